"""A machine with the small guest of tests/guests/control, as tests of the coordinator start it.

Everything it leaves behind would be found: it has a runtime folder and a name of its own.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support import products

#: tells a hang, on a machine of any speed
PATIENCE = 60.0
ATOLL = str(Path(sys.executable).parent / "atoll")


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Looks again and again until ``condition`` is true, and returns its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.01)
    return value


def processes(name: str) -> dict[str, int]:
    """PID by role of the processes that call themselves part of machine ``name``; the dead do not count."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split(" ")
                if words[0] == "atoll" and words[-1] == name:
                    found[words[1]] = int(entry.name)
    return found


def _listens(path: Path) -> bool:
    """Whether a socket has come to listen, without connecting to it (it takes one client at a time)."""
    rows = (row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:])
    # the flag of a listening socket is __SO_ACCEPTCON, 10000h: proc(5)
    return any(row[3] == "00010000" and row[-1] == str(path) for row in rows)


class Machine:
    """``atoll run`` with options; as a context manager it ends what still runs."""

    def __init__(
        self, *options: str, stdin: int | IO[bytes] | None = subprocess.PIPE, stdout: int = subprocess.PIPE,
        guest: bool = True, name: str | None = None, runtime: Path | None = None, **popen: Any,
    ) -> None:  # fmt: skip
        self.name = name or f"t{uuid.uuid4().hex[:12]}"
        self._own = runtime is None
        self.runtime = runtime or Path(tempfile.mkdtemp(prefix="atoll-"))
        kernel = ["-kernel", str(products.bare("control"))] if guest else []
        self.qmp_path = self.runtime / "qmp"
        self.command = [ATOLL, "run", "-name", self.name, "-nodefaults", *kernel, *options]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(self.runtime)}
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command, stdin=stdin, stdout=stdout, stderr=self._errors, env=environment, **popen
        )
        if self.process.stdout is not None:
            threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            print(f"machine's stderr: {self.errors()}", file=sys.stderr)
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._errors.close()
        if self._own:
            shutil.rmtree(self.runtime, ignore_errors=True)

    # ---- console -----------------------------------------------------------------------------------
    def _read(self, pipe: IO[bytes]) -> None:
        with contextlib.suppress(ValueError):  # closed at the end
            for line in pipe:
                self._lines.put(line.decode(errors="replace").strip())
        self._lines.put(None)

    def says(self, pattern: str) -> re.Match[str]:
        """The next console line that matches."""
        seen = []
        while (line := self._lines.get(timeout=PATIENCE)) is not None:
            seen.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"the console ended without {pattern!r}: {seen}; stderr: {self.errors()}")

    def type(self, data: bytes) -> None:
        """Input to the guest's serial port."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def errors(self) -> str:
        """Standard error so far."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()

    # ---- control -----------------------------------------------------------------------------------
    @contextlib.contextmanager
    def qmp(self) -> Iterator[Any]:
        """A session at the control socket."""
        until(lambda: _listens(self.qmp_path) or self.process.poll() is not None, "the control socket")
        monitor = QEMUMonitorProtocol(str(self.qmp_path))
        monitor.connect()
        try:
            yield monitor
        finally:
            with contextlib.suppress(EOFError, OSError):  # the machine may have closed it first
                monitor.close()

    def roles(self) -> dict[str, int]:
        return processes(self.name)

    # ---- end ---------------------------------------------------------------------------------------
    def wait(self) -> int:
        """The exit status."""
        return self.process.wait(PATIENCE)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def leaves(self) -> dict[str, Any]:
        """What is left of it: processes and files of the runtime folder. Empty when it is as it should be."""
        folder = self.runtime / "atoll"
        files = [str(path) for path in self.runtime.rglob("*") if path not in (folder, folder / ".lock")]
        return {key: value for key, value in (("processes", self.roles()), ("files", files)) if value}

    def gone(self) -> None:
        """Fails unless nothing is left, now or in a moment, and no exception was left to Python to report."""
        assert not re.search("Traceback|never retrieved|never awaited", self.errors()), self.errors()
        until(lambda: not self.roles(), "the end of all processes")
        assert self.leaves() == {}


def with_qmp(*options: str, **more: Any) -> Machine:
    """A machine with a control socket (``qmp_path``)."""
    runtime = Path(tempfile.mkdtemp(prefix="atoll-"))
    machine = Machine(*options, "-qmp", f"unix:{runtime / 'qmp'},server=on,wait=off", runtime=runtime, **more)
    machine._own = True
    return machine


CONSOLE = ("-serial", "stdio")
