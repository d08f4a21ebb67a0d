"""From kills to figures: how many had errors, with their bounds, and how long each role was away."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from coordinator.lab.console import Text
from coordinator.lab.crash.results import Crashes, Kill
from coordinator.lab.statistics import Distribution, Rate, distribution, wilson

#: of all roles together
ALL = "all"
#: syslog(2): at this level and below something is wrong
KERN_ERR = 3
#: what the kernel says at other levels when a device does not do as it should
_COMPLAINT = re.compile(
    r"\bata\d+(\.\d+)?: |\bsr\d?\b.*(Sense|FAILED|error)|\bsd\b.*(Sense|FAILED|error)|I/O error"
    r"|nobody cared|lost interrupt|blocked for more than|rcu.*stall|lockup|FAT-fs|Buffer I/O"
)


class Summary(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Of one role, or of all. ``errors``: kills after which anything was wrong; the others say what.
    ``blackout`` ... in ms. ``phases``: kills by the phase of any drive that was not idle, else "idle"."""

    role: str
    errors: Rate
    lost: int
    complaints: int
    user_errors: int
    wrong_passes: int
    wrong_bytes: int
    blackout: Distribution | None
    gap_host: Distribution | None
    gap_guest: Distribution | None
    next_read: Distribution | None
    beside: int
    phases: dict[str, int]
    passes: int
    rounds: int
    syncs: int
    compared: int


def complaints(said: Sequence[Text]) -> tuple[str, ...]:
    """What of it is about hardware or of level KERN_ERR."""
    return tuple(one.text for one in said if one.level <= KERN_ERR or _COMPLAINT.search(one.text))


def busy(kill: Kill) -> str:
    """Where the drives stood: those that did something, else idle; unknown where nobody could tell."""
    if not kill.phases:
        return "unknown"
    return ", ".join(sorted({phase for phase in kill.phases.values() if phase != "idle"})) or "idle"


def summary(role: str, kills: Sequence[Kill]) -> Summary:
    return Summary(
        role=role,
        errors=wilson(sum(bool(kill.errors) for kill in kills), len(kills)),
        lost=sum(kill.outcome != "replaced" for kill in kills),
        complaints=sum(bool(kill.complaints) for kill in kills),
        user_errors=sum(bool(kill.user_errors) for kill in kills),
        wrong_passes=sum(kill.wrong for kill in kills),
        wrong_bytes=sum(kill.wrong_bytes for kill in kills),
        blackout=distribution([kill.blackout for kill in kills]),
        gap_host=distribution([kill.gap_host for kill in kills]),
        gap_guest=distribution([kill.gap_guest for kill in kills]),
        next_read=distribution([kill.next_read for kill in kills]),
        beside=sum(kill.beside for kill in kills),
        phases=dict(Counter(map(busy, kills)).most_common()),
        passes=sum(kill.right for kill in kills),
        rounds=sum(kill.rounds for kill in kills),
        syncs=sum(kill.syncs for kill in kills),
        compared=sum(kill.compared for kill in kills),
    )


def summaries(results: Crashes) -> list[Summary]:
    """All roles together first, then each; none where there are no kills."""
    kills = results.kills
    roles = sorted({kill.role for kill in kills})
    found = [summary(role, [kill for kill in kills if kill.role == role]) for role in roles]
    return [summary(ALL, kills), *found] if kills else []


def failed_checks(results: Crashes) -> list[str]:
    """What was found wrong with guests that ended."""
    return [
        f"guest {ended.guest + 1}: {name}: {finding}"
        for ended in results.ended
        for name, finding in ended.checks.items()
        if finding
    ]
