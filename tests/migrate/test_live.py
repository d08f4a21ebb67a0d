"""Migrations of whole machines, with the guest of tests/guests/counter as the judge: both sides killed,
ended, refused and brought back.
"""

from __future__ import annotations

import contextlib
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.migrate.machines import Moved, Source, Target, sequence
from tests.system.machine import until

pytestmark = pytest.mark.timeout(300)


@contextlib.contextmanager
def started(*machines: Moved) -> Any:
    """They have begun side by side; ready here."""
    with contextlib.ExitStack() as stack:
        for machine in machines:
            stack.push(machine.__exit__)
        for machine in machines:
            machine.__enter__()
        yield machines


def error(machine: Moved, command: str, **arguments: Any) -> str:
    answer = machine.qmp.cmd_raw(command, {key.replace("_", "-"): value for key, value in arguments.items()})
    return str(answer["error"]["desc"])


def test_there_and_back(home: Path) -> None:
    """Over TCP and UNIX, with a lost and a doubled word; afterwards a reset starts the kernel anew."""
    with started(Source(), Target(), Target(fault="target.verify=lose"), Target("-S")) as (a, b, c, d):
        assert a.migrates(b)["status"] == "completed"
        b.counts()
        a.stands()
        assert "has been migrated away" in error(a, "cont")
        assert "has been migrated away" in error(a, "system_reset")
        b.fault("resume=double")
        assert b.migrates(c)["status"] == "completed"
        c.counts()
        texts = [a.quit(), b.quit()]
        ram = c.migrates(d)["ram"]
        assert ram["normal-bytes"] == ram["normal"] * ram["page-size"] > 0 and ram["remaining"] == 0
        assert d.state == "paused"
        before = d.text
        d.cmd("cont")
        d.counts()
        d.cmd("system_reset")
        until(lambda: "n 00000001\n" in d.text[len(before) :], "a second start")
        texts += [c.quit(), d.quit().partition("n 00000001\n")[0]]
        sequence(*texts)


def test_target_is_killed(home: Path) -> None:
    """Before the commit point the source goes on; after it, it never does."""
    points = ("receive", "load", "verify")
    with started(Source(), *(Target(fault=f"target.{p}=kill") for p in (*points, "resume"))) as (a, *targets):
        for target, point in zip(targets, points, strict=False):
            status = a.migrates(target)
            assert status["status"] == "failed" and "\n" not in status["error-desc"], point
            assert a.state == "running"
            a.counts()
            target.killed()
        a.cmd("migrate", uri=targets[3].uri)
        a.reaches("postcopy-paused")
        targets[3].killed()
        a.stands()
        for command in ("migrate_cancel", "cont"):
            assert error(a, command)
        assert "paused migration" not in error(a, "migrate", uri="tcp:nowhere.invalid:1", resume=True)
        text = a.quit()
        sequence(text)
        assert all(target.text == "" for target in targets)
        assert "atoll migrate --recover NAME file:" in a.machine.errors()


@pytest.mark.parametrize(
    "point", ["negotiate.done", "quiesce", "send", "verify", "verify.done", "release.done"]
)
def test_source_is_killed(home: Path, point: str) -> None:
    with started(Source(), Target()) as (a, b):
        a.fault(f"{point}=kill")
        _send(a, b)
        a.killed()
        if point in ("verify.done", "release.done"):  # it has all, and cannot know
            b.reaches("postcopy-paused")
            assert b.state == "inmigrate"
            assert "waiting for its migration" in error(b, "cont")
        else:
            assert b.dies() == 1
            assert re.search("the source is gone|ends too early", b.machine.errors())
            return
        record = home / "state" / "atoll" / "released" / f"transfer-{b.status['x-transfer']}"
        if point == "verify.done":
            assert "of no machine" in error(b, "migrate-recover", uri=f"file:{record}")
            b.stands()
        else:
            b.cmd("migrate-recover", uri=f"file:{record}")
            assert b.ended()["status"] == "completed"
            b.counts()
            sequence(a.text, b.quit())
            record.unlink()


def _send(a: Moved, b: Moved) -> None:
    with contextlib.suppress(Exception):
        a.cmd("migrate", uri=b.uri)


def test_recovery_at_another_address(home: Path) -> None:
    with started(Source(), Target()) as (a, b):
        a.fault("resume=delay:700")
        a.cmd("migrate", uri=b.uri)
        a.phase("resume")
        Path(b.uri.removeprefix("unix:")).unlink()
        other = f"{b.uri}2"
        b.cmd("migrate-recover", uri=other)
        a.cmd("migrate", uri=other, resume=True)
        assert a.ended()["status"] == "completed"
        b.counts()
        sequence(a.quit(), b.quit())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_side_is_interrupted(home: Path, number: signal.Signals) -> None:
    with started(Source(), Target(fault="target.load=delay:60000"), Target()) as (a, b, c):
        a.cmd("migrate", uri=b.uri)
        b.phase("load")
        b.machine.kill(number)
        assert a.ended()["status"] == "failed"
        a.counts()
        assert b.machine.wait() == (130 if number is signal.SIGINT else 0)
        b.machine.gone()
        a.fault("verify.done=delay:60000")
        a.cmd("migrate", uri=c.uri)
        until(lambda: c.status.get("x-phase") == "verify", "a target in doubt")
        a.machine.kill(number)
        a.machine.wait()
        a.machine.gone()
        assert c.dies() == 1
        assert "the source goes on: its machine ends" in c.machine.errors()
        assert c.text == ""


