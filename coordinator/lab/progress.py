"""How far a run is, and how long it may take: one line that is written over and over on a terminal, now and
then one elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import TextIO

#: those that the estimate is made from: a stall is long, and others like it may follow
RECENT = 20
#: between two lines where there is no terminal, seconds
QUIET_SECONDS = 30.0


def clock(seconds: float) -> str:
    """H:MM:SS."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms" if value < 9999.5 else f"{value / 1000:.1f} s"


class Progress:
    """``of``: migrations, or whatever is counted, in all; ``done``: those of before."""

    def __init__(self, stream: TextIO, of: int, done: int = 0) -> None:
        self._stream, self._of, self._done = stream, of, done
        self._terminal = stream.isatty()
        self._ends: deque[float] = deque([time.monotonic()], RECENT + 1)
        self._said = -QUIET_SECONDS
        self._width = 0

    @property
    def left(self) -> float | None:
        """Seconds, None before the first one."""
        if len(self._ends) < 2:
            return None
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return each * (self._of - self._done)

    def step(self, text: str) -> None:
        """One more is over."""
        self._done += 1
        self._ends.append(time.monotonic())
        left = self.left
        tail = f"  ({clock(left)} left)" if left is not None else ""
        self._say(f"{self._done}/{self._of}  {text}{tail}")

    def note(self, text: str) -> None:
        """Something that is not counted."""
        self._say(f"{self._done}/{self._of}  {text}")

    def _say(self, text: str) -> None:
        if self._terminal:
            self._stream.write(f"\r{text:<{self._width}}")
            self._width = len(text)
        elif self._done == self._of or time.monotonic() - self._said >= QUIET_SECONDS:
            self._said = time.monotonic()
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def end(self) -> None:
        """Leave the line as it is."""
        if self._terminal and self._width:
            self._stream.write("\n")
            self._stream.flush()
