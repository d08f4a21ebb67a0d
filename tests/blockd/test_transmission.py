"""The NBD transmission phase: every command, every refusal, and clients that go away in the middle."""

import errno
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.export_image import FORMATS
from blockd.image import Buffer
from blockd.locks import lock_image
from blockd.nbd.server import Connection, Limits
from blockd.raw import RawImage
from coordinator.contract.config import Export, Media
from coordinator.contract.errors import BlockError
from tests.blockd.conftest import SERVICES, Serve, make_image
from tests.support.nbd_wire import WireClient

MIB = 1 << 20
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EINVAL, ENOSPC = 1, 22, 28


@pytest.fixture
def file(tmp_path: Path) -> str:
    return make_image(tmp_path / "disk", 2 * MIB)


def connect(path: str, name: str = "hd0", structured: bool = False) -> WireClient:
    client = WireClient(path)
    if structured:
        client.option(8)
        text = name.encode()
        client.option(10, struct.pack(">I", len(text)) + text + b"\0\0\0\1\0\0\0\x0fbase:allocation")
    assert client.go(name)[-1] == (1, b"")
    return client


def test_read_write_and_their_kin(serve: Serve, file: str) -> None:
    expected = bytearray(Path(file).read_bytes())
    with connect(serve(Export("hd0", file))) as client:
        assert client.read(1000, 3000) == expected[1000:4000]
        assert client.request(WRITE, 100, 50, data=b"w" * 50) == 0
        assert client.request(WRITE, 4096, 512, FUA, data=b"f" * 512) == 0
        assert client.request(ZEROES, 8192, 4096) == 0
        assert client.request(ZEROES, 16384, 4096, NO_HOLE | FUA) == 0
        assert client.request(TRIM, 65536, 4096, FUA) == 0
        assert client.request(CACHE, 0, 65536) == 0
        assert client.request(FLUSH) == 0
        assert client.request(FLUSH, flags=FUA) == 0
        expected[100:150] = b"w" * 50
        expected[4096:4608] = b"f" * 512
        expected[8192:12288] = expected[16384:20480] = expected[65536:69632] = bytes(4096)
        assert client.read(0, 2 * MIB) == expected  # in pieces: more than one buffer of the server
        for command in (READ, WRITE, TRIM, CACHE, ZEROES):
            assert client.request(command, 2 * MIB, 0) == 0
        client.send_request(DISC)
        assert client.closed_by_server()
    assert Path(file).read_bytes() == expected


@pytest.mark.parametrize("structured", [False, True])
def test_structured_and_simple_replies_read_the_same(serve: Serve, file: str, structured: bool) -> None:
    stored = Path(file).read_bytes()
    with connect(serve(Export("hd0", file)), structured=structured) as client:
        for offset, length in ((0, 512), (7, 1), (512, MIB), (0, 2 * MIB)):
            client.send_request(READ, offset, length, flags=DF if structured else 0)
            if structured:
                flags, kind, _, body = client.chunk()
                assert (flags, kind) == (1, 1)
                assert (
                    struct.unpack(">Q", body[:8])[0] == offset
                    and body[8:] == stored[offset : offset + length]
                )
            else:
                assert client.simple_reply(length)[2] == stored[offset : offset + length]


def test_structured_errors_and_acknowledgements(serve: Serve, file: str) -> None:
    with connect(serve(Export("hd0", file)), structured=True) as client:
        client.send_request(READ, 2 * MIB, 1, cookie=5)
        flags, kind, cookie, body = client.chunk()
        assert (flags, kind, cookie) == (1, 0x8001, 5)
        assert struct.unpack(">IH", body[:6]) == (EINVAL, len(body) - 6)
        client.send_request(FLUSH, cookie=6)
        assert client.chunk() == (1, 0, 6, b"")


def test_block_status(serve: Serve, tmp_path: Path) -> None:
    with open(tmp_path / "disk", "wb") as sparse:
        sparse.truncate(4 * MIB)
        os.pwrite(sparse.fileno(), b"d" * MIB, MIB)
    with connect(serve(Export("hd0", str(tmp_path / "disk"))), structured=True) as client:
        client.send_request(STATUS, 0, 4 * MIB)
        flags, kind, _, body = client.chunk()
        assert (flags, kind) == (1, 5)
        assert struct.unpack(">II", body[4:12]) == (MIB, 3)  # hole, zero
        assert struct.unpack(">IIII", body[12:]) == (MIB, 0, 2 * MIB, 3)
        client.send_request(STATUS, MIB + 512, 2 * MIB, flags=REQ_ONE)
        assert struct.unpack(">II", client.chunk()[3][4:]) == (MIB - 512, 0)
        for offset, length in ((0, 0xFFFFFFFF), (1 << 63, 1), (4 * MIB, 1), (0, 0)):
            client.send_request(STATUS, offset, length)
            assert client.chunk()[1] == 0x8001


