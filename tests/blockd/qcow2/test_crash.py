"""SIGKILL, failing writes and loss of power: the image is clean or has leaks only, and holds what it must.

What must be there: after SIGKILL every write that had returned; after loss of power every write that
had returned before the last flush. A write that had not returned may be there in parts.
"""

from __future__ import annotations

import copy
import errno
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blockd.hostfile import HostFile
from blockd.qcow2 import operations
from blockd.qcow2.check import check
from blockd.qcow2.image import Qcow2Image
from coordinator.contract.errors import BlockError
from tests.blockd.qcow2.support import Model, make, qemu_check, read, step

#: set to more for a longer run
KILLS = int(os.environ.get("ATOLL_CRASHES", "30"))
SIZE = 4 << 20
SHAPES = [(65536, 3, 16), (4096, 3, 16), (512, 3, 8), (4096, 2, 16)]
SECTOR = 512


def no_corruption(file: str) -> None:
    image = Qcow2Image(file, read_only=True, repair=True, locked=False)
    try:
        report = check(image)
    finally:
        image.close()
    assert not report.corruptions, report.lines


def either(found: bytes, *allowed: bytes | bytearray) -> None:
    """Every byte is as in one of the states that may be."""
    fitting = [state for state in allowed if len(state) == len(found)]
    assert fitting, f"{len(found)} bytes, not one of {[len(state) for state in allowed]}"
    have = np.frombuffer(found, np.uint8)
    wrong = np.ones(len(have), bool)
    for state in fitting:
        wrong &= have != np.frombuffer(state, np.uint8)
    at = np.flatnonzero(wrong)
    assert not len(at), f"{len(at)} wrong bytes from offset {at[0]:#x}"


# ---- SIGKILL ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_writer_loses_nothing(tmp_path: Path, seed: int) -> None:
    shape = SHAPES[seed % len(SHAPES)]
    file, below = _make_over(tmp_path, SIZE, shape, seed)
    discards = shape[1] >= 3 or not below
    rnd = random.Random(seed)
    moment, spin = rnd.randrange(1, 60), rnd.randrange(20000)
    acknowledged, told = os.pipe()
    child = os.fork()
    if not child:
        _write_until_killed(file, Model(SIZE, shape[0], below), seed, discards, told)
    os.close(told)
    for _ in range(moment):
        if not os.read(acknowledged, 1):
            break
    for _ in range(spin):
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    done = moment
    while os.read(acknowledged, 1):
        done += 1
    os.close(acknowledged)
    model, rnd = Model(SIZE, shape[0], below), random.Random(seed)
    for _ in range(done):
        step(model, rnd, discards=discards)
    after = copy.deepcopy(model)
    step(after, rnd, discards=discards)

    qemu_check(file, leaks_allowed=True)
    no_corruption(file)
    image = Qcow2Image(file)  # a writer's lock is gone with it
    either(read(image), model.data, after.data)
    image.close()


