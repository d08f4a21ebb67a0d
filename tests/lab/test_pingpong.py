"""Real migrations, a few of each kind, of one guest that is booted once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from coordinator.lab.local import Local
from coordinator.lab.plan import Experiment, Plan, experiment
from coordinator.lab.results import Results
from coordinator.lab.statistics import complaints

pytestmark = [pytest.mark.boot, pytest.mark.timeout(600)]

AIM = "packet-complete"
EXPERIMENTS = (
    {"name": "aimed", "count": 2, "aim": AIM},
    {"name": "drain", "count": 1, "aim": AIM, "policy": "drain"},
    {"name": "error", "count": 1, "aim": AIM, "policy": "error"},
    {"name": "fails", "count": 1, "fault": "send=fail"},
    {"name": "killed", "count": 1, "fault": "resume=kill"},
    {"name": "far", "count": 1, "delay": 2.0, "rate": 200.0, "streams": 2, "compression": "zstd"},
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    made: tuple[Experiment, ...] = tuple(experiment(fields) for fields in EXPERIMENTS)
    results = Results(Plan(experiments=made), tmp_path_factory.mktemp("lab") / "r.jsonl")
    asyncio.run(Local().run(results.plan, results.done, results.add))
    results.close()
    assert results.path is not None and results.done == {one.name: one.count for one in made}
    assert Results(results.plan, Path(results.path), resume=True).migrations == results.migrations
    return results


@pytest.mark.parametrize("name", ["aimed", "drain", "far"])
def test_a_guest_that_is_moved_reads_on_and_notices_nothing(results: Results, name: str) -> None:
    for migration in results.of(name):
        assert (migration.outcome, migration.status, migration.error) == ("moved", "completed", "")
        assert migration.right > 0 and migration.wrong == 0 and migration.reads > 0
        assert migration.user_errors == () and complaints(migration) == []
        assert migration.downtime_host is not None and migration.stall is not None and migration.stall > 0
        assert [word for word, _ in migration.timeline] == ["set up", "stopped", "runs", "read"]
        assert migration.bytes > 0 and migration.pages > 0


def test_a_gap_in_the_guests_clock_is_its_downtime(results: Results) -> None:
    for migration in results.of("aimed"):
        # its thread slept before the stop and was woken after the start, so its gap is the longer one
        assert migration.downtime_guest is not None and migration.downtime_host is not None
        assert migration.downtime_guest > 0.9 * migration.downtime_host


def test_the_drive_is_caught_where_it_was_aimed(results: Results) -> None:
    assert [(one.aimed, one.phase, one.stream) for one in results.of("aimed")] == [(True, AIM, "full")] * 2
    (drained,) = results.of("drain")
    assert drained.aimed and drained.drained and drained.phase != AIM and drained.stream == "v0"


def test_an_error_is_seen_by_kernel_and_program(results: Results) -> None:
    (migration,) = results.of("error")
    assert migration.outcome == "moved" and migration.phase == AIM and migration.wrong == 0
    said = " ".join(complaints(migration))
    assert "Medium Error" in said and "No seek complete" in said  # 03h/02h, docs/migration.md
    assert migration.user_errors and all(text.startswith("errno 5") for text in migration.user_errors)  # EIO


def test_a_guest_whose_migration_fails_stays_and_reads_on(results: Results) -> None:
    (migration,) = results.of("fails")
    assert (migration.outcome, migration.status) == ("stayed", "failed")
    assert "fault injected at send" in migration.error
    assert migration.right > 0 and migration.wrong == 0 and complaints(migration) == []


def test_a_source_that_dies_behind_the_commit_point_leaves_its_record(results: Results) -> None:
    (migration,) = results.of("killed")
    assert (migration.outcome, migration.status) == ("recovered", "gone")
    assert migration.right > 0 and migration.wrong == 0 and complaints(migration) == []


def test_shares_of_time_are_whole(results: Results) -> None:
    shares = results.shares["aimed"]
    assert sum(shares.shares.values()) == pytest.approx(1, abs=0.01)
    assert {"idle", AIM, "dma-transfer"} <= shares.shares.keys()
