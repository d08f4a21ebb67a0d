"""Tables of figures, and the statistics file that `atoll run -stats FILE` writes when it ends.

The file is JSON; times are in seconds, everything else counts:

    {"vcpus": [{"instructions": 0, "seconds_running": 0.0, "seconds_halted": 0.0, "exits": {"KIND": 0}}],
     "accesses": {"DEVICE": {"CLASS": 0}},    CLASS is sync, posted, shadow, time, memory or nobody
     "roundtrips": {"DEVICE": 0},
     "devhost": {"dma_bytes": 0},
     "interrupts": {"VECTOR": 0},             taken by the CPUs
     "pins": {"PIN": 0}}                      delivered by the IOAPIC

Whatever is absent is shown as "-".
"""

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CLASSES = ("sync", "posted", "shadow", "time", "memory", "nobody")
ABSENT = "-"


def read(path: Path | None) -> dict[str, Any]:
    """The statistics, or an empty dictionary where there are none."""
    try:
        data = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table with the first column flush left and the others flush right."""
    cells = [list(head)] + [[shown(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def shown(value: object) -> str:
    """A cell's text: counts with separators, times and rates with one or two places."""
    if value is None:
        return ABSENT
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
    return str(value)


def mips(instructions: int | float | None, seconds: float | None) -> float | None:
    """Millions of instructions a second."""
    return instructions / seconds / 1e6 if instructions and seconds else None


def total_roundtrips(stats: dict[str, Any]) -> int | None:
    """All synchronous device round trips."""
    counts = stats.get("roundtrips")
    return sum(counts.values()) if counts else None


def report(stats: dict[str, Any]) -> str:
    """The tables of vCPUs, devices and interrupts."""
    vcpus: list[Sequence[object]] = [
        (
            f"vcpu {index}",
            cpu.get("instructions"),
            cpu.get("seconds_running"),
            mips(cpu.get("instructions"), cpu.get("seconds_running")),
            cpu.get("seconds_halted"),
            sum(cpu["exits"].values()) if cpu.get("exits") else None,
            ", ".join(f"{kind} {count:,}" for kind, count in _most(cpu.get("exits", {}))) or ABSENT,
        )
        for index, cpu in enumerate(stats.get("vcpus", []))
    ] or [("vcpu", None, None, None, None, None, None)]
    accesses, trips = stats.get("accesses", {}), stats.get("roundtrips", {})
    devices = [
        (name, *[accesses.get(name, {}).get(kind) for kind in CLASSES], trips.get(name))
        for name in sorted({*accesses, *trips}, key=lambda name: (-trips.get(name, 0), name))
    ]
    sums = [
        sum(classes.get(kind, 0) for classes in accesses.values()) if accesses else None for kind in CLASSES
    ]
    devices.append(("all", *sums, total_roundtrips(stats)))
    dma = stats.get("devhost", {}).get("dma_bytes")
    return "\n\n".join((
        table(("vCPU", "instructions", "seconds", "MIPS", "halted", "exits", "exits by kind"), vcpus),
        table(("device accesses", *CLASSES, "round trips"), devices),
        _list("interrupts by vector", stats.get("interrupts")),
        _list("interrupts by IOAPIC pin", stats.get("pins")),
        f"bytes moved by DMA: {shown(dma)}",
    ))


def _list(title: str, counts: dict[str, int] | None) -> str:
    """Counts on as few lines as they need, the largest first."""
    if not counts:
        return f"{title}: {ABSENT}"
    words = ", ".join(f"{name}:_{count:,}" for name, count in _most(counts))  # not broken at the underscore
    text = textwrap.fill(f"{title} ({sum(counts.values()):,} in all): {words}", 110, subsequent_indent="  ")
    return text.replace(":_", ": ")


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
