"""Bytes of NBD clients: options and requests in any order, of any length, cut off anywhere."""

from __future__ import annotations

import logging
import random
import socket
import struct
import threading
from pathlib import Path

from blockd.nbd.server import Limits
from blockd.qcow2.create import Options, create
from blockd.service import Service
from coordinator.contract.config import Export
from tests.support.nbd_wire import WireClient

TARGETS = ("NBD options", "NBD requests")
SIZE = 256 << 10
#: a server that has neither answered nor hung up by then hangs
SECONDS = 30
_EXPORTS = ("disk", "cd", "qcow2", "", "none")
_CONTEXTS = (
    b"base:allocation",
    b"base:",
    b"qemu:",
    b"qemu:dirty-bitmap:one",
    b"qemu:dirty-bitmap:",
    b":",
    b"",
)
_LENGTHS = (0, 1, 511, 512, 4096, 65536, SIZE, SIZE + 1, 1 << 20, (32 << 20) + 1, 1 << 31, 0xFFFFFFFF)
_OFFSETS = (0, 1, 512, SIZE - 512, SIZE - 1, SIZE, SIZE + 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)


class Wire:
    """A server in the same process, and clients that send what they like."""

    memory = 1 << 30

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, folder: Path) -> None:
        self._folder = folder
        self._content = random.Random(1).randbytes(SIZE)
        for name in ("disk", "cd"):
            (folder / name).write_bytes(self._content)
        create(str(folder / "qcow2"), Options(SIZE, cluster_size=512))
        self._failures: list[str] = []
        handler = logging.Handler(logging.ERROR)
        handler.emit = self._note  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)
        self._service = Service(Limits(handshake_seconds=SECONDS / 2))
        self._service.exports.open(Export("disk", str(folder / "disk")))
        self._service.exports.open(Export("cd", str(folder / "cd"), read_only=True))
        self._service.exports.open(Export("qcow2", str(folder / "qcow2"), "qcow2"))
        self._path = str(folder / "nbd")
        self._service.listen(self._path)
        self._thread = threading.Thread(target=self._service.run)
        self._thread.start()

    def _note(self, record: logging.LogRecord) -> None:
        self._failures.append(logging.Formatter().format(record))

    # ---- making -----------------------------------------------------------------------------------
    def make(self, rnd: random.Random) -> bytes:
        """All that a client says, from its flags on."""
        flags = rnd.choice([3, 3, 3, 3, 3, 3, 1, 0, 2, rnd.getrandbits(32)])
        stream = bytearray(struct.pack(">I", flags))
        if self.name == "NBD options":
            for _ in range(rnd.randrange(1, 12)):
                stream += self._option(rnd)
        else:
            if rnd.random() < 0.6:
                stream += self._packed(8, b"")
                query = struct.pack(">I", rnd.randrange(3))
                name = rnd.choice(_EXPORTS[:3])
                for context in _CONTEXTS[:2]:
                    query += struct.pack(">I", len(context)) + context
                stream += self._packed(10, struct.pack(">I", len(name)) + name.encode() + query)
            stream += self._packed(7, self._name(rnd.choice(_EXPORTS[:3])) + b"\0\0")
            for _ in range(rnd.randrange(1, 20)):
                stream += self._request(rnd)
        for _ in range(rnd.choice([0, 0, 1, 2, 5])):
            stream[rnd.randrange(len(stream))] = rnd.choice([0, 1, 0x7F, 0x80, 0xFF, rnd.randrange(256)])
        if rnd.random() < 0.3:
            del stream[rnd.randrange(len(stream)) :]
        return bytes(stream)

    @staticmethod
    def _packed(option: int, data: bytes, length: int | None = None) -> bytes:
        return b"IHAVEOPT" + struct.pack(">II", option, len(data) if length is None else length) + data

    @staticmethod
    def _name(name: str) -> bytes:
        return struct.pack(">I", len(name)) + name.encode()

    def _option(self, rnd: random.Random) -> bytes:
        option = rnd.choice([1, 2, 3, 5, 6, 6, 7, 8, 8, 9, 9, 10, 10, 11, rnd.getrandbits(32)])
        name = rnd.choice([*_EXPORTS, "n" * rnd.choice([255, 3000, 4096, 4097])])
        if option == 1:
            data = name.encode()
        elif option in (6, 7):
            wishes = [rnd.choice([0, 1, 2, 3, 4, 0xFFFF]) for _ in range(rnd.choice([0, 1, 4, 300]))]
            data = self._name(name) + struct.pack(f">H{len(wishes)}H", len(wishes), *wishes)
        elif option in (9, 10):
            queries = [rnd.choice(_CONTEXTS) for _ in range(rnd.choice([0, 1, 1, 3, 200]))]
            data = self._name(name) + struct.pack(">I", len(queries))
            data += b"".join(struct.pack(">I", len(query)) + query for query in queries)
        else:
            data = rnd.randbytes(rnd.choice([0, 0, 0, 1, 100]))
        if rnd.random() < 0.15:  # lengths that do not fit, inside and outside
            at = rnd.randrange(len(data) + 1)
            data = data[:at] + rnd.randbytes(rnd.choice([0, 1, 4])) + data[at + rnd.choice([0, 1, 4]) :]
        length = len(data)
        if rnd.random() < 0.1:
            length = rnd.choice([0, max(0, length - 1), length + 1, 65536, 65537, 1 << 20, 0xFFFFFFFF])
        return self._packed(option, data, length)

    @staticmethod
    def _request(rnd: random.Random) -> bytes:
        command = rnd.choice([0, 1, 1, 2, 3, 4, 5, 6, 7, 7, 8, rnd.getrandbits(16)])
        if command == 2 and rnd.random() < 0.8:
            command = 0
        flags = rnd.choice([0, 0, 0, 1, 2, 4, 8, 16, rnd.getrandbits(16)])
        offset = rnd.choice([*_OFFSETS, rnd.randrange(SIZE), rnd.getrandbits(64)])
        length = rnd.choice([*_LENGTHS[:6], *_LENGTHS[:6], *_LENGTHS, rnd.randrange(SIZE)])
        payload = b""
        if command == 1:
            # one that does not come whole ends the connection, so that is rare
            length = min(length, 70000) if rnd.random() < 0.9 else length
            payload = bytes(min(length, 70000))
        magic = 0x25609513 if rnd.random() < 0.99 else rnd.getrandbits(32)
        return struct.pack(">IHHQQI", magic, flags, command, rnd.getrandbits(64), offset, length) + payload

    # ---- judging ----------------------------------------------------------------------------------
    def judge(self, data: bytes, rnd: random.Random) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(self._path)
            speaker = threading.Thread(target=self._say, args=(client, data, rnd.randrange(1, 1 << 16)))
            speaker.start()
            try:
                while client.recv(1 << 20):
                    pass
            except ConnectionError:
                pass
            speaker.join()
        assert not self._failures, self._failures[0]
        with WireClient(self._path) as other:
            assert other.go("cd")[-1] == (1, b""), "the next client is not served"
            assert other.read(0, SIZE) == self._content, "a read-only disk has changed"
        assert (self._folder / "disk").stat().st_size == SIZE, "the disk has another size"
        assert len(list(self._folder.iterdir())) == 4

    @staticmethod
    def _say(client: socket.socket, data: bytes, piece: int) -> None:
        try:
            for at in range(0, len(data), piece):
                client.sendall(data[at : at + piece])
            client.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def finish(self) -> None:
        self._service.stop()
        self._thread.join()
        assert not self._failures, self._failures[0]
