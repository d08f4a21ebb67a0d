"""Servers that lie (hardware-cases 17): one line of error each, never a hang, nothing beyond the request."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.nbd.remote import NbdImage
from coordinator.contract.errors import BlockError
from tests.blockd.nbd_client.script import (
    CONTEXT,
    EIO,
    Asked,
    Script,
    chunk,
    data,
    done,
    error,
    hole,
    leaving,
    name,
    negotiate,
    read,
    status,
    take,
)
from tests.support.nbd_wire import IHAVEOPT, NBDMAGIC, WireServer, option_reply, receive, simple_reply

#: a connection that a client gives up is closed: the script's next receive ends
Answer = Callable[[Asked], bytes]
LENGTH = 4096
AT = 8192


def until_closed(sock: socket.socket) -> None:
    try:
        while sock.recv(65536):
            pass
    except OSError:
        pass


def answering(answer: Answer, structured: bool = True) -> Script:
    def script(sock: socket.socket) -> None:
        negotiate(sock, structured=structured)
        try:
            sock.sendall(answer(take(sock)))
        except OSError:
            return  # the client had seen enough
        until_closed(sock)

    return script


def endless(piece: Answer) -> Script:
    def script(sock: socket.socket) -> None:
        negotiate(sock)
        asked = take(sock)
        try:
            while True:
                sock.sendall(piece(asked) * 16)
        except OSError:
            pass

    return script


READS: dict[str, tuple[Script, str]] = {
    "wrong cookie": (answering(lambda a: data(a.cookie + 1, AT, bytes(LENGTH))), "that was not made"),
    "wrong magic": (answering(lambda a: b"\xff" * 32), "without its magic number"),
    "simple reply": (answering(lambda a: simple_reply(a.cookie, 0, bytes(LENGTH))), "simple reply to a read"),
    "before it": (answering(lambda a: data(a.cookie, AT - 1, bytes(LENGTH))), "does not fit"),
    "behind it": (answering(lambda a: data(a.cookie, AT + LENGTH, bytes(1))), "does not fit"),
    "too long": (answering(lambda a: data(a.cookie, AT, bytes(LENGTH + 1))), "does not fit"),
    "much too long": (
        answering(lambda a: chunk(a.cookie, 1, struct.pack(">Q", AT), length=0xFFFFFFFF)), "does not fit"),
    "at the end of the world": (answering(lambda a: data(a.cookie, (1 << 64) - 1, bytes(1))), "does not fit"),
    "hole too long": (answering(lambda a: hole(a.cookie, AT, 0xFFFFFFFF)), "does not fit"),
    "empty hole": (answering(lambda a: hole(a.cookie, AT, 0)), "does not fit"),
    "half a hole": (answering(lambda a: chunk(a.cookie, 2, bytes(8))), "hole chunk of 8 bytes"),
    "no data": (answering(lambda a: chunk(a.cookie, 1, bytes(8))), "data chunk of 8 bytes"),
    "missing chunk": (answering(lambda a: data(a.cookie, AT, bytes(LENGTH - 1))), "do not make up"),
    "nothing": (answering(lambda a: done(a.cookie)), "do not make up"),
    "overlap": (
        answering(lambda a: data(a.cookie, AT, bytes(2048), 0) + data(a.cookie, AT + 1024, bytes(2048))),
        "do not make up"),
    "twice": (
        answering(lambda a: data(a.cookie, AT, bytes(LENGTH), 0) + data(a.cookie, AT, bytes(LENGTH))),
        "does not fit"),
    "done twice": (answering(lambda a: error(a.cookie, EIO) + error(a.cookie, EIO)), "read failed"),
    "extents": (answering(lambda a: status(a.cookie, (LENGTH, 0))), "not asked for"),
    "unknown chunk": (answering(lambda a: chunk(a.cookie, 77)), "unknown type"),
    "empty and not the last": (answering(lambda a: chunk(a.cookie, 0, flags=0)), "not the last"),
    "not empty": (answering(lambda a: chunk(a.cookie, 0, b"x")), "not empty"),
    "error without number": (answering(lambda a: error(a.cookie, 0)), "makes no sense"),
    "error that is cut": (
        answering(lambda a: chunk(a.cookie, 0x8001, struct.pack(">IH", 5, 100))), "makes no sense"),
    "error of half a number": (answering(lambda a: chunk(a.cookie, 0x8001, b"\0\0")), "chunk of 2 bytes"),
    "huge error": (
        answering(lambda a: chunk(a.cookie, 0x8001, length=0x7FFFFFFF)), "error chunk of 2147483647 bytes"),
    "errors without end": (endless(lambda a: error(a.cookie, EIO, b"no", 0)), "errors without end"),
    "bytes without end": (endless(lambda a: data(a.cookie, AT, b"x", 0)), "too many chunks|does not fit"),
}  # fmt: skip


@pytest.mark.parametrize("case", READS)
def test_reads(runtime: Path, case: str) -> None:
    script, words = READS[case]
    server = WireServer(str(runtime / "s"), script)
    image = NbdImage(name(str(runtime / "s")))
    buffer = bytearray(b"\xee" * (3 * LENGTH))
    with pytest.raises(OSError, match=words) as caught:
        image.read_into(AT, memoryview(buffer)[LENGTH : 2 * LENGTH])
    assert caught.value.errno == errno.EIO and "\n" not in str(caught.value)
    assert buffer[:LENGTH] + buffer[2 * LENGTH :] == b"\xee" * (2 * LENGTH)
    image.close()
    server.finish()


OTHERS: dict[str, tuple[Answer, bool, str]] = {
    "data for a write": (lambda a: data(a.cookie, 0, bytes(512)), True, "data for a request that is no read"),
    "extents for a write": (lambda a: status(a.cookie, (512, 0)), True, "not asked for"),
    "structured unasked": (lambda a: done(a.cookie), False, "magic number"),
    "wrong cookie": (lambda a: simple_reply(a.cookie ^ 1), False, "was not made"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_writes(runtime: Path, case: str) -> None:
    answer, structured, words = OTHERS[case]
    server = WireServer(str(runtime / "s"), answering(answer, structured))
    image = NbdImage(name(str(runtime / "s")))
    with pytest.raises(OSError, match=words):
        image.write(0, bytes(512))
    image.close()
    server.finish()


EXTENTS: dict[str, tuple[Answer, str]] = {
    "none": (lambda a: chunk(a.cookie, 5, struct.pack(">I", CONTEXT)), "of 4 bytes"),
    "done without": (lambda a: done(a.cookie), "without extents"),
    "simple": (lambda a: simple_reply(a.cookie), "without extents"),
    "half": (lambda a: chunk(a.cookie, 5, bytes(15)), "of 15 bytes"),
    "huge": (lambda a: chunk(a.cookie, 5, length=0x7FFFFFFC), "of 2147483644 bytes"),
    "other context": (lambda a: status(a.cookie, (512, 0), context=1), "context that was not asked for"),
    "no length": (lambda a: status(a.cookie, (512, 0), (0, 0)), "without length"),
    "twice": (lambda a: status(a.cookie, (512, 0), flags=0) + status(a.cookie, (512, 0)), "not asked for"),
}


@pytest.mark.parametrize("case", EXTENTS)
def test_block_status(runtime: Path, case: str) -> None:
    answer, words = EXTENTS[case]
    server = WireServer(str(runtime / "s"), answering(answer))
    image = NbdImage(name(str(runtime / "s")))
    with pytest.raises(OSError, match=words):
        list(image.extents(0, 1 << 20))
    image.close()
    server.finish()


def test_extents_that_reach_further_than_was_asked(runtime: Path) -> None:
    script = answering(lambda a: status(a.cookie, (512, 3), (0xFFFFFFFF, 0), (0xFFFFFFFF, 1)))
    server = WireServer(str(runtime / "s"), script)
    image = NbdImage(name(str(runtime / "s")))
    assert [extent.length for extent in image.extents(0, 4096)] == [512, 3584]
    image.close()
    server.finish()


def test_what_a_server_says_is_shown_on_one_line(runtime: Path) -> None:
    text = b"\x1b[31mdisk\x07 on fire\n" + b"x" * 4000
    server = WireServer(str(runtime / "s"), answering(lambda a: error(a.cookie, EIO, text)))
    image = NbdImage(name(str(runtime / "s")))
    with pytest.raises(OSError) as caught:
        read(image, 0, 512)
    assert caught.value.strerror == f"NBD server at {runtime}/s: read failed: ?[31mdisk? on fire"
    image.close()
    server.finish()


def test_a_violation_fails_all_that_is_in_flight_and_the_next_request_connects_again(runtime: Path) -> None:
    def good(sock: socket.socket) -> None:
        negotiate(sock)
        asked = take(sock)
        sock.sendall(data(asked.cookie, asked.offset, b"g" * asked.length))
        until_closed(sock)

    server = WireServer(str(runtime / "s"), answering(lambda a: done(a.cookie)), good)
    image = NbdImage(name(str(runtime / "s")))
    with pytest.raises(OSError):
        read(image, 0, 512)
    assert read(image, 0, 512) == b"g" * 512
    image.close()
    server.finish()


# ---- handshakes --------------------------------------------------------------------------------------
def told(size: int, *, flags: int = 0x6D, sizes: tuple[int, int, int] | None = None) -> Script:
    def script(sock: socket.socket) -> None:
        negotiate(sock, size, flags, sizes=sizes)
        until_closed(sock)

    return leaving(script)


def greeting(text: bytes) -> Script:
    def script(sock: socket.socket) -> None:
        sock.sendall(text)
        until_closed(sock)

    return leaving(script)


def options(*answers: bytes) -> Script:
    """Answer one option after the other."""

    def script(sock: socket.socket) -> None:
        sock.sendall(NBDMAGIC + IHAVEOPT + b"\0\3")
        receive(sock, 4)
        for answer in answers:
            receive(sock, struct.unpack(">12xI", receive(sock, 16))[0])
            sock.sendall(answer)
        until_closed(sock)

    return leaving(script)


NO = option_reply(8, 1 << 31 | 1)
HANDSHAKES: dict[str, tuple[Script, str]] = {
    "negative size": (told(-4096), "impossible size"),
    "blocks of no bytes": (told(1 << 20, sizes=(0, 512, 4096)), "impossible block sizes"),
    "odd blocks": (told(1 << 20, sizes=(3, 512, 4096)), "impossible block sizes"),
    "large blocks": (told(1 << 20, sizes=(1 << 17, 1 << 17, 1 << 17)), "serves only requests of"),
    "no maximum": (told(1 << 20, sizes=(1, 512, 0)), "serves only requests of"),
    "half a block": (told((1 << 20) + 512, sizes=(1024, 1024, 4096)), "in blocks of 1024"),
    "no greeting": (greeting(b"HTTP/1.1 400 Bad Request"), "is no NBD server"),
    "old style": (greeting(NBDMAGIC + bytes.fromhex("0000420281861253") + bytes(134)), "newstyle"),
    "huge reply": (options(struct.pack(">QIII", 0x3E889045565A9, 8, 1, 0xFFFFFFFF)), "4294967295 bytes"),
    "other option": (options(option_reply(7, 1)), "what was not asked"),
    "other context": (options(option_reply(8, 1), option_reply(10, 4, bytes(4) + b"base:o")), "not asked"),
    "contexts without end": (
        options(option_reply(8, 1), option_reply(10, 4, bytes(4) + b"base:allocation") * 100), "to an end"),
    "unknown export": (options(NO, option_reply(7, 1 << 31 | 6)), "has no export 'x'"),
    "only with TLS": (options(option_reply(8, 1 << 31 | 5)), "insists on TLS"),
    "refused at length": (options(NO, option_reply(7, 1 << 31 | 2, b"no\x1b\n" * 9999)), "'x': no\\?$"),
}  # fmt: skip


@pytest.mark.parametrize("case", HANDSHAKES)
def test_handshakes(runtime: Path, case: str) -> None:
    script, words = HANDSHAKES[case]
    server = WireServer(str(runtime / "s"), script)
    with pytest.raises(BlockError, match=words) as caught:
        NbdImage(name(str(runtime / "s")))
    assert "\n" not in str(caught.value)
    server.finish()
