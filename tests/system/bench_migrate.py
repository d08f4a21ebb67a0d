"""The migration section of `make bench`: a Linux guest with memory in use, stopped and moved over loopback.

The same guest is moved on by QEMU's TCG (where installed) and by Atoll in turn, plain against plain, by
``stop``, ``migrate`` and ``cont``: downtime is what a clock outside tells between ``stop`` and RESUME on the
other side. Beside it stands what a plain socket takes for as many bytes, and Atoll's ``migrate`` of a running
guest, which stops it itself, plain, with zstd and with TLS. Then Atoll's downtime as the memory in use grows.
Timing never fails anything; a guest that does not go on, or finds its memory damaged, does.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from tests.support.certificates import make_certificates
from tests.support.launch import Launcher
from tests.system import figures, plot
from tests.system.moves import ATOLL, QEMU, SIDES, Failed, Guest, Move

MIB = 1 << 20
#: bytes of one piece of the plain copy
PIECE = MIB
#: what the machine must have to spare beside two guests, MiB
SPARE = 2048
#: at most half of QEMU's, and that again of loopback TCP's
TARGET, AIM = 0.5, 2.0


@dataclass
class Plan:
    """How much is measured; tests measure less."""

    ram: int = 512
    #: MiB of memory in use
    used: int = 150
    repeats: int = 5
    #: MiB in use of the curve
    curve: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    curve_repeats: int = 3
    plot: Path | None = Path("build/migration.svg")


@dataclass
class Row:
    """``floor``: what a plain socket took for ``bytes``."""

    name: str
    bytes: int
    clock: float | None
    own: float
    floor: float
    moves: list[Move]
    #: the shortest, which other work on the machine has disturbed least, and that of the plain sockets
    best: float
    best_floor: float


@dataclass
class Results:
    rows: dict[str, Row] = field(default_factory=dict)
    curve: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


# ---- a plain socket --------------------------------------------------------------------------------------
def floor(size: int) -> float:
    """Seconds that as many bytes take from one process to another through a plain TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        child = os.fork()
        if child == 0:
            _drain(door)
        sock = socket.create_connection(door.getsockname())
    with sock:
        piece = memoryview(bytearray(os.urandom(PIECE)))
        sock.sendall(piece)  # awake, and with its window open
        sock.recv(1)
        begin = monotonic()
        for left in range(size, 0, -PIECE):
            sock.sendall(piece[: min(left, PIECE)])
        sock.shutdown(socket.SHUT_WR)
        sock.recv(1)
        seconds = monotonic() - begin
    os.waitpid(child, 0)
    return seconds


def _drain(door: socket.socket) -> None:
    """The other end of ``floor``, a process of its own: takes all, answers by a byte."""
    try:
        sock, _ = door.accept()
        buffer = bytearray(PIECE)
        got = 0
        while got < PIECE:
            got += sock.recv_into(buffer)
        sock.sendall(b"1")
        while sock.recv_into(buffer):
            pass
        sock.sendall(b"2")
    finally:
        os._exit(0)


# ---- the section -----------------------------------------------------------------------------------------
def run(plan: Plan, say: Callable[[str], None], launcher: str | None = None) -> Results:
    """Measure everything for which the tools and the memory are there."""
    results = Results()
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as scratch:
        bench = _Bench(plan, say, Path(scratch), Launcher.parse(launcher), results)
        for part in (bench.compare, bench.grow):
            try:
                part()
            except Failed as error:
                results.failures.append(f"migration: {error}")
    if results.curve and plan.plot is not None:
        plan.plot.parent.mkdir(parents=True, exist_ok=True)
        plan.plot.write_text(plot.downtime([(row.bytes / MIB, row.own, row.floor) for row in results.curve]))
        say(f"plot: {plan.plot}")
    return results


