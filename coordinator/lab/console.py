"""What the guest says (guest/), put together from the consoles of the machines it has lived in.

Guest times are nanoseconds of its time-stamp counter's clock, which is the machine's guest time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.contract.config import TSC_KHZ


@dataclass(frozen=True)
class Moment:
    """Something at guest time ``at``."""

    at: int


@dataclass(frozen=True)
class Read(Moment):
    """``count`` reads have completed since the last one, the last at ``at``."""

    count: int


@dataclass(frozen=True)
class Gap(Moment):
    """The guest's clock went from ``since`` to ``at`` in one step, ``ns`` by its own measure."""

    since: int
    ns: int


@dataclass(frozen=True)
class Pass(Moment):
    """The whole CD was read, and is right or not."""

    right: bool


@dataclass(frozen=True)
class Text(Moment):
    """A call failed, or the kernel said something at a level (syslog(2)) of its."""

    text: str
    level: int = 6


@dataclass(frozen=True)
class Disk(Moment):
    """What the writer has done since it began: rounds, flushes that came back, bytes compared. ``digest``:
    its last word, SHA-256 of the blocks."""

    rounds: int
    syncs: int
    compared: int
    digest: str = ""


@dataclass(frozen=True)
class Wrong(Moment):
    """``bytes`` of the disk are others than were written."""

    bytes: int
    where: str


@dataclass(frozen=True)
class Mark:
    """A place in a guest's record."""

    reads: int = 0
    gaps: int = 0
    passes: int = 0
    errors: int = 0
    kernel: int = 0
    disk: int = 0
    wrong: int = 0


@dataclass
class Guestbook:
    """Everything that was said, in order."""

    reads: list[Read] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    errors: list[Text] = field(default_factory=list)
    kernel: list[Text] = field(default_factory=list)
    disk: list[Disk] = field(default_factory=list)
    wrong: list[Wrong] = field(default_factory=list)
    #: lines that are none of ours: firmware, the kernel's last words
    other: list[str] = field(default_factory=list)
    ready: bool = False
    writes: bool = False
    ended: bool = False
    failed: str = ""
    _partial: bytes = b""

    def __post_init__(self) -> None:
        self.news = asyncio.Event()

    def feed(self, data: bytes) -> None:
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._line(line.decode(errors="replace").strip())
        self.news.set()

    def _ns(self, tsc: str) -> int:
        return int(tsc) * 1_000_000 // TSC_KHZ

    def _line(self, line: str) -> None:
        word, *rest = line.split(" ")
        try:
            match word, rest:
                case "@read", [tsc, count]:
                    self.reads.append(Read(self._ns(tsc), int(count)))
                case "@gap", [since, tsc, ns]:
                    self.gaps.append(Gap(self._ns(tsc), self._ns(since), int(ns)))
                case "@pass", [tsc, _, _, verdict]:
                    self.passes.append(Pass(self._ns(tsc), verdict == "right"))
                case "@error", [tsc, errno, offset]:
                    self.errors.append(Text(self._ns(tsc), f"errno {errno} at byte {offset}"))
                case "@kmsg", [tsc, level, *words]:
                    self.kernel.append(Text(self._ns(tsc), " ".join(words), int(level)))
                case "@disk", [tsc, rounds, syncs, compared]:
                    self.disk.append(Disk(self._ns(tsc), int(rounds), int(syncs), int(compared)))
                case "@diskwrong", [tsc, count, *words]:
                    self.wrong.append(Wrong(self._ns(tsc), int(count), " ".join(words)))
                case "@diskerror", [tsc, errno, *words]:
                    self.errors.append(Text(self._ns(tsc), f"disk: errno {errno} at {' '.join(words)}"))
                case "@diskend", [tsc, rounds, syncs, compared, digest]:
                    self.disk.append(
                        Disk(self._ns(tsc), int(rounds), int(syncs), int(compared), digest)
                    )
                    self.ended = True
                case "@diskready", [_, _]:
                    self.writes = True
                case "@ready", [_, _]:
                    self.ready = True
                case "@failed", [_, *words]:
                    self.failed = " ".join(words)
                case _:
                    self.other.append(line)
        except ValueError:
            self.other.append(line)

    def mark(self) -> Mark:
        """How much of it there is now."""
        return Mark(
            len(self.reads), len(self.gaps), len(self.passes), len(self.errors), len(self.kernel),
            len(self.disk), len(self.wrong),
        )  # fmt: skip

    async def passes_after(self, count: int) -> None:
        """More than ``count`` passes are over, or never will be."""
        while len(self.passes) <= count and not self.failed:
            self.news.clear()
            await self.news.wait()

    async def read_after(self, guest_ns: int) -> Read | None:
        """The first read that completes after that moment; None when the guest has failed."""
        seen = 0
        while True:
            for read in self.reads[seen:]:
                if read.at > guest_ns:
                    return read
            seen = len(self.reads)
            if self.failed:
                return None
            self.news.clear()
            await self.news.wait()

    async def until_ready(self) -> None:
        """Reading has begun, or never will (``failed``)."""
        await self.until(lambda: self.ready)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Something holds, or never will (``failed``)."""
        while not holds() and not self.failed:
            self.news.clear()
            await self.news.wait()
