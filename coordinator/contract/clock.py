"""Guest time as devices see it: a clock is handed in, so a device test needs no process and no sleep.

Times are integer nanoseconds of guest time, 0 at power-on. Guest time stands still while the
machine is stopped (see ``struct timebase`` in segment.h).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Protocol

NS_PER_S = 1_000_000_000


class Timer:
    """One-shot deadline of a device. ``arm`` replaces an earlier deadline; the callback runs once."""

    __slots__ = ("_wheel", "callback", "deadline")

    def __init__(self, wheel: TimerWheel, callback: Callable[[], None]) -> None:
        self._wheel = wheel
        self.callback = callback
        #: guest time in ns, or None when not armed
        self.deadline: int | None = None

    def arm(self, deadline: int) -> None:
        """Fire at guest time ``deadline`` (at once if it has passed)."""
        self.deadline = deadline
        self._wheel.push(self, deadline)

    def cancel(self) -> None:
        """Forget the deadline; harmless when not armed."""
        self.deadline = None


class Clock(Protocol):
    """What a chip may know of time."""

    def now(self) -> int:
        """Guest time in ns."""
        ...

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A new, unarmed timer."""
        ...


class TimerWheel:
    """Deadlines in order; stale heap entries (re-armed or cancelled timers) are skipped lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Timer]] = []
        self._serial = itertools.count()

    def push(self, timer: Timer, deadline: int) -> None:
        heapq.heappush(self._heap, (deadline, next(self._serial), timer))

    def next_deadline(self) -> int | None:
        """The earliest armed deadline, or None."""
        while self._heap:
            deadline, _, timer = self._heap[0]
            if timer.deadline == deadline:
                return deadline
            heapq.heappop(self._heap)
        return None

    def fire(self, now: int) -> int:
        """Run the callbacks due at ``now``, oldest first; returns how many ran."""
        fired = 0
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            timer = heapq.heappop(self._heap)[2]
            timer.deadline = None
            timer.callback()
            fired += 1
        return fired


class ManualClock:
    """A clock for tests: time moves only by ``advance``, timers fire at their exact deadlines."""

    def __init__(self, start: int = 0) -> None:
        self._now = start
        self.wheel = TimerWheel()

    def now(self) -> int:
        return self._now

    def timer(self, callback: Callable[[], None]) -> Timer:
        return Timer(self.wheel, callback)

    def advance(self, ns: int) -> None:
        """Move ``ns`` forward, firing each timer with ``now()`` at its deadline."""
        end = self._now + ns
        while (deadline := self.wheel.next_deadline()) is not None and deadline <= end:
            self._now = max(self._now, deadline)
            self.wheel.fire(self._now)
        self._now = end
