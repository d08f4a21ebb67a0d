"""Plan files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.contract.drives import DrivePhase
from coordinator.contract.errors import ConfigError
from coordinator.lab import compare, plan
from coordinator.lab.plan import Experiment, Policy

EXAMPLE = """
hosts = "namespaces"
[base]
count = 5
seed = 7
[[experiment]]
name = "memory"
ram = [96, 128]
compression = ["none", "zstd"]
[[experiment]]
name = "killed"
policy = "drain"
aim = "packet-complete"
fault = "send=kill"
dirty = 16
dirty-rate = 50
"""


def read(tmp_path: Path, text: str) -> plan.Plan:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return plan.read(path)


def test_lists_stand_for_one_experiment_each(tmp_path: Path) -> None:
    made = read(tmp_path, EXAMPLE)
    assert made.hosts == "namespaces" and made.migrations == 25
    *memory, killed = made.experiments
    assert [(one.name, one.ram, one.compression) for one in memory] == [
        ("memory ram=96 compression=none", 96, "none"),
        ("memory ram=96 compression=zstd", 96, "zstd"),
        ("memory ram=128 compression=none", 128, "none"),
        ("memory ram=128 compression=zstd", 128, "zstd"),
    ]
    assert all(one.seed == 7 for one in made.experiments)
    assert (killed.policy, killed.aim, killed.dirty_rate) == (Policy.DRAIN, DrivePhase.PACKET_COMPLETE, 50)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[experiment", "plan.toml"),
        ("", r"no \[\[experiment\]\]"),
        ("x = 1", "'x' is not one of hosts, base, experiment"),
        ("[[experiment]]\nname = 'a'\nrams = 1", "rams"),
        ("[[experiment]]\nname = 'a'\npolicy = 'hope'", "hope"),
        ("[[experiment]]\nname = 'a'\ncount = 0", ">= 1"),
        ("[[experiment]]\nname = 'a'\n[[experiment]]\nname = 'a'", "two experiments are named 'a'"),
        ("[[experiment]]\nname = 'a'\nfault = 'send'", "x-fault send"),
        ("[[experiment]]\nname = 'a'\ndirty = 8", "dirty-rate"),
        ("[[experiment]]\nname = 'a'\nfill = 64", "RAM"),
        ("hosts = 'moon'\n[[experiment]]\nname = 'a'", "moon"),
        ("experiment = 3", r"no \[\[experiment\]\]"),
        ("experiment = [3]", "table"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        plan.read(tmp_path / "none.toml")


def test_comparison_has_each_policy_at_each_place() -> None:
    base = Experiment(name="base", count=200, ram=128)
    made = compare.plan(base, list(Policy), [None, DrivePhase.PACKET_COMPLETE], drop_count=50)
    assert [one.name for one in made.experiments[::5]] == ["carry", "carry at packet-complete"]
    assert [one.count for one in made.experiments] == [200, 200, 200, 200, 50] * 2
    assert all(one.ram == 128 for one in made.experiments)
