"""Guests that a benchmark moves from machine to machine, by QEMU or by Atoll, and what each move took."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from qemu.qmp.legacy import QEMUMonitorProtocol

from coordinator import pieces
from tests.support import products
from tests.support.launch import Launcher

ATOLL, QEMU = SIDES = ("atoll", "qemu")
#: seconds that anything may take before it counts as hung
LIMIT = 300.0
#: Atoll's own parameters, which a machine keeps from the move before
PLAIN = {"multifd_compression": "none", "tls_creds": ""}
#: what a guest has in use before it fills memory, about, MiB
KERNEL = 52


class Failed(Exception):
    """A machine did not do what it should; one line."""


@dataclass
class Move:
    """One migration. Seconds; ``clock`` is by the clock outside, ``own`` what the source says of it."""

    own: float
    bytes: int
    clock: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


class Machine:
    """A process with a guest, or one that waits for it; its console is a file."""

    def __init__(self, side: str, launcher: Launcher, folder: Path, options: list[str]) -> None:
        self.side, self.folder = side, Path(tempfile.mkdtemp(prefix=f"{side}-", dir=folder))
        self.console, self._errors = self.folder / "console", (self.folder / "stderr").open("w+b")
        control = self.folder / "qmp"
        extra = ["-nic", "none", "-monitor", "none"] if side == QEMU else ["-name", self.folder.name]
        homes = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in ("CONFIG", "STATE")}
        self._process = subprocess.Popen(
            [
                *launcher.command, *options, *extra, "-display", "none", "-serial", f"file:{self.console}",
                "-qmp", f"unix:{control},server=on,wait=off",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors, env=os.environ | homes,
        )  # fmt: skip
        try:
            self._qmp: QEMUMonitorProtocol = until(lambda: self._connected(control), "a control socket")
        except Failed:
            self.kill()
            raise

    def _connected(self, path: Path) -> QEMUMonitorProtocol | None:
        if self._process.poll() is not None:
            self._errors.seek(0)
            raise Failed(f"{self.side}: {self._errors.read().decode(errors='replace').strip()[-300:]}")
        monitor = QEMUMonitorProtocol(str(path))
        try:
            monitor.connect()
        except Exception:
            return None
        return monitor

    def cmd(self, name: str, **arguments: Any) -> Any:
        return self._qmp.cmd(name, **{key.replace("_", "-"): value for key, value in arguments.items()})

    def forget(self) -> None:
        """Events so far are no longer of interest."""
        self._qmp.clear_events()

    def event(self, name: str, status: str = "") -> float:
        """UNIX time of the next such event, as the machine's own clock has it."""
        while event := self._qmp.pull_event(wait=LIMIT):
            told = event.get("data", {}).get("status", "")
            if event["event"] == name and told in (status, "failed"):
                if told != status:
                    raise Failed(f"{self.side}: {self.cmd('query-migrate').get('error-desc', 'failed')}")
                at = event["timestamp"]
                return float(at["seconds"]) + at["microseconds"] / 1e6
        raise Failed(f"{self.side}: no {name}")

    def ticks(self, more: int = 1) -> None:
        """Waits until the guest says that it lives and its memory is what it was."""
        before = self.text.count("atoll: tick")
        until(lambda: self.text.count("atoll: tick") >= before + more, f"{self.side}: a guest that lives")
        if "damaged" in self.text or "Kernel panic" in self.text:
            raise Failed(f"{self.side}: the guest finds its memory damaged")

    @property
    def text(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def kill(self) -> None:
        with suppress(Exception):
            self._qmp.close()
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Guest:
    """A guest of one side, wherever it runs."""

    def __init__(self, side: str, launcher: Launcher, folder: Path, ram: int, used: int) -> None:
        self.side, self._launcher, self._folder = side, launcher, folder
        words = f"console=ttyS0 atoll.demo=fill atoll.fill={max(1, used - KERNEL)}"
        self._options = [
            "-machine", "pc", "-smp", "2", "-m", str(ram), "-no-reboot", "-kernel", str(pieces.kernel()),
            "-initrd", str(products.initramfs()), "-append", words,
        ]  # fmt: skip
        self._at = Machine(side, launcher, folder, self._options)

    def __enter__(self) -> Guest:
        try:
            until(lambda: "atoll: filled" in self._at.text, f"{self.side}: a guest with its memory in use")
            self._at.ticks()
        except BaseException:
            self._at.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._at.kill()

    def rests(self) -> None:
        """Stands still, so that it disturbs nobody."""
        self._at.cmd("stop")

    def goes_on(self) -> None:
        self._at.cmd("cont")
        self._at.ticks()

    def moves(self, stopped: bool, **parameters: Any) -> Move:
        """To a new machine. ``stopped``: by stop, migrate, cont."""
        uri = f"tcp:127.0.0.1:{_free_port()}"
        there = Machine(self.side, self._launcher, self._folder, [*self._options, "-incoming", "defer"])
        here = self._at
        try:
            self._set_up(here, there, parameters)
            there.cmd("migrate-incoming", uri=uri)
            here.forget()
            move = self._stopped(here, there, uri) if stopped else self._running(here, there, uri)
            there.ticks()
        except BaseException:
            there.kill()
            raise
        self._at = there
        here.kill()
        return move

    def _set_up(self, here: Machine, there: Machine, parameters: dict[str, Any]) -> None:
        if self.side == QEMU:
            capabilities = [{"capability": "events", "state": True}]
            for machine in (here, there):
                machine.cmd("migrate-set-capabilities", capabilities=capabilities)
            here.cmd("migrate-set-parameters", max_bandwidth=1 << 40)  # its default is 128 MiB/s
        else:
            for machine in (here, there):
                machine.cmd("migrate-set-parameters", **(PLAIN | parameters))

    def _stopped(self, here: Machine, there: Machine, uri: str) -> Move:
        begin = time.time()
        here.cmd("stop")
        here.cmd("migrate", uri=uri)
        there.event("MIGRATION", "completed")
        there.cmd("cont")
        clock = there.event("RESUME") - begin
        here.event("MIGRATION", "completed")
        return self._told(here, clock)

    def _running(self, here: Machine, there: Machine, uri: str) -> Move:
        here.cmd("migrate", uri=uri)
        here.event("MIGRATION", "completed")
        return self._told(here, None)

    def _told(self, here: Machine, clock: float | None) -> Move:
        told = here.cmd("query-migrate")
        return Move(told["downtime"] / 1000, told["ram"]["transferred"], clock, told.get("x-phases", {}))


def until(ready: Callable[[], Any], what: str) -> Any:
    """The first true value; Failed after ``LIMIT``."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.05)
    raise Failed(f"waited {LIMIT:.0f} s for {what}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