class _Bench:
    def __init__(
        self, plan: Plan, say: Callable[[str], None], folder: Path, launcher: Launcher, results: Results
    ) -> None:
        self._plan, self._say, self._folder, self._results = plan, say, folder, results
        self._launchers = {
            ATOLL: launcher, QEMU: Launcher(("qemu-system-x86_64", "-accel", "tcg,thread=multi"))
        }

    def _guest(self, side: str, ram: int, used: int) -> Guest:
        return Guest(side, self._launchers[side], self._folder, ram, used)

    def compare(self) -> None:
        """Both sides in turn, then Atoll by other ways."""
        plan = self._plan
        sides = [side for side in SIDES if side == ATOLL or shutil.which(self._launchers[side].command[0])]
        if QEMU not in sides:
            self._results.skipped.append("skipped: QEMU's migration: qemu-system-x86_64 is not installed")
        with ExitStack() as stack:
            ways: dict[str, tuple[str, bool, dict[str, Any]]] = {
                side: (side, True, {}) for side in sides
            } | {"running": (ATOLL, False, {}), "zstd": (ATOLL, False, {"multifd_compression": "zstd"})}
            if shutil.which("openssl"):
                ways["tls"] = (ATOLL, False, {"tls_creds": self._credentials()})
            else:
                self._results.skipped.append("skipped: migration by TLS: openssl is not installed")
            guests = {}
            for side in sides:
                self._say(f"migration: {side} boots a guest of {plan.ram} MiB with {plan.used} in use")
                guests[side] = stack.enter_context(self._guest(side, plan.ram, plan.used))
                guests[side].rests()
            moves: dict[str, list[Move]] = {name: [] for name in ways}
            floors: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(plan.repeats):
                for name, (side, stopped, parameters) in ways.items():
                    guests[side].goes_on()
                    move = guests[side].moves(stopped, **parameters)
                    guests[side].rests()
                    moves[name].append(move)
                    floors[name].append(floor(move.bytes))
                    self._say(f"migration: {_line(name, move, floors[name][-1])}")
        for name in ways:
            self._results.rows[name] = _row(name, moves[name], floors[name])

    def _credentials(self) -> str:
        """A folder for both sides."""
        made = make_certificates(self._folder / "tls")
        for file in made.client.glob("client-*"):
            shutil.copy(file, made.server)
        return str(made.server)

    def grow(self) -> None:
        """Atoll's downtime against the memory in use."""
        for used in self._plan.curve:
            needs = 2 * used + SPARE
            if needs > _available():
                why = f"this machine has less than {needs} MiB to spare"
                self._results.skipped.append(f"skipped: {used} MiB in use: {why}")
                continue
            with self._guest(ATOLL, used * 9 // 8 + 128, used) as guest:
                moves = [guest.moves(False) for _ in range(self._plan.curve_repeats)]
            row = _row(f"{used} MiB", moves, [floor(move.bytes) for move in moves])
            for move in moves:
                self._say(f"migration: {_line(row.name, move, row.floor)}")
            self._results.curve.append(row)


def _row(name: str, moves: list[Move], floors: list[float]) -> Row:
    clocks = [move.clock for move in moves if move.clock is not None]
    return Row(
        name, round(statistics.median([move.bytes for move in moves])),
        statistics.median(clocks) if clocks else None,
        statistics.median(move.own for move in moves), statistics.median(floors), moves,
        min(clocks or [move.own for move in moves]), min(floors),
    )  # fmt: skip


def _line(name: str, move: Move, seconds: float) -> str:
    clock = f"{move.clock * 1e3:.0f} ms, " if move.clock is not None else ""
    phases = ", ".join(f"{phase} {took:.0f}" for phase, took in move.phases.items())
    return (
        f"{name}: {clock}own figure {move.own * 1e3:.0f} ms, {move.bytes / MIB:.0f} MiB, plain socket "
        f"{seconds * 1e3:.0f} ms{f' ({phases})' if phases else ''}"
    )


def _available() -> int:
    """MiB that can be used without pushing anything out (proc(5), MemAvailable)."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) // 1024 if found else 0


def report(results: Results) -> str:
    """The tables."""
    names = {
        QEMU: "QEMU TCG: stop, migrate, cont", ATOLL: "Atoll: stop, migrate, cont",
        "running": "Atoll: migrate", "zstd": "Atoll: migrate, zstd", "tls": "Atoll: migrate, TLS",
    }  # fmt: skip
    rows = [
        (names[name], row.bytes / MIB, _ms(row.clock), _ms(row.own), _ms(row.floor),
         (row.clock or row.own) / row.floor, _ms(row.best), _ms(row.best_floor))
        for name, row in results.rows.items()
    ]  # fmt: skip
    head = (
        "downtime, medians, ms", "MiB", "clock", "own figure", "plain socket", "times socket", "best",
        "best socket",
    )  # fmt: skip
    text = [figures.table(head, rows)]
    if verdict := _verdict(results):
        text.append(verdict)
    curve = [
        (
            f"{row.name} in use", row.bytes / MIB, _ms(row.own), _ms(row.floor), row.own / row.floor,
            _ms(row.best), _ms(row.best_floor),
        )
        for row in results.curve
    ]
    if curve:
        columns = ("Atoll: migrate, ms", "MiB", "downtime", *head[4:])
        text.append(figures.table(columns, curve))
    return "\n\n".join([*text, *results.skipped])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _verdict(results: Results) -> str:
    """Against the targets: by the same commands as QEMU, and by Atoll's own way to stop a guest."""
    theirs = results.rows.get(QEMU)
    if theirs is None or theirs.clock is None:
        return ""
    rows = []
    for label, name in (("stop, migrate, cont", ATOLL), ("migrate", "running")):
        ours = results.rows[name]
        rows.append((
            label, (ours.clock or ours.own) / theirs.clock, ours.best / theirs.best, TARGET,
            (ours.clock or ours.own) / ours.floor, ours.best / ours.best_floor, AIM,
        ))  # fmt: skip
    head = ("Atoll against", "QEMU", "of the best", "target", "plain socket", "of the best", "aim")
    return figures.table(head, rows)


def as_json(results: Results) -> dict[str, Any]:
    """The same for programs; seconds and bytes."""
    return asdict(results)
