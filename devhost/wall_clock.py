"""Civil time for the RTC, from ``-rtc base=,clock=``."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

from coordinator.contract.clock import NS_PER_S
from coordinator.contract.config import Rtc


def wall_clock(rtc: Rtc, guest_now: Callable[[], int]) -> Callable[[], int]:
    """A function that gives ns since 1970, following the host's clock or guest time (0 at power-on)."""
    start = time.time_ns()
    if rtc.base == "localtime":
        offset = datetime.now().astimezone().utcoffset()
        start += int(offset.total_seconds()) * NS_PER_S if offset else 0
    elif rtc.base != "utc":
        moment = datetime.fromisoformat(rtc.base)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        start = int(moment.timestamp()) * NS_PER_S
    if rtc.clock == "vm":
        return lambda: start + guest_now()
    begun = time.monotonic_ns()
    return lambda: start + time.monotonic_ns() - begun
