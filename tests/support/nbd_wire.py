"""A bare NBD client and server for tests, which say exactly what they are told to say.

The numbers are copied from the protocol's text ("The NBD protocol", proto.md), not from the code.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable

NBDMAGIC = b"NBDMAGIC"
IHAVEOPT = b"IHAVEOPT"
SECONDS = 20  # a peer that has not answered by then does not answer


def receive(sock: socket.socket, length: int) -> bytes:
    """Exactly ``length`` bytes, or EOFError."""
    data = b""
    while len(data) < length:
        piece = sock.recv(length - len(data))
        if not piece:
            raise EOFError(f"{len(data)} of {length} bytes")
        data += piece
    return data


class WireClient:
    """A connection to a server, after its greeting."""

    def __init__(self, path: str, flags: int = 3) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(path)
        self.greeting = receive(self.sock, 18)
        self.sock.sendall(struct.pack(">I", flags))

    def __enter__(self) -> WireClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    # handshake
    def send_option(self, option: int, data: bytes = b"", length: int | None = None) -> None:
        size = len(data) if length is None else length
        self.sock.sendall(IHAVEOPT + struct.pack(">II", option, size) + data)

    def option_reply(self) -> tuple[int, int, bytes]:
        """Option, reply type, data."""
        magic, option, kind, length = struct.unpack(">QIII", receive(self.sock, 20))
        assert magic == 0x3E889045565A9
        return option, kind, receive(self.sock, length)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; all replies to it, the last one is ACK or an error."""
        self.send_option(option, data)
        replies = []
        while True:
            echo, kind, reply = self.option_reply()
            assert echo == option
            replies.append((kind, reply))
            if kind == 1 or kind >> 31:
                return replies

    def go(self, name: str, infos: tuple[int, ...] = ()) -> list[tuple[int, bytes]]:
        text = name.encode()
        data = struct.pack(">I", len(text)) + text + struct.pack(f">H{len(infos)}H", len(infos), *infos)
        return self.option(7, data)

    # transmission
    def send_request(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        cookie: int = 1,
        flags: int = 0,
        data: bytes = b"",
    ) -> None:
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + data)

    def simple_reply(self, length: int = 0) -> tuple[int, int, bytes]:
        """Error, cookie, data (``length`` bytes if there is no error)."""
        magic, error, cookie = struct.unpack(">IIQ", receive(self.sock, 16))
        assert magic == 0x67446698
        return error, cookie, b"" if error else receive(self.sock, length)

    def request(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, data: bytes = b""
    ) -> int:
        """One request without data in its reply; the error."""
        self.send_request(command, offset, length, 77, flags, data)
        error, cookie, _ = self.simple_reply()
        assert cookie == 77
        return error

    def read(self, offset: int, length: int) -> bytes:
        self.send_request(0, offset, length, 78)
        error, cookie, data = self.simple_reply(length)
        assert (error, cookie) == (0, 78)
        return data

    def chunk(self) -> tuple[int, int, int, bytes]:
        """Structured reply chunk: flags, type, cookie, body."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", receive(self.sock, 20))
        assert magic == 0x668E33EF
        return flags, kind, cookie, receive(self.sock, length)

    def closed_by_server(self) -> bool:
        """Wait until the server has closed the connection; False if it says something instead."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True


class WireServer:
    """Listens at ``path`` and runs one script after the other, one for each connection."""

    def __init__(self, path: str, *scripts: Callable[[socket.socket], None]) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._listener.settimeout(SECONDS)
        self._scripts = scripts
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for script in self._scripts:
                sock, _ = self._listener.accept()
                with sock:
                    sock.settimeout(SECONDS)
                    script(sock)
        except BaseException as failure:
            self._failure = failure

    def finish(self) -> None:
        """Wait for the scripts; raises what one of them raised."""
        self._thread.join(SECONDS)
        self._listener.close()
        if self._failure is not None:
            raise self._failure


def greet(sock: socket.socket, size: int = 1 << 20, flags: int = 0x6D, sizes: tuple[int, ...] = ()) -> None:
    """A server's side of a handshake with NBD_OPT_GO; ``sizes``: more sizes of the same export."""
    sock.sendall(NBDMAGIC + IHAVEOPT + struct.pack(">H", 3))
    receive(sock, 4)
    header = receive(sock, 16)
    option, length = struct.unpack(">II", header[8:])
    assert header[:8] == IHAVEOPT and option == 7
    receive(sock, length)
    for told in (size, *sizes):
        sock.sendall(option_reply(7, 3, struct.pack(">HQH", 0, told & (1 << 64) - 1, flags)))
    sock.sendall(option_reply(7, 1))


def option_reply(option: int, kind: int, data: bytes = b"", length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, size) + data


def take_request(sock: socket.socket) -> tuple[int, int, int, int, int]:
    """Command, flags, cookie, offset, length of the next request (its data, if any, is left)."""
    magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", receive(sock, 28))
    assert magic == 0x25609513
    return command, flags, cookie, offset, length


def simple_reply(cookie: int, error: int = 0, data: bytes = b"", magic: int = 0x67446698) -> bytes:
    return struct.pack(">IIQ", magic, error, cookie) + data
