"""Reports made from fixed results."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest

from coordinator.contract.errors import ConfigError
from coordinator.lab import plots, report, table
from coordinator.lab.progress import Progress
from coordinator.lab.results import Results
from coordinator.lab.run import described
from coordinator.lab.statistics import summaries
from tests.lab.results import PLAN, migration, results

PNG = b"\x89PNG\r\n\x1a\n"  # PNG specification, 5.2


class Wellformed(HTMLParser):
    """Each element is closed in order, and nothing is fetched from anywhere."""

    VOID = {"meta", "img"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_one_whole_file_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(results(), tmp_path / "r.json", tmp_path / "r.html", tmp_path / "png")
    page = Wellformed()
    text = (tmp_path / "r.html").read_text()
    page.feed(text)
    assert page.open == [] and len(page.sources) == len(plots.PLOTS)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert {path.name for path in (tmp_path / "png").iterdir()} == {f"{name}.png" for name in plots.PLOTS}
    assert all(path.read_bytes().startswith(PNG) for path in (tmp_path / "png").iterdir())
    assert "ata2.00: exception" in text and "no read completed" in text


def test_page_without_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    report.write(results(), None, tmp_path / "r.html", None)
    assert "atoll[lab]" in (tmp_path / "r.html").read_text()
    with pytest.raises(ConfigError, match=r"atoll\[lab\]"):
        report.write(results(), None, None, tmp_path / "png")


def test_what_guests_say_is_no_markup() -> None:
    made = Results(PLAN)
    made.add(migration(kernel=("sr0: <script>alert(1)</script>",), outcome="lost"))
    assert "<script>" not in report.page(made, {})


def test_document_has_plan_summaries_and_migrations() -> None:
    document = json.loads(report.document(results()))
    assert [one["name"] for one in document["plan"]["experiments"]] == ["carry", "drop at packet-complete"]
    assert document["summaries"][1]["stalls"]["count"] == 2
    assert len(document["migrations"]) == 5 and document["migrations"][0]["downtime-host"] == 40.0


def test_table_has_a_column_an_experiment() -> None:
    lines = table.text(summaries(results())).splitlines()
    assert lines[0].split() == ["experiment", "carry", "drop", "at", "packet-complete"]
    stalls = next(line for line in lines if line.startswith("stalls"))
    assert "0 of 3" in stalls and "2 of 2" in stalls
    met = next(line for line in lines if line.startswith("packet-complete"))
    assert "1 of 3" in met
    assert table.text([]) == "no migration yet"


@pytest.mark.parametrize("made", [Results(PLAN), results()])
def test_reports_of_nothing_and_of_all_are_drawn(made: Results) -> None:
    pytest.importorskip("matplotlib")
    assert len(plots.png(made)) == (len(plots.PLOTS) if made.migrations else 0)


def test_progress_tells_what_is_left() -> None:
    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = Progress(stream, of=3)
    for index in range(3):
        progress.step(described(migration(index=index)))
    progress.end()
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("3/3  carry 3: idle, unnoticed") and re.search(r"\(0:00:00 left\)\s*\n$", last)
