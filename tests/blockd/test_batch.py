"""Batches of requests against a plain model of a disk: what C serves, what it leaves to others, and the seam
between the two. The connection is a script, so that what arrives together is known."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockd import batch as batches
from blockd.export import Counters, Export
from blockd.export_image import ProbedRawImage
from blockd.hostfile import HostFile
from blockd.image import Image
from blockd.nbd.handshake import Hangup, Negotiated
from blockd.nbd.transmission import Transmission
from blockd.opening import open_qcow2
from blockd.qcow2 import operations
from blockd.qcow2.direct import DirectClusters
from blockd.qcow2.image import Qcow2Image
from blockd.raw import RawImage
from coordinator.contract import config
from tests.blockd.qcow2.support import Model, make, qemu_check, qemu_reads, read
from tests.support.tools import run_tool

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE = 1, 2
EPERM, EIO, EINVAL, ENOSPC = 1, 5, 22, 28
SIZE = 1 << 20


class Script:
    """A socket that hands out these pieces, one a call, and keeps what is sent. It is all that a connection
    by TLS has in common with a plain one."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.sent = bytearray()

    def recv_into(self, view: memoryview) -> int:
        if not self._pieces:
            return 0
        piece = self._pieces.pop(0)
        length = min(len(piece), len(view))
        view[:length] = piece[:length]
        if piece[length:]:
            self._pieces.insert(0, piece[length:])
        return length

    def sendall(self, data: memoryview) -> None:
        self.sent += data


def request(
    command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0, cookie: int = 7
) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length or len(data)) + data


def serve(image: Image, pieces: list[bytes], structured: bool = False) -> tuple[bytes, Counters]:
    """What a connection to the image answers to these pieces, and what it has counted."""
    script, counters = Script(pieces), Counters()
    export = Export(config.Export("x", image.file), image, 1)
    agreed = Negotiated(export, script, structured)  # type: ignore[arg-type]
    Transmission(agreed, counters).run()
    return bytes(script.sent), counters


