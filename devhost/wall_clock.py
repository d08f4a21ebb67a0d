"""Civil time for the RTC, from ``-rtc base=,clock=``."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

from coordinator.contract.clock import NS_PER_S
from coordinator.contract.config import Rtc


class WallClock:
    """Gives ns since 1970, following the host's clock or guest time (0 at power-on). ``epoch`` is what it
    gives at 0
    of either; one that is to go on where another was takes it over."""

    def __init__(self, rtc: Rtc, guest_now: Callable[[], int]) -> None:
        start = time.time_ns()
        if rtc.base == "localtime":
            offset = datetime.now().astimezone().utcoffset()
            start += int(offset.total_seconds()) * NS_PER_S if offset else 0
        elif rtc.base != "utc":
            moment = datetime.fromisoformat(rtc.base)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            start = int(moment.timestamp()) * NS_PER_S
        self._now = guest_now if rtc.clock == "vm" else time.monotonic_ns
        self.epoch = start if rtc.clock == "vm" else start - time.monotonic_ns()

    def __call__(self) -> int:
        return self.epoch + self._now()
