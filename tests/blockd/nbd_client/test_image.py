"""An export as an image: against nbdkit, qemu-nbd and our own server, with a bytearray as the judge."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.export_image import open_image
from blockd.image import Extent
from blockd.nbd.remote import NbdImage
from blockd.nbd.replies import Request
from coordinator.contract.config import Export
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import Command
from tests.blockd.conftest import Serve, make_image
from tests.blockd.nbd_client.conftest import Foreign, Start
from tests.blockd.nbd_client.script import (
    ABLE,
    CACHE,
    ENOTSUP,
    FAST_ZERO,
    FLUSH,
    HAS_FLAGS,
    MIB,
    READ,
    READ_ONLY,
    SEND_CACHE,
    STATUS,
    TRIM,
    WRITE,
    ZEROES,
    Asked,
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
from tests.support.nbd_wire import WireServer, simple_reply

SIZE = 4 * MIB


def exercise(image: NbdImage, rnd: random.Random, steps: int, start: int = 0, size: int = SIZE) -> None:
    """Random requests, compared with a bytearray; the range has been zero."""
    model = bytearray(size)
    for _ in range(steps):
        length = min(rnd.choice([1, 511, 512, 4096, 70000, MIB]), size)
        offset = rnd.randrange(size - length + 1)
        kind = rnd.random()
        if kind < 0.4:
            model[offset : offset + length] = rnd.randbytes(length)
            image.write(start + offset, model[offset : offset + length], fua=kind < 0.05)
        elif kind < 0.6:
            model[offset : offset + length] = bytes(length)
            image.write_zeroes(start + offset, length, unmap=kind < 0.5, fast=False, fua=kind < 0.45)
        elif kind < 0.65:
            image.flush()
        elif kind < 0.7:
            image.prefetch(start + offset, length)
        else:
            assert read(image, start + offset, length) == model[offset : offset + length]
    assert read(image, start, size) == model


def test_nbdkit_memory(nbdkit: Start) -> None:
    image = NbdImage(name(nbdkit("memory", f"size={SIZE}")))
    assert (image.size, image.format, image.read_only) == (SIZE, "raw", False)
    exercise(image, random.Random(1), 150)
    image.trim(0, SIZE)
    image.close()


def test_qemu_nbd(qemu_nbd: Start, tmp_path: Path) -> None:
    file = make_image(tmp_path / "disk", SIZE, 0)
    image = NbdImage(name(qemu_nbd("-f", "raw", "-x", "x", file)))
    exercise(image, random.Random(2), 150)
    last = read(image, 0, SIZE)
    image.flush()
    image.close()
    assert Path(file).read_bytes() == last


def test_our_own_server(serve: Serve, tmp_path: Path) -> None:
    file = make_image(tmp_path / "disk", SIZE, 0)
    image = NbdImage(name(serve(Export("x", file))))
    exercise(image, random.Random(3), 150)
    image.close()


def test_many_threads_on_one_connection(nbdkit: Start) -> None:
    """nbdkit serves 16 requests of a connection at once, and the filter lets them end in another order."""
    path = nbdkit("memory", f"size={8 * SIZE}", "--filter=delay", "rdelay=1ms", "wdelay=2ms")
    image = NbdImage(name(path))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            exercise(image, random.Random(number), 60, number * SIZE)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    image.close()


def test_extents(nbdkit: Start, qemu_nbd: Start, serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "sparse"
    with open(file, "wb") as sparse:
        sparse.truncate(8 * MIB)
        sparse.seek(2 * MIB)
        sparse.write(b"d" * MIB)
    gap, content = Extent(2 * MIB, True, True), Extent(MIB, False, False)
    for path in (
        qemu_nbd("-f", "raw", "-r", "-x", "x", str(file)),
        nbdkit("-r", "file", str(file)),
        serve(Export("x", str(file), read_only=True)),
    ):
        image = NbdImage(name(path), read_only=True)
        assert list(image.extents(0, 8 * MIB)) == [gap, content, Extent(5 * MIB, True, True)]
        inside = [Extent(512, True, True), Extent(1024, False, False)]
        assert list(image.extents(2 * MIB - 512, 1536)) == inside
        image.close()
    image = NbdImage(name(nbdkit("--filter=noextents", "-r", "file", str(file))), read_only=True)
    assert {extent[1:] for extent in image.extents(0, 8 * MIB)} == {(False, False)}
    image.close()


def test_names_of_exports(nbdkit: Start) -> None:
    """nbdkit's info plugin serves the name that was asked for."""
    path = nbdkit("info", "exportname")
    for export, quoted in (("hello world", "hello%20world"), ("/a", "/a"), ("ä", "%C3%A4")):
        image = NbdImage(name(path, quoted), read_only=True, granularity=1)
        assert read(image, 0, image.size).decode() == export
        image.close()
    path = nbdkit("--filter=exportname", "memory", "size=1M", "default-export=one", "exportname=one",
                  "exportname-strict=true")  # fmt: skip
    NbdImage(name(path, "one")).close()
    with pytest.raises(BlockError, match="export 'two'"):
        NbdImage(name(path, "two"))


