"""Writes that a server has acknowledged and not yet been told to make durable.

A server whose machine has lost power comes back without them, and nothing on the wire says so. They are
kept, up to a limit, and repeated when a connection is made again; so a flush that succeeds is true.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from blockd.nbd.replies import Request
from coordinator.contract.nbd import Command, CommandFlag

#: when this much waits the client flushes by itself
MOST_BYTES = 32 << 20
MOST_WRITES = 8192


class Written(NamedTuple):
    """A write or write-zeroes that is done."""

    number: int
    command: Command
    flags: int
    offset: int
    length: int
    data: bytes


class Unflushed:
    """In the order in which they were acknowledged. Callers hold the client's lock."""

    def __init__(self) -> None:
        self._written: deque[Written] = deque()
        self._bytes = 0
        #: number of the last write
        self.last = 0

    def __len__(self) -> int:
        return len(self._written)

    @property
    def full(self) -> bool:
        return self._bytes > MOST_BYTES or len(self._written) > MOST_WRITES

    def add(self, request: Request) -> None:
        """A request was acknowledged. One with FUA is durable, but must be kept behind an older write, which
        would else be repeated over it."""
        if request.flags & CommandFlag.FUA and not self._written:
            return
        data = b"" if request.view is None else bytes(request.view)
        self.last += 1
        flags = request.flags & ~(CommandFlag.FUA | CommandFlag.FAST_ZERO)
        self._written.append(Written(self.last, request.command, flags, request.offset, request.length, data))
        self._bytes += len(data)

    def flushed(self, mark: int) -> None:
        """Everything up to number ``mark`` is durable."""
        while self._written and self._written[0].number <= mark:
            self._bytes -= len(self._written.popleft().data)

    def requests(self) -> list[Request]:
        """What has to be repeated, in order."""
        return [
            Request(w.command, w.offset, w.length, memoryview(w.data) if w.data else None, w.flags)
            for w in self._written
        ]
