"""The crash section of `make bench`: what commits of device hosts cost a Linux that boots and reads its CD.

The same guest runs with commits and without (``-x-commits off``), turn and turn about: time from start to its
first program, the rate at which it reads its CD by its own clock, and CPU time of the device hosts for all of
it. Ratios are of the best of each, which other work on the machine has disturbed least; medians stand beside
them. Timing never fails anything.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support import products
from tests.support.launch import CONSOLE, Guest, Launcher
from tests.system import boots, figures
from tests.system.machine import processes

#: of the way without commits: at most so much slower
AIM = 1.10
WAYS = {"on": (), "off": ("-x-commits", "off")}
READ = re.compile(r"atoll: cdread (\d+) ([\d.]+) ([\d.]+)")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Plan:
    """How much is measured; tests measure less. ``cd`` is MiB, read ``passes`` times."""

    repeats: int = 5
    passes: int = 3
    cd: int = 32


@dataclass
class Way:
    """Seconds to the first program and of the device hosts' CPUs, one a guest; seconds a pass by the guest's
    clock."""

    boots: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass
class Results:
    bytes: int = 0
    ways: dict[str, Way] = field(default_factory=lambda: {name: Way() for name in WAYS})
    failures: list[str] = field(default_factory=list)


def run(plan: Plan, say: Callable[[str], None], launcher: str | None = None) -> Results:
    """Guests with commits and without, in turn."""
    results = Results()
    image = products.demo_iso(payload_bytes=plan.cd << 20, name=f"cd{plan.cd}")
    results.bytes = image.stat().st_size
    with tempfile.TemporaryDirectory(prefix="atoll-bench-") as scratch:
        for turn in range(plan.repeats):
            for name in WAYS if turn % 2 == 0 else reversed(WAYS):
                say(f"crash: commits {name}, {turn + 1} of {plan.repeats}")
                _one(results.ways[name], WAYS[name], image, plan.passes, Path(scratch), launcher)
    return results


def _one(
    way: Way, more: tuple[str, ...], image: Path, passes: int, folder: Path, launcher: str | None
) -> None:
    name = f"bench-{uuid.uuid4().hex[:8]}"

    def seen(at: float, line: str) -> None:
        if line.startswith("atoll: init "):
            way.boots.append(at)
        elif match := READ.match(line):
            way.reads.append(float(match[3]) - float(match[2]))
        elif line.startswith("atoll: log begin"):
            way.cpu.append(sum(_cpu(pid) for role, pid in processes(name).items() if "devhost" in role))

    words = f"atoll.demo=cdread atoll.passes={passes}"
    options = [
        "-name", name, "-machine", "pc", "-smp", "2", "-m", "512", "-no-reboot", *CONSOLE,
        *boots.kernel_options(words), "-cdrom", str(image), *more,
    ]  # fmt: skip
    with Guest(Launcher.parse(launcher), options, folder / "console.log") as guest:
        guest.expect("reboot: Power down", silence=boots.SILENCE_SECONDS, seen=seen)
        guest.wait()


def _cpu(pid: int) -> float:
    """User and system time so far, seconds (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


#: heading, and what it is of a way: less is better
FIGURES: tuple[tuple[str, Callable[[Way], list[float]]], ...] = (
    ("start to init, s", lambda way: way.boots),
    ("CD pass, guest s", lambda way: way.reads),
    ("device hosts' CPU, s", lambda way: way.cpu),
)


def ratios(results: Results) -> dict[str, float]:
    """With commits against without, by figure: of the best."""
    on, off = results.ways["on"], results.ways["off"]
    return {name: min(of(on)) / min(of(off)) for name, of in FIGURES if of(on) and of(off)}


def report(results: Results) -> str:
    rows = []
    best = ratios(results)
    for name, of in FIGURES:
        cells: list[object] = [name]
        for way in results.ways.values():
            values = of(way)
            cells += [min(values, default=None), statistics.median(values) if values else None]
        rows.append((*cells, best.get(name)))
    head = ("commits", "on, best", "median", "off, best", "median", "best on/off")
    passes = len(results.ways["on"].reads)
    return (
        f"Debian's kernel by -kernel, 2 vCPUs, {results.bytes / 1e6:.0f} MB of CD read {passes} times in all "
        f"(aim: at most {AIM:.2f})\n\n{figures.table(head, rows)}"
    )


def as_json(results: Results) -> dict[str, Any]:
    """The same for programs."""
    return {**asdict(results), "ratios": ratios(results)}
