"""Machines that a guest is moved between: tests/guests/counter counts on, its consoles tell where it ran.

The guest says each number once, so the consoles of the machines that it has lived in, one after another, are
a sequence without a gap or a repetition: two that run at once would both say the next number.
"""

from __future__ import annotations

import contextlib
import re
import signal
import tempfile
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support import products
from tests.system.machine import Machine, until

FINAL = ("completed", "failed", "cancelled")
LINE = re.compile(r"n ([0-9a-f]{8})\n")


class Moved:
    """One machine with the counting guest, its console in a file and a QMP session open."""

    #: where it waits
    uri = ""

    def __init__(self, *options: str, guest: str = "counter", before: tuple[str, ...] = ()) -> None:
        self.runtime = Path(tempfile.mkdtemp(prefix="atoll-"))
        self._folder = tempfile.TemporaryDirectory(prefix="atoll-")
        self.console = Path(self._folder.name) / "console"
        self.machine = Machine(
            *before, "-kernel", str(products.bare(guest)), "-m", "16", "-serial", f"file:{self.console}",
            "-qmp", f"unix:{self.runtime / 'qmp'},server=on,wait=off", *options,
            runtime=self.runtime, guest=False, name=f"m{uuid.uuid4().hex[:12]}",
        )  # fmt: skip
        self.machine._own = True
        self._qmp: QEMUMonitorProtocol | None = None
        #: of the console, when it is no more
        self._text = ""

    def __enter__(self) -> Moved:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._qmp is not None:
            with contextlib.suppress(EOFError, OSError):  # the machine may have closed it first
                self._qmp.close()
        self.machine.__exit__(kind, value, trace)
        self._text = self.text
        self._folder.cleanup()

    # ---- control -----------------------------------------------------------------------------------
    @property
    def qmp(self) -> QEMUMonitorProtocol:
        if self._qmp is None:
            path, ended = self.runtime / "qmp", self.machine.process.poll
            ready = until(lambda: _connected(path) or ended() is not None, "the control socket")
            assert isinstance(ready, QEMUMonitorProtocol), self.machine.errors()
            self._qmp = ready
        return self._qmp

    def cmd(self, name: str, **arguments: Any) -> Any:
        return self.qmp.cmd(name, **{key.replace("_", "-"): value for key, value in arguments.items()})

    def fault(self, what: str) -> None:
        self.cmd("migrate-set-parameters", x_fault=what)

    @property
    def status(self) -> dict[str, Any]:
        """query-migrate."""
        found: dict[str, Any] = self.cmd("query-migrate")
        return found

    @property
    def state(self) -> str:
        """query-status."""
        return str(self.cmd("query-status")["status"])

    def migrates(self, where: Moved | str, **more: Any) -> dict[str, Any]:
        """To its end, whatever that is: query-migrate then."""
        self.cmd("migrate", uri=where if isinstance(where, str) else where.uri, **more)
        return self.ended()

    def ended(self) -> dict[str, Any]:
        until(lambda: self.status.get("status") in FINAL, "the end of a migration")
        return self.status

    def reaches(self, state: str) -> None:
        """Waits for a status of the migration."""
        until(lambda: self.status.get("status") == state, f"a migration that is {state}")

    def phase(self, name: str) -> None:
        """Waits for a phase of the migration."""
        until(lambda: self.status.get("x-phase") == name, f"phase {name}")

    def quit(self) -> str:
        """Ends it; what it wrote to the console."""
        if self.machine.process.poll() is None:
            self.cmd("quit")
            self.machine.wait()
        return self.text

    def dies(self) -> int:
        """Its exit status, when it has ended by itself and left nothing."""
        status = self.machine.wait()
        self.machine.gone()
        return status

    def killed(self) -> None:
        """Waits for the end by SIGKILL, and of its islands after it."""
        assert self.machine.wait() == -signal.SIGKILL
        until(lambda: not self.machine.roles(), "the end of all processes")

    # ---- the guest ---------------------------------------------------------------------------------
    @property
    def text(self) -> str:
        return self.console.read_text() if self.console.exists() else self._text

    def counts(self, more: int = 3) -> None:
        """Waits until the guest has counted on here."""
        seen = len(LINE.findall(self.text))
        until(lambda: len(LINE.findall(self.text)) >= seen + more, "a guest that counts")

    def stands(self) -> None:
        """Fails if the guest runs here: its console grows no more, and QMP says so."""
        assert self.state != "running"
        assert self.cmd("query-status")["running"] is False


def _connected(path: Path) -> QEMUMonitorProtocol | None:
    monitor = QEMUMonitorProtocol(str(path))
    try:
        monitor.connect()
    except Exception:
        return None
    return monitor


class Source(Moved):
    """A machine whose guest runs, once entered."""

    def __enter__(self) -> Source:
        self.counts(1)
        return self


class Target(Moved):
    """A machine that waits at ``uri``, once entered."""

    def __init__(self, *options: str, fault: str = "", **more: Any) -> None:
        super().__init__(*options, "-incoming", "defer", **more)
        self.uri = f"unix:{self.runtime / 'migration'}"
        self._fault = fault

    def __enter__(self) -> Target:
        until(lambda: self.state == "inmigrate", "a machine that waits")
        self.fault(self._fault)
        self.cmd("migrate-incoming", uri=self.uri)
        return self


def sequence(*consoles: str) -> int:
    """Fails unless the consoles, one after another, are what one guest has said; its last number."""
    text = "".join(consoles)
    numbers = [int(number, 16) for number in LINE.findall(text)]
    assert numbers == list(range(1, len(numbers) + 1)), text[:200]
    rest = LINE.sub("", text)
    assert re.fullmatch(r"(n [0-9a-f]{0,8})?|n?", rest), rest
    return len(numbers)