def test_pipelined_requests_are_answered_in_order(serve: Serve, file: str) -> None:
    """Overlapping ones, sent at once: each read sees the writes before it and none behind it."""
    with connect(serve(Export("hd0", file))) as client:
        wire = b""
        for number in range(200):
            data = bytes([number]) * 4096
            wire += struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 2 * number, 2048 * (number % 7), 4096) + data
            wire += struct.pack(">IHHQQI", 0x25609513, 0, READ, 2 * number + 1, 2048 * (number % 7), 4096)
        sender = threading.Thread(target=client.sock.sendall, args=(wire,))
        sender.start()
        for number in range(200):
            assert client.simple_reply()[:2] == (0, 2 * number)
            assert client.simple_reply(4096) == (0, 2 * number + 1, bytes([number]) * 4096)
        sender.join()


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"),
    [
        (READ, 2 * MIB, 1, 0, EINVAL),
        (READ, 2 * MIB - 1, 2, 0, EINVAL),
        (READ, (1 << 64) - 1, 1, 0, EINVAL),
        (READ, 1 << 63, 512, 0, EINVAL),
        (READ, 0, (32 << 20) + 1, 0, EINVAL),
        (READ, 0, 0xFFFFFFFF, 0, EINVAL),
        (READ, 0, 512, DF, EINVAL),  # structured replies were not agreed on
        (READ, 0, 512, 1 << 15, EINVAL),
        (TRIM, 2 * MIB - 512, 1024, 0, EINVAL),
        (ZEROES, 2 * MIB - 512, 1024, 0, ENOSPC),
        (ZEROES, 0, 0xFFFFFFFF, 0, ENOSPC),
        (CACHE, 2 * MIB, 1, 0, EINVAL),
        (FLUSH, 0, 0, DF, EINVAL),
        (STATUS, 0, 512, 0, EINVAL),  # no context was chosen
        (RESIZE, 0, 512, 0, EINVAL),
        (9, 0, 0, 0, EINVAL),
        (0xFFFF, 0, 0, 0, EINVAL),
    ],
)
def test_refused_requests(
    serve: Serve, file: str, command: int, offset: int, length: int, flags: int, error: int
) -> None:
    before = Path(file).read_bytes()
    with connect(serve(Export("hd0", file))) as client:
        assert client.request(command, offset, length, flags) == error
        assert client.read(0, 4) == before[:4]  # and the connection goes on
    assert Path(file).read_bytes() == before


def test_write_past_the_end(serve: Serve, file: str) -> None:
    with connect(serve(Export("hd0", file))) as client:
        assert client.request(WRITE, 2 * MIB - 1, 2, data=b"xx") == ENOSPC
        assert client.request(WRITE, (1 << 64) - 1, 4, data=b"xxxx") == ENOSPC
        assert client.request(WRITE, 0, 4, 1 << 9, data=b"xxxx") == EINVAL
        assert client.read(0, 4) == bytes(4)
    assert os.path.getsize(file) == 2 * MIB


@pytest.mark.parametrize("media", [Media.DISK, Media.CDROM])
def test_read_only(serve: Serve, file: str, media: Media) -> None:
    with connect(serve(Export("hd0", file, read_only=media is Media.DISK, media=media))) as client:
        assert client.request(WRITE, 0, 512, data=bytes(512)) == EPERM
        assert client.request(WRITE, 0, 1 << 20, data=bytes(1 << 20)) == EPERM
        assert client.request(TRIM, 0, 512) == EPERM
        assert client.request(ZEROES, 0, 512) == EPERM
        assert client.request(FLUSH) == 0
        assert client.read(512, 4) == b"\1\0\0\0"


def test_payload_beyond_the_limit_ends_the_connection(serve: Serve, file: str) -> None:
    with connect(serve(Export("hd0", file))) as client:
        client.send_request(WRITE, 0, (32 << 20) + 1)
        assert client.closed_by_server()