def test_differences_are_named_before_memory_moves(home: Path, tmp_path: Path) -> None:
    media = [tmp_path / name for name in ("one.iso", "two.iso")]
    for number, medium in enumerate(media):
        medium.write_bytes(bytes([number]) * (64 << 10))
    disc = lambda path: ("-drive", f"file={path},format=raw,media=cdrom,id=cd")  # noqa: E731
    pair = (
        Source(*disc(media[0])),
        Target(*disc(media[1]), "-m", "32", "-smp", "2"),
        Target(),
        Target(*disc(media[0])),
    )
    with started(*pair) as (a, other, empty, same):
        status = a.migrates(other)
        for what in (
            "memory (bytes): source 16777216, target 33554432",
            "vcpus: source 1, target 2",
            "another medium",
        ):
            assert what in status["error-desc"]
        assert "ram" not in status and "downtime" not in status  # it never stood still
        assert other.dies() == 1
        assert "only the source has it" in a.migrates(empty)["error-desc"]
        a.counts()
        a.cmd("blockdev-open-tray", id="cd")
        assert a.migrates(same)["status"] == "completed"
        same.counts()
        assert same.cmd("query-block")[0]["tray_open"] is True
        same.cmd("blockdev-close-tray", id="cd")
        sequence(a.quit(), same.quit())


def test_to_a_file_and_from_one(home: Path, tmp_path: Path) -> None:
    good, folder = tmp_path / "a state.with spaces", tmp_path / "missing" / "state"
    with started(Source()) as (a,):
        assert "No such file or directory" in a.migrates(f"file:{folder}")["error-desc"]
        a.counts()
        assert list(tmp_path.iterdir()) == []
        a.counts()
        assert a.migrates(f"file:{good}")["status"] == "completed"
        a.stands()
        text = a.quit()
    whole = good.read_bytes()
    bad = {
        "short": (whole[:-50], "ends too early"),
        "foreign": (b"QEVM" + whole[4:], "no migration stream"),
    }
    machines = []
    for name, (data, _) in bad.items():
        (tmp_path / name).write_bytes(data)
        machines.append(Moved("-incoming", f"file:{tmp_path / name}"))
    back = Moved("-incoming", f"file:{good}")
    with started(*machines, back):
        for machine, (name, (_, why)) in zip(machines, bad.items(), strict=True):
            assert machine.dies() == 1, name
            lines = machine.machine.errors().splitlines()
            assert len(lines) == 1 and why in lines[0], lines
        back.counts()
        sequence(text, back.quit())


def test_commands_with_nonsense_and_others_meanwhile(home: Path) -> None:
    """Hardware cases, item 19, for the commands of migration; and the socket answers all the while."""
    with started(Source(), Target()) as (a, b):
        for command, arguments in (
            ("migrate", {}),
            ("migrate", {"uri": 5}),
            ("migrate", {"uri": ""}),
            ("migrate", {"uri": "exec:cat"}),
            ("migrate", {"uri": "tcp:1:2:3:x"}),
            ("migrate", {"uri": "tcp:127.0.0.1:99999"}),
            ("migrate", {"uri": "unix:" + "x" * 10000, "blk": True}),
            ("migrate", {"uri": b.uri, "resume": True}),
            ("migrate", {"uri": b.uri, "what": 1}),
            ("migrate-incoming", {"uri": b.uri}),
            ("migrate-recover", {"uri": "file:/nowhere"}),
            ("migrate-set-parameters", {"multifd-channels": 0}),
            ("migrate-set-parameters", {"multifd-channels": 10**30}),
            ("migrate-set-parameters", {"multifd-compression": "rar"}),
            ("migrate-set-parameters", {"x-fault": "nowhere=kill"}),
            ("migrate-set-parameters", {"x-fault": "stop=lose"}),
            ("migrate-set-parameters", {"unknown": [[[[]]]]}),
        ):
            assert "\n" not in error(a, command, **arguments), arguments
        assert "cannot be connected to" in a.migrates("unix:/" + "x" * 300)["error-desc"]
        assert "nobody listens there" in a.migrates("tcp:127.0.0.1:1")["error-desc"]
        assert "nobody listens there" in a.migrates(f"unix:{a.runtime / 'migration'}")["error-desc"]  # itself
        a.fault("verify=delay:60000")
        a.cmd("migrate", uri=b.uri)
        a.phase("verify")
        assert a.state == "finish-migrate"
        assert "progress" in error(a, "migrate", uri=b.uri)
        for command in ("stop", "cont", "system_reset"):
            assert "not finalized" in error(a, command)
        a.cmd("migrate_cancel")
        assert a.ended()["status"] == "cancelled"
        assert b.dies() == 1
        a.counts()
        sequence(a.quit())
