"""The plots of a report, as PNG. Needs matplotlib, which comes with ``atoll[lab]``."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from coordinator.contract.errors import ConfigError
from coordinator.lab.results import Migration, Results
from coordinator.lab.statistics import STALL_MS, VERDICTS, Summary, summaries, verdict

DPI = 96
WIDTH = 9.0
#: migrations of one experiment that the time line shows, the longest first
LINES = 40
#: what a value of 0 ms is drawn as where the axis is logarithmic
LEAST_MS = 0.1
VERDICT_COLOURS = dict(
    zip(VERDICTS, ("#4c9f70", "#e9c46a", "#f4a261", "#e76f51", "#9b2226", "#2b2d42"), strict=True)
)
#: parts of a migration, by the moment that ends each
PARTS = {"set up": "#bcd4e6", "stopped": "#7fb2d8", "runs": "#e76f51", "read": "#e9c46a"}
PART_NAMES = {"set up": "set up", "stopped": "until stopped", "runs": "down", "read": "until the next read"}


def available() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def pyplot() -> Any:
    """ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'atoll[lab]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def curves(
    axes: Any, lists: Sequence[tuple[str, Sequence[float | None]]], label: str, what: str = "migrations"
) -> None:
    """Share of them that took at most so long."""
    for name, values in lists:
        known = sorted(max(value, LEAST_MS) for value in values if value is not None)
        if known:
            shares = [(i + 1) / len(known) for i in range(len(known))]
            axes.step([known[0], *known], [0, *shares], where="post", label=f"{name} ({len(known)})")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(f"{label}, ms")
    axes.set_ylabel(f"share of {what}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def downtime(results: Results, found: list[Summary], plt: Any) -> Any:
    figure, (host, guest) = plt.subplots(
        layout="constrained", nrows=1, ncols=2, figsize=(WIDTH, 3.6), sharey=True
    )
    for axes, attribute, label in (
        (host, "downtime_host", "downtime as the host sees it"),
        (guest, "downtime_guest", "downtime as the guest sees it"),
    ):
        lists = [
            (s.experiment.name, [getattr(m, attribute) for m in results.of(s.experiment.name)]) for s in found
        ]
        curves(axes, lists, label)
    return figure


def stall(results: Results, found: list[Summary], plt: Any) -> Any:
    figure, axes = plt.subplots(layout="constrained", figsize=(WIDTH, 3.6))
    curves(
        axes,
        [(s.experiment.name, [m.stall for m in results.of(s.experiment.name)]) for s in found],
        "to the next read",
    )
    axes.axvline(STALL_MS, color="#9b2226", linestyle=":", linewidth=1)
    return figure


def _longest(migrations: Sequence[Migration]) -> list[Migration]:
    with_times = [migration for migration in migrations if migration.timeline]
    chosen = sorted(with_times, key=lambda migration: migration.timeline[-1][1], reverse=True)[:LINES]
    return sorted(chosen, key=lambda migration: migration.index)


def timeline(results: Results, found: list[Summary], plt: Any) -> Any:
    lists = [(one.experiment.name, _longest(results.of(one.experiment.name))) for one in found]
    heights = [0.13 * max(6, len(migrations)) + 0.7 for _, migrations in lists]
    figure, all_axes = plt.subplots(
        layout="constrained",
        nrows=len(lists),
        figsize=(WIDTH, sum(heights) + 0.8),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for (name, migrations), axes in zip(lists, all_axes[:, 0], strict=True):
        for row, migration in enumerate(migrations):
            before = 0.0
            for part, at in migration.timeline:
                axes.barh(row, max(0.0, at - before), left=before, height=0.8, color=PARTS[part])
                before = max(before, at)
        axes.set_yticks(range(len(migrations)), [str(m.index + 1) for m in migrations], fontsize=5)
        axes.invert_yaxis()
        axes.set_title(f"{name}: the {len(migrations)} longest", fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.3)
        axes.set_xlabel("ms since it was asked for", fontsize=8)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PARTS.values()]
    figure.legend(
        handles, list(PART_NAMES.values()), fontsize=7, loc="outside lower center", ncols=len(PARTS)
    )
    return figure


def outcomes(results: Results, found: list[Summary], plt: Any) -> Any:
    """Phases met against how it was for the guest."""
    rows = []
    for one in found:
        counts = Counter(
            (m.phase, verdict(m)) for m in results.of(one.experiment.name) if m.outcome != "stayed"
        )
        rows += [(f"{one.experiment.name}: {phase}", counts, phase) for phase in one.phases]
    figure, axes = plt.subplots(layout="constrained", figsize=(WIDTH, max(1.6, 0.26 * len(rows) + 1.0)))
    for row, (_, counts, phase) in enumerate(rows):
        left, total = 0.0, sum(count for (met, _), count in counts.items() if met == phase)
        for word in VERDICTS:
            share = counts[phase, word] / total
            axes.barh(row, share, left=left, color=VERDICT_COLOURS[word])
            left += share
        axes.text(1.01, row, str(total), va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.06)
    axes.set_xlabel("share of the migrations that met the phase (their number at the right)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in VERDICT_COLOURS.values()]
    axes.legend(
        handles, VERDICTS, fontsize=7, ncols=len(VERDICTS), loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    return figure


def phases(results: Results, found: list[Summary], plt: Any) -> Any:
    """Phases met, with their bounds, beside the share of guest time."""
    figure, all_axes = plt.subplots(
        layout="constrained",
        nrows=len(found),
        figsize=(WIDTH, 1.7 * len(found) + 0.6),
        squeeze=False,
        sharex=True,
    )
    names = list(
        dict.fromkeys(name for s in found for name in (*s.phases, *(s.shares.shares if s.shares else ())))
    )
    for one, axes in zip(found, all_axes[:, 0], strict=True):
        for place, name in enumerate(names):
            rate, share = one.phases.get(name), one.shares.shares.get(name, 0.0) if one.shares else 0.0
            axes.bar(place - 0.2, 100 * share, 0.38, color="#bcd4e6")
            if rate is not None:
                met = 100 * rate.count / rate.of
                axes.bar(place + 0.2, met, 0.38, color="#457b9d")
                axes.errorbar(
                    place + 0.2,
                    met,
                    [[met - 100 * rate.low], [100 * rate.high - met]],
                    color="black",
                    capsize=2,
                    linewidth=1,
                )
        axes.set_title(one.experiment.name, fontsize=9, loc="left")
        axes.set_ylabel("%")
    all_axes[-1, 0].set_xticks(range(len(names)), names, rotation=20, fontsize=7)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in ("#bcd4e6", "#457b9d")]
    all_axes[0, 0].legend(handles, ["guest time spent there", "migrations that met it (95 %)"], fontsize=7)
    return figure


#: file name -> (title, how it is drawn)
PLOTS: dict[str, tuple[str, Callable[[Results, list[Summary], Any], Any]]] = {
    "downtime": ("Downtime", downtime),
    "stall": ("From going on to the next completed CD read", stall),
    "outcomes": ("Phases met against outcome", outcomes),
    "phases": ("Phases met beside the time spent in them", phases),
    "timeline": ("Time line of each migration", timeline),
}


def png(results: Results) -> dict[str, bytes]:
    """By name, in the order of PLOTS; none where nothing has moved. ConfigError without matplotlib."""
    plt = pyplot()
    found = summaries(results)
    if not found:
        return {}
    return {name: rendered(draw(results, found, plt), title, plt) for name, (title, draw) in PLOTS.items()}


def rendered(figure: Any, title: str, plt: Any) -> bytes:
    """A figure as PNG; it is used up."""
    figure.suptitle(title, fontsize=11)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return out.getvalue()