def _make_over(folder: Path, size: int, shape: tuple[int, int, int], seed: int) -> tuple[str, bytes]:
    """An image, every third one over a backing file of those bytes."""
    if seed % 3 != 2:
        return make(folder / "disk.qcow2", size, shape), b""
    below = random.Random(seed).randbytes(size // 2)
    (folder / "base").write_bytes(below)
    return make(folder / "disk.qcow2", size, shape, backing_file="base", backing_format="raw"), below


def _write_until_killed(file: str, model: Model, seed: int, discards: bool, told: int) -> None:
    """The child: one byte into the pipe for every operation that has returned."""
    try:
        image = Qcow2Image(file)
        rnd = random.Random(seed)
        while True:
            step(model, rnd, discards=discards)(image)
            os.write(told, b".")
    finally:
        os._exit(99)


# ---- fault points -----------------------------------------------------------------------------------
class FaultyFile(HostFile):
    """Fails at one of its changes: writes nothing, or all but the last sectors of a longer write."""

    def __init__(self, file: str, read_only: bool = False) -> None:
        super().__init__(file, read_only)
        self.fail_at: int | None = None
        self.number = errno.EIO
        self.torn = False
        self.calls = 0

    def _due(self) -> bool:
        self.calls += 1
        return self.calls - 1 == self.fail_at

    def _fail(self) -> None:
        raise OSError(self.number, os.strerror(self.number))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if not self._due():
            return super().write(offset, data)
        sectors = (offset % SECTOR + len(data)) // SECTOR
        if self.torn and sectors:
            super().write(offset, memoryview(data)[: (sectors + 1) // 2 * SECTOR - offset % SECTOR])
        self._fail()

    def zero(self, offset: int, length: int) -> None:
        return self._fail() if self._due() else super().zero(offset, length)

    def resize(self, size: int) -> None:
        return self._fail() if self._due() else super().resize(size)

    def sync(self) -> None:
        return self._fail() if self._due() else super().sync()


def _sequence(image: Qcow2Image, model: Model) -> list[tuple[bytes, Callable[[], None]]]:
    """Operations that touch every kind of metadata; with each, the disk as it is afterwards."""
    result: list[tuple[bytes, Callable[[], None]]] = []
    rnd = random.Random(9)

    def write(offset: int, length: int) -> None:
        data = rnd.randbytes(length)
        model.data[offset : offset + length] = data
        result.append((bytes(model.data), lambda: image.write(offset, data)))

    def zeroes(offset: int, length: int, unmap: bool) -> None:
        model.data[offset : offset + length] = bytes(length)
        result.append((bytes(model.data), lambda: image.write_zeroes(offset, length, unmap, False)))

    def same(action: Callable[[], object]) -> None:
        result.append((bytes(model.data), lambda: None if action() else None))

    write(0, 9000)
    write(100 << 10, 30000)
    same(image.flush)
    zeroes(4096, 4096, True)
    zeroes(104 << 10, 8192, False)
    same(lambda: operations.create(image, "one", now=1.0))
    write(1000, 5000)
    write(110 << 10, 512)
    same(image.flush)
    zeroes(0, 64 << 10, True)
    same(lambda: operations.delete(image, "one"))
    write(0, 70000)
    return result


def _run_with_fault(file: str, fail_at: int | None, number: int, torn: bool) -> int:
    """Do the sequence; after a failure go on. Returns the changes that were made to the file."""
    image = Qcow2Image(file, open_file=FaultyFile)
    host = image.host
    assert isinstance(host, FaultyFile)
    host.calls = 0
    host.fail_at, host.number, host.torn = fail_at, number, torn
    model = Model(image.size, 4096)
    #: states that each byte may be in: the last one, and what failed operations may have left
    allowed = [bytes(model.data)]
    failed = False
    for state, action in _sequence(image, model):
        try:
            action()
        except OSError as error:
            assert error.errno in (number, errno.EIO)
            allowed = [*allowed, state]
            failed = True
        except BlockError:  # the snapshot that could not be made cannot be deleted
            continue
        else:
            allowed = [*allowed, state] if failed else [state]
    calls = host.calls
    either(read(image), *allowed)
    image.close()
    no_corruption(file)
    image = Qcow2Image(file, read_only=True)
    either(read(image), *allowed)
    image.close()
    return calls


@pytest.mark.parametrize("kind", ["EIO", "ENOSPC", "torn"])
@pytest.mark.parametrize("shape", [(4096, 3, 16), (512, 3, 8)], ids=str)
def test_every_change_may_fail(tmp_path: Path, shape: tuple[int, int, int], kind: str) -> None:
    number = errno.ENOSPC if kind == "ENOSPC" else errno.EIO
    disk = str(tmp_path / "disk.qcow2")
    make(tmp_path / "disk.qcow2", 256 << 10, shape)
    calls = _run_with_fault(disk, None, number, False)
    points = list(range(calls))
    if len(points) > 70:
        points = sorted(random.Random(calls).sample(points, 70))
    for count, point in enumerate(points):
        make(tmp_path / "disk.qcow2", 256 << 10, shape)
        try:
            _run_with_fault(disk, point, number, kind == "torn")
        except AssertionError as error:
            raise AssertionError(f"fault at change {point} of {calls}: {error}") from error
        if count % 20 == 0:
            qemu_check(disk, leaks_allowed=True)


# ---- loss of power ----------------------------------------------------------------------------------
class LoggedFile(HostFile):
    """Keeps a log of all changes; ``deaf`` leaves out the syncs."""

    deaf = False

    def __init__(self, file: str, read_only: bool = False) -> None:
        super().__init__(file, read_only)
        self.log: list[tuple[str, int, bytes | int]] = []

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().write(offset, data)
        self.log.append(("write", offset, bytes(data)))

    def zero(self, offset: int, length: int) -> None:
        super().zero(offset, length)
        self.log.append(("zero", offset, length))

    def resize(self, size: int) -> None:
        super().resize(size)
        self.log.append(("resize", size, 0))

    def sync(self) -> None:
        super().sync()
        if not self.deaf:
            self.log.append(("sync", 0, 0))


class DeafFile(LoggedFile):
    deaf = True


def _apply(data: bytearray, entry: tuple[str, int, bytes | int], rnd: random.Random | None) -> None:
    """One change to the file as it is on the disk; with ``rnd``, some of its sectors are lost."""
    kind, offset, what = entry
    if kind == "sync":
        return
    if kind == "resize":
        if rnd is None or rnd.random() < 0.5:
            del data[offset:]
            data.extend(bytes(offset - len(data)))
        return
    content = what if isinstance(what, bytes) else bytes(min(int(what), max(0, len(data) - offset)))
    if len(data) < offset + len(content):
        data.extend(bytes(offset + len(content) - len(data)))
    if rnd is None:
        data[offset : offset + len(content)] = content
        return
    chance = rnd.choice([0.1, 0.5, 0.9])
    at = 0
    while at < len(content):
        stop = min(len(content), at + SECTOR - (offset + at) % SECTOR)
        if rnd.random() < chance:
            data[offset + at : offset + stop] = content[at:stop]
        at = stop


def _power_losses(tmp_path: Path, seed: int, file_type: type[LoggedFile], losses: int) -> None:
    shape = SHAPES[seed % len(SHAPES)]
    size = 1 << 20
    file, below = _make_over(tmp_path, size, shape, seed)
    discards = shape[1] >= 3 or not below
    start = Path(file).read_bytes()
    image = Qcow2Image(file, open_file=file_type)
    host = image.host
    assert isinstance(host, LoggedFile)
    model, rnd = Model(size, shape[0], below), random.Random(seed)
    #: (length of the log, disk flushed last, bytes that have been written since)
    marks = [(0, bytes(model.data), np.zeros(size, bool))]
    flushed, dirty = bytes(model.data), np.zeros(size, bool)
    for number in range(60):
        before = bytes(model.data)
        if number % 7 == 6:
            image.flush()
            flushed, dirty = before, np.zeros(size, bool)
        elif number in (22, 40):
            operations.create(image, f"s{number}", now=1.0)
            flushed, dirty = before, np.zeros(size, bool)
        elif number == 50:
            operations.delete(image, "s22")
            flushed, dirty = before, np.zeros(size, bool)
        else:
            # what is being written is unknown from its first byte on
            action = step(model, rnd, whole=False, discards=discards)
            dirty = dirty.copy()
            dirty[model.touched[0] : sum(model.touched)] = True
            marks.append((len(host.log), flushed, dirty))
            action(image)
        marks.append((len(host.log), flushed, dirty))
    log = list(host.log)
    image.close()
    lost = tmp_path / "lost.qcow2"
    for _ in range(losses):
        moment = rnd.randrange(len(log) + 1)
        last_sync = max((n for n in range(moment) if log[n][0] == "sync"), default=-1)
        data = bytearray(start)
        for entry in log[: last_sync + 1]:
            _apply(data, entry, None)
        for entry in log[last_sync + 1 : moment]:
            _apply(data, entry, rnd)
        lost.write_bytes(data)
        no_corruption(str(lost))
        _, kept, unknown = [mark for mark in marks if mark[0] <= moment][-1]
        after = next((mark for mark in marks if mark[0] > moment), None)
        if after is not None:
            unknown = unknown | after[2]
        image = Qcow2Image(str(lost), read_only=True)
        found = np.frombuffer(read(image), np.uint8)
        image.close()
        wrong = (found != np.frombuffer(kept, np.uint8)) & ~unknown
        assert not wrong.any(), f"{int(wrong.sum())} flushed bytes are lost at change {moment} of {len(log)}"
    qemu_check(str(lost), leaks_allowed=True)


@pytest.mark.parametrize("seed", range(6))
def test_loss_of_power(tmp_path: Path, seed: int) -> None:
    _power_losses(tmp_path, seed, LoggedFile, losses=30)


def test_a_writer_that_never_syncs_is_caught(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, OSError)):
        for seed in range(4):
            _power_losses(tmp_path, seed, DeafFile, losses=40)
