"""Connections that break: what was in flight is sent again in its order, what is not durable is repeated."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.nbd import client, unflushed
from blockd.nbd.client import Client
from blockd.nbd.remote import NbdImage
from blockd.nbd.replies import Request
from blockd.nbd.uri import parse
from coordinator.contract.nbd import Command
from tests.blockd.nbd_client.conftest import Foreign
from tests.blockd.nbd_client.script import (
    ABLE,
    EIO,
    FLUSH,
    MIB,
    READ,
    WRITE,
    ZEROES,
    Asked,
    Script,
    data,
    done,
    error,
    leaving,
    name,
    negotiate,
    read,
    take,
)
from tests.support.nbd_wire import IHAVEOPT, NBDMAGIC, WireServer, option_reply, receive

PATIENT = 60  # seconds; a test that needs them has failed


def patient(path: str) -> str:
    return name(path, reconnect_delay=PATIENT)


def answer(sock: socket.socket, asked: Asked) -> None:
    if asked.command == READ:
        sock.sendall(data(asked.cookie, asked.offset, b"r" * asked.length))
    else:
        sock.sendall(done(asked.cookie))


class Session:
    """A script: take and answer ``answered`` requests, take ``taken`` more, and cut the connection."""

    def __init__(self, answered: int, taken: int = 0, size: int = MIB, flags: int = ABLE) -> None:
        self.seen: list[Asked] = []
        self._counts = answered, taken
        self._size, self._flags = size, flags

    def __call__(self, sock: socket.socket) -> None:
        negotiate(sock, self._size, self._flags)
        answered, taken = self._counts
        for number in range(answered + taken):
            self.seen.append(take(sock))
            if number < answered:
                answer(sock, self.seen[-1])

    def told(self) -> list[tuple[int, int, bytes]]:
        return [(asked.command, asked.offset, asked.data) for asked in self.seen]


def test_what_was_in_flight_is_sent_again_in_its_order(runtime: Path) -> None:
    first, second = Session(0, 3), Session(3)
    server = WireServer(str(runtime / "s"), first, second)
    made = Client(parse(patient(str(runtime / "s"))))
    buffer = bytearray(512)
    made.call(
        Request(Command.WRITE, 0, 3, memoryview(b"one")),
        Request(Command.WRITE, 1, 3, memoryview(b"two")),
        Request(Command.READ, 4096, 512, memoryview(buffer)),
    )
    assert first.told() == second.told() == [(WRITE, 0, b"one"), (WRITE, 1, b"two"), (READ, 4096, b"")]
    assert buffer == b"r" * 512
    made.close()
    server.finish()


def test_a_reply_that_was_cut_is_forgotten(runtime: Path) -> None:
    def cut(sock: socket.socket) -> None:
        negotiate(sock)
        asked = take(sock)
        sock.sendall(data(asked.cookie, 0, b"x" * 100, 0) + data(asked.cookie, 100, b"y" * 412)[:200])

    server = WireServer(str(runtime / "s"), cut, Session(1))
    image = NbdImage(patient(str(runtime / "s")))
    assert read(image, 0, 512) == b"r" * 512
    image.close()
    server.finish()


def test_writes_that_are_not_durable_are_repeated(runtime: Path) -> None:
    """Acknowledged, not flushed, and the server comes back as if its machine had lost power: everything
    since the last flush comes again, one after the other, before anything else. A write with FUA does too
    where an older write would else land on it."""
    first, second = Session(6), Session(4)
    server = WireServer(str(runtime / "s"), first, second)
    image = NbdImage(patient(str(runtime / "s")))
    image.write(0, b"durable")
    image.flush()
    image.write(0, b"alone", fua=True)
    image.write(10, b"one")
    image.write_zeroes(12, 4, unmap=False, fast=False)
    image.write(11, b"two", fua=True)
    image.flush()
    assert [asked[0] for asked in first.told()] == [WRITE, FLUSH, WRITE, WRITE, ZEROES, WRITE]
    repeated = [(WRITE, 10, b"one"), (ZEROES, 12, b""), (WRITE, 11, b"two")]
    assert second.told() == [*repeated, (FLUSH, 0, b"")]
    assert second.seen[1].flags == first.seen[4].flags and second.seen[2].flags == 0
    image.close()
    server.finish()


def test_a_repeated_write_that_fails_makes_the_flush_fail(runtime: Path) -> None:
    def second(sock: socket.socket) -> None:
        negotiate(sock)
        asked = take(sock)
        assert (asked.command, asked.data) == (WRITE, b"one")
        sock.sendall(error(asked.cookie, EIO))
        for _ in range(2):
            answer(sock, take(sock))
        take(sock)

    server = WireServer(str(runtime / "s"), Session(1), second)
    image = NbdImage(patient(str(runtime / "s")))
    image.write(0, b"one")
    with pytest.raises(OSError, match="may be lost") as caught:
        image.flush()
    assert caught.value.errno == errno.EIO
    image.flush()  # said once
    image.close()
    server.finish()


def test_the_client_flushes_before_too_much_waits(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unflushed, "MOST_BYTES", 1000)
    session = Session(6)
    server = WireServer(str(runtime / "s"), session)
    image = NbdImage(name(str(runtime / "s")))
    for _ in range(4):
        image.write(0, b"x" * 600)
    image.close()
    server.finish()
    assert [asked.command for asked in session.seen] == [WRITE, WRITE, FLUSH, WRITE, WRITE, FLUSH]


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (Session(0, size=2 * MIB), "has changed: 1048576 bytes became 2097152"),
        (Session(0, size=-512), "impossible size"),
        (Session(0, flags=ABLE | 2), "has changed"),
    ],
)
def test_an_export_that_is_another_one(runtime: Path, second: Script, words: str) -> None:
    server = WireServer(str(runtime / "s"), Session(0, 1), leaving(second))
    image = NbdImage(name(str(runtime / "s"), reconnect_delay=0))
    with pytest.raises(OSError, match=words) as caught:
        read(image, 0, 512)
    assert caught.value.errno == errno.EIO
    image.close()
    server.finish()


def test_a_server_that_takes_its_time_to_come_back(runtime: Path) -> None:
    """Until then nobody listens; then the handshake is cut; then an export is not there yet (hardware-cases
    25: the whole handshake is tried again)."""
    path = str(runtime / "s")

    def first(sock: socket.socket) -> None:
        negotiate(sock)
        take(sock)

    server = WireServer(path, first)
    image = NbdImage(patient(path))
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(read(image, 0, 512)))
    thread.start()
    server.finish()  # the listener is gone, and its name with it
    Path(path).unlink()

    def cut(sock: socket.socket) -> None:
        sock.sendall(b"NBDM")

    later = WireServer(path, cut, without_the_export, Session(1))
    thread.join(PATIENT)
    later.finish()
    assert got == [b"r" * 512]
    image.close()


def without_the_export(sock: socket.socket) -> None:
    sock.sendall(NBDMAGIC + IHAVEOPT + b"\0\3")
    receive(sock, 4)
    for option, answer_kind in ((8, 1), (10, 1 << 31 | 6), (7, 1 << 31 | 6)):
        header = receive(sock, 16)
        receive(sock, int.from_bytes(header[12:], "big"))
        sock.sendall(option_reply(option, answer_kind))


def test_patience_has_an_end(runtime: Path) -> None:
    server = WireServer(str(runtime / "s"), Session(0, 1))
    image = NbdImage(name(str(runtime / "s"), reconnect_delay=0.05))
    with pytest.raises(OSError, match="cannot connect again") as caught:
        read(image, 0, 512)
    assert caught.value.errno == errno.EIO
    server.finish()
    with pytest.raises(OSError, match="cannot be reached|cannot connect again"):
        image.write(0, b"x")
    image.close()


def test_a_request_that_no_connection_answers(runtime: Path) -> None:
    sessions = [Session(0, 1) for _ in range(client.MOST_ATTEMPTS)]
    server = WireServer(str(runtime / "s"), *sessions)
    image = NbdImage(patient(str(runtime / "s")))
    with pytest.raises(OSError, match="gave no answer on 8 connections"):
        image.write(0, b"x")
    image.close()
    server.finish()
    assert all(session.told() == [(WRITE, 0, b"x")] for session in sessions)


def test_silence_has_an_end(runtime: Path) -> None:
    """A server that takes requests and says nothing, again and again."""

    def silent(sock: socket.socket) -> None:
        negotiate(sock)
        take(sock)
        while sock.recv(100):
            pass

    server = WireServer(str(runtime / "s"), *[silent] * client.MOST_ATTEMPTS)
    image = NbdImage(name(str(runtime / "s"), answer_timeout=0.05, reconnect_delay=PATIENT))
    with pytest.raises(OSError, match="gave no answer"):
        image.write(0, b"x")
    image.close()
    server.finish()


def test_a_server_that_takes_nothing(runtime: Path) -> None:
    """A write that does not fit into the socket."""

    def deaf(sock: socket.socket) -> None:
        negotiate(sock, 64 * MIB)
        released.wait(PATIENT)

    released = threading.Event()
    server = WireServer(str(runtime / "s"), deaf)
    image = NbdImage(name(str(runtime / "s"), answer_timeout=0.05, reconnect_delay=0))
    with pytest.raises(OSError):
        image.write(0, bytes(32 * MIB))
    released.set()
    image.close()
    server.finish()


# ---- real servers, killed in the middle of a transfer -----------------------------------------------
@pytest.mark.parametrize("tool", ["nbdkit", "qemu-nbd"])
def test_a_server_killed_in_the_middle(
    runtime: Path, tmp_path: Path, foreign: Callable[..., Foreign], tool: str
) -> None:
    """Four threads write, read and compare while their server is killed and started again; then the file is
    what they have written."""
    file = tmp_path / "disk"
    file.write_bytes(bytes(8 * MIB))
    path = str(runtime / "s")
    arguments = ["file", str(file)] if tool == "nbdkit" else ["-f", "raw", "-x", "x", str(file)]
    server = foreign(tool, *arguments, socket=path)
    image = NbdImage(patient(path))
    models = [bytearray(2 * MIB) for _ in range(4)]
    failures: list[BaseException] = []
    steps = threading.Semaphore(0)

    def work(number: int) -> None:
        rnd, model, base = random.Random(number), models[number], number * 2 * MIB
        try:
            for _ in range(120):
                length = rnd.choice([512, 4096, 65536, 300000])
                offset = rnd.randrange(2 * MIB - length)
                if rnd.random() < 0.6:
                    model[offset : offset + length] = rnd.randbytes(length)
                    image.write(base + offset, model[offset : offset + length])
                elif rnd.random() < 0.2:
                    image.flush()
                else:
                    assert read(image, base + offset, length) == model[offset : offset + length]
                steps.release()
        except BaseException as failure:
            failures.append(failure)
            steps.release(1000)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        for _ in range(70):
            steps.acquire()
        server.kill()
        Path(path).unlink(missing_ok=True)
        server.start()
    for thread in threads:
        thread.join()
    assert not failures
    image.flush()
    image.close()
    assert file.read_bytes() == b"".join(models)
