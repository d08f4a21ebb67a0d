"""Requests of a client, and taking in the replies to them.

Source: NBD protocol, "Transmission phase", "Structured reply chunk message", "Structured reply types".

A server may be anything: what does not fit the request that it answers is a Violation. What a reply may
cost in memory is bounded by the request.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from blockd.nbd.wire import Wire
from coordinator.contract.nbd import (
    CHUNK,
    CHUNK_DONE,
    MAX_STRING,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
    host_errno,
)
from coordinator.contract.nbd_handshake import ExportInfo, printable

#: bytes taken from the socket at once
INPUT = 64 << 10
#: extents in one reply
MAX_EXTENTS = 64 << 10
#: errors in one reply
MAX_ERRORS = 16
#: a reply may come in more chunks than this by one for each so many bytes
MAX_CHUNKS, CHUNK_BYTES = 1024, 256
#: characters of a server's message that are shown
SHOWN = 200

_ERROR_CHUNK = 1 << 15
_OFFSET = struct.Struct(">Q")
_HOLE = struct.Struct(">QI")
_ERROR = struct.Struct(">IH")


class Violation(Exception):
    """The server does not keep to the protocol; how, in one line."""


class Request:
    """A request, and what has come of its reply. ``view`` is what a write sends and a read fills."""

    __slots__ = (
        "attempts", "chunks", "command", "cookie", "done", "error", "errors", "extents", "flags", "got",
        "length", "mark", "offset", "pieces", "text", "view",
    )  # fmt: skip

    def __init__(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        view: memoryview | None = None,
        flags: int = 0,
    ) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.view = view
        self.flags = flags
        self.cookie = 0
        #: connections that it has been sent on
        self.attempts = 0
        #: for a flush: what it makes durable (see unflushed.py)
        self.mark = 0
        #: called once, when ``error`` says what has come of it
        self.done: Callable[[], None] = _nothing
        self.begin()

    def begin(self) -> None:
        """Nothing of the reply has come."""
        #: errno, or 0; and what the server says about it
        self.error = 0
        self.text = ""
        self.got = self.chunks = self.errors = 0
        self.pieces: list[tuple[int, int]] = []
        self.extents: list[tuple[int, int]] = []

    def covered(self) -> bool:
        """Has every byte of a read come, and once?"""
        if self.got != self.length:
            return False
        at = 0
        for start, end in sorted(self.pieces):
            if start != at:
                return False
            at = end
        return True


def _nothing() -> None:
    """A request that nobody waits for."""


class Replies:
    """The receiving side of one connection. ``find`` gives the request of a cookie, ``finish`` is told when
    its reply is whole."""

    def __init__(
        self,
        wire: Wire,
        info: ExportInfo,
        find: Callable[[int], Request | None],
        finish: Callable[[Request], None],
    ) -> None:
        self._wire = wire
        self._info = info
        self._find = find
        self._finish = finish
        self._in = memoryview(bytearray(INPUT))
        self._begin = self._end = 0
        self._kinds: dict[int, Callable[[Request, int], None]] = {
            ChunkType.NONE: self._none,
            ChunkType.OFFSET_DATA: self._data,
            ChunkType.OFFSET_HOLE: self._hole,
            ChunkType.BLOCK_STATUS: self._block_status,
        }

    def take(self) -> None:
        """Wait for one reply, or one chunk of a reply, and take it in; Lost or Violation."""
        self._fill(SIMPLE_REPLY.size)
        magic, error, cookie = SIMPLE_REPLY.unpack_from(self._in, self._begin)
        if magic == SIMPLE_REPLY_MAGIC:
            self._begin += SIMPLE_REPLY.size
            self._simple(self._request(cookie), error)
        elif magic == STRUCTURED_REPLY_MAGIC and self._info.structured:
            self._fill(CHUNK.size)
            _, flags, kind, cookie, length = CHUNK.unpack_from(self._in, self._begin)
            self._begin += CHUNK.size
            self._chunk(self._request(cookie), flags, kind, length)
        else:
            raise Violation(f"reply without its magic number ({magic:#x})")

    def _request(self, cookie: int) -> Request:
        request = self._find(cookie)
        if request is None:
            raise Violation(f"reply to a request that was not made (cookie {cookie:#x})")
        return request

    def _simple(self, request: Request, error: int) -> None:
        if error:
            request.error = host_errno(error)
        elif request.command is Command.READ:
            if self._info.structured:
                raise Violation("simple reply to a read, though structured ones were agreed on")
            assert request.view is not None
            self._into(request.view)
        elif request.command is Command.BLOCK_STATUS:
            raise Violation("block status without extents")
        self._finish(request)

    # ---- chunks ----------------------------------------------------------------------------------
    def _chunk(self, request: Request, flags: int, kind: int, length: int) -> None:
        request.chunks += 1
        if request.chunks > MAX_CHUNKS + request.length // CHUNK_BYTES:
            raise Violation("a reply in too many chunks")
        if kind & _ERROR_CHUNK:
            self._error(request, kind, length)
        elif kind in self._kinds:
            self._kinds[kind](request, length)
        else:
            raise Violation(f"chunk of an unknown type ({kind})")
        if flags & CHUNK_DONE:
            if not request.error:
                self._complete(request)
            self._finish(request)
        elif kind == ChunkType.NONE:
            raise Violation("empty chunk that is not the last one")

    def _complete(self, request: Request) -> None:
        """A reply without an error must have brought all that was asked for."""
        if request.command is Command.READ and not request.covered():
            raise Violation("chunks of a read that do not make up what was asked for")
        if request.command is Command.BLOCK_STATUS and not request.extents:
            raise Violation("block status without extents")

    def _none(self, request: Request, length: int) -> None:
        if length:
            raise Violation("empty chunk that is not empty")

    def _data(self, request: Request, length: int) -> None:
        if length <= _OFFSET.size:
            raise Violation(f"data chunk of {length} bytes")
        self._fill(_OFFSET.size)
        (offset,) = _OFFSET.unpack_from(self._in, self._begin)
        self._begin += _OFFSET.size
        self._into(self._part(request, offset, length - _OFFSET.size))

    def _hole(self, request: Request, length: int) -> None:
        if length != _HOLE.size:
            raise Violation(f"hole chunk of {length} bytes")
        self._fill(length)
        offset, size = _HOLE.unpack_from(self._in, self._begin)
        self._begin += length
        part = self._part(request, offset, size)
        part[:] = bytes(size)

    def _part(self, request: Request, offset: int, size: int) -> memoryview:
        """Where the bytes of a chunk go."""
        start = offset - request.offset
        request.got += size
        if request.command is not Command.READ:
            raise Violation("data for a request that is no read")
        if not size or start < 0 or request.got > request.length or start + size > request.length:
            raise Violation(f"chunk of {size} bytes at {offset} that does not fit its request")
        assert request.view is not None
        request.pieces.append((start, start + size))
        return request.view[start : start + size]

    def _block_status(self, request: Request, length: int) -> None:
        count, odd = divmod(length - 4, 8)
        if request.command is not Command.BLOCK_STATUS or request.extents:
            raise Violation("block status that was not asked for")
        if count < 1 or odd or count > MAX_EXTENTS:
            raise Violation(f"block status of {length} bytes")
        body = memoryview(bytearray(length))
        self._into(body)
        numbers = struct.unpack(f">{length // 4}I", body)
        if numbers[0] != self._info.allocation:
            raise Violation("block status of a context that was not asked for")
        if not all(numbers[1::2]):
            raise Violation("extent without length")
        request.extents = list(zip(numbers[1::2], numbers[2::2], strict=True))

    def _error(self, request: Request, kind: int, length: int) -> None:
        request.errors += 1
        if request.errors > MAX_ERRORS:
            raise Violation("errors without end")
        if not _ERROR.size <= length <= _ERROR.size + MAX_STRING + _OFFSET.size:
            raise Violation(f"error chunk of {length} bytes")
        self._fill(length)
        body = bytes(self._in[self._begin : self._begin + length])
        self._begin += length
        error, size = _ERROR.unpack_from(body)
        text = body[_ERROR.size : _ERROR.size + size]
        if not error or _ERROR.size + size > length:
            raise Violation("error chunk that makes no sense")
        if not request.error:
            request.error = host_errno(error)
            lines = text.decode("utf-8", "replace").splitlines()
            request.text = printable(lines[0][:SHOWN]) if lines else ""

    # ---- bytes -----------------------------------------------------------------------------------
    def _fill(self, needed: int) -> None:
        """Have ``needed`` bytes in the buffer, which is large enough for any header."""
        waiting = self._end - self._begin
        if waiting >= needed:
            return
        if INPUT - self._begin < needed or not waiting:
            self._in[:waiting] = self._in[self._begin : self._end]
            self._begin, self._end = 0, waiting
        while self._end - self._begin < needed:
            self._end += self._wire.receive_into(self._in[self._end :])

    def _into(self, view: memoryview) -> None:
        """Fill a view: with what has come already, then straight from the socket."""
        done = min(len(view), self._end - self._begin)
        view[:done] = self._in[self._begin : self._begin + done]
        self._begin += done
        while done < len(view):
            done += self._wire.receive_into(view[done:])