class Replies:
    """Replies, read one by one. "Simple reply message", "Structured reply chunk message"."""

    def __init__(self, data: bytes, structured: bool = False) -> None:
        self.data, self.structured = data, structured

    def _take(self, length: int) -> bytes:
        assert len(self.data) >= length, "replies are missing"
        taken, self.data = self.data[:length], self.data[length:]
        return taken

    def next(self, cookie: int, reads: tuple[int, int] | None = None) -> tuple[int, bytes]:
        """(error, data read) of the reply to that cookie; ``reads`` is the (offset, length) of a read."""
        if not self.structured:
            magic, error, found = struct.unpack(">IIQ", self._take(16))
            assert (magic, found) == (0x67446698, cookie)
            return error, self._take(reads[1]) if reads and not error else b""
        magic, flags, kind, found, length = struct.unpack(">IHHQI", self._take(20))
        assert (magic, flags, found) == (0x668E33EF, 1, cookie)
        body = self._take(length)
        if kind == 0x8001:
            return struct.unpack(">I", body[:4])[0], b""
        if reads is None:
            assert (kind, body) == (0, b"")
            return 0, b""
        assert kind == 1 and struct.unpack(">Q", body[:8])[0] == reads[0] and len(body) == 8 + reads[1]
        return 0, body[8:]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each batch has served in C."""
    counts: list[int] = []

    def counted(serve: Callable[..., None]) -> Callable[..., None]:
        def wrapper(direct: batches.Direct, batch: batches.Batch) -> None:
            serve(direct, batch)
            counts.append(batch.c.done)

        return wrapper

    for kind in (batches.DirectFile, DirectClusters):
        monkeypatch.setattr(kind, "serve", counted(kind.serve))
    return counts


# ---- images of every kind ----------------------------------------------------------------------------
def raw(folder: Path) -> tuple[Image, bytes]:
    data = random.Random(1).randbytes(SIZE)
    (folder / "disk").write_bytes(data)
    return RawImage(str(folder / "disk")), data


def probed(folder: Path) -> tuple[Image, bytes]:
    (folder / "disk").write_bytes(bytes(SIZE))
    return ProbedRawImage(str(folder / "disk")), bytes(SIZE)


def padded(folder: Path) -> tuple[Image, bytes]:
    """A CD-ROM that ends within a sector."""
    data = random.Random(1).randbytes(SIZE - 1000)
    (folder / "disk").write_bytes(data)
    return RawImage(str(folder / "disk"), read_only=True, granularity=2048, pad=True), data + bytes(1000)


def empty(*shape: int) -> Callable[[Path], tuple[Image, bytes]]:
    return lambda folder: (open_qcow2(make(folder / "disk", SIZE, shape)), bytes(SIZE))  # type: ignore[arg-type]


def backed(folder: Path) -> tuple[Image, bytes]:
    """The backing file ends within the disk, and within a cluster."""
    below = random.Random(2).randbytes(SIZE // 2 + 1536)
    (folder / "base").write_bytes(below)
    file = make(folder / "disk", SIZE, (4096, 3, 16), backing_file="base", backing_format="raw")
    return open_qcow2(file), below.ljust(SIZE, b"\0")


def compressed(folder: Path) -> tuple[Image, bytes]:
    data = b"".join(random.Random(n).randbytes(16) * 256 for n in range(SIZE // 4096))
    (folder / "plain").write_bytes(data)
    file = str(folder / "disk")
    run_tool("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", str(folder / "plain"), file)
    return open_qcow2(file), data


def shared(folder: Path) -> tuple[Image, bytes]:
    """Half of it belongs to a snapshot, too."""
    image = open_qcow2(make(folder / "disk", SIZE, (4096, 3, 16)))
    data = random.Random(3).randbytes(SIZE // 2)
    image.write(0, data)
    operations.create(image, "one", now=1.0)
    return image, data.ljust(SIZE, b"\0")


def tracked(folder: Path) -> tuple[Image, bytes]:
    """With a bitmap that follows changes."""
    file = make(folder / "disk", SIZE, (4096, 3, 16))
    run_tool("qemu-img", "bitmap", "--add", "-g", "4k", file, "one")
    return open_qcow2(file), bytes(SIZE)


def data_file(folder: Path) -> tuple[Image, bytes]:
    (folder / "data").write_bytes(bytes(SIZE))
    return open_qcow2(make(folder / "disk", SIZE, (4096, 3, 16), data_file="data")), bytes(SIZE)


def subclusters(folder: Path) -> tuple[Image, bytes]:
    file = str(folder / "disk")
    options = "extended_l2=on,cluster_size=16k"
    run_tool("qemu-img", "create", "-f", "qcow2", "-o", options, file, str(SIZE))
    return open_qcow2(file), bytes(SIZE)


MAKERS = {
    "raw": raw,
    "probed": probed,
    "padded": padded,
    "64K": empty(65536, 3, 16),
    "512": empty(512, 3, 8),
    "version 2": empty(4096, 2, 16),
    "backed": backed,
    "compressed": compressed,
    "shared": shared,
    "tracked": tracked,
    "data file": data_file,
    "subclusters": subclusters,
}


@pytest.fixture(params=MAKERS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Image, bytearray]]:
    image, content = MAKERS[request.param](tmp_path)
    yield request.param, image, bytearray(content)


def cluster_size(image: Image) -> int:
    """What a discard is rounded to."""
    return image.header.cluster_size if isinstance(image, Qcow2Image) else 1


class Traffic:
    """Random requests, and what each must be answered with."""

    def __init__(self, image: Image, content: bytearray, seed: int, base: int = 0) -> None:
        """``content`` is the disk from ``base`` on, as far as requests go."""
        self._rnd, self._base = random.Random(seed), base
        self._read_only = image.read_only
        self.model = Model(len(content), cluster_size(image))
        self.model.data = content
        #: (cookie, error, offset, expected data or None where none is read)
        self.expected: list[tuple[int, int, int, bytes | None]] = []
        self.counts = dict.fromkeys(Counters.__slots__, 0)

    def next(self) -> bytes:
        rnd, data, cookie = self._rnd, self.model.data, self._rnd.getrandbits(64)
        length = rnd.choice([1, 512, 512, 4096, 4096, 4096, 9000, 70000])
        # few places, so that requests overlap
        last = len(data) - length
        offset = rnd.choice([0, 4096, 65536, len(data) // 2, last, rnd.randrange(last + 1)])
        offset = min(offset + rnd.choice([0, 0, 1, 512]), last)
        command = rnd.choices([READ, WRITE, ZEROES, TRIM, FLUSH, CACHE], [40, 40, 3, 3, 1, 1])[0]
        flags = rnd.choices([0, FUA], [20, 1])[0]
        if rnd.random() < 0.03 and not self._base:
            offset = len(data) - length + 1  # past the end
        error = self._judge(command, offset, length)
        payload = rnd.randbytes(length) if command == WRITE else b""
        read = None
        if error:
            self.counts["errors"] += 1
        elif command == READ:
            read = bytes(data[offset : offset + length])
            self._count("reads", "read_bytes", length)
        elif command == WRITE:
            data[offset : offset + length] = payload
            self._count("writes", "write_bytes", length)
        elif command == ZEROES:
            data[offset : offset + length] = bytes(length)
            self._count("zeroes")
        elif command == TRIM:
            self.model.discarded(offset, length)
            self._count("zeroes")
        elif command == FLUSH:
            self._count("flushes")
        offset += self._base
        self.expected.append((cookie, error, offset, read))
        return request(command, offset, 0 if payload else length, payload, flags, cookie)

    def _judge(self, command: int, offset: int, length: int) -> int:
        """ "Error values": what each command is refused with."""
        if command == FLUSH:
            return 0
        if self._read_only and command in (WRITE, ZEROES, TRIM):
            return EPERM
        if offset + length > len(self.model.data):
            return ENOSPC if command in (WRITE, ZEROES) else EINVAL
        return 0

    def _count(self, name: str, other: str = "", length: int = 0) -> None:
        self.counts[name] += 1
        if other:
            self.counts[other] += length

    def check(self, replies: Replies) -> None:
        for cookie, error, offset, data in self.expected:
            found = replies.next(cookie, None if data is None else (offset, len(data)))
            assert found == (error, data or b"")
        assert not replies.data


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_random_batches(
    disk: tuple[str, Image, bytearray],
    seed: int,
    structured: bool,
    done: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where qemu-img looks for data files
    kind, image, content = disk
    if kind == "probed":  # nothing may make it begin like qcow2, and the first bytes are never plain to write
        content[:] = read(image)
    traffic = Traffic(image, content, seed)
    wire = b"".join(traffic.next() for _ in range(400))
    rnd = random.Random(seed)
    pieces = []
    while wire:
        length = rnd.choice([1, 30, 5000, 100000, 300000])
        pieces.append(wire[:length])
        wire = wire[length:]
    replies, counters = serve(image, pieces, structured)
    traffic.check(Replies(replies, structured))
    assert counters.as_dict() == traffic.counts
    assert max(done, default=0) > 3 or kind == "subclusters"
    assert read(image) == traffic.model.data
    if not isinstance(image, Qcow2Image):
        image.close()
        return
    image.close()
    qemu_check(str(tmp_path / "disk"))
    qemu_reads(str(tmp_path / "disk"), bytes(traffic.model.data), tmp_path)


@pytest.mark.parametrize("maker", [raw, compressed, shared])
def test_reads_of_what_is_not_in_memory(
    maker: Callable[[Path], tuple[Image, bytes]], tmp_path: Path, done: list[int]
) -> None:
    image, content = maker(tmp_path)
    image.flush()
    with open(image.file, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    offsets = [random.Random(6).randrange(SIZE - 9000) for _ in range(16)]
    replies = Replies(serve(image, [b"".join(request(READ, offset, 9000) for offset in offsets)])[0])
    for offset in offsets:
        assert replies.next(7, (offset, 9000)) == (0, content[offset : offset + 9000])
    image.close()


@pytest.mark.parametrize("kind", ["raw", "512", "backed", "shared"])
def test_several_connections(kind: str, tmp_path: Path, done: list[int]) -> None:
    """Each has its part of the disk, and takes clusters that the others have given up."""
    image, content = MAKERS[kind](tmp_path)
    part = len(content) // 4
    share = [Traffic(image, bytearray(content[n * part : (n + 1) * part]), n, n * part) for n in range(1, 4)]
    results: list[tuple[Traffic, bytes]] = []

    def work(traffic: Traffic) -> None:
        wire = b"".join(traffic.next() for _ in range(400))
        pieces = [wire[at : at + 50000] for at in range(0, len(wire), 50000)]
        results.append((traffic, serve(image, pieces)[0]))

    threads = [threading.Thread(target=work, args=(traffic,)) for traffic in share]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 and max(done) > 3
    for traffic, replies in results:
        traffic.check(Replies(replies))
    assert read(image) == content[:part] + b"".join(traffic.model.data for traffic in share)
    image.close()
    if isinstance(image, Qcow2Image):
        qemu_check(str(tmp_path / "disk"))


def test_requests_split_everywhere(disk: tuple[str, Image, bytearray], done: list[int]) -> None:
    """At every byte of a batch, and into single bytes."""
    _, image, content = disk
    rnd = random.Random(5)
    wanted: list[tuple[int, tuple[int, int] | None, bytes]]
    if image.read_only:
        wire = request(READ, 100, 20, cookie=1) + request(READ, SIZE - 1010, 20, cookie=2)
        wanted = [(1, (100, 20), bytes(content[100:120]))]
        wanted.append((2, (SIZE - 1010, 20), bytes(content[SIZE - 1010 : SIZE - 990])))
    else:
        writes = [(4090, rnd.randbytes(20)), (SIZE // 2, rnd.randbytes(7))]
        wire = request(WRITE, 4090, data=writes[0][1], cookie=1) + request(READ, 4085, 30, cookie=2)
        wire += request(WRITE, SIZE // 2, data=writes[1][1], cookie=3) + request(ZEROES, 4095, 2, cookie=4)
        wire += request(READ, 4090, 20, cookie=5)
        first = bytes(content[4085:4090] + writes[0][1] + content[4110:4115])
        last = writes[0][1][:5] + bytes(2) + writes[0][1][7:]
        wanted = [(1, None, b""), (2, (4085, 30), first), (3, None, b""), (4, None, b"")]
        wanted.append((5, (4090, 20), last))
    single = [wire[at : at + 1] for at in range(len(wire))]
    for pieces in [single, *([wire[:cut], wire[cut:]] for cut in range(1, len(wire) + 1))]:
        replies = Replies(serve(image, pieces)[0])
        for cookie, reads, data in wanted:
            assert replies.next(cookie, reads) == (0, data)
        assert not replies.data
    assert sum(done) or not image.direct()
    image.close()


def test_a_client_that_leaves_within_a_write_has_written_nothing(disk: tuple[str, Image, bytearray]) -> None:
    kind, image, content = disk
    if image.read_only:
        image.close()
        return
    # two writes: the first is there, and of the second whatever was sent is not
    wire = request(WRITE, 0, data=b"a" * 512) + request(WRITE, 4096, data=b"b" * 512)
    with pytest.raises(Hangup):
        serve(image, [wire[:-1]])
    assert read(image, 0, 8192) == b"a" * 512 + content[512:8192]
    image.close()


# ---- refusals in the middle of a batch ---------------------------------------------------------------
@pytest.mark.parametrize("structured", [False, True])
def test_refusals_in_the_middle_of_a_batch(
    disk: tuple[str, Image, bytearray], structured: bool, done: list[int]
) -> None:
    _, image, content = disk
    denied = EPERM if image.read_only else 0
    sent = [
        (request(READ, 0, 8), 0, (0, 8)),
        (request(READ, SIZE, 1), EINVAL, (SIZE, 1)),
        (request(READ, (1 << 64) - 4, 8), EINVAL, (0, 8)),
        (request(READ, 8, 8), 0, (8, 8)),
        (request(WRITE, SIZE - 4, data=b"12345678"), denied or ENOSPC, None),
        (request(WRITE, 4096, data=b"z" * 8), denied, None),
        (request(WRITE, 4096, data=b"y" * 8, flags=1 << 9), EINVAL, None),
        (request(READ, 0, 8, flags=1 << 9), EINVAL, (0, 8)),
        (request(WRITE, (1 << 64) - 4, data=b"x" * 8), denied or ENOSPC, None),
        (request(STATUS, 0, 512), EINVAL, None),
        (request(0xFFFF, 0, 0), EINVAL, None),
        (request(READ, SIZE // 2, 0), 0, (SIZE // 2, 0)),
        (request(READ, 4096, 8), 0, (4096, 8)),
    ]
    if not image.read_only:
        content[4096:4104] = b"z" * 8
    found, counters = serve(image, [b"".join(wire for wire, _, _ in sent)], structured)
    replies = Replies(found, structured)
    for _, error, reads in sent:
        data = bytes(content[reads[0] : sum(reads)]) if reads and not error else b""
        assert replies.next(7, reads) == (error, data)
    assert not replies.data
    assert counters.errors == sum(error != 0 for _, error, _ in sent)
    assert read(image) == content
    image.close()


def test_no_write_makes_a_guessed_raw_disk_look_like_qcow2(tmp_path: Path) -> None:
    image, _ = probed(tmp_path)
    wire = request(WRITE, 4, data=b"rest") + request(WRITE, 0, data=b"QFI\xfb")
    wire += request(WRITE, 0, data=b"QFI") + request(WRITE, 3, data=b"\xfb")
    wire += request(WRITE, 1, data=b"FI\xfb") + request(READ, 0, 8)
    replies = Replies(serve(image, [wire])[0])
    assert [replies.next(7)[0] for _ in range(5)] == [0, EPERM, 0, EPERM, EPERM]
    assert replies.next(7, (0, 8)) == (0, b"QFI\0rest")
    image.close()


# ---- system calls that fail --------------------------------------------------------------------------
def allocated(folder: Path) -> Image:
    """Every cluster has its place."""
    image = open_qcow2(make(folder / "disk", SIZE, (4096, 3, 16)))
    image.write(0, random.Random(1).randbytes(SIZE))
    return image


@pytest.fixture(params=["raw", "qcow2"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Image]:
    yield raw(tmp_path)[0] if request.param == "raw" else allocated(tmp_path)


def test_a_write_that_fails_in_the_middle_of_a_batch(full: Image, done: list[int]) -> None:
    """The file may not grow, or be written, beyond half of its size (RLIMIT_FSIZE)."""
    before = read(full)
    limit = os.path.getsize(full.file) // 2 // 4096 * 4096
    offsets = [0, SIZE - 4096, 8192, SIZE - 8192, 16384]
    wire = b"".join(request(WRITE, offset, data=b"n" * 4096, cookie=offset) for offset in offsets)
    wire += request(READ, SIZE - 4096, 4096)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        found, counters = serve(full, [wire])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    replies = Replies(found)
    assert [replies.next(offset)[0] for offset in offsets] == [0, ENOSPC, 0, ENOSPC, 0]
    assert replies.next(7, (SIZE - 4096, 4096)) == (0, before[-4096:])
    assert (counters.writes, counters.errors, counters.reads) == (5, 2, 1)
    assert done[0] == 1
    full.close()


def test_a_read_that_fails_in_the_middle_of_a_batch(tmp_path: Path, done: list[int]) -> None:
    """A raw image that somebody has truncated: an error there, and not zeroes."""
    image, content = raw(tmp_path)
    os.truncate(image.file, SIZE // 2)
    offsets = [0, SIZE // 2 - 100, SIZE // 2, 4096]
    wire = b"".join(request(READ, offset, 512, cookie=offset) for offset in offsets)
    found, counters = serve(image, [wire])
    replies = Replies(found)
    wanted = [(0, content[:512]), (EIO, b""), (EIO, b""), (0, content[4096:4608])]
    assert [replies.next(offset, (offset, 512)) for offset in offsets] == wanted
    assert (counters.reads, counters.errors) == (4, 2)
    image.close()


def test_a_qcow2_file_that_ends_early_reads_as_zeroes(tmp_path: Path) -> None:
    image = allocated(tmp_path)
    os.truncate(image.file, os.path.getsize(image.file) - 4096)
    replies = Replies(serve(image, [request(READ, SIZE - 4096, 4096) + request(READ, SIZE - 4100, 8)])[0])
    assert replies.next(7, (SIZE - 4096, 4096)) == (0, bytes(4096))
    assert replies.next(7, (SIZE - 4100, 8))[1][4:] == bytes(4)
    image.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_file_that_fails_altogether(full: Image, number: int) -> None:
    """Its descriptor is another one's for a while: /dev/full says ENOSPC to each write, and what was opened
    for writing only cannot be read."""
    fd = full.data.fd if isinstance(full, Qcow2Image) else full._fd  # type: ignore[attr-defined]
    kept = os.dup(fd)
    other = os.open("/dev/full" if number == errno.ENOSPC else "/dev/null", os.O_WRONLY)
    os.dup2(other, fd)
    try:
        wire = request(READ, 0, 512) + request(WRITE, 0, data=bytes(512)) + request(READ, 512, 512)
        replies = Replies(serve(full, [wire])[0])
    finally:
        os.dup2(kept, fd)
        os.close(kept)
        os.close(other)
    written = 0 if number == errno.EIO else ENOSPC
    assert [replies.next(7, (0, 0))[0] for _ in range(3)] == [EIO, written, EIO]
    full.close()


# ---- many clusters at one cost -----------------------------------------------------------------------
def test_one_sync_for_the_copies_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of the backing file is durable before any entry points to its copy, and replies come last."""
    image, _ = backed(tmp_path)
    serve(image, [request(WRITE, 4096 * n + 512, data=b"w" * 512) for n in range(17)])  # reserves clusters
    content = bytearray(read(image))
    log: list[str] = []
    write, sync, sendall = HostFile.write, HostFile.sync, Script.sendall

    def logged_write(host: HostFile, offset: int, data: bytes) -> None:
        log.append({8: "entry", 4096: "copy"}.get(len(data), "other"))
        write(host, offset, data)

    def logged_sync(host: HostFile) -> None:
        log.append("sync")
        sync(host)

    def logged_send(script: Script, data: memoryview) -> None:
        log.append("reply")
        sendall(script, data)

    monkeypatch.setattr(HostFile, "write", logged_write)
    monkeypatch.setattr(HostFile, "sync", logged_sync)
    monkeypatch.setattr(Script, "sendall", logged_send)
    wire = b"".join(request(WRITE, 4096 * (40 + n) + 100, data=b"n" * 512) for n in range(8))
    replies = Replies(serve(image, [wire])[0])
    assert [replies.next(7)[0] for _ in range(8)] == [0] * 8
    assert log == ["copy"] * 8 + ["sync"] + ["entry"] * 8 + ["reply"]
    for n in range(8):
        content[4096 * (40 + n) + 100 : 4096 * (40 + n) + 612] = b"n" * 512
    assert read(image) == content
    image.close()
    qemu_check(str(tmp_path / "disk"))


