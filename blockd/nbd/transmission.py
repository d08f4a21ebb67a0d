"""Serving the requests of one connection.

Source: NBD protocol, "Transmission phase", "Request types", "Structured reply types".

Requests are served in the order in which they come, so that a client that sends a set of
overlapping ones finds them applied in that order. Both directions are batched: whatever has
arrived is parsed from one buffer, and the replies to it leave in one send, before the next receive.
Read data goes from the image straight behind its reply header in the buffer that is sent.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import islice

import numpy as np

from blockd.batch import Batch
from blockd.export import Counters
from blockd.image import Image
from blockd.nbd.handshake import Hangup, Negotiated
from coordinator.contract import nbd
from coordinator.contract.config import DetectZeroes
from coordinator.contract.nbd import (
    CHUNK,
    CHUNK_DONE,
    MAX_PAYLOAD,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
    CommandFlag,
)

#: bytes of requests parsed at once
INPUT = 256 << 10
#: bytes of replies in one send; a read that does not fit is sent in pieces
OUTPUT = 512 << 10
#: replies wait for one another up to so many bytes, so that a client is never idle for long
SEND_AT = 128 << 10
#: extents in one block-status reply
MAX_EXTENTS = 2048

_OFFSET = struct.Struct(">Q")
_ERROR = struct.Struct(">IH")
_EXTENT = struct.Struct(">II")
_CONTEXT = struct.Struct(">I")

#: flags that a command may carry, as far as the export offers them
_FLAGS = {
    Command.READ: int(CommandFlag.DF),
    Command.WRITE: int(CommandFlag.FUA),
    Command.DISC: 0,
    Command.FLUSH: 0,
    Command.TRIM: int(CommandFlag.FUA),
    Command.CACHE: 0,
    Command.WRITE_ZEROES: int(CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO),
    Command.BLOCK_STATUS: int(CommandFlag.REQ_ONE),
}
#: "Command flags": FUA may be sent with any command once the server has offered it
_ANY = int(CommandFlag.FUA)


def _is_zero(data: memoryview) -> bool:
    return not np.frombuffer(data, np.uint8).any()


class Transmission:
    """The transmission phase of one connection."""

    def __init__(self, agreed: Negotiated, counters: Counters) -> None:
        self._sock = agreed.sock
        self._image: Image = agreed.export.image
        self._size = self._image.size
        self._structured = agreed.structured
        self._contexts = agreed.contexts
        self._discard = agreed.export.discard
        self._through = agreed.export.writethrough
        self._detect = agreed.export.detect_zeroes
        self._counters = counters
        #: set by another thread: no further request is begun
        self.stopping = False
        self._in = memoryview(bytearray(INPUT))
        self._begin = self._end = 0  # what has come and is not parsed yet
        self._out = memoryview(bytearray(OUTPUT))
        self._ready = 0  # bytes of replies that wait to be sent
        self._large = memoryview(bytearray())  # payload that does not fit the input buffer
        looked_at = self._through or self._detect is not DetectZeroes.OFF  # each write by itself
        self._direct = None if looked_at else self._image.direct()
        self._batch = Batch(self._in, self._out, SEND_AT, self._size, self._structured)
        #: a read reply's header: simple, or a chunk with its offset
        self._read_head = CHUNK.size + _OFFSET.size if agreed.structured else SIMPLE_REPLY.size
        self._commands: dict[int, Callable[[int, int, int, int], None]] = {
            Command.READ: self._read,
            Command.WRITE: self._write,
            Command.FLUSH: self._flush,
            Command.TRIM: self._trim,
            Command.CACHE: self._cache,
            Command.WRITE_ZEROES: self._write_zeroes,
            Command.BLOCK_STATUS: self._block_status,
        }

    def run(self) -> None:
        """Serve until the client leaves (Hangup when not by the book) or ``stopping`` is set."""
        unpack = REQUEST.unpack_from
        size = REQUEST.size
        commands = self._commands
        while not self.stopping:
            if self._end - self._begin < size and not self._fill(size):
                return
            if self._direct is not None and self._serve_plain():
                if self._ready >= SEND_AT:
                    self._send()
                continue
            magic, flags, command, cookie, offset, length = unpack(self._in, self._begin)
            if magic != REQUEST_MAGIC:
                raise Hangup("request without its magic number")
            self._begin += size
            handler = commands.get(command)
            if handler is not None:
                handler(flags, cookie, offset, length)
            elif command == Command.DISC:
                break
            else:
                self._reply(cookie, nbd.EINVAL)
            if self._ready >= SEND_AT:
                self._send()
        self._send()

    def _serve_plain(self) -> bool:
        """Serve requests in the input buffer while they are plain; False when the first is not."""
        assert self._direct is not None
        batch = self._batch.c
        batch.begin, batch.end, batch.ready = self._begin, self._end, self._ready
        self._direct.serve(self._batch)
        if not batch.done:
            return False
        self._begin, self._ready = batch.begin, batch.ready
        counters = self._counters
        counters.reads += batch.reads
        counters.read_bytes += batch.read_bytes
        counters.writes += batch.writes
        counters.write_bytes += batch.write_bytes
        return True

    # ---- commands --------------------------------------------------------------------------------
    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        error = self._refusal(Command.READ, flags, offset, length)
        if length > MAX_PAYLOAD:
            error = nbd.EINVAL
        if error:
            self._reply(cookie, error)
            return
        self._counters.reads += 1
        self._counters.read_bytes += length
        head = self._read_head
        if head + length > OUTPUT - self._ready:
            self._send()
            if head + length > OUTPUT:
                self._read_large(cookie, offset, length)
                return
        at = self._ready
        end = at + head + length
        try:
            self._image.read_into(offset, self._out[at + head : end])
        except OSError as failure:
            self._reply(cookie, nbd.wire_error(failure.errno))
            return
        self._put_read_head(at, cookie, offset, length)
        self._ready = end

    def _read_large(self, cookie: int, offset: int, length: int) -> None:
        """A read that is longer than the output buffer: one header, and then data in pieces. Once the
        header is out an error can only be told by closing ("Simple reply message")."""
        head = self._read_head
        room = OUTPUT - head
        try:
            self._image.read_into(offset, self._out[head : head + room])
        except OSError as failure:
            self._reply(cookie, nbd.wire_error(failure.errno))
            return
        self._put_read_head(0, cookie, offset, length)
        self._ready = OUTPUT
        self._send()
        done = room
        while done < length:
            piece = min(length - done, OUTPUT)
            try:
                self._image.read_into(offset + done, self._out[:piece])
            except OSError as failure:
                self._counters.errors += 1
                raise Hangup(f"read failed behind its reply header: {failure}") from None
            self._ready = piece
            self._send()
            done += piece

    def _put_read_head(self, at: int, cookie: int, offset: int, length: int) -> None:
        if self._structured:
            size = _OFFSET.size + length
            CHUNK.pack_into(
                self._out, at, STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.OFFSET_DATA, cookie, size
            )
            _OFFSET.pack_into(self._out, at + CHUNK.size, offset)
        else:
            SIMPLE_REPLY.pack_into(self._out, at, SIMPLE_REPLY_MAGIC, 0, cookie)

    def _write(self, flags: int, cookie: int, offset: int, length: int) -> None:
        data = self._payload(length)
        error = self._refusal(Command.WRITE, flags, offset, length, past_end=nbd.ENOSPC)
        if not error:
            self._counters.writes += 1
            self._counters.write_bytes += length
            fua = self._through or bool(flags & CommandFlag.FUA)
            try:
                if self._detect is not DetectZeroes.OFF and length and _is_zero(data):
                    self._image.write_zeroes(offset, length, self._detect is DetectZeroes.UNMAP, False, fua)
                else:
                    self._image.write(offset, data, fua)
            except OSError as failure:
                error = nbd.wire_error(failure.errno)
        self._reply(cookie, error)

    def _flush(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._send()  # what is done need not wait for the disk
        self._counters.flushes += 1
        error = nbd.EINVAL if flags & ~_ANY else 0
        if not error:
            try:
                self._image.flush()
            except OSError as failure:
                error = nbd.wire_error(failure.errno)
        self._reply(cookie, error)

    def _trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        error = self._refusal(Command.TRIM, flags, offset, length)
        if length and not error:
            self._counters.zeroes += 1
            try:
                if self._discard:
                    self._image.trim(offset, length)
                if self._through or flags & CommandFlag.FUA:
                    self._image.flush()
            except OSError as failure:
                error = nbd.wire_error(failure.errno)
        self._reply(cookie, error)

    def _cache(self, flags: int, cookie: int, offset: int, length: int) -> None:
        error = self._refusal(Command.CACHE, flags, offset, length)
        if length and not error:
            try:
                self._image.prefetch(offset, length)
            except OSError as failure:
                error = nbd.wire_error(failure.errno)
        self._reply(cookie, error)

    def _write_zeroes(self, flags: int, cookie: int, offset: int, length: int) -> None:
        error = self._refusal(Command.WRITE_ZEROES, flags, offset, length, past_end=nbd.ENOSPC)
        if length and not error:
            self._counters.zeroes += 1
            unmap = self._discard and not flags & CommandFlag.NO_HOLE
            fast = bool(flags & CommandFlag.FAST_ZERO)
            fua = self._through or bool(flags & CommandFlag.FUA)
            try:
                self._image.write_zeroes(offset, length, unmap, fast, fua)
            except OSError as failure:
                error = nbd.wire_error(failure.errno)
        self._reply(cookie, error)

    def _block_status(self, flags: int, cookie: int, offset: int, length: int) -> None:
        error = self._refusal(Command.BLOCK_STATUS, flags, offset, length)
        if not self._contexts or not length:
            error = nbd.EINVAL
        if error:
            self._reply(cookie, error)
            return
        limit = 1 if flags & CommandFlag.REQ_ONE else MAX_EXTENTS
        try:
            for context in self._contexts:
                body = bytearray(_CONTEXT.pack(context.number))
                for extent in islice(context.status(offset, length), limit):
                    body += _EXTENT.pack(*extent)
                last = context is self._contexts[-1]
                self._put_chunk(ChunkType.BLOCK_STATUS, cookie, body, CHUNK_DONE if last else 0)
        except OSError as failure:
            self._reply(cookie, nbd.wire_error(failure.errno))

    # ---- replies ---------------------------------------------------------------------------------
    def _refusal(
        self, command: Command, flags: int, offset: int, length: int, past_end: int = nbd.EINVAL
    ) -> int:
        """Why a request cannot be served: a wire error, or 0."""
        if flags & ~(_FLAGS[command] | _ANY) or (flags & CommandFlag.DF and not self._structured):
            return nbd.EINVAL
        if self._image.read_only and command in _CHANGING:
            return nbd.EPERM
        if offset + length > self._size:
            return past_end
        return 0

    def _reply(self, cookie: int, error: int) -> None:
        """Done, or failed. A structured reply is obligatory for reads only, and allowed for all."""
        if error:
            self._counters.errors += 1
        if not self._structured:
            if self._ready + SIMPLE_REPLY.size > OUTPUT:
                self._send()
            SIMPLE_REPLY.pack_into(self._out, self._ready, SIMPLE_REPLY_MAGIC, error, cookie)
            self._ready += SIMPLE_REPLY.size
        elif error:
            self._put_chunk(ChunkType.ERROR, cookie, _ERROR.pack(error, 0))
        else:
            self._put_chunk(ChunkType.NONE, cookie, b"")

    def _put_chunk(self, kind: int, cookie: int, body: bytes | bytearray, flags: int = CHUNK_DONE) -> None:
        """A chunk of a reply, the only or last one unless ``flags`` says otherwise."""
        total = CHUNK.size + len(body)
        if self._ready + total > OUTPUT:
            self._send()
        at = self._ready
        CHUNK.pack_into(self._out, at, STRUCTURED_REPLY_MAGIC, flags, kind, cookie, len(body))
        self._out[at + CHUNK.size : at + total] = body
        self._ready = at + total

    # ---- the wire --------------------------------------------------------------------------------
    def _send(self) -> None:
        """Send the replies that wait."""
        if self._ready:
            try:
                self._sock.sendall(self._out[: self._ready])
            except OSError as error:
                raise Hangup(str(error)) from None
            self._ready = 0

    def _fill(self, needed: int) -> bool:
        """Receive until ``needed`` bytes (no more than the buffer holds) are there to be parsed. False
        when the client has left between two requests; Hangup when it left in the middle of one."""
        self._send()
        waiting = self._end - self._begin
        if self._begin and (not waiting or INPUT - self._begin < needed):
            self._in[:waiting] = self._in[self._begin : self._end]
            self._begin, self._end = 0, waiting
        while self._end - self._begin < needed:
            got = self._receive(self._in[self._end :])
            if not got:
                if self._end == self._begin and needed == REQUEST.size:
                    return False
                raise Hangup("the client left in the middle of a request")
            self._end += got
        return True

    def _payload(self, length: int) -> memoryview:
        """The data of a write, whole: a client that leaves in the middle has written nothing. Valid
        until the next request."""
        if length > MAX_PAYLOAD:
            raise Hangup(f"payload of {length} bytes")
        if length <= INPUT:
            if self._end - self._begin < length:
                self._fill(length)
            data = self._in[self._begin : self._begin + length]
            self._begin += length
            return data
        if len(self._large) < length:
            self._large = memoryview(bytearray(length))
        data = self._large[:length]
        done = self._end - self._begin
        data[:done] = self._in[self._begin : self._end]
        self._begin = self._end = 0
        self._send()
        while done < length:
            got = self._receive(data[done:])
            if not got:
                raise Hangup("the client left in the middle of a write")
            done += got
        return data

    def _receive(self, view: memoryview) -> int:
        try:
            return self._sock.recv_into(view)
        except OSError as error:
            raise Hangup(str(error)) from None


_CHANGING = frozenset({Command.WRITE, Command.TRIM, Command.WRITE_ZEROES})
