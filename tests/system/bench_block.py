"""The block section of `make bench`: `atoll nbd` beside qemu-nbd and `atoll img convert` beside qemu-img.

Both sides get the same images, the same clients and the same options, turn and turn about; what is told is
the medians and their ratio, above 1 where Atoll is faster, with the target of each beside it. Timing never
fails anything; a wrong copy or a client's error does.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blockd.qcow2 import refcounts, tables
from tests.system import figures

MIB = 1 << 20
ATOLL, QEMU = SIDES = ("atoll", "qemu")
#: program -> Debian package that brings it
PACKAGES = {"qemu-nbd": "qemu-utils", "qemu-img": "qemu-utils", "nbdcopy": "libnbd-bin", "fio": "fio"}
COMMANDS = {
    (ATOLL, "nbd"): (sys.executable, "-m", "coordinator.cli.main", "nbd"),
    (ATOLL, "img"): (sys.executable, "-m", "coordinator.cli.main", "img"),
    (QEMU, "nbd"): ("qemu-nbd",),
    (QEMU, "img"): ("qemu-img",),
}
#: seconds that a server or client may take before it counts as hung
LIMIT = 300
#: what tables of an image may take in memory, in bytes: see docs/images.md
CACHES = tables.CACHE_BYTES + refcounts.CACHE_BYTES


class Failed(Exception):
    """A server or client did not do what it should; one line."""


@dataclass
class Plan:
    """How much is measured; tests measure less."""

    #: bytes of the disk
    disk: int = 1024 * MIB
    #: and of the one that is compressed by zlib, which takes long
    slow_disk: int = 128 * MIB
    #: and of the sparse one
    sparse_disk: int = 1 << 40
    #: seconds of one run of random requests
    seconds: float = 2.0
    #: of writes to new clusters, in one run
    allocations: int = 2048
    #: random reads, and as many writes, over the whole sparse disk
    touches: int = 6144
    repeats: int = 3


@dataclass
class Row:
    """One comparison. ``unit`` is what ``qemu`` and ``atoll`` count: larger is better, but for seconds."""

    name: str
    unit: str
    target: float
    qemu: float | None = None
    atoll: float | None = None
    ratio: float | None = None
    note: str = ""
    each: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Memory:
    """Peak resident memory of a server, in bytes, when it had started and after the sparse disk."""

    side: str
    idle: int
    peak: int


@dataclass
class Results:
    rows: list[Row] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run(plan: Plan, say: Callable[[str], None], folder: Path | None = None) -> Results:
    """Measure everything for which the tools are there; ``folder`` is where the images lie."""
    with tempfile.TemporaryDirectory(prefix="atoll-bench-", dir=folder) as scratch:
        return _Bench(plan, say, Path(scratch)).run()


def report(results: Results) -> str:
    """The tables."""
    rows = [
        (row.name, row.unit, row.qemu, row.atoll, row.ratio, f"{row.target:.2f}", row.note)
        for row in results.rows
    ]
    memory = [
        (_name(each.side), each.idle / MIB, each.peak / MIB, (each.peak - each.idle) / MIB,
         CACHES / MIB if each.side == ATOLL else None)
        for each in results.memory
    ]
    text = [figures.table(("block", "unit", "QEMU", "Atoll", "ratio", "target", ""), rows)]
    if memory:
        head = ("sparse image, touched all over", "idle MiB", "peak MiB", "more MiB", "limit of tables MiB")
        text.append(figures.table(head, memory))
    return "\n\n".join([*text, *results.skipped])


def _name(side: str) -> str:
    return "atoll nbd" if side == ATOLL else "qemu-nbd"


def as_json(results: Results) -> dict[str, Any]:
    return asdict(results)


class _Bench:
    def __init__(self, plan: Plan, say: Callable[[str], None], folder: Path) -> None:
        self._plan, self._say, self._folder = plan, say, folder
        self._results = Results()
        #: a disk of random data, raw and as qcow2
        self._noise, self._full = folder / "noise.raw", folder / "full.qcow2"
        #: disks of mixed content, raw and as qcow2
        self._mixed, self._mixed_qcow2 = folder / "mixed.raw", folder / "mixed.qcow2"
        self._slow = folder / "slow.raw"
        self._new = folder / "new"
        self._uri = f"nbd+unix:///x?socket={folder / 'socket'}"

    def run(self) -> Results:
        plan = self._plan
        if self._missing("qemu-img"):
            self._results.skipped.append(self._skipped("the block section", "qemu-img"))
            return self._results
        self._say("block: making images")
        self._prepare()
        seconds = ("--time_based", f"--runtime={plan.seconds}")
        served: list[tuple[str, str, float, str, Callable[[], float], Callable[[], Path]]] = [
            ("nbdcopy, sequential read", "MiB/s", 1.0, "nbdcopy", self._copy, lambda: self._full),
            ("4 KiB random reads, depth 16", "IOPS", 1.0, "fio", lambda: self._fio("randread", *seconds),
             lambda: self._full),
            ("4 KiB random overwrites, depth 16", "IOPS", 1.0, "fio",
             lambda: self._fio("randwrite", *seconds), lambda: self._full),
            ("4 KiB writes to new clusters", "IOPS", 0.5, "fio", self._allocate, self._empty),
            ("the same over a backing file", "IOPS", 0.5, "fio", self._allocate, self._overlay),
            ("raw: nbdcopy, sequential read", "MiB/s", 1.0, "nbdcopy", self._copy, lambda: self._noise),
            ("raw: 4 KiB random reads, depth 16", "IOPS", 1.0, "fio",
             lambda: self._fio("randread", *seconds), lambda: self._noise),
        ]  # fmt: skip
        for name, unit, target, tool, work, image in served:
            row = Row(name, unit, target)
            self._compare(row, (tool, "qemu-nbd"), self._serving(work, image))
        zstd = ("-c", "-o", "compression_type=zstd")
        for name, source, options, target in (
            ("raw to qcow2", self._mixed, ("-O", "qcow2"), 1.0),
            ("qcow2 to qcow2", self._mixed_qcow2, ("-O", "qcow2"), 1.0),
            ("raw to raw", self._mixed, ("-O", "raw"), 1.0),
            ("qcow2 to raw", self._mixed_qcow2, ("-O", "raw"), 1.0),
            ("raw to qcow2, zstd", self._mixed, ("-O", "qcow2", *zstd), 0.95),
            (f"raw to qcow2, zlib, {plan.slow_disk // MIB} MiB", self._slow, ("-O", "qcow2", "-c"), 0.95),
        ):
            row = Row(f"convert {name}", "s", target)
            self._compare(row, ("qemu-img",), self._converting(source, options))
            if row.ratio is not None:
                self._judge(source, row.name)
        self._weigh()
        return self._results

    # ---- images ----------------------------------------------------------------------------------
    def _prepare(self) -> None:
        rnd = random.Random(1)
        words = [rnd.randbytes(rnd.randint(2, 9)).hex().encode() for _ in range(2000)]
        texts = [b" ".join(rnd.choices(words, k=MIB // 5)).ljust(MIB, b".")[:MIB] for _ in range(4)]
        with open(self._noise, "wb") as file:
            for _ in range(self._plan.disk // MIB):
                file.write(os.urandom(MIB))
        for path, size in ((self._mixed, self._plan.disk), (self._slow, self._plan.slow_disk)):
            with open(path, "wb") as file:
                for number in range(size // MIB):
                    file.write(_content(rnd, number, texts))
                file.truncate(size)
        for source, target in ((self._noise, self._full), (self._mixed, self._mixed_qcow2)):
            _client("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(source), str(target))
        os.sync()

    def _empty(self) -> Path:
        _client("qemu-img", "create", "-f", "qcow2", str(self._new), str(self._plan.disk))
        return self._new

    def _overlay(self) -> Path:
        _client("qemu-img", "create", "-f", "qcow2", "-b", str(self._noise), "-F", "raw", str(self._new))
        return self._new

    # ---- measuring -------------------------------------------------------------------------------
    def _compare(self, row: Row, tools: tuple[str, ...], work: Callable[[str], float]) -> None:
        """Fill the row from ``work(side)``, the sides alternating."""
        for tool in tools:
            if self._missing(tool):
                self._results.skipped.append(self._skipped(row.name, tool))
                return
        row.each = {side: [] for side in SIDES}
        try:
            for number in range(self._plan.repeats):
                for side in SIDES if number % 2 else SIDES[::-1]:
                    row.each[side].append(work(side))
        except (Failed, OSError) as error:
            self._results.failures.append(f"{row.name}: {error}")
            return
        row.atoll, row.qemu = (statistics.median(row.each[side]) for side in SIDES)
        row.ratio = row.qemu / row.atoll if row.unit == "s" else row.atoll / row.qemu
        row.note = "" if row.ratio >= row.target else "below"
        self._results.rows.append(row)
        self._say(
            f"block: {row.name}: QEMU {figures.shown(row.qemu)} {row.unit}, Atoll "
            f"{figures.shown(row.atoll)} {row.unit}, {row.ratio:.2f} (target {row.target:.2f})"
        )

    @staticmethod
    def _missing(tool: str) -> bool:
        return shutil.which(tool) is None

    @staticmethod
    def _skipped(name: str, tool: str) -> str:
        return f"skipped: {name}: {tool} is not installed (Debian's package {PACKAGES[tool]})"

    def _serving(self, work: Callable[[], float], image: Callable[[], Path]) -> Callable[[str], float]:
        def measure(side: str) -> float:
            with self._server(side, image()):
                return work()

        return measure

    @contextmanager
    def _server(self, side: str, image: Path) -> Iterator[int]:
        """Serve an image; yields the server's process number."""
        socket = self._folder / "socket"
        socket.unlink(missing_ok=True)
        kind = image.suffix.removeprefix(".") or "qcow2"
        options = ["-t", "-e", "8", "-x", "x", "-f", kind, "-k", str(socket), str(image)]
        if side == ATOLL:
            options[:0] = ["--allow-backing", str(self._folder)]
        log = self._folder / "server.log"
        with open(log, "wb") as told:
            process = subprocess.Popen([*COMMANDS[side, "nbd"], *options], stdout=told, stderr=told)
        try:
            begin = time.monotonic()
            while not socket.exists():
                if process.poll() is not None or time.monotonic() - begin > LIMIT:
                    raise Failed(f"{_name(side)} did not start: {log.read_text().strip()[-200:]}")
                time.sleep(0.005)
            yield process.pid
            if process.poll() is not None:
                raise Failed(f"{_name(side)} died: {log.read_text().strip()[-200:]}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()

    def _copy(self) -> float:
        begin = time.perf_counter()
        _client("nbdcopy", self._uri, "null:")
        return self._plan.disk / MIB / (time.perf_counter() - begin)

    def _allocate(self) -> float:
        """Each write at the start of a random cluster, so that most of those are new."""
        return self._fio("randwrite", "--blockalign=64k", f"--number_ios={self._plan.allocations}")

    def _fio(self, kind: str, *options: str, size: int | None = None) -> float:
        """Requests a second; the same ones in every run."""
        told = _client(
            "fio", "--name=x", "--ioengine=nbd", f"--uri={self._uri}", f"--rw={kind}", "--bs=4k",
            "--iodepth=16", f"--size={size or self._plan.disk}", "--norandommap", "--output-format=json",
            *options,
        )  # fmt: skip
        try:
            job = json.loads(told[told.index("{") :])["jobs"][0]
            rate = float(job["read"]["iops"] + job["write"]["iops"])
        except (ValueError, KeyError, IndexError):
            raise Failed(f"fio: {told.strip()[-200:]}") from None
        if job["error"] or not rate:
            raise Failed(f"fio: error {job['error']}")
        return rate

    def _converting(self, source: Path, options: tuple[str, ...]) -> Callable[[str], float]:
        def measure(side: str) -> float:
            target = self._folder / f"converted-{side}"
            target.unlink(missing_ok=True)
            command = [*COMMANDS[side, "img"], "convert", "-f", source.suffix.removeprefix("."), *options]
            begin = time.perf_counter()
            _client(*command, str(source), str(target))
            return time.perf_counter() - begin

        return measure

    def _judge(self, source: Path, name: str) -> None:
        """The last conversion of ours has the source's content."""
        try:
            _client("qemu-img", "compare", str(source), str(self._folder / f"converted-{ATOLL}"))
        except Failed as error:
            self._results.failures.append(f"{name}: {error}")

    def _weigh(self) -> None:
        """Memory of servers whose clients have read and written everywhere."""
        name = "memory on a sparse image"
        for tool in ("fio", "qemu-nbd"):
            if self._missing(tool):
                self._results.skipped.append(self._skipped(name, tool))
                return
        size, ios = self._plan.sparse_disk, f"--number_ios={self._plan.touches}"
        try:
            for side in SIDES:
                _client("qemu-img", "create", "-f", "qcow2", str(self._new), str(size))
                with self._server(side, self._new) as pid:
                    idle = _peak(pid)
                    self._fio("randwrite", ios, size=size)
                    self._fio("randread", ios, size=size)
                    self._results.memory.append(Memory(side, idle, _peak(pid)))
        except (Failed, OSError) as error:
            self._results.failures.append(f"{name}: {error}")


def _content(rnd: random.Random, number: int, texts: list[bytes]) -> bytes:
    """A MiB of a disk as disks are: data that does not compress, text, zeroes, and 4 KiB of each in turn."""
    if number % 4 == 0:
        return os.urandom(MIB)
    if number % 4 == 1:
        return bytes(MIB)
    if number % 4 == 2:
        return b"".join(os.urandom(4096) + bytes(4096) for _ in range(MIB // 8192))
    text, cut = rnd.choice(texts), rnd.randrange(MIB)
    return text[cut:] + text[:cut]


def _client(*command: str) -> str:
    """Run a program to its end; its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-200:]
        raise Failed(f"{Path(command[0]).name} {command[-1]}: exit {done.returncode}: {said}")
    return done.stdout


def _peak(pid: int) -> int:
    """Most resident memory that a process has had, in bytes (proc(5), VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise Failed(f"process {pid} has no memory")