@pytest.mark.parametrize("failing", ["write", "sync"])
def test_copies_that_fail(tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write is told so, and the image holds what it held."""
    image, _ = backed(tmp_path)
    serve(image, [request(WRITE, 512, data=b"w" * 512)])
    content = read(image)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "injected")

    with monkeypatch.context() as patch:
        patch.setattr(HostFile, failing, fail)
        wire = b"".join(request(WRITE, 4096 * (40 + n) + 100, data=b"n" * 512) for n in range(4))
        replies = Replies(serve(image, [wire])[0])
    assert [replies.next(7)[0] for _ in range(4)] == [EIO] * 4
    assert read(image) == content
    image.close()
    qemu_check(str(tmp_path / "disk"), leaks_allowed=True)
    qemu_reads(str(tmp_path / "disk"), content, tmp_path)


def test_an_entry_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of four: the others' clusters are where they should be, and nothing but a leak is left."""
    image, _ = backed(tmp_path)
    serve(image, [request(WRITE, 512, data=b"w" * 512)])
    content = bytearray(read(image))
    write, entries = HostFile.write, []

    def third_fails(host: HostFile, offset: int, data: bytes) -> None:
        if len(data) == 8:
            entries.append(offset)
            if len(entries) == 3:
                raise OSError(errno.EIO, "injected")
        write(host, offset, data)

    monkeypatch.setattr(HostFile, "write", third_fails)
    wire = b"".join(request(WRITE, 4096 * (40 + n), data=b"n" * 512) for n in range(4))
    replies = Replies(serve(image, [wire])[0])
    for n in range(4):
        assert replies.next(7)[0] == 0  # the write found another way
        content[4096 * (40 + n) : 4096 * (40 + n) + 512] = b"n" * 512
    assert read(image) == content
    image.close()
    qemu_check(str(tmp_path / "disk"), leaks_allowed=True)
    qemu_reads(str(tmp_path / "disk"), bytes(content), tmp_path)


def test_what_a_bitmap_says_of_writes_in_place(tmp_path: Path, done: list[int]) -> None:
    """qemu-nbd is asked for the bitmap."""
    file = str(tmp_path / "disk")
    options = "cluster_size=4k,preallocation=metadata"
    run_tool("qemu-img", "create", "-f", "qcow2", "-o", options, file, str(SIZE))
    run_tool("qemu-img", "bitmap", "--add", "-g", "4k", file, "one")
    image = open_qcow2(file)
    read(image)  # its tables are in memory from here on
    wire = request(WRITE, 3 * 4096 + 100, data=b"1" * 10) + request(WRITE, 9 * 4096, data=b"2" * 8192)
    serve(image, [wire + request(READ, 20 * 4096, 4096)])
    assert done[0] == 3
    image.close()
    server = ["--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", "one", file, "]"]
    told = json.loads(run_tool("nbdinfo", "--json", "--map=qemu:dirty-bitmap:one", *server))
    dirty = [(extent["offset"], extent["length"]) for extent in told if extent["type"]]
    assert dirty == [(3 * 4096, 4096), (9 * 4096, 8192)]
    qemu_check(file)
