"""What came out, for people and programs: JSON, one self-contained HTML file, plots as PNG."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from coordinator.contract.errors import ConfigError
from coordinator.lab import plots, table
from coordinator.lab.results import Results
from coordinator.lab.statistics import Summary, complaints, summaries, verdict

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 12px }
th, td { border: 1px solid #ccc; padding: 3px 7px; text-align: left; vertical-align: top }
th { background: #f0f3f6 } img { max-width: 100% } h2 { margin-top: 2em } .wide { overflow-x: auto }
"""
#: unusual migrations that the report lists, of each experiment
MOST_LISTED = 30


def document(results: Results) -> bytes:
    """JSON: plan, summary of each experiment, every migration."""
    found = {"plan": results.plan, "summaries": summaries(results), "migrations": results.migrations}
    return msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first cell of a row is its heading."""
    cells = "".join(f"<th>{html.escape(word)}</th>" for word in head)
    lines = "".join(
        "<tr>"
        + f"<th>{html.escape(row[0])}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{cells}</tr>{lines}</table></div>'


def _unusual(results: Results, found: list[Summary]) -> str:
    """Migrations that the guest noticed."""
    rows = []
    for one in found:
        noticed = [m for m in results.of(one.experiment.name) if verdict(m) != "unnoticed" or m.error]
        for m in noticed[:MOST_LISTED]:
            said = "; ".join([*([m.error] if m.error else []), *m.user_errors[:2], *complaints(m)[:3]])
            stall = "-" if m.stall is None else f"{m.stall:.0f}"
            rows.append([m.experiment, str(m.index + 1), m.phase, m.outcome, verdict(m), stall, said])
    if not rows:
        return "<p>None.</p>"
    return grid(
        ["experiment", "number", "phase", "outcome", "for the guest", "next read, ms", "what was said"], rows
    )


def _settings(results: Results) -> str:
    rows = []
    for one in results.plan.experiments:
        fields = msgspec.to_builtins(one)
        name = fields.pop("name")
        said = [f"{key} {value}" for key, value in fields.items() if value not in ("", None, 0)]
        rows.append([name, ", ".join(said)])
    return grid(["experiment", "settings"], rows)


def html_page(title: str, heading: str, sections: Sequence[tuple[str, str]]) -> str:
    """One file with everything in it; a section is a heading (may be empty) and its HTML."""
    parts = "".join(
        (f"<h2>{html.escape(name)}</h2>" if name else "") + content + "\n" for name, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{html.escape(heading)}</h1>
{parts}</body></html>
"""


def pictures(drawn: Mapping[str, bytes], titles: Mapping[str, str]) -> list[tuple[str, str]]:
    """Sections of plots, as PNG by name."""
    if not drawn:
        return [("", "<p>Plots need matplotlib (atoll[lab]).</p>")]
    return [
        (
            titles[name],
            f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}">',
        )
        for name, data in drawn.items()
    ]


def page(results: Results, drawn: dict[str, bytes]) -> str:
    """The HTML report, with the plots inside."""
    found = summaries(results)
    names = [one.experiment.name for one in found]
    about = (
        "<p>Rates are followed by Wilson's 95 % bounds. Times are median / 99th percentile / largest. "
        "docs/lab.md says what each line means.</p>"
    )
    return html_page(
        "Atoll: migrations",
        f"Atoll: {len(results.migrations)} migrations of a guest that reads its CD",
        [
            ("", about + grid(["", *names], [[heading, *cells] for heading, cells in table.rows(found)[1:]])),
            (
                "Phases met, and time spent in them",
                grid(["phase", *names], [[heading, *cells] for heading, cells in table.phases(found)]),
            ),
            *pictures(drawn, {name: title for name, (title, _) in plots.PLOTS.items()}),
            ("Migrations that the guest noticed, or that failed", _unusual(results, found)),
            ("Settings", _settings(results)),
        ],
    )


def write(results: Results, json: Path | None, page_file: Path | None, png: Path | None) -> None:
    """Files that were asked for; ``png`` is a folder. ConfigError names what cannot be written."""
    drawn = plots.png(results) if png is not None or (page_file is not None and plots.available()) else {}
    files = (json, lambda: document(results)), (page_file, lambda: page(results, drawn).encode())
    save(*files, png=(png, drawn))


def save(
    *files: tuple[Path | None, Callable[[], bytes]], png: tuple[Path | None, Mapping[str, bytes]]
) -> None:
    """Files of those that have a path, plots in a folder; ConfigError names what cannot be written."""
    made = {path: data() for path, data in files if path is not None}
    folder, drawn = png
    if folder is not None:
        made |= {folder / f"{name}.png": data for name, data in drawn.items()}
    for path, data in made.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
