"""The plots of a report, as PNG (lab/plots.py)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from coordinator.lab.crash.results import Crashes, Kill
from coordinator.lab.crash.statistics import busy
from coordinator.lab.plots import LEAST_MS, WIDTH, curves, pyplot, rendered

#: what is aimed at: the 99th percentile with a warm standby
AIM_MS = 50.0
ERROR_COLOUR = "#9b2226"


def _by_role(kills: Sequence[Kill]) -> dict[str, list[Kill]]:
    found = defaultdict(list)
    for kill in kills:
        found[kill.role].append(kill)
    return dict(sorted(found.items()))


def blackout(kills: Sequence[Kill], plt: Any) -> Any:
    figure, (host, guest) = plt.subplots(
        layout="constrained", nrows=1, ncols=2, figsize=(WIDTH, 3.6), sharey=True
    )
    roles = _by_role(kills).items()
    curves(host, [(role, [kill.blackout for kill in found]) for role, found in roles], "blackout", "kills")
    host.axvline(AIM_MS, color=ERROR_COLOUR, linestyle=":", linewidth=1)
    lists = [(role, [kill.next_read for kill in found]) for role, found in roles]
    curves(guest, lists, "guest time to the next CD read", "kills")
    return figure


def course(kills: Sequence[Kill], plt: Any) -> Any:
    """Each kill in its turn."""
    figure, axes = plt.subplots(layout="constrained", figsize=(WIDTH, 3.6))
    for role, found in _by_role(kills).items():
        known = [kill for kill in found if kill.blackout is not None]
        axes.scatter(
            [kill.index + 1 for kill in known],
            [max(kill.blackout or 0.0, LEAST_MS) for kill in known],
            s=14, label=role,
        )  # fmt: skip
    wrong = [kill for kill in kills if kill.errors]
    if wrong:
        axes.scatter(
            [kill.index + 1 for kill in wrong],
            [max(kill.blackout or 0.0, LEAST_MS) for kill in wrong],
            s=70, facecolors="none", edgecolors=ERROR_COLOUR, label="with errors",
        )  # fmt: skip
    axes.axhline(AIM_MS, color=ERROR_COLOUR, linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("kill")
    axes.set_ylabel("blackout, ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def phases(kills: Sequence[Kill], plt: Any) -> Any:
    """How many met the drives where."""
    roles = _by_role(kills)
    names = sorted({busy(kill) for kill in kills}, key=lambda name: -sum(busy(k) == name for k in kills))
    figure, axes = plt.subplots(layout="constrained", figsize=(WIDTH, max(1.8, 0.24 * len(names) + 1.1)))
    left = [0] * len(names)
    for role, found in roles.items():
        counts = [sum(busy(kill) == name for kill in found) for name in names]
        axes.barh(range(len(names)), counts, left=left, label=role)
        left = [before + count for before, count in zip(left, counts, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("kills")
    axes.legend(fontsize=8)
    return figure


def clock(kills: Sequence[Kill], plt: Any) -> Any:
    """The step in the guest's clock against the blackout: it does not depend on it."""
    figure, axes = plt.subplots(layout="constrained", figsize=(WIDTH, 3.4))
    for role, found in _by_role(kills).items():
        known = [kill for kill in found if kill.blackout is not None]
        axes.scatter(
            [kill.blackout for kill in known], [kill.gap_guest or 0.0 for kill in known], s=14, label=role
        )
    most = max((kill.blackout or 0.0 for kill in kills), default=0.0)
    axes.plot(
        [0, most], [0, most], color="#999999", linestyle=":", linewidth=1, label="if time did not stand still"
    )
    axes.set_xlabel("blackout, ms")
    axes.set_ylabel("step of the guest's clock, ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


#: file name -> (title, how it is drawn)
PLOTS: dict[str, tuple[str, Callable[[Sequence[Kill], Any], Any]]] = {
    "blackout": ("How long an island is away, and when the guest reads on", blackout),
    "course": ("Each kill in its turn", course),
    "phases": ("Where the drives stood", phases),
    "clock": ("What the guest's clock shows of it", clock),
}


def png(results: Crashes) -> dict[str, bytes]:
    """By name, in the order of PLOTS; none where nothing was killed. ConfigError without matplotlib."""
    plt = pyplot()
    if not results.kills:
        return {}
    return {name: rendered(draw(results.kills, plt), title, plt) for name, (title, draw) in PLOTS.items()}
