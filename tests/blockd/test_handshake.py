"""The NBD handshake, by the protocol's text and against it ("Newstyle negotiation"; CVE-2017-15118,
CVE-2017-15119, CVE-2019-14851, CVE-2024-7409)."""

import socket
import struct
from pathlib import Path

import pytest

from blockd.nbd.server import Limits
from coordinator.contract.config import Export, Media
from tests.blockd.conftest import SERVICES, Serve, make_image
from tests.support.nbd_wire import IHAVEOPT, NBDMAGIC, WireClient

ERR = 1 << 31
ACK = (1, b"")
LIST, INFO, GO, STRUCTURED, LIST_META, SET_META = 3, 6, 7, 8, 9, 10


@pytest.fixture
def disk(tmp_path: Path) -> Export:
    return Export("hd0", make_image(tmp_path / "disk"))


def test_greeting(serve: Serve, disk: Export) -> None:
    with WireClient(serve(disk)) as client:
        assert client.greeting == NBDMAGIC + IHAVEOPT + b"\0\3"  # fixed newstyle, no zeroes


def test_list_info_and_go(serve: Serve, disk: Export, tmp_path: Path) -> None:
    cd = Export("cd0", make_image(tmp_path / "cd", 4096), media=Media.CDROM)
    with WireClient(serve(disk, cd)) as client:
        assert client.option(LIST) == [(2, b"\0\0\0\3hd0disk, raw"), (2, b"\0\0\0\3cd0cdrom, raw"), ACK]
        wish = b"\0\0\0\3hd0" + b"\0\3" + b"\0\1" + b"\0\2" + b"\0\3"
        told = dict((reply[:2], reply[2:]) for kind, reply in client.option(INFO, wish) if kind == 3)
        assert told[b"\0\1"] == b"hd0" and b"disk" in told[b"\0\2"]
        size, flags = struct.unpack(">QH", told[b"\0\0"])
        # has flags, flush, FUA, trim, write zeroes, multi-conn, cache, fast zero
        assert (size, flags) == (1 << 20, 0b1101_0110_1101)
        assert struct.unpack(">III", told[b"\0\3"]) == (1, 4096, 32 << 20)
        replies = client.go("cd0")
        size, flags = struct.unpack(">QH", replies[0][1][2:])
        assert size == 4096 and flags & 2 and not flags & 0b1000_0110_0000
        assert replies[-1] == ACK
        assert client.read(0, 512) == bytes(512)


def test_export_name_with_and_without_zeroes(serve: Serve, disk: Export) -> None:
    path = serve(disk)
    for flags, zeroes in ((3, 0), (1, 124)):
        with WireClient(path, flags) as client:
            client.send_option(1, b"hd0")
            reply = b""
            while len(reply) < 10 + zeroes:
                reply += client.sock.recv(10 + zeroes - len(reply))
            assert reply[:8] == (1 << 20).to_bytes(8, "big") and reply[10:] == bytes(zeroes)
            assert client.read(512, 4) == b"\1\0\0\0"


def test_default_export_is_the_only_one(serve: Serve, disk: Export, tmp_path: Path) -> None:
    with WireClient(serve(disk)) as client:
        assert client.go("")[-1] == ACK
    one, two = (Export(name, make_image(tmp_path / name)) for name in ("a", "b"))
    with WireClient(serve(one, two)) as client:
        assert client.go("")[-1][0] == ERR | 6


def test_unknown_export(serve: Serve, disk: Export) -> None:
    path = serve(disk)
    with WireClient(path) as client:
        assert client.go("hd1")[-1][0] == ERR | 6
        assert client.go("\xff\0")[-1][0] == ERR | 6
        assert client.go("hd0")[-1] == ACK  # one more try is allowed
    with WireClient(path) as client:
        client.send_option(1, b"hd1")
        assert client.closed_by_server()


def test_abort(serve: Serve, disk: Export) -> None:
    with WireClient(serve(disk)) as client:
        assert client.option(2) == [ACK]
        assert client.closed_by_server()


@pytest.mark.parametrize("option", [0, 4, 11, 0xFFFFFFFF])
def test_unknown_options_are_refused_and_skipped(serve: Serve, disk: Export, option: int) -> None:
    with WireClient(serve(disk)) as client:
        assert client.option(option, b"x" * 100)[0][0] == ERR | 1
        assert client.go("hd0")[-1] == ACK


@pytest.mark.parametrize("flags", [0, 2, 4, 7, 0xFFFFFFFF])
def test_client_flags_that_are_none(serve: Serve, disk: Export, flags: int) -> None:
    with WireClient(serve(disk), flags) as client:
        assert client.closed_by_server()


def test_option_without_magic(serve: Serve, disk: Export) -> None:
    with WireClient(serve(disk)) as client:
        client.sock.sendall(bytes(16))
        assert client.closed_by_server()


@pytest.mark.parametrize("length", [3000, 4096])
def test_long_export_name(serve: Serve, disk: Export, length: int) -> None:
    """CVE-2017-15118: a name of 3,000 bytes."""
    path = serve(disk)
    with WireClient(path) as client:
        assert client.go("n" * length)[-1][0] == ERR | 6
        client.send_option(1, b"n" * length)
        assert client.closed_by_server()