def test_content_that_is_known(nbdkit: Start) -> None:
    """The pattern plugin: each eight bytes are their own offset, big-endian; here beyond 32 bits."""
    image = NbdImage(name(nbdkit("pattern", "size=1T")), read_only=True)
    at = (1 << 40) - 64
    assert read(image, at, 64) == b"".join((at + n).to_bytes(8, "big") for n in range(0, 64, 8))
    assert read(image, 3, 9) == (bytes(8) + (8).to_bytes(8, "big"))[3:12]
    image.close()


def test_over_tcp(foreign: Callable[..., Foreign], runtime: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    foreign("nbdkit", "-i", "127.0.0.1", "-p", str(port), "memory", f"size={SIZE}")
    for spelling in (f"nbd://127.0.0.1:{port}/", f"nbd://localhost:{port}", f"nbd:127.0.0.1:{port}"):
        image = NbdImage(spelling)
        image.write(512, b"x" * 512)
        assert read(image, 0, 1024) == bytes(512) + b"x" * 512
        image.write_zeroes(512, 512, unmap=True, fast=False)
        image.close()


def test_errors_of_a_server(nbdkit: Start) -> None:
    path = nbdkit("--filter=error", "memory", "size=1M", "error-pread=EIO", "error-pread-rate=1",
                  "error-pwrite=ENOSPC", "error-pwrite-rate=1")  # fmt: skip
    image = NbdImage(name(path))
    for number, request in (
        (errno.EIO, lambda: read(image, 0, 4096)),
        (errno.ENOSPC, lambda: image.write(0, b"x" * 4096)),
    ):
        with pytest.raises(OSError) as caught:
            request()
        assert caught.value.errno == number and "\n" not in str(caught.value)
        assert path in str(caught.value)
    image.flush()  # the connection is as good as before
    image.close()


def test_blocks_of_a_server(nbdkit: Start) -> None:
    """nbdkit's filter refuses with EINVAL whatever is not aligned, or too long."""
    path = nbdkit("--filter=blocksize-policy", "memory", f"size={SIZE}", "blocksize-minimum=4096",
                  "blocksize-preferred=64k", "blocksize-maximum=128k", "blocksize-error-policy=error",
                  )  # fmt: skip
    image = NbdImage(name(path))
    exercise(image, random.Random(4), 150)
    image.trim(100, 10000)
    image.prefetch(100, 10000)
    assert sum(extent.length for extent in image.extents(100, 10000)) == 10000
    image.close()


def test_read_only(nbdkit: Start) -> None:
    path = nbdkit("-r", "memory", "size=1M")
    with pytest.raises(BlockError, match="is served read-only"):
        NbdImage(name(path))
    image = NbdImage(name(path), read_only=True)
    assert read(image, 0, 512) == bytes(512)
    image.close()


def test_odd_sizes(nbdkit: Start) -> None:
    path = nbdkit("data", "data=(@0x7 1)*1000")
    with pytest.raises(BlockError, match="size .* is not a multiple of 512 bytes"):
        NbdImage(name(path), read_only=True)
    empty = name(nbdkit("memory", "size=0"))
    image = NbdImage(empty, read_only=True)
    assert image.size == 0 and list(image.extents(0, 0)) == []
    image.close()
    with pytest.raises(BlockError, match="is empty"):
        open_image(Export("hd0", empty, read_only=True))
    path = nbdkit("memory", "size=1000")
    image = NbdImage(name(path), pad=True, granularity=2048)
    image.write(990, b"0123456789")
    assert (image.size, read(image, 980, 1068)) == (2048, bytes(10) + b"0123456789" + bytes(1048))
    assert list(image.extents(1000, 1048)) == [Extent(1048, True, True)]
    with pytest.raises(OSError) as caught:
        image.write(990, b"0123456789x")
    assert caught.value.errno == errno.ENOSPC
    image.close()


# ---- what is on the wire -----------------------------------------------------------------------------
def answers(sock: socket.socket, seen: list[Asked]) -> None:
    """Say yes to everything until the client leaves."""
    while True:
        asked = take(sock)
        seen.append(asked)
        if asked.command == 2:
            return
        if asked.command == READ:
            sock.sendall(data(asked.cookie, asked.offset, bytes(asked.length)))
        elif asked.command == STATUS:
            sock.sendall(status(asked.cookie, (asked.length, 0)))
        else:
            sock.sendall(done(asked.cookie))


def on_the_wire(
    path: str, flags: int, use: Callable[[NbdImage], None], **how: object
) -> list[tuple[int, int, int, int]]:
    """(command, flags, offset, length) of all requests but the last, a good-bye."""
    seen: list[Asked] = []

    def script(sock: socket.socket) -> None:
        negotiate(sock, flags=flags, **how)  # type: ignore[arg-type]
        answers(sock, seen)

    server = WireServer(path, script)
    image = NbdImage(name(path), read_only=bool(flags & READ_ONLY))
    use(image)
    image.close()
    server.finish()
    assert seen[-1].command == 2
    return [(a.command, a.flags, a.offset, a.length) for a in seen[:-1]]


FUA, NO_HOLE, FAST = 1, 2, 16


def test_requests_on_the_wire(runtime: Path) -> None:
    def use(image: NbdImage) -> None:
        image.write(0, b"x" * 10)
        image.write(0, b"x" * 10, fua=True)
        image.write_zeroes(512, 512, unmap=True, fast=False)
        image.write_zeroes(512, 512, unmap=False, fast=True, fua=True)
        image.trim(1024, 512)
        image.prefetch(0, 512)
        image.flush()
        list(image.extents(0, 4096))

    assert on_the_wire(str(runtime / "s"), ABLE | SEND_CACHE | FAST_ZERO, use) == [
        (WRITE, 0, 0, 10),
        (WRITE, FUA, 0, 10),
        (ZEROES, 0, 512, 512),
        (ZEROES, NO_HOLE | FAST | FUA, 512, 512),
        (TRIM, 0, 1024, 512),
        (CACHE, 0, 0, 512),
        (FLUSH, 0, 0, 0),
        (STATUS, 0, 0, 4096),
    ]


def test_a_server_that_can_do_nothing(runtime: Path) -> None:
    """Hints are not sent, zeroes are written, and a fast way to zeroes is denied."""

    def use(image: NbdImage) -> None:
        image.write(0, b"x" * 10, fua=True)
        image.write_zeroes(512, 512, unmap=True, fast=False)
        with pytest.raises(OSError) as caught:
            image.write_zeroes(512, 512, unmap=True, fast=True)
        assert caught.value.errno == errno.EOPNOTSUPP
        image.trim(1024, 512)
        image.prefetch(0, 512)
        image.flush()
        assert list(image.extents(0, 4096)) == [Extent(4096, False, False)]

    told = on_the_wire(str(runtime / "s"), HAS_FLAGS, use, context=False)
    assert told == [(WRITE, 0, 0, 10), (WRITE, 0, 512, 512)]


def test_flush_instead_of_fua(runtime: Path) -> None:
    flags = ABLE & ~8
    told = on_the_wire(str(runtime / "s"), flags, lambda image: image.write(0, b"x", fua=True))
    assert told == [(WRITE, 0, 0, 1), (FLUSH, 0, 0, 0)]


def test_long_requests_end_where_the_server_prefers(runtime: Path) -> None:
    def use(image: NbdImage) -> None:
        read(image, 1024, 24 << 10)

    told = on_the_wire(str(runtime / "s"), ABLE | READ_ONLY, use, sizes=(512, 4096, 9000))
    assert told == [
        (READ, 0, 1024, 7 << 10),
        (READ, 0, 8192, 8 << 10),
        (READ, 0, 16384, 8 << 10),
        (READ, 0, 24576, 1024),
    ]


def test_chunks_in_any_order(runtime: Path) -> None:
    def script(sock: socket.socket) -> None:
        negotiate(sock)
        cookie = take(sock).cookie
        sock.sendall(
            data(cookie, 4096, b"b" * 100, 0) + hole(cookie, 4196, 3996, 0) + data(cookie, 0, b"a" * 4096)
        )
        take(sock)

    server = WireServer(str(runtime / "s"), script)
    image = NbdImage(name(str(runtime / "s")))
    assert read(image, 0, 8192) == b"a" * 4096 + b"b" * 100 + bytes(3996)
    image.close()
    server.finish()


def test_replies_in_any_order(runtime: Path) -> None:
    """Three pieces of one read, answered from the last to the first and in turns."""

    def script(sock: socket.socket) -> None:
        negotiate(sock, sizes=(1, 4096, 4096))
        one, two, three = take(sock), take(sock), take(sock)
        sock.sendall(data(three.cookie, 8192, b"c" * 4096) + data(one.cookie, 0, b"a" * 100, 0))
        sock.sendall(data(two.cookie, 4096, b"b" * 4096) + data(one.cookie, 100, b"A" * 3996))
        take(sock)

    server = WireServer(str(runtime / "s"), script)
    image = NbdImage(name(str(runtime / "s")))
    assert read(image, 0, 12288) == b"a" * 100 + b"A" * 3996 + b"b" * 4096 + b"c" * 4096
    image.close()
    server.finish()


def read_and_write(image: NbdImage, size: int) -> Request:
    """Both by one thread: nobody waits for replies while the write is sent. Returns the read."""
    asked = Request(Command.READ, 0, size, memoryview(bytearray(size)))
    image._client.call(asked, Request(Command.WRITE, 0, size, memoryview(bytearray(size))))
    return asked


def test_a_server_that_answers_before_it_takes_more(runtime: Path) -> None:
    """Neither side's buffers hold a request or an answer: the client reads while it sends."""
    size = 16 * MIB

    def script(sock: socket.socket) -> None:
        negotiate(sock, size=size)
        asked = take(sock)
        sock.sendall(data(asked.cookie, 0, b"r" * size))
        sock.sendall(done(take(sock).cookie))
        take(sock)

    server = WireServer(str(runtime / "s"), script)
    image = NbdImage(name(str(runtime / "s"), reconnect_delay=0))
    asked = read_and_write(image, size)
    assert asked.view == b"r" * size
    image.close()
    server.finish()


def test_nonsense_that_comes_while_a_request_is_sent(runtime: Path) -> None:
    """It ends what is in flight, as it does at any other time."""

    def script(sock: socket.socket) -> None:
        negotiate(sock, size=16 * MIB)
        take(sock)
        sock.sendall(bytes(64))
        while sock.recv(65536):
            pass

    server = WireServer(str(runtime / "s"), leaving(script))
    image = NbdImage(name(str(runtime / "s"), reconnect_delay=0))
    with pytest.raises(OSError, match="broke the protocol: reply without its magic number"):
        read_and_write(image, 16 * MIB)
    image.close()
    server.finish()


def test_many_threads_that_read_and_write_at_once(nbdkit: Start) -> None:
    """A server whose worker threads all answer reads takes no more writes meanwhile."""
    policy = ("--filter=blocksize-policy", "blocksize-maximum=64k", "blocksize-error-policy=error")
    image = NbdImage(name(nbdkit("memory", "64M", *policy), reconnect_delay=0))
    errors: list[OSError] = []

    def work(index: int) -> None:
        at, buffer = index * 16 * MIB, memoryview(bytearray(16 * MIB))
        try:
            image.read_into(at, buffer) if index % 2 else image.write(at, buffer)
        except OSError as reason:
            errors.append(reason)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    image.close()


def test_a_server_of_simple_replies(runtime: Path) -> None:
    def script(sock: socket.socket) -> None:
        negotiate(sock, structured=False)
        sock.sendall(simple_reply(take(sock).cookie, 0, b"r" * 512))
        sock.sendall(simple_reply(take(sock).cookie, 28))
        take(sock)

    server = WireServer(str(runtime / "s"), script)
    image = NbdImage(name(str(runtime / "s")))
    assert read(image, 0, 512) == b"r" * 512
    with pytest.raises(OSError) as caught:
        image.write(0, b"x")
    assert caught.value.errno == errno.ENOSPC
    image.close()
    server.finish()


def test_zeroes_that_are_not_supported_are_written(runtime: Path) -> None:
    seen: list[int] = []

    def script(sock: socket.socket) -> None:
        negotiate(sock)
        asked = take(sock)
        sock.sendall(error(asked.cookie, ENOTSUP))
        asked = take(sock)
        seen.append(asked.command)
        sock.sendall(done(asked.cookie))
        seen.append(take(sock).command)

    server = WireServer(str(runtime / "s"), script)
    image = NbdImage(name(str(runtime / "s")))
    image.write_zeroes(0, 4096, unmap=True, fast=False)
    image.close()
    server.finish()
    assert seen == [WRITE, 2]


def test_nobody_listens(runtime: Path) -> None:
    with pytest.raises(BlockError) as caught:
        NbdImage(name(str(runtime / "none")))
    assert str(caught.value) == f"NBD server at {runtime}/none: cannot connect: No such file or directory"
    with pytest.raises(BlockError, match="cannot connect: .*name|cannot connect: .*Name|resolution"):
        NbdImage("nbd://no-such-host.invalid/")
    with pytest.raises(BlockError, match="cannot connect"):
        NbdImage("nbd+unix:///?socket=" + "x" * 200)
