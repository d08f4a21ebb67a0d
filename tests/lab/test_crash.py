"""``atoll lab crash``: its plan, figures and report, from results that nobody measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.main import main
from coordinator.contract.errors import ConfigError
from coordinator.lab.console import Text
from coordinator.lab.crash import plots, report, table
from coordinator.lab.crash.plan import Trial, trial
from coordinator.lab.crash.results import Crashes, Ended, Kill
from coordinator.lab.crash.run import described
from coordinator.lab.crash.statistics import complaints, failed_checks, summaries
from tests.lab.results import LIBATA
from tests.lab.test_report import Wellformed


def kill(index: int, role: str = "devhost0", **fields: Any) -> Kill:
    """One that went well, but for ``fields``."""
    known: dict[str, Any] = {
        "guest": 0, "how": "kill", "at": index / 2, "at_guest": 3.0, "blackout": 10.0 + index,
        "gap_host": 12.0, "next_read": 4.0, "phases": {"ide0-hd0": "idle", "ide1-cd0": "packet-complete"},
        "reads": 9, "right": 2, "rounds": 5, "syncs": 7, "compared": 1 << 20,
    }  # fmt: skip
    return Kill(index=index, role=role, **{**known, **fields})


def ended(**checks: str) -> Ended:
    return Ended(guest=0, kills=4, rounds=20, syncs=30, compared=4 << 20, checks={"look": "", **checks})


def results() -> Crashes:
    """Of four kills three did no harm."""
    made = Crashes(Trial(kills=4))
    made.add(kill(0))
    made.add(kill(1, "blockd", phases={"ide0-hd0": "flush", "ide1-cd0": "dma-transfer"}))
    made.add(kill(2, gap_guest=9.0, beside=True))
    made.add(
        kill(
            3, "blockd", outcome="lost", error="blockd is not replaced", blackout=None, phases={}, wrong=1,
            wrong_bytes=8, complaints=(LIBATA,), user_errors=("disk: errno 5 at <fsync>",),
        )
    )  # fmt: skip
    made.add(ended())
    return made


def test_summaries() -> None:
    everything, blockd, devhost = summaries(results())
    assert [one.role for one in (everything, blockd, devhost)] == ["all", "blockd", "devhost0"]
    assert (everything.errors.count, everything.errors.of) == (1, 4) and devhost.errors.count == 0
    assert (blockd.lost, blockd.complaints, blockd.user_errors) == (1, 1, 1)
    assert (blockd.wrong_passes, blockd.wrong_bytes) == (1, 8)
    assert devhost.blackout is not None and (devhost.blackout.least, devhost.blackout.most) == (10, 12)
    assert blockd.blackout is not None and blockd.blackout.n == 1
    assert everything.phases == {"packet-complete": 2, "dma-transfer, flush": 1, "unknown": 1}
    assert everything.beside == 1 and everything.compared == 4 << 20
    assert summaries(Crashes(Trial())) == []


@pytest.mark.parametrize(
    ("text", "level", "wrong"),
    [
        (LIBATA, 6, True),
        ("sr 1:0:0:0: [sr0] tag#0 Sense Key : Medium Error [current]", 6, True),
        ("I/O error, dev sda, sector 8", 3, True),
        ("irq 14: nobody cared", 6, True),
        ("something of level KERN_ERR", 3, True),
        ("random: crng init done", 5, False),
        ("clocksource: Switched to clocksource tsc", 6, False),
    ],
)
def test_complaints(text: str, level: int, wrong: bool) -> None:
    assert bool(complaints([Text(1, text, level)])) is wrong


def test_table_and_line() -> None:
    said = table.text(results())
    assert "1 of 4" in said and "0 of 2" in said and "1 of 1 clean" in said and "FAILED" not in said
    assert table.text(Crashes(Trial())) == "no kill yet"
    assert described(kill(0)) == "devhost0 killed, drives packet-complete: away 10 ms, nothing noticed"
    made = results()
    made.add(ended(look="2 leaked clusters"))
    assert failed_checks(made) == ["guest 1: look: 2 leaked clusters"] and "FAILED: guest 1" in table.text(
        made
    )


def test_report_is_one_whole_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.write(results(), tmp_path / "r.json", tmp_path / "r.html", tmp_path / "png")
    page, text = Wellformed(), (tmp_path / "r.html").read_text()
    page.feed(text)
    assert page.open == [] and len(page.sources) == len(plots.PLOTS)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "blockd is not replaced" in text and "<fsync>" not in text and len(text) < 2 << 20
    document = json.loads((tmp_path / "r.json").read_text())
    assert len(document["kills"]) == 4 and document["summaries"][0]["errors"]["count"] == 1
    assert {path.stem for path in (tmp_path / "png").iterdir()} == set(plots.PLOTS)
    report.write(Crashes(Trial()), None, tmp_path / "empty.html", None)


def test_a_run_goes_on_behind_its_last_kill(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    made = Crashes(Trial(), path)
    made.add(kill(0, user_errors=("x",)))
    made.add(ended())
    made.close()
    path.write_bytes(path.read_bytes() + b'{"type": "ki')
    again = Crashes(Trial(), path, resume=True)
    assert (again.kills, again.ended) == (made.kills, made.ended)
    with pytest.raises(ConfigError, match="another plan"):
        Crashes(Trial(seed=9), path, resume=True)


def test_roles() -> None:
    both = trial({"roles": "devhost1,blockd"})
    assert [role for role in ("devhost0", "devhost1", "blockd", "vcpu0") if both.has(role)] == [
        "devhost1",
        "blockd",
    ]
    assert trial({}).has("devhost7") and not trial({}).has("coordinator")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--kills", "0"], 1, "kills = 0"),
        (["--spacing", "soon"], 1, "soon"),
        (["--roles", "vcpu0"], 1, "vcpu0"),
        (["--roles", ","], 1, "at least one"),
        (["--hang", "2"], 1, "hang = 2"),
        (["--disk", "1"], 1, "48"),
        (["--resume"], 2, "--results"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "crash", *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("atoll lab: ") and error.count("\n") == 1 and said in error
