"""Linux reads its CD while its device host and its block daemon are killed again and again: right bytes,
and no word of it."""

import contextlib
import os
import random
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest

from tests.support import products
from tests.support.launch import Launcher
from tests.system import boots
from tests.system.machine import processes

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1500)]

ROLES = ("devhost0", "blockd")
KILLS = 20
#: how many of them at least hit a guest on a fast machine before it has read all
LEAST = 3
SEED = 5
#: between two kills, seconds
SPACING = (0.05, 0.5)


class Killer(threading.Thread):
    """Kills processes that are one of ``roles`` of machine ``name``, each once, until told to stop."""

    def __init__(self, name: str, roles: tuple[str, ...], kills: int) -> None:
        super().__init__(daemon=True)
        self._name, self._roles, self._left = name, roles, kills
        self._random = random.Random(SEED)
        self.killed: set[int] = set()
        self.enough = threading.Event()

    def run(self) -> None:
        while self._left and not self.enough.wait(self._random.uniform(*SPACING)):
            pid = processes(self._name).get(self._random.choice(self._roles))
            if pid is not None and pid not in self.killed:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.killed.add(pid)
                    self._left -= 1


def test_linux_reads_its_cd_and_notices_nothing(launcher: Launcher, tmp_path: Path) -> None:
    """All complaints of the kernel count (judge.py), so a libata message or a lost interrupt would."""
    if not launcher.ours:
        pytest.skip("its devices are in no process of their own")
    image = products.demo_iso(payload_bytes=32 << 20, name="mid")
    name = f"t{uuid.uuid4().hex[:12]}"
    options = [
        "-name", name, *boots.kernel_options("atoll.demo=hash"), "-cdrom", str(image), "-no-reboot",
    ]  # fmt: skip
    with boots.start(launcher, tmp_path, options) as guest:
        killer = Killer(name, ROLES, KILLS)
        guest.expect("Linux version", silence=boots.SILENCE_SECONDS)
        killer.start()
        began = time.monotonic()
        try:
            facts = boots.finish(guest)
        finally:
            killer.enough.set()
            killer.join()
    print(f"{len(killer.killed)} kills in {time.monotonic() - began:.0f} s")
    assert facts.marks["sha256"] == products.sha256_of(image)
    assert "DMA" in facts.marks["dma"]
    assert len(killer.killed) >= LEAST
