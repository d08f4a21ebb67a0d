"""``atoll lab`` as users see it: one-line errors, reports of results that are there."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from coordinator.cli.main import main
from coordinator.lab.results import Results
from tests.lab.results import PLAN, migration


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "COMMAND"),
        (["juggle"], 2, "juggle"),
        (["pingpong", "--policy", "hope"], 2, "hope"),
        (["pingpong", "--aim", "lunch"], 2, "lunch"),
        (["pingpong", "--count", "many"], 1, "many"),
        (["pingpong", "--ram", "1"], 1, "64"),
        (["pingpong", "--fault", "send"], 1, "x-fault send"),
        (["pingpong", "--resume"], 2, "--results"),
        (["pingpong", "--guest", "doom"], 1, "doom"),
        (["compare", "--policies", "carry,hope"], 2, "hope"),
        (["compare", "--aim", "lunch"], 2, "lunch"),
        (["sweep", "/nowhere.toml"], 1, "No such file"),
        (["report", "/nowhere.jsonl"], 1, "No such file"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", *arguments]) == status
    error = capsys.readouterr().err
    assert error.startswith("atoll lab: ") and error.count("\n") == 1 and said in error


def test_report_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for seed in (1, 2):
        ones = tuple(msgspec.structs.replace(one, seed=seed) for one in PLAN.experiments)
        paths.append(str(tmp_path / f"{seed}.jsonl"))
        made = Results(msgspec.structs.replace(PLAN, experiments=ones), Path(paths[-1]))
        made.add(migration())
        made.close()
    assert main(["lab", "report", *paths, "--json", str(tmp_path / "out.json")]) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["migrations"]) == 2


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["lab", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("pingpong", "compare", "sweep", "report"))
