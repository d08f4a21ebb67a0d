"""The file of results: written line by line, gone on with, put together from shards."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coordinator.contract.errors import ConfigError
from coordinator.lab.results import Results, gathered
from tests.lab.results import CARRY, PLAN, migration


def test_a_run_that_was_cut_off_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = Results(PLAN, path)
    first.add(migration(index=0))
    first.add(migration(index=1, kernel=("x",), timeline=()))
    first.close()
    whole = path.read_bytes()
    for cut in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        path.write_bytes(whole[:cut])
        again = Results(PLAN, path, resume=True)
        assert again.done == {"carry": 1}
        again.add(migration(index=1, kernel=("x",), timeline=()))
        again.close()
        assert path.read_bytes() == whole


def test_all_fields_come_back(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    one = migration(user_errors=("errno 5",), aimed=False, drained=True, stall=None)
    made = Results(PLAN, path)
    made.add(one)
    made.close()
    assert Results(PLAN, path, resume=True).migrations == [one]


def test_results_are_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Results(PLAN, path).close()
    with pytest.raises(ConfigError, match="is there already; --resume"):
        Results(PLAN, path)


def test_another_plan_does_not_go_on_with_them(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    Results(PLAN, path).close()
    other = msgspec.structs.replace(PLAN, experiments=(CARRY,))
    with pytest.raises(ConfigError, match="of another plan"):
        Results(other, path, resume=True)


@pytest.mark.parametrize("text", ["{}\n", "hello\n", '{"type":"migration"}\n'])
def test_a_file_of_something_else_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.jsonl, line 1"):
        Results(PLAN, path, resume=True)


def test_shards_are_one_run(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        shard = msgspec.structs.replace(PLAN, experiments=(msgspec.structs.replace(CARRY, seed=seed),))
        paths.append(tmp_path / f"{seed}.jsonl")
        made = Results(shard, paths[-1])
        made.add(migration(index=0))
        made.add(migration(index=1))
        made.close()
    assert gathered(paths).done == {"carry": 4}
    with pytest.raises(ConfigError, match="seed 1 is in .*1.jsonl, too"):
        gathered([*paths, tmp_path / "1.jsonl"])


def test_shards_under_different_settings_are_not(tmp_path: Path) -> None:
    paths = []
    for ram in (96, 128):
        paths.append(tmp_path / f"{ram}.jsonl")
        one = msgspec.structs.replace(CARRY, ram=ram)
        Results(msgspec.structs.replace(PLAN, experiments=(one,)), paths[-1]).close()
    with pytest.raises(ConfigError, match="other settings"):
        gathered(paths)