def test_name_longer_than_any_string(serve: Serve, disk: Export) -> None:
    path = serve(disk)
    with WireClient(path) as client:
        assert client.go("n" * 4097)[-1][0] == ERR | 3
        client.send_option(1, b"n" * 4097)
        assert client.closed_by_server()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\3hd",
        b"\0\0\0\3hd0",
        b"\0\0\0\3hd0\0",
        b"\0\0\0\3hd0\0\1",
        b"\0\0\0\3hd0\0\0x",
        b"\xff\xff\xff\xffhd0\0\0",
        b"\x7f\xff\xff\xffhd0\0\0",
    ],
)
def test_malformed_go(serve: Serve, disk: Export, data: bytes) -> None:
    with WireClient(serve(disk)) as client:
        assert client.option(GO, data)[0][0] == ERR | 3
        assert client.option(INFO, data)[0][0] == ERR | 3
        assert client.go("hd0")[-1] == ACK


def test_data_where_there_is_none(serve: Serve, disk: Export) -> None:
    with WireClient(serve(disk)) as client:
        assert client.option(LIST, b"x")[0][0] == ERR | 3
        assert client.option(STRUCTURED, b"x")[0][0] == ERR | 3


def test_huge_option_of_a_slow_client(serve: Serve, disk: Export) -> None:
    """CVE-2017-15119: what was announced costs nothing, and the time for it ends."""
    path = serve(disk, limits=Limits(handshake_seconds=0.2))
    with WireClient(path) as client:
        client.send_option(GO, b"slow", length=60_000)
        assert client.closed_by_server()
    with WireClient(path) as client:
        assert client.option(GO, bytes(1 << 20))[0][0] == ERR | 9
    with WireClient(path) as client:
        client.send_option(GO, length=0xFFFFFFFF)
        assert client.closed_by_server()


def test_a_client_that_says_nothing(serve: Serve, disk: Export) -> None:
    path = serve(disk, limits=Limits(handshake_seconds=0.1))
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(20)
        silent.connect(path)
        while silent.recv(18):
            pass


def test_too_many_clients(serve: Serve, disk: Export) -> None:
    path = serve(disk, limits=Limits(connections=2))
    with WireClient(path) as one, WireClient(path) as two:
        with socket.socket(socket.AF_UNIX) as third:
            third.settimeout(20)
            third.connect(path)
            assert third.recv(18) == b""
        assert one.go("hd0")[-1] == ACK and two.go("hd0")[-1] == ACK


def test_meta_context_wants_structured_replies_first(serve: Serve, disk: Export) -> None:
    """CVE-2019-14851: options in the wrong order."""
    query = b"\0\0\0\3hd0\0\0\0\1\0\0\0\x0fbase:allocation"
    with WireClient(serve(disk)) as client:
        assert client.option(SET_META, query)[0][0] == ERR | 3
        assert client.option(LIST_META, query)[0][0] == ERR | 3
        assert client.option(STRUCTURED) == [ACK]
        chosen = client.option(SET_META, query)
        assert chosen[0][0] == 4 and chosen[0][1][4:] == b"base:allocation" and chosen[1] == ACK
        assert client.option(LIST_META, b"\0\0\0\3hd0\0\0\0\0")[0] == (4, bytes(4) + b"base:allocation")
        assert client.option(LIST_META, b"\0\0\0\3hd0\0\0\0\1\0\0\0\5base:")[0] == (
            4,
            bytes(4) + b"base:allocation",
        )
        assert client.option(SET_META, b"\0\0\0\3hd0\0\0\0\1\0\0\0\4qemu") == [ACK]
        assert client.option(SET_META, b"\0\0\0\3hd0\0\0\0\0") == [ACK]
        assert client.option(SET_META, b"\0\0\0\3hd1\0\0\0\0")[0][0] == ERR | 6


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\3hd0",
        b"\0\0\0\3hd0\0\0\0\1",
        b"\0\0\0\3hd0\0\0\0\1\0\0\0\5base",
        b"\0\0\0\3hd0\xff\xff\xff\xff",
        b"\0\0\0\3hd0\0\0\0\0x",
        b"\0\0\0\3hd0\0\0\0\1\xff\xff\xff\xffbase:allocation",
    ],
)
def test_malformed_meta_context(serve: Serve, disk: Export, data: bytes) -> None:
    with WireClient(serve(disk)) as client:
        assert client.option(STRUCTURED) == [ACK]
        assert client.option(SET_META, data)[0][0] == ERR | 3
        assert client.go("hd0")[-1] == ACK


def test_context_of_another_export_is_none(serve: Serve, disk: Export, tmp_path: Path) -> None:
    other = Export("hd1", make_image(tmp_path / "other"))
    with WireClient(serve(disk, other)) as client:
        assert client.option(STRUCTURED) == [ACK]
        client.option(SET_META, b"\0\0\0\3hd1\0\0\0\1\0\0\0\x0fbase:allocation")
        assert client.go("hd0")[-1] == ACK
        client.send_request(7, 0, 512)
        _, kind, _, body = client.chunk()
        assert kind == 0x8001 and body[:4] == b"\0\0\0\x16"  # EINVAL


def test_clients_connected_at_shutdown(serve: Serve, disk: Export) -> None:
    """CVE-2024-7409: in the greeting, in the middle of an option, and in transmission."""
    path = serve(disk)
    with WireClient(path) as early, WireClient(path) as middle, WireClient(path) as late:
        middle.send_option(GO, b"abc", length=100)
        assert late.go("hd0")[-1] == ACK
        late.sock.sendall(b"\x25\x60\x95\x13 half a request")
        SERVICES[path].stop()
        for client in (early, middle, late):
            assert client.closed_by_server()
