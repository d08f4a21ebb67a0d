"""One image through many crashes: who works on it, when they are killed, and what must be there afterwards.

Three kinds of processes work, each forked from this one, so that 300 of them cost seconds:
- ``library`` changes the image as blockd does: writes, zeroes, discards, snapshots, resizes
- ``img`` runs ``atoll img``: snapshots, resizes, commits, conversions and repairs
- ``nbd`` is the block daemon, its client sends requests over two connections before it has the replies
A process is killed by SIGKILL after a random number of replies, or by itself at a random change to a
file, in the middle of a longer write, too. What it had acknowledged must be there; what it had begun may
be, in parts. The next one goes on with the same image.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import random
import select
import signal
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blockd.hostfile import HostFile
from blockd.opening import open_qcow2
from blockd.qcow2 import snapshots
from blockd.qcow2.check import check
from blockd.qcow2.image import Qcow2Image
from blockd.service import Service
from coordinator.cli.main import main as atoll
from coordinator.contract.config import Export
from tests.blockd.qcow2.support import SECTOR, Model, make, qemu_check, read, step
from tests.support.nbd_wire import WireClient
from tests.support.tools import run_tool

SIZE = 4 << 20
#: a write that SIGKILL interrupts ends at a page
PAGE = 4096
#: cluster size, version, refcount bits; see ``features``
SHAPES = [(65536, 3, 16), (4096, 3, 16), (512, 3, 8), (4096, 2, 16), (1024, 3, 64), (16384, 3, 16)]
#: what else an image has: each is a reason for metadata of its own
KINDS = ("plain", "raw below", "bitmap", "qcow2 below", "data file")
WORKERS = ("library", "nbd", "img", "library", "nbd")
#: requests that a client has under way
DEPTH = 12
WRITE, FLUSH, TRIM, ZEROES = 1, 3, 4, 6
_FUA, _NO_HOLE = 1, 2


def features(shape: tuple[int, int, int]) -> dict[str, Any]:
    """What else a new image of that shape has: subclusters of one sector in one of them."""
    return {"extended_l2": True, "lazy_refcounts": True} if shape[0] == 16384 else {}


def no_corruption(file: str) -> None:
    image = open_qcow2(file, read_only=True, repair=True, locked=False)
    try:
        report = check(image)
    finally:
        image.close()
    assert not report.corruptions, report.lines


def either(found: bytes, *allowed: bytes | bytearray) -> None:
    """Every byte is as in one of the states that may be."""
    fitting = [state for state in allowed if len(state) == len(found)]
    assert fitting, f"{len(found)} bytes, not one of {[len(state) for state in allowed]}"
    if found in fitting:
        return
    have = np.frombuffer(found, np.uint8)
    wrong = np.ones(len(have), bool)
    for state in fitting:
        wrong &= have != np.frombuffer(state, np.uint8)
    at = np.flatnonzero(wrong)
    assert not len(at), f"{len(at)} wrong bytes from offset {at[0]:#x}"


# ---- the moment ---------------------------------------------------------------------------------------
@dataclass
class Moment:
    """When a worker dies: at a change to a file, or after so many replies and a while."""

    change: int | None
    replies: int
    spin: int

    @classmethod
    def random(cls, rnd: random.Random) -> Moment:
        change = int(rnd.expovariate(1 / 40)) if rnd.random() < 0.6 else None
        return cls(change, rnd.randrange(1, 40), rnd.randrange(20000))

    def prepare(self) -> None:
        """In the worker: SIGKILL at the chosen change, before it or in its middle."""
        if self.change is not None:
            counter = itertools.count()
            for name in ("write", "zero", "resize", "sync"):
                setattr(HostFile, name, _deadly(getattr(HostFile, name), counter, self.change))

    def wait(self) -> None:
        """In the parent, after the last of the replies that it waits for."""
        for _ in range(self.spin):
            pass


def _deadly(method: Callable[..., None], counter: itertools.count[int], last: int) -> Callable[..., None]:
    def wrapped(file: HostFile, *arguments: Any) -> None:
        if next(counter) == last:
            if method.__name__ == "write":
                offset, data = arguments
                pages = (offset % PAGE + len(data)) // PAGE
                if pages > 1:
                    method(file, offset, memoryview(data)[: (pages + 1) // 2 * PAGE - offset % PAGE])
            os.kill(os.getpid(), signal.SIGKILL)
        method(file, *arguments)

    wrapped.__name__ = method.__name__
    return wrapped


# ---- the image ------------------------------------------------------------------------------------------
@dataclass
class Life:
    """An image, its model, and the log that workers leave when something else than a kill ends them."""

    folder: Path
    seed: int
    shape: tuple[int, int, int] = SHAPES[0]
    kind: str = "plain"
    file: str = ""
    model: Model = field(init=False)

    def __post_init__(self) -> None:
        self.shape = SHAPES[self.seed % len(SHAPES)]
        self.kind = KINDS[self.seed // len(SHAPES) % len(KINDS)]
        if self.shape[1] < 3 and self.kind in ("bitmap", "data file"):
            self.kind = "plain"
        path, below, how = self.folder / "disk.qcow2", b"", features(self.shape)
        if self.kind.endswith("below"):
            below = random.Random(self.seed).randbytes(SIZE // 2)
            base = self.folder / "base"
            base.write_bytes(below)
            how |= {"backing_file": "base", "backing_format": "raw"}
            if self.kind == "qcow2 below":
                run_tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(base), f"{base}.qcow2")
                how |= {"backing_file": "base.qcow2", "backing_format": "qcow2"}
        if self.kind == "data file":
            # what lies there must not come to light
            (self.folder / "disk.data").write_bytes(random.Random(self.seed).randbytes(SIZE))
            how |= {"data_file": "disk.data"}
        self.file = make(path, SIZE, self.shape, **how)
        if self.kind == "bitmap":
            run_tool("qemu-img", "bitmap", "--add", "-g", "64k", self.file, "one")
        self.model = Model(SIZE, self.shape[0], below)

    @property
    def backed(self) -> bool:
        return self.kind.endswith("below")

    @property
    def discards(self) -> bool:
        return self.shape[1] >= 3 or not self.backed

    def crash(self, number: int) -> None:
        """Let a worker work and die, and judge what it has left."""
        rnd = random.Random(self.seed * 1000 + number)
        worker = WORKERS[rnd.randrange(len(WORKERS))]
        if worker == "nbd":
            allowed, known = self._serve(rnd)
        else:
            allowed, known = self._work(rnd, self._library_step if worker == "library" else self._img_step)
        try:
            with contextlib.chdir(self.folder):  # where qemu-img looks for data files
                qemu_check(self.file, leaks_allowed=True)
            no_corruption(self.file)
            image = open_qcow2(self.file)  # a writer's lock is gone with it
            found = read(image)
            names = {snapshot.name for snapshot in snapshots.load(image.host, image.header)}
            image.close()
            allowed(found)
            assert any(names == set(each) for each in known), f"snapshots are {names}"
            kept = {name: _snapshot(self.file, name) for name in names}
            for name, data in kept.items():
                assert any(each.get(name) == data for each in known), f"snapshot {name} has changed"
        except AssertionError as error:
            what = f"crash {number} of a {self.kind} image {self.shape}, worker {worker}"
            raise AssertionError(f"{what}: {error}") from error
        self.model.data = bytearray(found)
        self.model.snapshots = kept
        if self.kind == "bitmap":  # it may be out of date, so that it hinders a change of size
            for action in ("--remove", "--add"):
                _img("bitmap", action, self.file, "one")()

    # ---- library and img: one reply for each operation that has returned -------------------------------
    def _work(
        self, rnd: random.Random, next_step: Callable[[Model, random.Random], Callable[[], None]]
    ) -> tuple[Callable[[bytes], None], list[dict[str, bytes]]]:
        moment, seed = Moment.random(rnd), rnd.random()
        acknowledged, told = os.pipe()
        child = os.fork()
        if not child:
            with _worker(self.folder):
                moment.prepare()
                model, rnd = copy.deepcopy(self.model), random.Random(seed)
                while True:
                    next_step(model, rnd)()
                    os.write(told, b".")
        os.close(told)
        done = 0
        while done < moment.replies or moment.change is not None:
            if not os.read(acknowledged, 1):
                break
            done += 1
        moment.wait()
        self._bury(child)
        while os.read(acknowledged, 1):
            done += 1
        os.close(acknowledged)
        model, rnd = self.model, random.Random(seed)
        for _ in range(done):
            next_step(model, rnd)
        after = copy.deepcopy(model)
        next_step(after, rnd)
        states = [model.data, after.data]
        if len(after.data) < len(model.data):  # a resize: it zeroes what is behind the new end before
            states.append(after.data.ljust(len(model.data), b"\0"))
        return lambda found: either(found, *states), [dict(model.snapshots), after.snapshots]

    def _bury(self, child: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, (self.folder / "log").read_text()

    def _library_step(self, model: Model, rnd: random.Random) -> Callable[[], None]:
        whole = self.kind != "data file"
        action = step(model, rnd, whole, self.discards)
        return lambda: action(_opened(self.file))

    def _img_step(self, model: Model, rnd: random.Random) -> Callable[[], None]:
        """One run of ``atoll img``."""
        choice = rnd.random()
        names = sorted(model.snapshots)
        snapshots_allowed = self.kind != "data file"
        if choice < 0.3 and len(names) < 3 and snapshots_allowed:
            name = model.new_name()
            model.snapshots[name] = bytes(model.data)
            return _img("snapshot", "-c", name, self.file)
        if choice < 0.4 and names:
            name = rnd.choice(names)
            model.data = bytearray(model.snapshots[name])
            return _img("snapshot", "-a", name, self.file)
        if choice < 0.5 and names:
            name = rnd.choice(names)
            del model.snapshots[name]
            return _img("snapshot", "-d", name, self.file)
        if choice < 0.65:
            size = rnd.randrange(SIZE // 4, 2 * SIZE) // SECTOR * SECTOR
            model.data = model.data[:size] + bytes(max(0, size - len(model.data)))
            return _img("resize", "-q", "--shrink", self.file, str(size))
        if choice < 0.75 and self.backed and not names:
            return _img("commit", "-q", self.file)
        if choice < 0.85:
            return _img("check", "-q", "-r", rnd.choice(["leaks", "all"]), self.file)
        data = bytearray(len(model.data))
        for _ in range(4):
            offset, length = model.span(rnd)
            data[offset : offset + length] = rnd.randbytes(length)
        model.data[:] = data
        source = self.folder / "source"

        def convert() -> None:
            source.write_bytes(data)
            _img("convert", "-q", "-n", "-f", "raw", "-O", "qcow2", str(source), self.file)()

        return convert

    # ---- nbd ----------------------------------------------------------------------------------------------
    def _serve(self, rnd: random.Random) -> tuple[Callable[[bytes], None], list[dict[str, bytes]]]:
        moment = Moment.random(rnd)
        path = str(self.folder / "nbd")
        ready, told = os.pipe()
        child = os.fork()
        if not child:
            with _worker(self.folder):
                os.close(ready)
                moment.prepare()
                service = Service()
                service.exports.open(Export("hd0", self.file, "qcow2"))
                service.listen(path)
                os.write(told, b".")
                service.run()
        os.close(told)
        client = _Client(self, rnd)
        if os.read(ready, 1):
            client.work(path, moment)
        os.close(ready)
        moment.wait()
        self._bury(child)
        client.last_words()
        return client.judge, [dict(self.model.snapshots)]


@contextlib.contextmanager
def _worker(folder: Path) -> Any:
    """The child's side of a fork: it never returns, and what it says goes into the log."""
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        yield
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(99)