def test_request_without_magic(serve: Serve, file: str) -> None:
    with connect(serve(Export("hd0", file))) as client:
        client.sock.sendall(bytes(28))
        assert client.closed_by_server()


@pytest.mark.parametrize("length", [4096, 1 << 20])
@pytest.mark.parametrize("sent", [0, 1, 27, 28, 29, 3000])
def test_truncated_write_changes_nothing(serve: Serve, file: str, length: int, sent: int) -> None:
    before = Path(file).read_bytes()
    path = serve(Export("hd0", file))
    request = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 0, length) + b"x" * length
    with connect(path) as client:
        client.sock.sendall(request[:sent])
    wait_for_clients(path, 0)
    assert Path(file).read_bytes() == before


def wait_for_clients(path: str, number: int) -> None:
    """Wait (bounded by the test's own time limit) until the service counts so many clients."""
    while SERVICES[path].exports.describe()[0]["clients"] != number:
        threading.Event().wait(0.005)


def test_what_a_dead_client_left_cannot_land_on_what_it_writes_next(
    serve: Serve, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old session is in the middle of a write, another waits in its socket, and its client comes
    back. The hold on the first write ends when the server sees to the old session, or, if it does
    not, behind the new session's write."""
    hold, begun = threading.Event(), threading.Event()
    write, end = RawImage.write, Connection.end

    def held_write(image: RawImage, offset: int, data: Buffer, fua: bool = False) -> None:
        if bytes(data[:3]) == b"old":
            begun.set()
            hold.wait()
        write(image, offset, data, fua)

    def noted_end(connection: Connection) -> None:
        hold.set()
        end(connection)

    monkeypatch.setattr(RawImage, "write", held_write)
    monkeypatch.setattr(RawImage, "direct", lambda image: None)
    monkeypatch.setattr(Connection, "end", noted_end)
    path = serve(Export("hd0", file))
    old = connect(path)
    old.send_request(WRITE, 0, 4096, data=b"old " * 1024)
    old.send_request(WRITE, 4096, 4096, data=b"old " * 1024)
    begun.wait()
    old.sock.close()
    with connect(path) as new:
        assert new.request(WRITE, 0, 8192, data=b"new " * 2048) == 0
        hold.set()
        wait_for_clients(path, 1)
        assert new.read(0, 8192) == b"new " * 2048


def test_a_client_that_does_not_read_its_replies(serve: Serve, file: str) -> None:
    path = serve(Export("hd0", file), limits=Limits(farewell_seconds=0.1))
    with connect(path) as client:
        for cookie in range(8):
            client.send_request(READ, 0, 2 * MIB, cookie)
        SERVICES[path].exports.close("hd0")
        assert SERVICES[path].exports.describe() == []


def test_several_connections_and_counters(serve: Serve, file: str) -> None:
    path = serve(Export("hd0", file))
    with connect(path) as one, connect(path) as two:
        assert one.request(WRITE, 0, 512, data=b"1" * 512) == 0
        assert two.read(0, 512) == b"1" * 512
        assert two.request(FLUSH) == 0
        assert two.request(READ, 2 * MIB, 1) == EINVAL
        (told,) = SERVICES[path].exports.describe()
        assert told["clients"] == 2
    wait_for_clients(path, 0)
    (told,) = SERVICES[path].exports.describe()
    wanted = {
        "reads": 1,
        "read_bytes": 512,
        "writes": 1,
        "write_bytes": 512,
        "flushes": 1,
        "zeroes": 0,
        "errors": 1,
    }
    assert {name: told[name] for name in wanted} == wanted
    assert (told["id"], told["file"], told["format"], told["size"], told["read_only"], told["epoch"]) == (
        "hd0",
        file,
        "raw",
        2 * MIB,
        False,
        1,
    )


def test_change_of_medium(serve: Serve, tmp_path: Path) -> None:
    first, second = (make_image(tmp_path / str(byte), 4096, byte) for byte in (1, 2))
    path = serve(Export("cd0", first, media=Media.CDROM))
    exports = SERVICES[path].exports
    with connect(path, "cd0") as client:
        assert client.read(0, 4) == b"\1\1\1\1"
        export = exports.open(Export("cd0", second, media=Media.CDROM))
        assert export.epoch == 2
        assert client.closed_by_server()
    with connect(path, "cd0") as client:
        assert client.read(0, 4) == b"\2\2\2\2"
    with open(first, "r+b") as freed:  # and the first is not locked any more
        assert lock_image(freed.fileno(), first, writable=True)


# ---- images that fail, and clients that send noise --------------------------------------------------------
class FailingImage(RawImage):
    """A raw image whose calls fail where they are told to; there is no way around them."""

    failures: dict[str, tuple[int, int]] = {}  # method: errno, from which offset on

    def direct(self) -> None:
        return None

    def _check(self, method: str, offset: int = 0) -> None:
        number, start = self.failures.get(method, (0, 0))
        if number and offset >= start:
            raise OSError(number, os.strerror(number))

    def read_into(self, offset: int, view: memoryview) -> None:
        self._check("read", offset + len(view) - 1)
        super().read_into(offset, view)

    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        self._check("write", offset)
        super().write(offset, data, fua)

    def flush(self) -> None:
        self._check("flush")
        super().flush()


@pytest.fixture
def failing(serve: Serve, file: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A service whose image can be made to fail."""
    monkeypatch.setitem(FORMATS, "raw", lambda wanted: FailingImage(wanted.file))
    FailingImage.failures = {}
    yield serve(Export("hd0", file))
    FailingImage.failures = {}


@pytest.mark.parametrize(
    ("number", "wire"),
    [
        (errno.EIO, 5),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EROFS, 1),
        (errno.ENOMEM, 12),
        (errno.EBADMSG, 5),
    ],
)
def test_errors_of_the_image_reach_the_client(failing: str, number: int, wire: int) -> None:
    FailingImage.failures = {"read": (number, 0), "write": (number, 0), "flush": (number, 0)}
    with connect(failing) as client:
        assert client.request(READ, 0, 512) == wire
        assert client.request(READ, 0, 2 * MIB) == wire
        assert client.request(WRITE, 0, 512, data=bytes(512)) == wire
        assert client.request(FLUSH) == wire
        FailingImage.failures = {}
        assert client.read(0, 4) == bytes(4)  # and the connection goes on


def test_an_error_behind_the_reply_header_ends_the_connection(failing: str) -> None:
    """ "Simple reply message": no other way is left to tell it."""
    FailingImage.failures = {"read": (errno.EIO, MIB)}
    with connect(failing) as client:
        client.send_request(READ, 0, 2 * MIB)
        with pytest.raises(EOFError):
            client.simple_reply(2 * MIB)


def test_a_flush_that_fails_at_the_end_is_told(failing: str) -> None:
    FailingImage.failures = {"flush": (errno.EIO, 0)}
    with pytest.raises(BlockError, match="flush failed: Input/output error") as caught:
        SERVICES[failing].exports.close("hd0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_noise(serve: Serve, file: str, seed: int) -> None:
    """Right beginnings, and then bytes that were changed here and there: whatever comes of it, the next
    client is served and a read-only image stays what it was."""
    before = Path(file).read_bytes()
    path = serve(Export("hd0", file, read_only=True), limits=Limits(handshake_seconds=5))
    chance = random.Random(seed)
    options = b"".join(
        b"IHAVEOPT" + struct.pack(">II", option, len(data)) + data
        for option, data in (
            (8, b""),
            (3, b""),
            (10, b"\0\0\0\3hd0\0\0\0\1\0\0\0\x0fbase:allocation"),
            (6, b"\0\0\0\3hd0\0\1\0\3"),
            (7, b"\0\0\0\3hd0\0\0"),
        )
    )
    requests = b"".join(
        struct.pack(">IHHQQI", 0x25609513, 0, command, 1, 512, 512) + bytes(512 if command == WRITE else 0)
        for command in (READ, WRITE, FLUSH, TRIM, CACHE, ZEROES, STATUS, RESIZE)
    )
    for _ in range(50):
        stream = bytearray(options + requests)
        for _ in range(chance.randrange(1, 6)):
            stream[chance.randrange(len(stream))] = chance.choice(
                (0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256))
            )
        with WireClient(path) as client:
            client.sock.sendall(stream[: chance.randrange(len(stream))])
            client.sock.shutdown(socket.SHUT_WR)
            try:
                while client.sock.recv(65536):
                    pass
            except ConnectionResetError:
                pass  # it had heard enough
    with connect(path) as client:
        assert client.read(0, 2 * MIB) == before
    wait_for_clients(path, 0)
