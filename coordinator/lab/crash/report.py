"""What came out, for people and programs: JSON, one self-contained HTML file, plots as PNG."""

from __future__ import annotations

from pathlib import Path

import msgspec

from coordinator.lab import plots as lab_plots
from coordinator.lab.crash import plots, table
from coordinator.lab.crash.results import Crashes
from coordinator.lab.crash.statistics import busy, failed_checks, summaries
from coordinator.lab.progress import milliseconds
from coordinator.lab.report import grid, html_page, pictures, save

#: kills with errors, and longest blackouts, that the report lists
MOST_LISTED = 50
LONGEST = 10


def document(results: Crashes) -> bytes:
    """JSON: plan, summary of each role, ends of guests, every kill."""
    found = {
        "plan": results.plan, "summaries": summaries(results), "ended": results.ended, "kills": results.kills
    }  # fmt: skip
    return msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"


def _wrong(results: Crashes) -> str:
    rows = [
        [
            str(kill.index + 1),
            kill.role,
            kill.how,
            busy(kill),
            milliseconds(kill.blackout),
            "; ".join(kill.errors[:4]),
        ]
        for kill in results.kills
        if kill.errors
    ]
    rows += [["", "", "", "", "", line] for line in failed_checks(results)]
    if not rows:
        return "<p>None.</p>"
    return grid(["kill", "role", "how", "drives", "blackout", "what was wrong"], rows[:MOST_LISTED])


def _longest(results: Crashes) -> str:
    kills = sorted(results.kills, key=lambda kill: kill.blackout or 0.0, reverse=True)[:LONGEST]
    rows = [
        [
            str(kill.index + 1), kill.role, kill.how, busy(kill), milliseconds(kill.blackout),
            "yes" if kill.beside else "no", "-" if kill.gap_guest is None else f"{kill.gap_guest:.0f} ms",
        ]
        for kill in kills
    ]  # fmt: skip
    return grid(
        ["kill", "role", "how", "drives", "blackout", "others away", "step of the guest's clock"], rows
    )


def page(results: Crashes, drawn: dict[str, bytes]) -> str:
    """The HTML report, with the plots inside."""
    found = summaries(results)
    roles = [one.role for one in found]
    about = (
        "<p>Linux reads its CD and writes, flushes and compares a qcow2 disk while processes of its machine "
        "are killed. Rates are followed by Wilson's 95 % bounds. Times are median / 99th "
        "percentile / largest. docs/lab.md says what each line means.</p>"
    )
    ends = [
        [
            f"{ended.guest + 1}", str(ended.kills), str(ended.rounds), str(ended.syncs),
            f"{ended.compared / 1e6:.0f}", *(finding or "clean" for finding in ended.checks.values()),
        ]
        for ended in results.ended
    ]  # fmt: skip
    names = list(results.ended[0].checks) if results.ended else []
    settings = [[key, str(value)] for key, value in msgspec.to_builtins(results.plan).items()]
    return html_page(
        "Atoll: kills",
        f"Atoll: {len(results.kills)} kills of a guest's islands",
        [
            ("", about + grid(["", *roles], [[name, *cells] for name, cells in table.rows(found)[1:]])),
            (
                "Where the drives stood",
                grid(["", *roles], [[name, *cells] for name, cells in table.phases(found)]),
            ),
            *pictures(drawn, {name: title for name, (title, _) in plots.PLOTS.items()}),
            ("What was wrong", _wrong(results)),
            ("Longest blackouts", _longest(results)),
            (
                "Guests at their end",
                grid(["guest", "kills", "rounds", "flushes", "MB compared", *names], ends),
            ),
            ("Settings", grid(["setting", "value"], settings)),
        ],
    )


def write(results: Crashes, json: Path | None, page_file: Path | None, png: Path | None) -> None:
    """Files that were asked for; ``png`` is a folder. ConfigError names what cannot be written."""
    wanted = png is not None or (page_file is not None and lab_plots.available())
    drawn = plots.png(results) if wanted else {}
    files = (json, lambda: document(results)), (page_file, lambda: page(results, drawn).encode())
    save(*files, png=(png, drawn))
