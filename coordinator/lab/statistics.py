"""From migrations to figures: rates with their confidence bounds, distributions, one row an experiment.

Sources: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927);
quantiles by linear interpolation between order statistics (Hyndman and Fan 1996, type 7).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from coordinator.lab.plan import Experiment
from coordinator.lab.results import Migration, Results, Shares

#: two-sided 95 %
Z = 1.959963984540054
#: a CD read that takes longer than this after the guest goes on is a stall, ms
STALL_MS = 1000.0
#: what the drivers of the drive say when something is wrong
_COMPLAINT = re.compile(r"\bata\d|\bsr\b|\bsr\d|\bscsi|I/O error", re.ASCII)

#: how a migration was for the guest, best first
VERDICTS = ("unnoticed", "complaint", "error", "stall", "wrong data", "lost")


class Rate(msgspec.Struct, frozen=True):
    """``count`` of ``of``, and Wilson's 95 % bounds of the probability behind it."""

    count: int
    of: int
    low: float
    high: float


class Distribution(msgspec.Struct, frozen=True):
    """Of ``n`` values."""

    n: int
    least: float
    median: float
    p90: float
    p99: float
    most: float


class Summary(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """One experiment. Rates are of migrations that moved the guest, ``moved``, ``stayed`` and ``lost`` of
    all. A lost guest counts as a stall."""

    experiment: Experiment
    moved: Rate
    stayed: Rate
    lost: Rate
    aimed: Rate | None
    drained: Rate | None
    stalls: Rate
    complaints: Rate
    user_errors: Rate
    wrong: Rate
    passes_right: int
    passes_wrong: int
    phases: dict[str, Rate]
    shares: Shares | None
    downtime_host: Distribution | None
    downtime_guest: Distribution | None
    stall: Distribution | None
    total: Distribution | None
    megabytes: Distribution | None
    megabytes_a_second: Distribution | None


def wilson(count: int, of: int, z: float = Z) -> Rate:
    """Without a trial nothing is known: 0 to 1."""
    if of == 0:
        return Rate(count, of, 0.0, 1.0)
    share = count / of
    scale = 1 + z * z / of
    centre = (share + z * z / (2 * of)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    # a share of 0 or 1 is within its own bounds, also where rounding says otherwise
    return Rate(count, of, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, at least one."""
    place = (len(values) - 1) * share
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def distribution(values: Sequence[float | None]) -> Distribution | None:
    """None where there are no values; those that are None do not count."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    median, p90, p99 = (quantile(known, share) for share in (0.5, 0.9, 0.99))
    return Distribution(len(known), known[0], median, p90, p99, known[-1])


def complaints(migration: Migration) -> list[str]:
    """What the kernel said about the drive."""
    return [text for text in migration.kernel if _COMPLAINT.search(text)]


def stalled(migration: Migration) -> bool:
    return migration.outcome == "lost" or (migration.stall is not None and migration.stall > STALL_MS)


def verdict(migration: Migration) -> str:
    """The worst of VERDICTS that holds."""
    holds = {
        "lost": migration.outcome == "lost",
        "wrong data": migration.wrong > 0,
        "stall": stalled(migration),
        "error": bool(migration.user_errors),
        "complaint": bool(complaints(migration)),
    }
    return next((word for word in reversed(VERDICTS) if holds.get(word)), VERDICTS[0])


def summary(experiment: Experiment, migrations: Sequence[Migration], shares: Shares | None) -> Summary:
    """Of all migrations of one experiment."""
    everything = len(migrations)
    moved = [migration for migration in migrations if migration.outcome != "stayed"]

    def rate(holds: Sequence[bool]) -> Rate:
        return wilson(sum(holds), len(holds))

    outcomes = Counter(migration.outcome for migration in migrations)
    phases = Counter(migration.phase for migration in moved)
    return Summary(
        experiment=experiment,
        moved=wilson(outcomes["moved"] + outcomes["recovered"], everything),
        stayed=wilson(outcomes["stayed"], everything),
        lost=wilson(outcomes["lost"], everything),
        aimed=rate([one.aimed for one in migrations if one.aimed is not None]) if experiment.aim else None,
        drained=rate([one.drained for one in migrations if one.drained is not None])
        if any(one.drained is not None for one in migrations)
        else None,
        stalls=rate([stalled(one) for one in moved]),
        complaints=rate([bool(complaints(one)) for one in moved]),
        user_errors=rate([bool(one.user_errors) for one in moved]),
        wrong=rate([one.wrong > 0 for one in moved]),
        passes_right=sum(one.right for one in migrations),
        passes_wrong=sum(one.wrong for one in migrations),
        phases={phase: wilson(count, len(moved)) for phase, count in phases.most_common()},
        shares=shares,
        downtime_host=distribution([one.downtime_host for one in moved]),
        downtime_guest=distribution([one.downtime_guest for one in moved]),
        stall=distribution([one.stall for one in moved]),
        total=distribution([one.total for one in moved]),
        megabytes=distribution([one.bytes / 1e6 for one in moved]),
        megabytes_a_second=distribution(
            [one.bytes / one.downtime_host / 1e3 for one in moved if one.downtime_host and one.bytes]
        ),
    )


def summaries(results: Results) -> list[Summary]:
    """One an experiment of the plan, in its order; those without a migration yet are left out."""
    return [
        summary(experiment, found, results.shares.get(experiment.name))
        for experiment in results.plan.experiments
        if (found := results.of(experiment.name))
    ]
