"""The figures of a run as a table for the terminal, and as columns for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coordinator.lab.statistics import Distribution, Rate, Summary


def percent(rate: Rate | None) -> str:
    """``3 of 200 (0.5-4.3 %)``."""
    if rate is None:
        return "-"
    return f"{rate.count} of {rate.of} ({100 * rate.low:.1f}-{100 * rate.high:.1f} %)"


def spread(found: Distribution | None, digits: int = 0) -> str:
    """Median, 99th percentile, largest."""
    if found is None:
        return "-"
    return " / ".join(f"{value:.{digits}f}" for value in (found.median, found.p99, found.most))


#: heading, and what stands there of one experiment; docs/lab.md says what each means
COLUMNS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("experiment", lambda s: s.experiment.name),
    ("policy", lambda s: s.experiment.policy.value),
    ("moved", lambda s: percent(s.moved)),
    ("aim met", lambda s: percent(s.aimed)),
    ("drained", lambda s: percent(s.drained)),
    ("stalls > 1 s", lambda s: percent(s.stalls)),
    ("kernel complained", lambda s: percent(s.complaints)),
    ("user errors", lambda s: percent(s.user_errors)),
    ("wrong hash", lambda s: percent(s.wrong)),
    ("passes right", lambda s: str(s.passes_right)),
    ("downtime host, ms", lambda s: spread(s.downtime_host)),
    ("downtime guest, ms", lambda s: spread(s.downtime_guest)),
    ("next read, ms", lambda s: spread(s.stall)),
    ("total, ms", lambda s: spread(s.total)),
    ("MB", lambda s: f"{s.megabytes.median:.1f}" if s.megabytes else "-"),
    ("MB/s", lambda s: f"{s.megabytes_a_second.median:.0f}" if s.megabytes_a_second else "-"),
)


def rows(summaries: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """A heading and one cell an experiment; columns that say nothing of any experiment are left out."""
    found = [(heading, [cell(one) for one in summaries]) for heading, cell in COLUMNS]
    return [(heading, cells) for heading, cells in found if any(cell != "-" for cell in cells)]


def phases(summaries: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """By phase: the share of migrations that met it, beside the share of guest time that the drive spends
    there."""
    names = list(
        dict.fromkeys(
            name for one in summaries for name in (*one.phases, *(one.shares.shares if one.shares else ()))
        )
    )
    table = []
    for name in names:
        cells = []
        for one in summaries:
            rate, share = one.phases.get(name), one.shares.shares.get(name, 0.0) if one.shares else None
            met = percent(rate) if rate else "0"
            cells.append(met if share is None else f"{met}; time {100 * share:.2f} %")
        table.append((name, cells))
    return table


def text(summaries: Sequence[Summary]) -> str:
    """A block for each table: one line a figure, one column an experiment."""
    if not summaries:
        return "no migration yet"
    return laid_out([rows(summaries), [("phase met", [""] * len(summaries)), *phases(summaries)]])


def laid_out(tables: Sequence[Sequence[tuple[str, Sequence[str]]]]) -> str:
    """Tables of headings and cells for a terminal, a blank line between them."""
    blocks = []
    for table in tables:
        widths = [max(map(len, cells)) for cells in zip(*(cells for _, cells in table), strict=True)]
        head = max(len(heading) for heading, _ in table)
        lines = (
            [heading.ljust(head), *(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))]
            for heading, cells in table
        )
        blocks.append("\n".join("  ".join(line).rstrip() for line in lines))
    return "\n\n".join(blocks)
