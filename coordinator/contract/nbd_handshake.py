"""The client's side of the NBD handshake: from a connected socket to a known export.

Source: NBD protocol, "Newstyle negotiation", "Option types", "Option reply types", "Metadata querying".
The server may be anything that listens there: what it says is checked before it is used, bounded in
size, and bounded in time by the deadline.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import (
    BASE_ALLOCATION,
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_OPTION,
    MAX_PAYLOAD,
    MAX_SIZE,
    MAX_STRING,
    NBD_MAGIC,
    OPTION,
    OPTION_ERROR,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
    string,
)

#: information that a server may volunteer
MAX_INFOS = 64
#: a device's sector
SECTOR = 512
#: "Block size constraints": the minimum may not be larger
LARGEST_MINIMUM = 64 << 10

#: turns the connected socket into one that is encrypted
Secure = Callable[[socket.socket], socket.socket]


class TryAgain(Exception):
    """The server went away, or is about to: the whole handshake may be tried again."""


class Wanted(NamedTuple):
    """What a client wants beyond an export."""

    #: structured replies, and with them what is allocated (base:allocation)
    structured: bool = False
    #: TLS, without which nothing of the export is asked
    secure: Secure | None = None
    #: a server that takes no fewer bytes than more than this cannot be used
    largest_minimum: int = SECTOR


@dataclass(frozen=True)
class ExportInfo:
    """What the server says of an export."""

    #: bytes
    size: int
    flags: TransmissionFlag
    #: bytes of data in one request at most
    max_payload: int = MAX_PAYLOAD
    #: offsets and lengths are multiples of this
    minimum: int = 1
    #: ... and should be of this
    preferred: int = 4096
    structured: bool = False
    #: the number by which base:allocation is known on this connection; None when it is not
    allocation: int | None = field(default=None, compare=False)


class ClientHandshake:
    """One attempt on one connected socket. ``where`` names the server in messages."""

    def __init__(
        self, sock: socket.socket, where: str, deadline: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        #: the socket to go on with: another one than was given once TLS has begun
        self.sock = sock
        self._where = where
        self._deadline = deadline
        self._clock = clock
        self._no_zeroes = False

    def run(self, export: str, wanted: Wanted | None = None) -> ExportInfo:
        """Choose ``export``; TryAgain or BlockError."""
        wanted = wanted or Wanted()
        name = export.encode("utf-8", "surrogateescape")
        if len(name) > MAX_STRING:
            raise BlockError(f"export name of {len(name)} bytes is too long for NBD", errno.ENAMETOOLONG)
        self._greet()
        if wanted.secure is not None:
            self._start_tls(wanted.secure)
        structured = wanted.structured and self._accepted(Option.STRUCTURED_REPLY, b"")
        allocation = self._set_context(name) if structured else None
        info = self._go(name, wanted) or self._export_name(name)
        if structured:
            info = ExportInfo(
                info.size, info.flags, info.max_payload, info.minimum, info.preferred, True, allocation
            )
        return info

    def _greet(self) -> None:
        magic, option_magic, flags = GREETING.unpack(self._receive(GREETING.size))
        if magic != NBD_MAGIC:
            raise self._bad("is no NBD server")
        if option_magic != OPTION_MAGIC or not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise self._bad("does not speak NBD's fixed newstyle")
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        answer = HandshakeFlag.FIXED_NEWSTYLE
        if self._no_zeroes:
            answer |= HandshakeFlag.NO_ZEROES
        self._send(CLIENT_FLAGS.pack(answer))

    def _start_tls(self, secure: Secure) -> None:
        if not self._accepted(Option.STARTTLS, b""):
            raise BlockError(f"{self._where}: has no TLS", errno.EACCES)
        self._limit_time()
        try:
            self.sock = secure(self.sock)
        except TimeoutError:
            raise TryAgain("the handshake took too long") from None
        except OSError as error:  # ssl.SSLError is one
            reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)
            raise BlockError(f"{self._where}: TLS failed: {reason}", errno.EACCES) from None

    def _accepted(self, option: Option, data: bytes) -> bool:
        """Send an option that is answered by yes or no."""
        self._send(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)
        kind, reply = self._option_reply(option)
        if kind in (OptionReply.ERR_SHUTDOWN, OptionReply.ERR_TLS_REQD):
            raise self._refused(kind, b"", reply)
        if kind != OptionReply.ACK and not kind & OPTION_ERROR:
            raise self._bad(f"answered an option with {kind:#x}")
        return kind == OptionReply.ACK

    def _set_context(self, name: bytes) -> int | None:
        """NBD_OPT_SET_META_CONTEXT: the number of base:allocation, or None."""
        context = BASE_ALLOCATION.encode()
        data = string(name) + struct.pack(">I", 1) + string(context)
        self._send(OPTION.pack(OPTION_MAGIC, Option.SET_META_CONTEXT, len(data)) + data)
        number = None
        for _ in range(MAX_INFOS):
            kind, reply = self._option_reply(Option.SET_META_CONTEXT)
            if kind == OptionReply.ACK:
                return number
            if kind & OPTION_ERROR:
                return None
            if kind != OptionReply.META_CONTEXT or reply[4:] != context:
                raise self._bad("answered what was not asked")
            number = int.from_bytes(reply[:4], "big")
        raise self._bad("does not come to an end with what it tells")

    def _go(self, name: bytes, wanted: Wanted) -> ExportInfo | None:
        """NBD_OPT_GO; None when the server does not know it."""
        data = string(name) + struct.pack(">HH", 1, Info.BLOCK_SIZE)
        self._send(OPTION.pack(OPTION_MAGIC, Option.GO, len(data)) + data)
        exports: set[tuple[int, int]] = set()
        sizes = (1, 4096, MAX_PAYLOAD)
        for _ in range(MAX_INFOS):
            kind, reply = self._option_reply(Option.GO)
            if kind == OptionReply.ERR_UNSUP:
                return None
            if kind & OPTION_ERROR:
                raise self._refused(kind, name, reply)
            if kind == OptionReply.ACK:
                if len(exports) != 1:
                    raise self._bad(f"told {len(exports)} sizes of one export")
                return self._checked(*exports.pop(), sizes)
            if kind != OptionReply.INFO or len(reply) < 2:
                raise self._bad(f"answered an option with {kind:#x}")
            (info,) = struct.unpack_from(">H", reply)
            if info == Info.EXPORT and len(reply) == INFO_EXPORT.size:
                exports.add(INFO_EXPORT.unpack(reply)[1:])
            elif info == Info.BLOCK_SIZE and len(reply) == INFO_BLOCK_SIZE.size:
                _, minimum, preferred, maximum = INFO_BLOCK_SIZE.unpack(reply)
                sizes = self._block_sizes(minimum, preferred, maximum, wanted.largest_minimum)
        raise self._bad("does not come to an end with what it tells")

    def _block_sizes(self, minimum: int, preferred: int, maximum: int, largest: int) -> tuple[int, int, int]:
        """ "Block size constraints": powers of two, but for the maximum, which is a multiple."""
        possible = minimum and minimum & (minimum - 1) == 0 and preferred & (preferred - 1) == 0
        if minimum > largest or maximum < max(SECTOR, minimum):
            raise self._bad(f"serves only requests of {minimum} to {maximum} bytes")
        if not possible:
            raise self._bad(f"tells impossible block sizes ({minimum}, {preferred})")
        maximum = min(maximum, MAX_PAYLOAD)
        return minimum, max(minimum, min(preferred, MAX_PAYLOAD)), maximum - maximum % minimum

    def _export_name(self, name: bytes) -> ExportInfo:
        """NBD_OPT_EXPORT_NAME, for servers that know no better: an unknown name closes the connection."""
        self._send(OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, len(name)) + name)
        try:
            size, flags = EXPORT_NAME_REPLY.unpack(self._receive(EXPORT_NAME_REPLY.size))
        except TryAgain:
            raise self._bad(f"has no export {_shown(name)}") from None
        if not self._no_zeroes:
            self._receive(EXPORT_NAME_ZEROES)
        return self._checked(size, flags, (1, 4096, MAX_PAYLOAD))

    def _checked(self, size: int, flags: int, sizes: tuple[int, int, int]) -> ExportInfo:
        if size > MAX_SIZE:
            raise self._bad(f"tells an impossible size ({size} bytes)")
        if not flags & TransmissionFlag.HAS_FLAGS:
            flags = 0
        minimum, preferred, maximum = sizes
        if size % minimum:
            raise self._bad(f"serves {size} bytes in blocks of {minimum}")
        return ExportInfo(size, TransmissionFlag(flags), maximum, minimum, preferred)

    def _option_reply(self, option: int) -> tuple[int, bytes]:
        """Type and data of the next reply."""
        magic, echo, kind, length = OPTION_REPLY.unpack(self._receive(OPTION_REPLY.size))
        if magic != OPTION_REPLY_MAGIC or echo != option:
            raise self._bad("answered what was not asked")
        if length > MAX_OPTION:
            raise self._bad(f"answered an option with {length} bytes")
        return kind, self._receive(length)

    def _refused(self, kind: int, name: bytes, text: bytes) -> Exception:
        if kind == OptionReply.ERR_SHUTDOWN:
            return TryAgain("the server is shutting down")
        if kind == OptionReply.ERR_UNKNOWN:
            return BlockError(f"{self._where}: has no export {_shown(name)}", errno.ENOENT)
        if kind == OptionReply.ERR_TLS_REQD:
            return BlockError(f"{self._where}: insists on TLS", errno.EACCES)
        reason = text[:200].decode("utf-8", "replace").splitlines()
        return self._bad(f"refused export {_shown(name)}: {printable(reason[0]) if reason else hex(kind)}")

    def _bad(self, what: str) -> BlockError:
        return BlockError(f"{self._where}: {what}", errno.EPROTO)

    # ---- the wire --------------------------------------------------------------------------------
    def _limit_time(self) -> None:
        left = self._deadline - self._clock()
        if left <= 0:
            raise TryAgain("the handshake took too long")
        self.sock.settimeout(left)

    def _send(self, data: bytes) -> None:
        self._limit_time()
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise TryAgain(_reason(error)) from None

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._limit_time()
            try:
                piece = self.sock.recv(length - len(data))
            except OSError as error:
                raise TryAgain(_reason(error)) from None
            if not piece:
                raise TryAgain("the server closed the connection")
            data += piece
        return bytes(data)


def printable(text: str) -> str:
    """What a stranger says, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _shown(name: bytes) -> str:
    return repr(name.decode("utf-8", "replace"))


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "the handshake took too long"
    return error.strerror or str(error)