_OPEN: dict[str, Qcow2Image] = {}


def _opened(file: str) -> Qcow2Image:
    """A worker's image; opened by its first operation, so that a crash may come then, too."""
    if file not in _OPEN:
        _OPEN[file] = open_qcow2(file)
    return _OPEN[file]


def _img(*arguments: str) -> Callable[[], None]:
    def run() -> None:
        status = atoll(["img", *arguments])
        if status:
            raise AssertionError(f"{arguments}: exit {status}")

    return run


def _snapshot(file: str, name: str) -> bytes:
    image = open_qcow2(file, read_only=True, snapshot=name)
    try:
        return read(image)
    finally:
        image.close()


@dataclass
class _Request:
    offset: int
    data: bytes
    done: bool = False


class _Client:
    """Random requests over two connections, each in its half of the disk, since requests of two
    connections have no order; on one, overlapping ones have."""

    def __init__(self, life: Life, rnd: random.Random) -> None:
        self._life = life
        self._rnd = rnd
        self._clients: list[WireClient] = []
        self._input, self._pending = [b"", b""], [0, 0]
        #: in the order in which they were sent; the cookie is the index
        self._requests: list[_Request] = []
        self._replies = 0

    def work(self, path: str, moment: Moment) -> None:
        """Until the daemon is dead, or has sent the replies after which it is to be killed."""
        try:
            for _ in range(2):
                self._clients.append(client := WireClient(path))
                client.go("hd0")
            while self._replies < moment.replies or moment.change is not None:
                for number in range(2):
                    while self._pending[number] < DEPTH:
                        self._send(number)
                ready, _, _ = select.select([client.sock for client in self._clients], [], [])
                for number, client in enumerate(self._clients):
                    if client.sock in ready:
                        self._take(number, client.sock.recv(1 << 16))
        except (EOFError, OSError):
            return

    def last_words(self) -> None:
        """What a dead daemon had sent counts, too."""
        for number, client in enumerate(self._clients):
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self._take(number, client.sock.recv(1 << 16))
            client.sock.close()

    def _send(self, number: int) -> None:
        rnd, size = self._rnd, len(self._life.model.data)
        half = size // 2 // max(SHAPES)[0] * max(SHAPES)[0]
        low, high = (0, half) if number == 0 else (half, size)
        length = min(rnd.choice([512, 1536, 4096, 65536, 100 * 512]), high - low)
        offset = low + rnd.randrange(0, high - low - length + 1) // SECTOR * SECTOR
        kind = rnd.choice([WRITE, WRITE, WRITE, WRITE, ZEROES, TRIM, FLUSH])
        flags = rnd.choice([0, 0, 0, _FUA])
        payload, start, data = b"", offset, b""
        if kind == WRITE:
            payload = data = rnd.randbytes(length)
        elif kind == ZEROES:
            data = bytes(length)
            flags |= rnd.choice([0, _NO_HOLE])
        elif kind == FLUSH:
            offset, length, flags = 0, 0, 0
        elif self._life.discards:
            start, data = self._discarded(offset, offset + length)
        self._requests.append(_Request(start, data))
        self._pending[number] += 1
        head = struct.pack(">IHHQQI", 0x25609513, flags, kind, len(self._requests) - 1, offset, length)
        self._clients[number].sock.sendall(head + payload)

    def _discarded(self, offset: int, end: int) -> tuple[int, bytes]:
        """Whole clusters become zero; the disk's last one may be cut short."""
        mask = self._life.shape[0] - 1
        low = (offset + mask) & ~mask
        high = end if end == len(self._life.model.data) else end & ~mask
        return low, bytes(max(0, high - low))

    def _take(self, number: int, data: bytes) -> None:
        if not data:
            raise EOFError
        self._input[number] += data
        while len(self._input[number]) >= 16:
            magic, error, cookie = struct.unpack_from(">IIQ", self._input[number])
            assert (magic, error) == (0x67446698, 0), (magic, error)
            self._input[number] = self._input[number][16:]
            self._requests[cookie].done = True
            self._pending[number] -= 1
            self._replies += 1

    def judge(self, found: bytes) -> None:
        """Each byte is what the last request that was answered made of it, or what one that was not would
        have."""
        expected = self._life.model.data
        for request in self._requests:
            if request.done:
                expected[request.offset : request.offset + len(request.data)] = request.data
        assert len(found) == len(expected)
        have = np.frombuffer(found, np.uint8)
        wrong = have != np.frombuffer(bytes(expected), np.uint8)
        for request in self._requests:
            if not request.done and request.data:
                where = slice(request.offset, request.offset + len(request.data))
                wrong[where] &= have[where] != np.frombuffer(request.data, np.uint8)
        at = np.flatnonzero(wrong)
        assert not len(at), f"{len(at)} wrong bytes from offset {at[0]:#x}"
