"""Loss of power: the image is clean or has leaks only, and everything that had been flushed is there.

Writers that leave a sync out, or sync too late, must be caught by these very tests.
"""

from __future__ import annotations

import contextlib
import random
import select
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from blockd import export_image as exports
from blockd.opening import open_qcow2
from blockd.qcow2 import operations
from blockd.service import Service
from coordinator.contract.config import Export
from coordinator.contract.errors import BlockError
from tests.blockd.qcow2.anatomy import Anatomy
from tests.blockd.qcow2.crashing import SHAPES, features, no_corruption
from tests.blockd.qcow2.power import SECTOR, LoggedImage, PowerLog
from tests.blockd.qcow2.support import Model, make, qemu_check, read, step
from tests.support.nbd_wire import WireClient
from tests.support.tools import run_tool

SIZE = 1 << 20
GRANULE = 65536
KINDS = ("plain", "below", "data file", "bitmap")
Sectors = npt.NDArray[np.bool_]


@dataclass
class Mark:
    """What was known when the log had this length."""

    at: int
    #: the disk as far as it has been flushed
    kept: bytes
    #: sectors that may be anything, since something newer may have reached the disk
    unknown: Sectors


class Disk:
    """An image whose power fails."""

    def __init__(self, folder: Path, seed: int, log: PowerLog) -> None:
        self.folder, self.seed, self.log = folder, seed, log
        self.shape = SHAPES[seed % len(SHAPES)]
        self.kind = KINDS[seed % len(KINDS)] if self.shape[1] >= 3 else KINDS[seed % 2]
        below, how = b"", features(self.shape)
        if self.kind == "below":
            below = random.Random(seed).randbytes(SIZE // 2)
            (folder / "base").write_bytes(below)
            how |= {"backing_file": "base", "backing_format": "raw"}
        elif self.kind == "data file":
            # what lies there must not come to light
            (folder / "disk.data").write_bytes(random.Random(seed).randbytes(SIZE))
            how |= {"data_file": "disk.data"}
        self.file = make(folder / "disk.qcow2", SIZE, self.shape, **how)
        self.model = Model(SIZE, self.shape[0], below)
        self._fill()
        if self.kind == "bitmap":
            run_tool("qemu-img", "bitmap", "--add", "-g", "64k", self.file, "one")
        names = ["disk.qcow2", "disk.data"] if self.kind == "data file" else ["disk.qcow2"]
        self.files = {name: (folder / name).read_bytes() for name in names}
        self.discards = self.shape[1] >= 3 or self.kind != "below"
        self.start = bytes(self.model.data)
        self.marks = [Mark(0, self.start, np.zeros(SIZE // SECTOR, bool))]

    def _fill(self) -> None:
        """Some clusters are there already, so that the first write may be one in place."""
        image = open_qcow2(self.file)
        for offset in range(SIZE // 4, SIZE // 2, 96 << 10):
            data = random.Random(offset).randbytes(64 << 10)
            self.model.data[offset : offset + len(data)] = data
            image.write(offset, data)
        image.close()

    def mark(self, kept: bytes, unknown: Sectors) -> None:
        self.marks.append(Mark(len(self.log), kept, unknown.copy()))

    def lose_power(self, times: int) -> None:
        """At random moments; each time, what is left must be as it should."""
        rnd = random.Random(self.seed)
        lost = self.folder / "lost"
        lost.mkdir()
        if self.kind == "below":
            (lost / "base").write_bytes((self.folder / "base").read_bytes())
        file = str(lost / "disk.qcow2")
        for _ in range(times):
            moment = self._moment(rnd)
            for name, data in self.log.lose(moment, self.files, rnd).items():
                (lost / name).write_bytes(data)
            no_corruption(file)
            self._judge(file, moment)
        with contextlib.chdir(lost):  # where qemu-img looks for data files
            qemu_check(file, leaks_allowed=True)

    def _moment(self, rnd: random.Random) -> int:
        """The first changes and the last ones are of their own kind; and a writer that has left out a sync
        is known by what it does next."""
        moments = [rnd.randrange(len(self.log) + 1), rnd.randrange(12), len(self.log) - rnd.randrange(12)]
        if self.log.spoilt:
            moments += [rnd.choice(self.log.spoilt) + rnd.randrange(1, 6) for _ in range(6)]
        return max(0, min(len(self.log), rnd.choice(moments)))

    def _judge(self, file: str, moment: int) -> None:
        mark = [mark for mark in self.marks if mark.at <= moment][-1]
        after = next((mark for mark in self.marks if mark.at > moment), mark)
        unknown = np.repeat(mark.unknown | after.unknown, SECTOR)
        image = open_qcow2(file, read_only=True)
        content = read(image)
        image.close()
        found = np.frombuffer(content, np.uint8)
        if self.kind == "bitmap":
            changed = {at // GRANULE for at in range(0, SIZE, SECTOR) if self._differs(content, at)}
            assert changed <= _dirty(Path(file).read_bytes()), "a bitmap is out of date and does not say so"
        wrong = (found != np.frombuffer(mark.kept, np.uint8)) & ~unknown
        text = f"{int(wrong.sum())} flushed bytes are lost at change {moment} of {len(self.log)}"
        assert not wrong.any(), text

    def _differs(self, content: bytes, at: int) -> bool:
        return content[at : at + SECTOR] != self.start[at : at + SECTOR]


def _dirty(data: bytes) -> set[int]:
    """Granules that the only bitmap says have changed: all of them when it says that it is out of date."""
    parts = {part.role: part.offset for part in Anatomy(data).parts}
    (flags,) = struct.unpack_from(">I", data, parts["bitmap directory"] + 12)
    (entry,) = struct.unpack_from(">Q", data, parts["bitmap table"])
    if flags & 1 or entry == 1:
        return set(range(SIZE // GRANULE))
    bits = int.from_bytes(data[entry : entry + 8], "little") if entry else 0
    return {number for number in range(SIZE // GRANULE) if bits >> number & 1}


# ---- one writer -----------------------------------------------------------------------------------------
def one_writer(folder: Path, seed: int, log: PowerLog, losses: int) -> None:
    disk = Disk(folder, seed, log)
    image = open_qcow2(disk.file, open_file=log.open)
    model, rnd = disk.model, random.Random(seed)
    flushed, dirty = bytes(model.data), np.zeros(SIZE // SECTOR, bool)
    for number in range(60):
        before = bytes(model.data)
        whole: Callable[[], object] | None = None
        if number % 7 == 6:
            whole = image.flush
        elif number in (22, 23, 40) and disk.kind != "data file":
            name = f"s{number}"
            whole = lambda name=name: operations.create(image, name, now=1.0)  # noqa: E731
        elif number == 50 and disk.kind != "data file":
            whole = lambda: operations.delete(image, "s22")  # noqa: E731
        if whole is not None:
            whole()
            flushed, dirty = before, np.zeros(SIZE // SECTOR, bool)
        else:
            # what is being written is unknown from its first byte on
            action = step(model, rnd, whole=False, discards=disk.discards)
            offset, length = model.touched
            dirty[offset // SECTOR : (offset + length) // SECTOR] = True
            disk.mark(flushed, dirty)
            action(image)
        disk.mark(flushed, dirty)
    image.close()
    disk.lose_power(losses)


# ---- clients of the server ----------------------------------------------------------------------------
WRITE, FLUSH, TRIM, ZEROES, FUA = 1, 3, 4, 6, 1


@dataclass
class Request:
    kind: int
    start: int
    data: bytes
    fua: bool
    #: for a flush: the disk with all that had been answered when it was sent, and what had not
    covers: tuple[bytes, Sectors] | None = None
    done: bool = False

    @property
    def sectors(self) -> slice:
        return slice(self.start // SECTOR, (self.start + len(self.data)) // SECTOR)


class Clients:
    """Two connections, each to its half of the disk, with many requests under way; a flush on one counts
    for both, as multi-conn promises."""

    DEPTH = 8

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk, self._rnd = disk, random.Random(disk.seed)
        self._clients = [WireClient(path) for _ in range(2)]
        for client in self._clients:
            client.go("hd0")
        self._pending, self._requests = [0, 0], list[Request]()
        self._kept, self._unknown = bytearray(disk.start), np.zeros(SIZE // SECTOR, bool)

    def work(self, requests: int) -> None:
        while len(self._requests) < requests or any(self._pending):
            for number in range(2):
                while len(self._requests) < requests and self._pending[number] < self.DEPTH:
                    self._send(number)
            ready, _, _ = select.select([client.sock for client in self._clients], [], [])
            for number, client in enumerate(self._clients):
                if client.sock in ready:
                    error, cookie, _ = client.simple_reply()
                    assert not error
                    self._pending[number] -= 1
                    self._answered(self._requests[cookie], cookie)
        for client in self._clients:
            client.sock.close()

    def _send(self, number: int) -> None:
        rnd, half = self._rnd, SIZE // 2
        length = rnd.choice([512, 1536, 4096, 65536])
        offset = number * half + rnd.randrange(0, half - length + 1) // SECTOR * SECTOR
        kind = rnd.choice([WRITE, WRITE, WRITE, WRITE, ZEROES, TRIM, FLUSH])
        fua = kind != FLUSH and rnd.random() < 0.15
        start, data, payload = offset, bytes(length), b""
        if kind == WRITE:
            payload = data = rnd.randbytes(length)
        elif kind == TRIM:
            mask = self._disk.shape[0] - 1
            start, end = (offset + mask) & ~mask, (offset + length) & ~mask
            data = bytes(max(0, end - start)) if self._disk.discards else b""
        elif kind == FLUSH:
            start = offset = length = 0
            data = b""
        request = Request(kind, start, data, fua)
        if kind == FLUSH:
            request.covers = self._now()
        self._requests.append(request)
        self._unknown[request.sectors] = True
        self._disk.mark(bytes(self._kept), self._unknown)
        self._pending[number] += 1
        head = struct.pack(">IHHQQI", 0x25609513, fua, kind, len(self._requests) - 1, offset, length)
        self._clients[number].sock.sendall(head + payload)

    def _now(self) -> tuple[bytes, Sectors]:
        """The disk by the requests that have been answered, and where others may have been served."""
        disk, unknown = bytearray(self._disk.start), np.zeros(SIZE // SECTOR, bool)
        for request in self._requests:
            if request.done:
                disk[request.start : request.start + len(request.data)] = request.data
            unknown[request.sectors] = not request.done
        return bytes(disk), unknown

    def _answered(self, request: Request, cookie: int) -> None:
        request.done = True
        later = self._requests[cookie + 1 :]
        if request.covers is not None:
            kept, self._unknown = request.covers[0], request.covers[1].copy()
            self._kept = bytearray(kept)
            for other in later:
                self._unknown[other.sectors] = True
        elif request.fua:
            newer = np.zeros(SIZE // SECTOR, bool)
            for other in later:
                newer[other.sectors] = True
            for sector in range(request.sectors.start, request.sectors.stop):
                if not newer[sector]:
                    at = sector * SECTOR
                    inside = at - request.start
                    self._kept[at : at + SECTOR] = request.data[inside : inside + SECTOR]
                    self._unknown[sector] = False
        else:
            return
        self._disk.mark(bytes(self._kept), self._unknown)


def two_clients(folder: Path, seed: int, log: PowerLog, losses: int) -> None:
    disk = Disk(folder, seed, log)

    service = Service()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(exports.FORMATS, "qcow2", lambda wanted: LoggedImage(wanted.file, log))
        service.exports.open(Export("hd0", disk.file, "qcow2"))
    path = str(folder / "nbd")
    service.listen(path)
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        Clients(disk, path).work(150)
    finally:
        service.stop()
        thread.join()
    disk.lose_power(losses)


# ---- tests -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(12))
def test_one_writer(tmp_path: Path, seed: int) -> None:
    one_writer(tmp_path, seed, PowerLog(), losses=30)


@pytest.mark.parametrize("seed", range(12))
def test_two_clients_of_the_server(tmp_path: Path, seed: int) -> None:
    two_clients(tmp_path, seed, PowerLog(), losses=30)


#: functions that call for a sync, and the seed that shows soonest what becomes of one without it
SYNCS = {
    "_reserve": 0,
    "_allocate": 0,
    "_allocate_external": 6,
    "_add_block": 4,
    "writable_table": 0,
    "_make_durable": 1,
    "write_tables": 0,
    "flush": 0,
    "_begin": 7,
    "store": 7,
}


def caught(folder: Path, log: Callable[[], PowerLog], hint: int) -> bool:
    """Is what is wrong with this writer seen, whatever the seed?"""
    for seed in (hint, *range(20)):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            try:
                one_writer(Path(place), seed, log(), losses=60)
            except (AssertionError, OSError, BlockError):
                return True
    return False


@pytest.mark.parametrize("function", SYNCS)
def test_a_writer_that_leaves_out_one_sync_is_caught(tmp_path: Path, function: str) -> None:
    assert caught(tmp_path, lambda: PowerLog(deaf=frozenset({function})), SYNCS[function])


@pytest.mark.parametrize(
    ("function", "hint"), [("_reserve", 2), ("_allocate", 0), ("_make_durable", 1), ("flush", 0)]
)
def test_a_writer_that_syncs_too_late_is_caught(tmp_path: Path, function: str, hint: int) -> None:
    """Behind the write that must not be on the disk before what was written earlier."""
    assert caught(tmp_path, lambda: PowerLog(late=frozenset({function})), hint)


def test_a_server_whose_group_commit_leaves_out_its_sync_is_caught(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, OSError, BlockError)):
        for seed in range(12):
            (tmp_path / str(seed)).mkdir()
            two_clients(tmp_path / str(seed), seed, PowerLog(deaf=frozenset({"_settle"})), 60)


@pytest.mark.parametrize("test", [one_writer, two_clients])
def test_a_writer_that_never_syncs_is_caught(
    tmp_path: Path, test: Callable[[Path, int, PowerLog, int], None]
) -> None:
    with pytest.raises((AssertionError, OSError, BlockError)):
        for seed in range(4):
            (tmp_path / str(seed)).mkdir()
            test(tmp_path / str(seed), seed, PowerLog(frozenset("*")), 40)
