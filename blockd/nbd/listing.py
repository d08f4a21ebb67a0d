"""``atoll nbd -L``: what another server exports.

Source: NBD protocol, "NBD_OPT_LIST", "NBD_OPT_INFO", "NBD_OPT_LIST_META_CONTEXT".
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from dataclasses import dataclass, field

from blockd.nbd.settings import Settings
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import (
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    OPTION_ERROR,
    OPTION_MAGIC,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
    string,
)
from coordinator.contract.nbd_handshake import ClientHandshake, Secure, TryAgain, printable
from coordinator.contract.tls import client_context

#: the whole listing must have been told by then
SECONDS = 30.0
#: replies to one option
MAX_REPLIES = 100_000

#: qemu-nbd's words for the transmission flags
_FLAGS = {
    TransmissionFlag.READ_ONLY: "readonly",
    TransmissionFlag.SEND_FLUSH: "flush",
    TransmissionFlag.SEND_FUA: "fua",
    TransmissionFlag.ROTATIONAL: "rotational",
    TransmissionFlag.SEND_TRIM: "trim",
    TransmissionFlag.SEND_WRITE_ZEROES: "zeroes",
    TransmissionFlag.SEND_DF: "df",
    TransmissionFlag.CAN_MULTI_CONN: "multi",
    TransmissionFlag.SEND_RESIZE: "resize",
    TransmissionFlag.SEND_CACHE: "cache",
    TransmissionFlag.SEND_FAST_ZERO: "fast-zero",
}


@dataclass
class Listed:
    """What a server says of one export; sizes are None where it does not say."""

    name: bytes
    description: bytes = b""
    size: int | None = None
    flags: int = 0
    #: minimum, preferred and maximum block size
    blocks: tuple[int, int, int] | None = None
    contexts: list[bytes] = field(default_factory=list)


def show(settings: Settings) -> None:
    """Print the exports of a server as qemu-nbd does; BlockError in one line."""
    host, port = settings.addresses[0] if settings.addresses else ("", 0)
    where = settings.sockets[0] if settings.sockets else f"{host}:{port}"
    secure = None if settings.credentials is None else _secure(settings, host)
    try:
        if settings.sockets:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(SECONDS)
            sock.connect(where)
        else:
            sock = socket.create_connection((host, port), SECONDS)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BlockError(f"cannot connect to {where}: {reason}", error.errno or errno.EIO) from None
    exchange = Listing(sock, where, time.monotonic() + SECONDS)
    try:
        found = exchange.exports(secure)
    except TryAgain as reason:
        raise BlockError(f"{where}: {reason}", errno.EIO) from None
    finally:
        exchange.sock.close()
    print(f"exports available: {len(found)}")
    for export in found:
        print("\n".join(_lines(export)))


def _secure(settings: Settings, host: str) -> Secure:
    assert settings.credentials is not None
    name = settings.hostname or host or None
    context = client_context(settings.credentials.folder, name)
    return lambda sock: context.wrap_socket(sock, server_hostname=name)


def _lines(export: Listed) -> list[str]:
    lines = [f" export: '{_text(export.name)}'"]
    if export.description:
        lines.append(f"  description: {_text(export.description)}")
    if export.size is not None:
        words = "".join(f" {word}" for flag, word in _FLAGS.items() if export.flags & flag)
        lines += [f"  size:  {export.size}", f"  flags: {export.flags:#x} ({words} )"]
    if export.blocks is not None:
        names = ("min block", "opt block", "max block")
        lines += [f"  {name}: {size}" for name, size in zip(names, export.blocks, strict=True)]
    if export.contexts:
        lines.append(f"  available meta contexts: {len(export.contexts)}")
        lines += [f"   {_text(context)}" for context in export.contexts]
    return lines


def _text(data: bytes) -> str:
    return printable(os.fsdecode(data))


class Listing(ClientHandshake):
    """A handshake that asks, and chooses nothing."""

    def exports(self, secure: Secure | None) -> list[Listed]:
        """All that the server has; TryAgain or BlockError."""
        self._greet()
        if secure is not None:
            self._start_tls(secure)
        structured = self._accepted(Option.STRUCTURED_REPLY, b"")
        found = []
        for data in self._replies(Option.LIST, b"", OptionReply.SERVER):
            length = int.from_bytes(data[:4], "big")
            if len(data) < 4 + length:
                raise self._bad("tells a malformed list")
            found.append(Listed(data[4 : 4 + length], data[4 + length :]))
        for export in found:
            self._ask(export, structured)
        self._send(OPTION.pack(OPTION_MAGIC, Option.ABORT, 0))
        return found

    def _ask(self, export: Listed, structured: bool) -> None:
        """The particulars, as far as the server knows such questions."""
        name = string(export.name)
        wishes = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)
        data = name + struct.pack(f">H{len(wishes)}H", len(wishes), *wishes)
        for reply in self._replies(Option.INFO, data, OptionReply.INFO, optional=True):
            kind = int.from_bytes(reply[:2], "big")
            if kind == Info.EXPORT and len(reply) == INFO_EXPORT.size:
                _, export.size, export.flags = INFO_EXPORT.unpack(reply)
            elif kind == Info.BLOCK_SIZE and len(reply) == INFO_BLOCK_SIZE.size:
                export.blocks = INFO_BLOCK_SIZE.unpack(reply)[1:]
            elif kind == Info.DESCRIPTION:
                export.description = reply[2:]
        if structured:
            replies = self._replies(
                Option.LIST_META_CONTEXT, name + bytes(4), OptionReply.META_CONTEXT, optional=True
            )
            export.contexts = [reply[4:] for reply in replies]

    def _replies(self, option: int, data: bytes, wanted: int, optional: bool = False) -> list[bytes]:
        """The data of all replies to an option. A refusal is BlockError, or no reply where ``optional``."""
        self._send(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)
        found: list[bytes] = []
        while len(found) < MAX_REPLIES:
            kind, reply = self._option_reply(option)
            if kind == OptionReply.ACK:
                return found
            if kind & OPTION_ERROR:
                if optional:
                    return found
                raise self._refused(kind, b"", reply)
            if kind != wanted:
                raise self._bad(f"answered an option with {kind:#x}")
            found.append(reply)
        raise self._bad("does not come to an end with what it tells")
