"""An export of an NBD server as an image.

Source: NBD protocol, "Request types", "Block size constraints", "base:allocation".

A foreign server has no locks and no leases: nothing keeps a second writer away.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from blockd.hostfile import NotWritable
from blockd.image import Buffer, Extent, Image
from blockd.nbd.client import Client
from blockd.nbd.replies import Request
from blockd.nbd.uri import parse
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import STATE_HOLE, STATE_ZERO, Command, CommandFlag, TransmissionFlag

#: bytes in one request without data: a length has 32 bits, and the answer should not take long
LARGEST_SPAN = 256 << 20
#: source of zeroes where the server cannot make them
_ZEROES = memoryview(bytes(1 << 20))


class NbdImage(Image):
    """The export that ``file`` names. ``granularity`` is the sector of the drive that will use it. An odd end
    is an error; with ``pad`` (a CD-ROM, which is never written) it is followed by zeroes."""

    format = "raw"

    def __init__(self, file: str, read_only: bool = False, granularity: int = 512, pad: bool = False) -> None:
        """Connect; BlockError in one line when that cannot be."""
        self.file = file
        self.read_only = read_only
        self.address = parse(file)
        self._client = Client(self.address)
        info = self._client.info
        self._stored = info.size
        self._minimum = info.minimum
        rest = info.size % granularity
        self.size = info.size + (granularity - rest if rest else 0)
        try:
            if rest and not pad:
                text = f"{file}: size {info.size} is not a multiple of {granularity} bytes"
                raise BlockError(text, errno.EINVAL)
            if not read_only and self._client.has(TransmissionFlag.READ_ONLY):
                raise NotWritable(f"{file}: is served read-only", errno.EACCES)
        except BlockError:
            self._client.close()
            raise
        #: longest request with data
        self._longest = max(info.max_payload - info.max_payload % info.preferred, info.minimum)
        self._preferred = info.preferred
        #: where blocks are larger than a byte a change of half a block writes back the other half, which
        #: nobody may change at that moment
        self._changing: AbstractContextManager[object] = (
            nullcontext() if info.minimum == 1 else threading.RLock()
        )

    def _pieces(self, offset: int, length: int, longest: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the requests for a range, that end where the server prefers it."""
        end = offset + length
        while offset < end:
            stop = min(end, offset + longest)
            aligned = stop - stop % self._preferred
            if stop < end and aligned > offset:
                stop = aligned
            yield offset, stop - offset
            offset = stop

    def _call(
        self, command: Command, offset: int, length: int, view: memoryview | None = None, flags: int = 0
    ) -> None:
        """A range that is aligned as the server wants it."""
        longest = LARGEST_SPAN if view is None else self._longest
        self._client.call(
            *(
                Request(
                    command, at, size, None if view is None else view[at - offset : at - offset + size], flags
                )
                for at, size in self._pieces(offset, length, longest)
            )
        )

    def _outer(self, offset: int, length: int) -> tuple[int, int]:
        """The whole blocks that a range touches, as (start, end)."""
        mask = self._minimum - 1
        return offset & ~mask, (offset + length + mask) & ~mask

    def _inner(self, offset: int, length: int) -> tuple[int, int]:
        """The whole blocks within a range, as (start, end); none when start >= end."""
        mask = self._minimum - 1
        return (offset + mask) & ~mask, (offset + length) & ~mask

    # ---- reading ---------------------------------------------------------------------------------
    def read_into(self, offset: int, view: memoryview) -> None:
        inside = min(len(view), max(0, self._stored - offset))
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)
            view = view[:inside]
        if not inside:
            return
        start, end = self._outer(offset, inside)
        if (start, end) == (offset, offset + inside):
            self._call(Command.READ, offset, inside, view)
            return
        buffer = memoryview(bytearray(end - start))
        self._call(Command.READ, start, end - start, buffer)
        view[:] = buffer[offset - start : offset - start + inside]

    def prefetch(self, offset: int, length: int) -> None:
        start, end = self._outer(offset, min(length, self._stored - offset))
        if self._client.has(TransmissionFlag.SEND_CACHE) and end > start:
            self._call(Command.CACHE, start, end - start)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """A server that does not tell has data everywhere."""
        end = offset + length
        stored = min(end, self._stored)
        while offset < stored:
            known = self._block_status(offset, stored - offset)
            for size, state in known:
                yield Extent(size, hole=bool(state & STATE_HOLE), zero=bool(state & STATE_ZERO))
                offset += size
        if offset < end:
            yield Extent(end - offset, hole=True, zero=True)

    def _block_status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(bytes, flags), at least one, and never more than ``length`` in all."""
        if self._client.info.allocation is None:
            return [(length, 0)]
        start, end = self._outer(offset, min(length, LARGEST_SPAN))
        request = Request(Command.BLOCK_STATUS, start, end - start)
        try:
            self._client.call(request)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return [(length, 0)]  # it does not know here
        result = []
        at = start
        for size, state in request.extents:  # the last one may reach further than was asked
            low, high = max(at, offset), min(at + size, offset + length)
            if low < high:
                result.append((high - low, state))
            at += size
        return result or [(min(length, end - offset), 0)]

    # ---- changing --------------------------------------------------------------------------------
    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        view = memoryview(data).cast("B")
        if offset + len(view) > self._stored:
            raise OSError(errno.ENOSPC, f"{self.file}: write past the end of the export")
        flags, flush = self._durably(fua)
        with self._changing:
            start, end = self._outer(offset, len(view))
            if (start, end) != (offset, offset + len(view)):
                view = self._with_neighbours(start, end, offset, view)
            self._call(Command.WRITE, start, end - start, view, flags)
        self._changed(flush)

    def _with_neighbours(self, start: int, end: int, offset: int, data: memoryview) -> memoryview:
        """Whole blocks, of what is there and of ``data``."""
        blocks = memoryview(bytearray(end - start))
        size = self._minimum
        self.read_into(start, blocks[:size])
        if end - start > size:
            self.read_into(end - size, blocks[-size:])
        blocks[offset - start : offset - start + len(data)] = data
        return blocks

    def write_zeroes(self, offset: int, length: int, unmap: bool, fast: bool, fua: bool = False) -> None:
        if offset + length > self._stored:
            raise OSError(errno.ENOSPC, f"{self.file}: write past the end of the export")
        start, end = self._inner(offset, length)
        able = self._client.has(TransmissionFlag.SEND_WRITE_ZEROES) and start < end
        if fast and not (able and self._client.has(TransmissionFlag.SEND_FAST_ZERO)):
            raise OSError(errno.EOPNOTSUPP, f"{self.file}: the server has no fast zeroes here")
        if not able or not self._zero_blocks(start, end, unmap, fast, fua):
            self._write_zeroes(offset, length, fua)
            return
        self._write_zeroes(offset, start - offset, fua)
        self._write_zeroes(end, offset + length - end, fua)

    def _zero_blocks(self, start: int, end: int, unmap: bool, fast: bool, fua: bool) -> bool:
        """Whole blocks; False when the server will not, and the zeroes have to be written."""
        flags, flush = self._durably(fua)
        flags |= 0 if unmap else CommandFlag.NO_HOLE
        flags |= CommandFlag.FAST_ZERO if fast else 0
        try:
            with self._changing:
                self._call(Command.WRITE_ZEROES, start, end - start, None, flags)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or fast:
                raise
            return False
        self._changed(flush)
        return True

    def _write_zeroes(self, offset: int, length: int, fua: bool) -> None:
        end = offset + length
        while offset < end:
            piece = min(end - offset, len(_ZEROES))
            self.write(offset, _ZEROES[:piece], fua)
            offset += piece

    def trim(self, offset: int, length: int) -> None:
        start, end = self._inner(offset, length)
        if self._client.has(TransmissionFlag.SEND_TRIM) and start < end:
            with self._changing:
                self._call(Command.TRIM, start, end - start)

    def _durably(self, fua: bool) -> tuple[int, bool]:
        """Flags for a change, and whether a flush has to follow."""
        if fua and self._client.has(TransmissionFlag.SEND_FUA):
            return int(CommandFlag.FUA), False
        return 0, fua

    def _changed(self, flush: bool) -> None:
        if flush or self._client.should_flush:
            self._client.flush()

    def flush(self) -> None:
        if not self.read_only:
            self._client.flush()

    def resize(self, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, f"{self.file}: an export cannot be resized over NBD")

    def close(self) -> None:
        self._client.close()
