"""The client's side of the NBD handshake: from a connected socket to a known export.

Source: NBD protocol, "Newstyle negotiation", "Option types", "Option reply types". The server may
be anything that listens there: what it says is checked before it is used, bounded in size, and
bounded in time by the deadline.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
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
)

#: a reply to an option is a few numbers and a text
MAX_REPLY = 64 << 10
#: information that a server may volunteer
MAX_INFOS = 64
#: a device's sector: a server that takes no less than more than this cannot be used
LARGEST_MINIMUM = 512


class TryAgain(Exception):
    """The server went away, or is about to: the whole handshake may be tried again."""


@dataclass(frozen=True)
class ExportInfo:
    """What the server says of an export."""

    #: bytes
    size: int
    flags: TransmissionFlag
    #: bytes of data in one request at most
    max_payload: int = MAX_PAYLOAD


class ClientHandshake:
    """One attempt on one connected socket. ``where`` names the server in messages."""

    def __init__(
        self, sock: socket.socket, where: str, deadline: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sock = sock
        self._where = where
        self._deadline = deadline
        self._clock = clock
        self._no_zeroes = False

    def run(self, export: str) -> ExportInfo:
        """Choose ``export``; TryAgain or BlockError."""
        name = export.encode()
        if len(name) > MAX_STRING:
            raise BlockError(f"export name of {len(name)} bytes is too long for NBD", errno.ENAMETOOLONG)
        self._greet()
        info = self._go(name) or self._export_name(name)
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

    def _go(self, name: bytes) -> ExportInfo | None:
        """NBD_OPT_GO; None when the server does not know it."""
        data = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, Info.BLOCK_SIZE)
        self._send(OPTION.pack(OPTION_MAGIC, Option.GO, len(data)) + data)
        sizes: set[tuple[int, int]] = set()
        max_payload = MAX_PAYLOAD
        for _ in range(MAX_INFOS):
            kind, reply = self._option_reply(Option.GO)
            if kind == OptionReply.ERR_UNSUP:
                return None
            if kind & OPTION_ERROR:
                raise self._refused(kind, name, reply)
            if kind == OptionReply.ACK:
                if len(sizes) != 1:
                    raise self._bad(f"told {len(sizes)} sizes of one export")
                return self._checked(*sizes.pop(), max_payload)
            if kind != OptionReply.INFO or len(reply) < 2:
                raise self._bad(f"answered an option with {kind:#x}")
            (info,) = struct.unpack_from(">H", reply)
            if info == Info.EXPORT and len(reply) == INFO_EXPORT.size:
                sizes.add(INFO_EXPORT.unpack(reply)[1:])
            elif info == Info.BLOCK_SIZE and len(reply) == INFO_BLOCK_SIZE.size:
                _, minimum, _, maximum = INFO_BLOCK_SIZE.unpack(reply)
                if minimum > LARGEST_MINIMUM or maximum < LARGEST_MINIMUM:
                    raise self._bad(f"serves only requests of {minimum} to {maximum} bytes")
                max_payload = min(maximum, MAX_PAYLOAD)
        raise self._bad("does not come to an end with what it tells")

    def _export_name(self, name: bytes) -> ExportInfo:
        """NBD_OPT_EXPORT_NAME, for servers that know no better: an unknown name closes the connection."""
        self._send(OPTION.pack(OPTION_MAGIC, Option.EXPORT_NAME, len(name)) + name)
        try:
            size, flags = EXPORT_NAME_REPLY.unpack(self._receive(EXPORT_NAME_REPLY.size))
        except TryAgain:
            raise self._bad(f"has no export {name.decode()!r}") from None
        if not self._no_zeroes:
            self._receive(EXPORT_NAME_ZEROES)
        return self._checked(size, flags, MAX_PAYLOAD)

    def _checked(self, size: int, flags: int, max_payload: int) -> ExportInfo:
        if size > MAX_SIZE:
            raise self._bad(f"tells an impossible size ({size} bytes)")
        if not flags & TransmissionFlag.HAS_FLAGS:
            flags = 0
        return ExportInfo(size, TransmissionFlag(flags), max_payload)

    def _option_reply(self, option: int) -> tuple[int, bytes]:
        """Type and data of the next reply."""
        magic, echo, kind, length = OPTION_REPLY.unpack(self._receive(OPTION_REPLY.size))
        if magic != OPTION_REPLY_MAGIC or echo != option:
            raise self._bad("answered what was not asked")
        if length > MAX_REPLY:
            raise self._bad(f"answered an option with {length} bytes")
        return kind, self._receive(length)

    def _refused(self, kind: int, name: bytes, text: bytes) -> Exception:
        if kind == OptionReply.ERR_SHUTDOWN:
            return TryAgain("the server is shutting down")
        if kind == OptionReply.ERR_UNKNOWN:
            return BlockError(f"{self._where}: has no export {name.decode()!r}", errno.ENOENT)
        if kind == OptionReply.ERR_TLS_REQD:
            return BlockError(f"{self._where}: insists on TLS", errno.EACCES)
        reason = text[:200].decode("utf-8", "replace").splitlines()
        return self._bad(f"refused export {name.decode()!r}: {reason[0] if reason else hex(kind)}")

    def _bad(self, what: str) -> BlockError:
        return BlockError(f"{self._where}: {what}", errno.EPROTO)

    # ---- the wire --------------------------------------------------------------------------------
    def _limit_time(self) -> None:
        left = self._deadline - self._clock()
        if left <= 0:
            raise TryAgain("the handshake took too long")
        self._sock.settimeout(left)

    def _send(self, data: bytes) -> None:
        self._limit_time()
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise TryAgain(_reason(error)) from None

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._limit_time()
            try:
                piece = self._sock.recv(length - len(data))
            except OSError as error:
                raise TryAgain(_reason(error)) from None
            if not piece:
                raise TryAgain("the server closed the connection")
            data += piece
        return bytes(data)


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "the handshake took too long"
    return error.strerror or str(error)
