"""Writes that fail or are torn, at each kind of change to a file: what had been done before stays true.

``EXPECTED`` lists the changes that an image knows, by what they change; a first run without a fault
finds out which change of which operation is of which kind, and every kind must be among those that
are then made to fail (item 24 of the inputs that have broken emulators).
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blockd.hostfile import HostFile
from blockd.opening import open_qcow2
from blockd.qcow2 import operations
from blockd.qcow2.check import repair
from blockd.qcow2.compression import compress
from blockd.qcow2.image import Qcow2Image
from coordinator.contract.errors import BlockError
from tests.blockd.qcow2.anatomy import Anatomy
from tests.blockd.qcow2.crashing import either, no_corruption
from tests.blockd.qcow2.support import SECTOR, Model, make, qemu_check, read
from tests.support.tools import run_tool

SIZE = 1 << 20
#: a table of one cluster of 512 bytes names 64 refcount blocks; with refcounts of 64 bits each counts 64
#: clusters, so that it ends at 2 MiB; the tables of so many clusters take a part of that
FILLED = 1900 << 10
#: points that are tried of each kind of change in each run; all kinds are tried
POINTS_OF_A_KIND = 2


# ---- a file that fails -------------------------------------------------------------------------------
@dataclass
class Faults:
    """Which change fails, and how; and a log of all of them, over all files of an image."""

    at: int | None = None
    number: int = errno.EIO
    torn: bool = False
    #: (kind of call, is it the external data file, offset, bytes)
    log: list[tuple[str, bool, int, int]] = field(default_factory=list)

    def open(self, file: str, read_only: bool) -> HostFile:
        return _FaultyFile(file, read_only, self)

    def due(self, call: str, file: str, offset: int, length: int) -> bool:
        self.log.append((call, file.endswith(".data"), offset, length))
        return len(self.log) - 1 == self.at

    def fail(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


class _FaultyFile(HostFile):
    """Fails at one of its changes: writes nothing, or all but the last sectors of a longer write."""

    def __init__(self, file: str, read_only: bool, faults: Faults) -> None:
        super().__init__(file, read_only)
        self._faults = faults

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if not self._faults.due("write", self.file, offset, len(data)):
            return super().write(offset, data)
        sectors = (offset % SECTOR + len(data)) // SECTOR
        if self._faults.torn and sectors:
            super().write(offset, memoryview(data)[: (sectors + 1) // 2 * SECTOR - offset % SECTOR])
        self._faults.fail()

    def zero(self, offset: int, length: int) -> None:
        if self._faults.due("zero", self.file, offset, length):
            self._faults.fail()
        super().zero(offset, length)

    def resize(self, size: int) -> None:
        if self._faults.due("resize", self.file, size, 0):
            self._faults.fail()
        super().resize(size)

    def sync(self) -> None:
        if self._faults.due("sync", self.file, 0, 0):
            self._faults.fail()
        super().sync()


# ---- what is done ----------------------------------------------------------------------------------------
@dataclass
class Script:
    """Operations on an image, and the disk as it is after each."""

    image: Qcow2Image
    model: Model
    steps: list[tuple[bytes, Callable[[], object]]] = field(default_factory=list)
    rnd: random.Random = field(default_factory=lambda: random.Random(9))

    def write(self, offset: int, length: int) -> None:
        data = self.rnd.randbytes(length)
        self.model.data[offset : offset + length] = data

        def write() -> None:
            if offset + length > self.image.size:
                raise BlockError("the disk could not be resized before")
            self.image.write(offset, data)

        self.then(write)

    def zeroes(self, offset: int, length: int, unmap: bool = True) -> None:
        self.model.data[offset : offset + length] = bytes(length)
        self.then(lambda: self.image.write_zeroes(offset, length, unmap, False))

    def packed(self, offset: int) -> None:
        size = self.model.cluster_size
        data = bytes(self.rnd.choices(b"\1\2", k=size))
        self.model.data[offset : offset + size] = data
        self.then(lambda: self.image.write_compressed(offset, compress(data, "zlib")))

    def resize(self, size: int) -> None:
        self.model.data = self.model.data[:size].ljust(size, b"\0")
        self.then(lambda: operations.resize(self.image, size))

    def then(self, action: Callable[[], object]) -> None:
        self.steps.append((bytes(self.model.data), action))


def _snapshots(script: Script) -> None:
    image = script.image
    script.write(0, 9000)
    script.write(100 << 10, 30000)
    script.then(image.flush)
    script.zeroes(4096, 4096)
    script.zeroes(104 << 10, 8192, unmap=False)
    script.then(lambda: operations.create(image, "one", now=1.0))
    script.write(1000, 5000)
    script.write(110 << 10, 512)
    script.then(image.flush)
    script.then(lambda: operations.create(image, "two", now=2.0))
    script.zeroes(0, 64 << 10)
    script.then(lambda: operations.delete(image, "one"))
    script.then(lambda: repair(image, everything=False))
    script.write(0, 70000)


def _compressed(script: Script) -> None:
    size = script.model.cluster_size
    for cluster in range(8):
        script.packed(cluster * size)
    script.then(script.image.flush)
    script.write(size // 2, 512)
    script.packed(0)
    script.zeroes(2 * size, 3 * size)
    script.then(script.image.flush)
    script.write(40 * size, size)
    script.packed(9 * size)


def _subclusters(script: Script) -> None:
    """Subclusters of one sector: written, zeroed and written again in a cluster that is there, a snapshot's,
    and a compressed one."""
    image, size = script.image, script.model.cluster_size
    script.write(1000, 700)
    script.write(5000, 100)
    script.zeroes(1024, 1024, unmap=False)
    script.then(image.flush)
    script.write(1030, 10)
    script.packed(size)
    script.write(size + 3000, 600)
    script.then(lambda: operations.create(image, "one", now=1.0))
    script.write(600, 1000)
    script.zeroes(4096, 1024)
    script.zeroes(0, size)
    script.write(3 * size + 100, 2 * size)
    script.then(image.flush)
    script.then(lambda: operations.delete(image, "one"))
    script.write(512, 512)


def _growing(script: Script) -> None:
    """Beyond what the first refcount table can count."""
    for offset in range(FILLED, FILLED + (256 << 10), 64 << 10):
        script.write(offset, 64 << 10)
    script.then(script.image.flush)


def _sizes(script: Script) -> None:
    """Smaller and larger, over a backing file that is longer than the disk."""
    script.write(5000, 3000)
    script.resize(SIZE // 2 + 512)
    script.write(SIZE // 2 - 512, 1024)
    script.resize(SIZE + SIZE // 2)
    script.write(SIZE + SIZE // 2 - 512, 512)
    script.resize(4 * SIZE)


def _data_file(script: Script) -> None:
    script.write(100, 9000)
    script.zeroes(4096, 8192)
    script.then(script.image.flush)
    script.write(6000, 100)
    script.resize(2 * SIZE)
    script.write(SIZE + 100, 5000)
    script.resize(SIZE)


@dataclass
class Case:
    """An image, what is done to it, and the changes that this must bring about."""

    script: Callable[[Script], None]
    shape: tuple[int, int, int]
    expected: set[str]
    below: bool = False
    bitmap: bool = False
    data_file: bool = False
    extended: bool = False
    size: int = SIZE
    #: bytes that are written before
    filled: int = 0


_ALWAYS = {"write refcount block", "write L2 table", "write data", "resize", "sync"}
CASES = {
    "snapshots": Case(
        _snapshots,
        (4096, 3, 16),
        _ALWAYS
        | {"write header", "write L1 table", "write snapshot table", "write refcount table", "zero data"},
    ),
    "snapshots, small clusters": Case(_snapshots, (512, 3, 8), _ALWAYS | {"write header", "write L1 table"}),
    "snapshots, version 2": Case(_snapshots, (4096, 2, 16), _ALWAYS | {"write header", "write L1 table"}),
    "compressed": Case(_compressed, (4096, 3, 16), _ALWAYS | {"write compressed data"}),
    "compressed, narrow refcounts": Case(_compressed, (4096, 3, 2), _ALWAYS | {"write compressed data"}),
    "subclusters": Case(
        _subclusters,
        (16384, 3, 16),
        _ALWAYS | {"write header", "write L1 table", "write compressed data"},
        extended=True,
    ),
    "subclusters over a backing file": Case(
        _subclusters, (16384, 3, 16), _ALWAYS | {"write header"}, below=True, extended=True
    ),
    "sizes, subclusters": Case(_sizes, (16384, 3, 16), _ALWAYS | {"write header"}, below=True, extended=True),
    "growing refcount table": Case(
        _growing,
        (512, 3, 64),
        _ALWAYS | {"write refcount table", "write header"},
        size=3 << 20,
        filled=FILLED,
    ),
    "sizes": Case(_sizes, (4096, 3, 16), _ALWAYS | {"write header", "write L1 table"}, below=True),
    "sizes, small clusters": Case(_sizes, (512, 3, 16), _ALWAYS | {"write header"}, below=True),
    "sizes, version 2": Case(_sizes, (4096, 2, 16), _ALWAYS | {"write header"}, below=True),
    "bitmap": Case(
        _snapshots,
        (4096, 3, 16),
        _ALWAYS | {"write bitmap directory", "write bitmap table", "write bitmap data"},
        bitmap=True,
    ),
    "data file": Case(
        _data_file,
        (4096, 3, 16),
        {"write refcount block", "write L2 table", "write header", "write external data"}
        | {"resize external data", "sync external data"},
        data_file=True,
    ),
}


def _make(case: Case, folder: Path) -> tuple[str, bytes]:
    """The image as it is before, and what its disk begins with."""
    content = b""
    how: dict[str, Any] = {"extended_l2": case.extended}
    if case.below:
        content = random.Random(3).randbytes(2 * case.size)
        (folder / "base").write_bytes(content)
        how |= {"backing_file": "base", "backing_format": "raw"}
    if case.data_file:
        (folder / "disk.data").write_bytes(random.Random(5).randbytes(case.size))
        how |= {"data_file": "disk.data"}
    file = make(folder / "disk.qcow2", case.size, case.shape, **how)
    if case.bitmap:
        run_tool("qemu-img", "bitmap", "--add", "-g", "512", file, "one")
    if case.filled:
        content = random.Random(4).randbytes(case.filled)
        image = open_qcow2(file)
        image.write(0, content)
        image.close()
    return file, content


def _run(case: Case, file: str, content: bytes, faults: Faults, watched: bool = False) -> list[set[str]]:
    """Do the script; after a failure go on. When it is ``watched``, returns what each change was."""
    kinds: list[set[str]] = []

    def look(before: Anatomy) -> Anatomy:
        after = Anatomy(Path(file).read_bytes())
        for call, external, offset, length in faults.log[len(kinds) :]:
            if external:
                kinds.append({f"{call} external data"})
            elif call in ("resize", "sync"):
                kinds.append({call})
            else:
                found = after.roles(offset, length) or before.roles(offset, length) or {"spare cluster"}
                kinds.append({f"{call} {role}" for role in found})
        return after

    image = open_qcow2(file, open_file=faults.open)
    try:
        anatomy = Anatomy(Path(file).read_bytes()) if watched else None
        script = Script(image, Model(case.size, case.shape[0], content))
        #: states that each byte may be in: the last one, and what failed operations may have left
        allowed = [bytes(script.model.data)]
        case.script(script)
        failed = False
        for state, action in script.steps:
            try:
                action()
            except OSError as error:
                assert error.errno in (faults.number, errno.EIO) and faults.at is not None, error
                allowed = [*allowed, state]
                failed = True
            except BlockError:  # the snapshot that could not be made cannot be deleted
                assert failed
                continue
            else:
                allowed = [*allowed, state] if failed else [state]
            if anatomy is not None:
                anatomy = look(anatomy)
        _judge(read(image), allowed)
    finally:
        image.close()
    if anatomy is not None:
        look(anatomy)
    no_corruption(file)
    image = open_qcow2(file, read_only=True)
    _judge(read(image), allowed)
    image.close()
    return kinds


def _judge(found: bytes, allowed: list[bytes]) -> None:
    """A resize that failed may have zeroed what is behind the new end."""
    shorter = [state.ljust(len(found), b"\0") for state in allowed if len(state) < len(found)]
    either(found, *allowed, *shorter)


def _points(kinds: list[set[str]], rnd: random.Random) -> list[int]:
    """Some of each kind."""
    result: set[int] = set()
    for kind in sorted(set().union(*kinds)):
        having = [number for number, each in enumerate(kinds) if kind in each]
        result |= set(rnd.sample(having, min(POINTS_OF_A_KIND, len(having))))
    return sorted(result)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_change_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)  # where qemu-img looks for data files
    case = CASES[name]
    template = tmp_path / "template"
    template.mkdir()
    _, content = _make(case, template)
    file = str(tmp_path / "disk.qcow2")
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    kinds = _run(case, file, content, Faults(), watched=True)
    missing = case.expected - set().union(*kinds)
    assert not missing, f"never reached: {sorted(missing)}"
    rnd = random.Random(len(kinds))
    for how in ("EIO", "ENOSPC", "torn"):
        number = errno.ENOSPC if how == "ENOSPC" else errno.EIO
        for count, point in enumerate(_points(kinds, rnd)):
            shutil.copytree(template, tmp_path, dirs_exist_ok=True)
            try:
                _run(case, file, content, Faults(point, number, how == "torn"))
                if count % 10 == 0:
                    qemu_check(file, leaks_allowed=True)
            except AssertionError as error:
                what = f"{how} at change {point} of {len(kinds)} ({', '.join(kinds[point])})"
                raise AssertionError(f"{what}: {error}") from error
