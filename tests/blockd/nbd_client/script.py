"""A server that says exactly what it is told to say, structured replies included.

The numbers are copied from the protocol's text ("The NBD protocol", proto.md), not from the code.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

from blockd.nbd.remote import NbdImage
from tests.support.nbd_wire import IHAVEOPT, NBDMAGIC, option_reply, receive

MIB = 1 << 20
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
EIO, EINVAL, ENOTSUP = 5, 22, 95
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1, 2, 4, 8
SEND_TRIM, SEND_ZEROES, SEND_DF, SEND_CACHE, FAST_ZERO = 1 << 5, 1 << 6, 1 << 7, 1 << 10, 1 << 11
#: everything but the cache and fast zeroes
ABLE = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_ZEROES | SEND_DF
CONTEXT = 17  # the number that this server gives base:allocation
DONE = 1

Script = Callable[[socket.socket], None]


def negotiate(
    sock: socket.socket,
    size: int = MIB,
    flags: int = ABLE,
    structured: bool = True,
    context: bool = True,
    sizes: tuple[int, int, int] | None = None,
) -> str:
    """A handshake as a good server makes it; the export's name."""
    sock.sendall(NBDMAGIC + IHAVEOPT + struct.pack(">H", 3))
    receive(sock, 4)
    while True:
        header = receive(sock, 16)
        option, length = struct.unpack(">II", header[8:])
        data = receive(sock, length)
        if option == 8 and structured:
            sock.sendall(option_reply(8, 1))
        elif option == 10 and context:
            reply = struct.pack(">I", CONTEXT) + b"base:allocation"
            sock.sendall(option_reply(10, 4, reply) + option_reply(10, 1))
        elif option == 7:
            sock.sendall(option_reply(7, 3, struct.pack(">HQH", 0, size & (1 << 64) - 1, flags)))
            if sizes is not None:
                sock.sendall(option_reply(7, 3, struct.pack(">HIII", 3, *sizes)))
            sock.sendall(option_reply(7, 1))
            return data[4 : 4 + int.from_bytes(data[:4], "big")].decode()
        else:
            sock.sendall(option_reply(option, 1 << 31 | 1))


def leaving(script: Script) -> Script:
    """A script whose client may leave at any moment."""

    def run(sock: socket.socket) -> None:
        try:
            script(sock)
        except (OSError, EOFError):
            pass

    return run


class Asked(NamedTuple):
    """A request as it came."""

    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes


def take(sock: socket.socket) -> Asked:
    """The next request, with its data."""
    magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", receive(sock, 28))
    assert magic == 0x25609513
    return Asked(command, flags, cookie, offset, length, receive(sock, length) if command == WRITE else b"")


def chunk(cookie: int, kind: int, body: bytes = b"", flags: int = DONE, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, size) + body


def done(cookie: int) -> bytes:
    return chunk(cookie, 0)


def data(cookie: int, offset: int, content: bytes, flags: int = DONE) -> bytes:
    return chunk(cookie, 1, struct.pack(">Q", offset) + content, flags)


def hole(cookie: int, offset: int, length: int, flags: int = DONE) -> bytes:
    return chunk(cookie, 2, struct.pack(">QI", offset, length), flags)


def status(cookie: int, *extents: tuple[int, int], context: int = CONTEXT, flags: int = DONE) -> bytes:
    body = struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(cookie, 5, body, flags)


def error(cookie: int, number: int, text: bytes = b"", flags: int = DONE) -> bytes:
    return chunk(cookie, 0x8001, struct.pack(">IH", number, len(text)) + text, flags)


def name(path: str, export: str = "x", **parameters: object) -> str:
    """The URI of an export at a UNIX socket."""
    more = "".join(f"&{key.replace('_', '-')}={value}" for key, value in parameters.items())
    return f"nbd+unix:///{export}?socket={path}{more}"


def read(image: NbdImage, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    image.read_into(offset, memoryview(buffer))
    return bytes(buffer)
