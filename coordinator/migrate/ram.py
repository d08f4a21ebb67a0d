"""Guest memory to and from descriptors: what there is to send, and the C that moves it (ram.h).

Only RAM and video RAM travel. ROM is part of the machine's description. Holes of the segment's memfd are
never touched: to read one would allocate it (memfd_create(2), lseek(2) SEEK_DATA).
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.contract.errors import MigrationError
from coordinator.contract.segment import PAGE, Segment
from coordinator.migrate._ram import ffi, lib

#: pages that one call sends: what a cancel waits for, and the grain that connections share the work in
SLICE = 2048
#: stretches of memory that a source tells of ahead, and how long either side makes itself ready for them,
#: seconds: what is not ready then costs faults later, and nothing else
MOST_RUNS, AHEAD_SECONDS = 4096, 10.0

_REASONS = {
    lib.RAM_BAD_FRAME: "a frame of guest memory is no frame, or of another round",
    lib.RAM_BAD_SUM: "guest memory arrived with a wrong checksum",
    lib.RAM_BAD_RANGE: "a frame names memory that this machine does not have",
    lib.RAM_BAD_COUNT: "the number of pages is not what the sender says it is",
    lib.RAM_ENDED: "the stream of guest memory ends too early",
    lib.RAM_TWICE: "a page of guest memory came twice",
}


@dataclass
class Counts:
    """Pages, and bytes on the wire."""

    normal: int = 0
    zero: int = 0
    bytes: int = 0

    def add(self, other: Counts) -> None:
        self.normal += other.normal
        self.zero += other.zero
        self.bytes += other.bytes


def _check(result: int, peer: str) -> None:
    if result < 0:
        name = "the peer does not answer" if -result == errno.EAGAIN else os.strerror(-result)
        raise MigrationError(f"{peer}: guest memory: {name}")
    if result > 0:
        raise MigrationError(f"{peer}: {_REASONS[result]}")


def _guest(segment: Segment) -> Any:
    return ffi.cast("void *", segment.guest_address)


def pages_of(segment: Segment) -> int:
    """Pages of RAM and video RAM."""
    return int(segment.header.ram_size + segment.header.vram_size) // PAGE


Run = tuple[int, int]


def data_runs(segment: Segment) -> Iterator[Run]:
    """(first page, pages) of all that is not a hole."""
    at = segment.guest_offset
    end = at + pages_of(segment) * PAGE
    while at < end:
        try:
            at = os.lseek(segment.fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        if at >= end:  # that of the ROM
            break
        stop = min(end, os.lseek(segment.fd, at, os.SEEK_HOLE))
        first, last = (at - segment.guest_offset) // PAGE, -(-(stop - segment.guest_offset) // PAGE)
        yield first, last - first
        at = max(stop, at + PAGE)


def slices(runs: Iterable[Run]) -> Iterator[Run]:
    """The same in pieces of SLICE pages."""
    for first, count in runs:
        for page in range(first, first + count, SLICE):
            yield page, min(SLICE, first + count - page)


class Ahead:
    """Makes this process ready to read or write runs of memory, so that nothing has to be while the guest
    stands. It is of no harm where the runs are not what comes; no page is changed."""

    def __init__(self, segment: Segment, runs: Sequence[Run], write: bool) -> None:
        """MigrationError where they are no memory of this machine."""
        pages = pages_of(segment)
        fits = all(first >= 0 and 1 <= count <= pages - first for first, count in runs)
        if len(runs) > MOST_RUNS or not fits:
            raise MigrationError("the memory that is to come does not fit this machine")
        self._segment, self._runs, self._write = segment, runs, write
        self._over = False

    async def run(self) -> None:
        """Until it is done, or has taken long enough."""
        try:
            await asyncio.to_thread(self._work)
        finally:
            self._over = True  # the thread of a cancelled one ends within a slice

    def _work(self) -> None:
        end = time.monotonic() + AHEAD_SECONDS
        for first, count in slices(self._runs):
            if self._over or time.monotonic() > end:
                return
            if lib.ram_populate(_guest(self._segment), first, count, self._write):
                return


class Sender:
    """One round of sending, shared by the connections: each calls ``run`` in a thread of its own."""

    def __init__(self, segment: Segment, round_: int = 0) -> None:
        self._segment = segment
        self._round = round_
        self._slices = deque(slices(data_runs(segment)))
        #: what there was to do, in pages
        self.total = sum(count for _, count in self._slices)
        self.counts = Counts()
        self._lock = threading.Lock()
        self.cancelled = False

    def run(self, fd: int, peer: str) -> None:
        """Send this connection's share, up to its end; MigrationError when the peer is gone."""
        mine = ffi.new("struct ram_counts *")
        before = Counts()
        guest = _guest(self._segment)
        while not self.cancelled:
            try:
                first, count = self._slices.popleft()
            except IndexError:
                break
            _check(lib.ram_send(fd, guest, first, count, self._round, mine), peer)
            now = Counts(mine.normal, mine.zero, mine.bytes)
            with self._lock:
                self.counts.add(
                    Counts(now.normal - before.normal, now.zero - before.zero, now.bytes - before.bytes)
                )
            before = now
        if self.cancelled:
            raise MigrationError("cancelled")
        _check(lib.ram_send_end(fd, self._round, mine), peer)


class Receiver:
    """One round of receiving into a segment whose memory is empty; ``run`` as for Sender."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._pages = pages_of(segment)
        self._seen = bytearray(self._pages)
        self.counts = Counts()
        self._lock = threading.Lock()

    def run(self, fd: int, peer: str, round_: int = 0) -> None:
        """Receive one connection's share; MigrationError where it is not as it should be. Memory is only of
        use when all shares have come."""
        mine = ffi.new("struct ram_counts *")
        seen = ffi.from_buffer("uint8_t[]", self._seen, require_writable=True)
        result = lib.ram_receive(fd, _guest(self._segment), self._pages, round_, seen, mine)
        with self._lock:
            self.counts.add(Counts(mine.normal, mine.zero, mine.bytes))
        _check(result, peer)
