"""SIGKILL in each phase of a migration, on both sides, with a qcow2 disk that both reach and that the guest
writes.

The guest is tests/guests/scribe, which counts in memory and on its disk and would notice if the two were not
of one moment, or if anybody else had written. The lease says who may.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.migrate.machines import Moved, Source, Target, sequence
from tests.migrate.test_live import _send, error
from tests.support.tools import run_tool
from tests.system.machine import until
from tests.system.test_leases import lease

pytestmark = [pytest.mark.boot, pytest.mark.timeout(600)]

#: a phase of the source, and the point before it at which it is held; those behind are after the commit point
PHASES = ("negotiate.done", "stop", "quiesce", "flush", "settle", "send", "verify", "verify.done")
#: for how long a phase is held, ms: an island dies meanwhile
HELD = 1500


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    image = tmp_path / "disk.qcow2"
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M")
    return image


class Machines:
    """All that a guest with this disk has lived in, in their order."""

    def __init__(self, disk: Path, stack: contextlib.ExitStack) -> None:
        self._disk, self._stack = disk, stack
        self._options = ("-drive", f"file={disk},format=qcow2,if=ide,index=0")
        self.texts: list[str] = []

    def source(self) -> Source:
        return self._stack.enter_context(Source(*self._options, guest="scribe"))

    def target(self, fault: str = "") -> Target:
        return self._stack.enter_context(Target(*self._options, guest="scribe", fault=fault))

    def has(self, machine: Moved) -> None:
        """The guest runs there, finds memory and disk as they should be, and nobody else may write."""
        machine.counts()
        assert "bad" not in machine.text
        held = lease(self._disk)
        assert (held["state"], held["vm"]) == ("held", machine.machine.name)

    def ends(self, machine: Moved) -> None:
        """The guest powers off; its disk is sound."""
        self.texts.append(machine.quit())
        assert "No errors were found" in run_tool("qemu-img", "check", str(self._disk))


@pytest.fixture
def machines(home: Path, disk: Path) -> Iterator[Machines]:
    with contextlib.ExitStack() as stack:
        yield Machines(disk, stack)


def test_target(machines: Machines, disk: Path) -> None:
    """Before the commit point the source goes on, again and again; after it, it never does."""
    a = machines.source()
    for point in ("negotiate", "receive", "load", "verify"):
        b = machines.target(f"target.{point}=kill")
        status = a.migrates(b)
        assert status["status"] == "failed" and "\n" not in status["error-desc"], point
        b.killed()
        assert b.text == ""
        machines.has(a)
    b = machines.target("target.resume=kill")
    a.cmd("migrate", uri=b.uri)
    a.reaches("postcopy-paused")
    b.killed()
    a.stands()
    assert error(a, "cont") and error(a, "migrate_cancel")
    assert lease(disk)["vm"] == a.machine.name  # which has let go, and nobody has taken it
    assert b.text == ""
    machines.ends(a)
    sequence(*machines.texts)


@pytest.mark.parametrize("point", [*PHASES, "release.done", "resume"])
def test_source(machines: Machines, disk: Path, point: str) -> None:
    """Before the commit point the guest is lost, as in any crash, and the target never runs it; after it the
    target does, by the record that lies beside the disk."""
    a, b = machines.source(), machines.target()
    a.fault(f"{point}=kill")
    _send(a, b)
    a.killed()
    if point in ("release.done", "resume"):
        b.reaches("postcopy-paused")
        b.cmd("migrate-recover", uri="file:beside-the-disk")
        assert b.ended()["status"] == "completed"
        machines.has(b)
        machines.texts.append(a.text)
        machines.ends(b)
        sequence(*machines.texts)
        return
    if point == "verify.done":
        b.reaches("postcopy-paused")
        assert error(b, "migrate-recover", uri="file:beside-the-disk")
        b.stands()
        b.quit()
    else:
        assert b.dies() == 1
        assert re.search("the source is gone|ends too early", b.machine.errors())
    assert b.text == ""
    assert lease(disk)["holder-dead"] is True
    machines.has(machines.source())  # a new one, with the same disk


def killed_at(machine: Moved, phase: str, role: str) -> None:
    """The phase is reached, and an island of the machine dies in it."""
    machine.phase(phase)
    os.kill(machine.machine.roles()[role], signal.SIGKILL)


def settled(machines: Machines, a: Moved, b: Moved) -> Moved:
    """Who has the guest, for certain, and alone."""
    if a.ended()["status"] == "completed":
        a.stands()
        machines.has(b)
        a.quit()
        return b
    assert "\n" not in a.status["error-desc"]
    assert b.dies() == 1
    assert b.text == ""
    machines.has(a)
    return a


@pytest.mark.parametrize("role", ["devhost0", "blockd"])
def test_islands_of_the_source(machines: Machines, role: str) -> None:
    """The migration goes on, or fails and the guest stays; either way it goes on with its disk."""
    here: Moved = machines.source()
    for point in (*PHASES, "release.done"):
        there = machines.target()
        here.fault(f"{point}=delay:{HELD}")
        here.cmd("migrate", uri=there.uri)
        killed_at(here, point.removesuffix(".done"), role)
        here = settled(machines, here, there)
        here.fault("")
    machines.ends(here)


@pytest.mark.parametrize("role", ["devhost0", "blockd"])
def test_islands_of_the_target(machines: Machines, role: str) -> None:
    here: Moved = machines.source()
    for point in ("negotiate", "receive", "load", "verify", "resume"):
        there = machines.target(f"target.{point}=delay:{HELD}")
        here.cmd("migrate", uri=there.uri)
        killed_at(there, point, role)
        if point == "resume":
            until(lambda: there.status["status"] == "completed", "the guest at the target")  # noqa: B023
        here = settled(machines, here, there)
        here.fault("")
    machines.ends(here)


@pytest.mark.parametrize("point", ["negotiate.done", "stop", "quiesce", "settle", "send", "release.done"])
def test_a_vcpu_of_the_source(machines: Machines, disk: Path, point: str) -> None:
    """Nobody takes its place. Either its state has left before, and the target runs; or the migration fails,
    the guest stands still where it was, and the disk is still its own."""
    here, there = machines.source(), machines.target()
    here.fault(f"{point}=delay:{HELD}")
    here.cmd("migrate", uri=there.uri)
    killed_at(here, point.removesuffix(".done"), "vcpu0")
    if here.ended()["status"] == "completed":
        here.stands()
        machines.has(there)
        return
    assert "\n" not in here.status["error-desc"]
    until(lambda: here.cmd("query-status")["status"] == "internal-error", "the state")
    if point == "negotiate.done":  # before a word of the guest has left: the target waits for another source
        there.stands()
    else:
        assert there.dies() == 1
    assert there.text == ""
    assert lease(disk)["vm"] == here.machine.name
    here.cmd("system_reset")
    here.cmd("cont")
    assert here.cmd("query-status")["running"]
