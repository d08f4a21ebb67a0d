"""The option haggling that ends in an export, or in a closed connection.

Source: NBD protocol, "Newstyle negotiation", "Option types". A client is anybody who can reach the
socket: nothing it says may cost more than a bounded piece of memory and of time.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from blockd.export import Export, ExportTable
from blockd.nbd.contexts import Context, select
from coordinator.contract.nbd import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    GREETING,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    MAX_OPTION,
    MAX_PAYLOAD,
    MAX_STRING,
    NBD_MAGIC,
    OPTION,
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

#: longer option data is skipped up to here, and then the connection is closed
MAX_SKIPPED = 1 << 20

_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")


class Hangup(Exception):
    """The connection is over: the client went away, broke the protocol or was too slow."""


@dataclass(frozen=True)
class Terms:
    """What holds for every client of a server."""

    #: with it nothing of an export is told or served in plain
    tls: ssl.SSLContext | None = None
    #: several clients may use an export at once
    shared: bool = True


@dataclass
class Negotiated:
    """What the handshake agreed on."""

    export: Export
    #: the socket to go on with: another one than came in where TLS has begun
    sock: socket.socket
    structured: bool = False
    #: the metadata contexts that were chosen for this export
    contexts: tuple[Context, ...] = ()


@dataclass
class _Wishes:
    structured: bool = False
    no_zeroes: bool = False
    #: name of the export and the contexts chosen for it; a second choice replaces the first
    contexts: tuple[str, tuple[Context, ...]] = field(default=("", ()))


def transmission_flags(export: Export, structured: bool, shared: bool = True) -> int:
    """ "Transmission flags" of an export. All connections share one image and its cache, so a flush on one
    covers what was written on another. Resize is not offered."""
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_CACHE
    )
    if shared:
        flags |= TransmissionFlag.CAN_MULTI_CONN
    if export.image.read_only:
        flags |= TransmissionFlag.READ_ONLY
    else:
        flags |= (
            TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
        )
    if structured:
        flags |= TransmissionFlag.SEND_DF
    return int(flags)


class Handshake:
    """One client's handshake, which is over after ``seconds``. ``join`` lets its session into an export
    (False: it is going away); ``replaced`` is told the socket that takes the place of ``sock`` when TLS
    begins."""

    def __init__(
        self,
        sock: socket.socket,
        exports: ExportTable,
        join: Callable[[Export], bool],
        seconds: float,
        terms: Terms,
        replaced: Callable[[socket.socket], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sock = sock
        self._exports = exports
        self._join = join
        self._terms = terms
        self._replaced = replaced
        self._clock = clock
        self._deadline = clock() + seconds
        self._wishes = _Wishes()
        #: nothing but STARTTLS is answered yet
        self._barred = terms.tls is not None
        self._options: dict[int, Callable[[int, bytes], Negotiated | None]] = {
            Option.ABORT: self._abort,
            Option.LIST: self._list,
            Option.STARTTLS: self._start_tls,
            Option.INFO: self._info_or_go,
            Option.GO: self._info_or_go,
            Option.STRUCTURED_REPLY: self._structured_reply,
            Option.LIST_META_CONTEXT: self._meta_context,
            Option.SET_META_CONTEXT: self._meta_context,
        }

    def run(self) -> Negotiated:
        """Haggle until an export is agreed on; Hangup otherwise. The socket is blocking afterwards."""
        offered = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
        self._send(GREETING.pack(NBD_MAGIC, OPTION_MAGIC, offered))
        (flags,) = CLIENT_FLAGS.unpack(self._receive(CLIENT_FLAGS.size))
        if flags & ~int(offered) or not flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise Hangup(f"client flags {flags:#x}")
        self._wishes.no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        while True:
            magic, option, length = OPTION.unpack(self._receive(OPTION.size))
            if magic != OPTION_MAGIC:
                raise Hangup("option without its magic number")
            if option == Option.EXPORT_NAME:
                result: Negotiated | None = self._export_name(length)
            else:
                result = self._answer(option, length)
            if result is not None:
                self._sock.settimeout(None)
                return result

    def _answer(self, option: int, length: int) -> Negotiated | None:
        if length > MAX_OPTION:
            self._skip(length)
            self._reply_error(option, OptionReply.ERR_TOO_BIG, f"option data of {length} bytes")
            return None
        data = self._receive(length)
        if self._barred and option not in (Option.STARTTLS, Option.ABORT):
            self._reply_error(option, OptionReply.ERR_TLS_REQD, "this server insists on TLS")
            return None
        handler = self._options.get(option)
        if handler is None:
            self._reply_error(option, OptionReply.ERR_UNSUP, "this option is not known here")
            return None
        return handler(option, data)

    # ---- options ---------------------------------------------------------------------------------
    def _export_name(self, length: int) -> Negotiated:
        """NBD_OPT_EXPORT_NAME has no error reply: the connection is closed instead."""
        if self._barred:
            raise Hangup("the client wants an export without TLS")
        if length > MAX_STRING:
            raise Hangup(f"export name of {length} bytes")
        export = self._exports.find(_text(self._receive(length)))
        if export is None or not self._join(export):
            raise Hangup("no such export")
        structured = self._wishes.structured
        flags = transmission_flags(export, structured, self._terms.shared)
        reply = EXPORT_NAME_REPLY.pack(export.image.size, flags)
        self._send(reply if self._wishes.no_zeroes else reply + bytes(EXPORT_NAME_ZEROES))
        return self._agreed(export)

    def _abort(self, option: int, data: bytes) -> None:
        self._reply(option, OptionReply.ACK)
        raise Hangup("the client ended the handshake")

    def _list(self, option: int, data: bytes) -> None:
        if data:
            self._reply_error(option, OptionReply.ERR_INVALID, "NBD_OPT_LIST has no data")
            return
        for export in self._exports.all():
            name = string(export.name.encode())
            self._reply(option, OptionReply.SERVER, name + export.description.encode())
        self._reply(option, OptionReply.ACK)

    def _start_tls(self, option: int, data: bytes) -> None:
        """ "NBD_OPT_STARTTLS". Nothing is read ahead, so what a client (or somebody between it and us) has
        sent in plain behind this option can only be taken for TLS, and is none."""
        if data:
            self._reply_error(option, OptionReply.ERR_INVALID, "NBD_OPT_STARTTLS has no data")
        elif self._terms.tls is None:
            self._reply_error(option, OptionReply.ERR_POLICY, "TLS is not configured here")
        elif not self._barred:
            self._reply_error(option, OptionReply.ERR_INVALID, "TLS is in use already")
        else:
            self._reply(option, OptionReply.ACK)
            try:
                secured = self._terms.tls.wrap_socket(
                    self._sock, server_side=True, do_handshake_on_connect=False
                )
                self._sock = secured
                self._replaced(secured)
                secured.settimeout(self._time_left())
                secured.do_handshake()
            except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
                raise Hangup(f"TLS: {error}") from None
            self._barred = False

    def _info_or_go(self, option: int, data: bytes) -> Negotiated | None:
        wish = _parse_info(data)
        if wish is None:
            self._reply_error(option, OptionReply.ERR_INVALID, "malformed data")
            return None
        name, wanted = wish
        export = self._exports.find(name)
        if export is None or (option == Option.GO and not self._join(export)):
            self._reply_error(option, OptionReply.ERR_UNKNOWN, "no such export")
            return None
        flags = transmission_flags(export, self._wishes.structured, self._terms.shared)
        self._reply(option, OptionReply.INFO, INFO_EXPORT.pack(Info.EXPORT, export.image.size, flags))
        if Info.NAME in wanted:
            self._reply(option, OptionReply.INFO, _U16.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in wanted:
            text = export.description.encode()
            self._reply(option, OptionReply.INFO, _U16.pack(Info.DESCRIPTION) + text)
        sizes = INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, 1, 4096, MAX_PAYLOAD)
        self._reply(option, OptionReply.INFO, sizes)
        self._reply(option, OptionReply.ACK)
        return self._agreed(export) if option == Option.GO else None

    def _structured_reply(self, option: int, data: bytes) -> None:
        if data:
            self._reply_error(option, OptionReply.ERR_INVALID, "NBD_OPT_STRUCTURED_REPLY has no data")
            return
        self._wishes.structured = True
        self._reply(option, OptionReply.ACK)

    def _meta_context(self, option: int, data: bytes) -> None:
        """ "Metadata querying" """
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._wishes.contexts = ("", ())
        if not self._wishes.structured:
            self._reply_error(option, OptionReply.ERR_INVALID, "structured replies come first")
            return
        query = _parse_meta_context(data)
        if query is None:
            self._reply_error(option, OptionReply.ERR_INVALID, "malformed data")
            return
        name, queries = query
        export = self._exports.find(name)
        if export is None:
            self._reply_error(option, OptionReply.ERR_UNKNOWN, "no such export")
            return
        chosen = select(export.contexts, queries, setting)
        for context in chosen:
            number = _U32.pack(context.number if setting else 0)
            self._reply(option, OptionReply.META_CONTEXT, number + context.name.encode())
        if setting:
            self._wishes.contexts = (export.name, tuple(chosen))
        self._reply(option, OptionReply.ACK)

    def _agreed(self, export: Export) -> Negotiated:
        name, contexts = self._wishes.contexts
        # an export of another medium has other contexts, under the same name
        chosen = tuple(one for one in contexts if name == export.name and one in export.contexts)
        return Negotiated(export, self._sock, self._wishes.structured, chosen)

    # ---- the wire --------------------------------------------------------------------------------
    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._send(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _reply_error(self, option: int, kind: int, text: str) -> None:
        self._reply(option, kind, text.encode())

    def _time_left(self) -> float:
        left = self._deadline - self._clock()
        if left <= 0:
            raise Hangup("the handshake took too long")
        return left

    def _send(self, data: bytes) -> None:
        self._sock.settimeout(self._time_left())
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise Hangup(str(error)) from None

    def _receive(self, length: int) -> bytes:
        """Exactly ``length`` bytes. Memory grows with what has come, not with what was announced."""
        pieces = []
        while length:
            self._sock.settimeout(self._time_left())
            try:
                piece = self._sock.recv(min(length, MAX_OPTION))
            except OSError as error:
                raise Hangup(str(error)) from None
            if not piece:
                raise Hangup("the client went away")
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _skip(self, length: int) -> None:
        if length > MAX_SKIPPED:
            raise Hangup(f"option data of {length} bytes")
        while length:
            length -= len(self._receive(min(length, MAX_OPTION)))


def _text(data: bytes) -> str:
    """A name as the client spells it; what is no UTF-8 is no name of ours, and fits none."""
    return data.decode("utf-8", "surrogateescape")


def _parse_string(data: bytes, at: int) -> tuple[str, int] | None:
    """A 32-bit length and a string; the string and where it ends."""
    if len(data) < at + 4:
        return None
    (length,) = _U32.unpack_from(data, at)
    end = at + 4 + length
    if length > MAX_STRING or end > len(data):
        return None
    return _text(data[at + 4 : end]), end


def _parse_info(data: bytes) -> tuple[str, set[int]] | None:
    """NBD_OPT_INFO and NBD_OPT_GO: name, number of wishes, wishes."""
    string = _parse_string(data, 0)
    if string is None:
        return None
    name, at = string
    if len(data) < at + 2:
        return None
    (count,) = _U16.unpack_from(data, at)
    if len(data) != at + 2 + 2 * count:
        return None
    return name, set(struct.unpack_from(f">{count}H", data, at + 2))


def _parse_meta_context(data: bytes) -> tuple[str, list[str]] | None:
    """NBD_OPT_SET_META_CONTEXT: name, number of queries, queries."""
    string = _parse_string(data, 0)
    if string is None or len(data) < string[1] + 4:
        return None
    name, at = string
    (count,) = _U32.unpack_from(data, at)
    at += 4
    queries: list[str] = []
    while at < len(data) and len(queries) < count:
        string = _parse_string(data, at)
        if string is None:
            return None
        queries.append(string[0])
        at = string[1]
    if at != len(data) or len(queries) != count:
        return None
    return name, queries
