"""The figures of a run as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordinator.lab.crash.results import Crashes
from coordinator.lab.crash.statistics import Summary, failed_checks, summaries
from coordinator.lab.table import laid_out, percent, spread

#: heading, and what stands there of one role; docs/lab.md says what each means
COLUMNS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("role", lambda s: s.role),
    ("kills with errors", lambda s: percent(s.errors)),
    ("not replaced", lambda s: str(s.lost)),
    ("kernel complained", lambda s: str(s.complaints)),
    ("user errors", lambda s: str(s.user_errors)),
    ("wrong passes", lambda s: str(s.wrong_passes)),
    ("wrong bytes", lambda s: str(s.wrong_bytes)),
    ("blackout, ms", lambda s: spread(s.blackout, 1)),
    ("gap on the host, ms", lambda s: spread(s.gap_host, 1)),
    ("gap in the guest, ms", lambda s: spread(s.gap_guest, 1)),
    ("next read, guest ms", lambda s: spread(s.next_read, 1)),
    ("others away, too", lambda s: str(s.beside)),
    ("passes right", lambda s: str(s.passes)),
    ("disk rounds", lambda s: str(s.rounds)),
    ("disk flushes", lambda s: str(s.syncs)),
    ("disk MB compared", lambda s: f"{s.compared / 1e6:.0f}"),
)


def rows(found: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """A heading and one cell a role."""
    return [(heading, [cell(one) for one in found]) for heading, cell in COLUMNS]


def phases(found: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """Kills by where the drives stood."""
    names = dict.fromkeys(name for one in found for name in one.phases)
    return [(name, [str(one.phases.get(name, 0)) for one in found]) for name in names]


def checks(results: Crashes) -> list[tuple[str, list[str]]]:
    """What was looked at when guests had ended: how many were clean."""
    names = dict.fromkeys(name for ended in results.ended for name in ended.checks)
    guests = results.ended
    clean = {name: sum(not ended.checks.get(name) for ended in guests) for name in names}
    return [(name, [f"{count} of {len(guests)} clean"]) for name, count in clean.items()]


def text(results: Crashes) -> str:
    """For the terminal."""
    found = summaries(results)
    if not found:
        return "no kill yet"
    tables = [rows(found), [("drives stood at", [""] * len(found)), *phases(found)]]
    if results.ended:
        tables.append(checks(results))
    return "\n".join([laid_out(tables), *(f"FAILED: {line}" for line in failed_checks(results))])
