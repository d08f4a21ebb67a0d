"""Batches of plain requests: reads and writes of bytes that have their place in a file already.

They are the bulk of what clients ask, and C serves them: see batch.h for what is plain and what becomes
of the rest. An image that can say where its bytes lie offers a ``Direct``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from blockd._batch import ffi, lib

READ_ONLY = (1 << 64) - 1


class Batch:
    """The buffers of one connection, and what is being done with them."""

    def __init__(
        self, received: memoryview, replies: memoryview, enough: int, size: int, structured: bool
    ) -> None:
        """Requests are read from ``received``, and none is begun once ``enough`` bytes of replies wait in
        ``replies``. ``size`` is the disk's, in bytes."""
        self._input = ffi.from_buffer(received)
        self._output = ffi.from_buffer(replies, require_writable=True)
        #: struct batch; cffi's attributes have no types
        self.c: Any = ffi.new("struct batch *")
        self.c.input, self.c.output = self._input, self._output
        self.c.output_size = len(replies)
        self.c.enough = enough
        self.c.size = size
        self.c.structured = structured

    def written(self) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of the writes among the planned requests."""
        for number in range(self.c.planned):
            request = self.c.requests[number]
            if request.writes:
                yield request.offset, request.length


class Direct(Protocol):
    """The short way to an image's bytes."""

    def serve(self, batch: Batch) -> None:
        """Serve requests from the front of a batch while they are plain; none may be. The batch's fields
        tell how far that went. Never fails: what fails is left to the image's methods."""
        ...


class DirectFile:
    """The short way to a file whose bytes are the disk's bytes."""

    def __init__(self, fd: int, writes_from: int) -> None:
        """Writes that begin below ``writes_from`` are not plain."""
        self._fd, self._writes_from = fd, writes_from

    def serve(self, batch: Batch) -> None:
        batch.c.fd, batch.c.writes_from = self._fd, self._writes_from
        lib.batch_plan(batch.c, ffi.NULL)
        lib.batch_run(batch.c)
