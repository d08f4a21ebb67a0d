"""Linux while islands of its machine are killed again and again: right bytes, no word of it.

Kills are counted, not timed: so many there are, on a machine of any speed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import uuid
from pathlib import Path

import pytest

from coordinator.lab.crash.killer import carry_out
from coordinator.lab.crash.plan import Trial
from coordinator.lab.crash.results import Crashes
from coordinator.lab.crash.statistics import failed_checks
from coordinator.lab.crash.table import text
from tests.support import products
from tests.support.launch import Launcher
from tests.system import boots
from tests.system.machine import processes, until

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1500)]

SEED = 5
#: while it boots: so many kills, each behind one of so many lines of the kernel's console
BOOT_KILLS, BOOT_LINES = 12, 120
KILLS = 20
ROLES = ("devhost", "blockd")


class Killer:
    """Kills islands of machine ``name`` in turn, each process once, behind lines drawn from SEED."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines = 0
        self._at = set(random.Random(SEED).sample(range(BOOT_LINES), BOOT_KILLS))
        self.killed: list[int] = []

    def seen(self, at: float, line: str) -> None:
        if line:
            if self._lines in self._at:
                self.kill()
            self._lines += 1

    def _fresh(self) -> list[int]:
        there = sorted(processes(self._name).items())
        return [pid for role, pid in there if role.rstrip("0123456789") in ROLES and pid not in self.killed]

    def kill(self) -> None:
        fresh = until(self._fresh, "an island")
        victim = fresh[len(self.killed) % len(fresh)]
        os.kill(victim, signal.SIGKILL)
        self.killed.append(victim)


def test_linux_boots_and_reads_its_cd(launcher: Launcher, tmp_path: Path) -> None:
    """All complaints of the kernel count (judge.py), so a libata message or a lost interrupt would."""
    if not launcher.ours:
        pytest.skip("its devices are in no process of their own")
    image = products.demo_iso(payload_bytes=32 << 20, name="mid")
    name = f"t{uuid.uuid4().hex[:12]}"
    options = ["-name", name, *boots.kernel_options("atoll.demo=hash"), "-cdrom", str(image), "-no-reboot"]
    killer = Killer(name)
    with boots.start(launcher, tmp_path, options) as guest:
        guest.expect("Linux version", silence=boots.SILENCE_SECONDS)
        guest.expect("atoll: init", silence=boots.SILENCE_SECONDS, seen=killer.seen)
        facts = boots.finish(guest)
    assert len(killer.killed) == len(set(killer.killed)) == BOOT_KILLS
    assert facts.marks["sha256"] == products.sha256_of(image)
    assert "DMA" in facts.marks["dma"]


def test_linux_reads_its_cd_and_writes_a_qcow2_disk(tmp_path: Path) -> None:
    """As ``atoll lab crash`` does it: programs, kernel, CD and disk are looked at."""
    made = Crashes(Trial(kills=KILLS, spacing=200, seed=SEED, roles=ROLES), tmp_path / "r.jsonl")
    asyncio.run(carry_out(made.plan, made.add))
    made.close()
    print(text(made))
    assert [kill.errors for kill in made.kills] == [[]] * KILLS and failed_checks(made) == []
    (ended,) = made.ended  # no guest was lost
    assert ended.kills == KILLS and ended.rounds > 0 and ended.syncs > ended.rounds and ended.compared > 0
    assert {"atoll img check", "blocks read on the host"} <= ended.checks.keys()
    assert {kill.role.rstrip("0123456789") for kill in made.kills} == set(ROLES)
    assert all(kill.blackout is not None and kill.blackout > 0 for kill in made.kills)
    assert sum(kill.right for kill in made.kills) > 0
