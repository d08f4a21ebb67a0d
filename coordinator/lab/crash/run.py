"""A trial from beginning to end, recorded and shown while it runs."""

from __future__ import annotations

from coordinator.lab.crash.killer import carry_out
from coordinator.lab.crash.results import Crashes, Kill, Record
from coordinator.lab.crash.statistics import busy
from coordinator.lab.progress import Progress, milliseconds
from coordinator.lab.run import in_order


def run(results: Crashes, progress: Progress) -> bool:
    """Whether it came to its end; False when a signal ended it. What was measured is in ``results`` in any
    case."""

    def record(found: Record) -> None:
        results.add(found)
        if isinstance(found, Kill):
            progress.step(described(found))

    guests = max((kill.guest for kill in results.kills), default=-1) + 1
    return in_order(carry_out(results.plan, record, len(results.kills), guests), progress)


def described(kill: Kill) -> str:
    """In a line."""
    word = "killed" if kill.how == "kill" else "stopped"
    harm = kill.errors
    said = f"{kill.role} {word}, drives {busy(kill)}: away {milliseconds(kill.blackout)}"
    return f"{said}, {harm[0] if harm else 'nothing noticed'}"
