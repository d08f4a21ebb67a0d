"""Civil time of the RTC by ``-rtc base=,clock=``."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from coordinator.contract.clock import ManualClock
from coordinator.contract.config import Rtc
from devhost.wall_clock import WallClock

HOUR = 3600 * 10**9


@pytest.mark.parametrize(
    "base", ["2020-02-29T23:59:58", "2020-02-29T23:59:58+00:00", "2020-03-01T00:59:58+01:00"]
)
def test_a_date_and_guest_time(base: str) -> None:
    """UTC unless the date says otherwise; stands still with guest time."""
    clock = ManualClock()
    civil = WallClock(Rtc(base, "vm"), clock.now)
    start = int(datetime(2020, 2, 29, 23, 59, 58, tzinfo=UTC).timestamp()) * 10**9
    assert civil() == civil() == start
    clock.advance(HOUR)
    assert civil() == start + HOUR


def test_host_clock() -> None:
    """Guest time has no say."""
    clock = ManualClock()
    civil = WallClock(Rtc(), clock.now)
    clock.advance(HOUR)
    assert abs(civil() - time.time_ns()) < 60 * 10**9


def test_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "EST5")
    time.tzset()
    try:
        behind = time.time_ns() - WallClock(Rtc("localtime"), lambda: 0)()
        assert abs(behind - 5 * HOUR) < 60 * 10**9
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_clock_goes_on_where_another_was() -> None:
    """One that began at a date does not begin again."""
    clock = ManualClock()
    first, second = (WallClock(Rtc("2020-02-29T23:59:58", "vm"), clock.now) for _ in range(2))
    first.epoch += HOUR
    second.epoch = first.epoch
    assert second() == first()
