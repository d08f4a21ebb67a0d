"""Starts a machine by QEMU's spelling of its command line and follows its serial console.

The launcher is a parameter: `atoll run` by default; `qemu-system-x86_64` serves to prove the guest
side and to compare with.
"""

import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from coordinator.contract.errors import AtollError

CONSOLE = ("-display", "none", "-monitor", "none", "-serial", "stdio", "-nic", "none")

HEARTBEAT_SECONDS = 10.0


class GuestError(AtollError):
    """The guest ended, fell silent or ran too long; the text says which and quotes its last line."""


def end_on_sigterm() -> None:
    """Lets SIGTERM unwind the stack, so that guests are ended with the program that started them."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@dataclass(frozen=True)
class Launcher:
    """The command that options are appended to."""

    command: tuple[str, ...]

    @staticmethod
    def parse(text: str | None) -> "Launcher":
        """From the words of a shell command; without one, `atoll run` of this environment."""
        if text:
            return Launcher(tuple(shlex.split(text)))
        return Launcher((str(Path(sys.executable).parent / "atoll"), "run"))

    @property
    def ours(self) -> bool:
        """Whether it takes our own options, such as -stats, besides QEMU's."""
        return "qemu-system" not in Path(self.command[0]).name

    @property
    def excused(self) -> tuple[str, ...]:
        """Kinds of complaints that are expected of it: TCG does not synchronize its CPUs' TSCs."""
        return () if self.ours else ("TSC",)

    def options(self, stats: Path | None = None) -> list[str]:
        """Options that only this launcher needs; `stats` is a file to write figures to at exit."""
        return ["-stats", str(stats)] if self.ours and stats is not None else []


class Guest:
    """A running machine. Its lines are read in the background, each with its time of arrival.

    As a context manager it ends the process on the way out, in order first (SIGTERM), then by force.
    """

    def __init__(self, launcher: Launcher, options: Sequence[str], log: Path) -> None:
        self.launcher = launcher
        self.started = time.monotonic()
        self.lines: list[str] = []
        self._arrived: queue.SimpleQueue[tuple[float, str] | None] = queue.SimpleQueue()
        self._log = log.open("wb")
        self._errors = log.with_suffix(".stderr").open("w+b")
        self._ended = False
        try:
            self._process = subprocess.Popen(
                [*launcher.command, *options],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors,
            )
        except OSError as error:
            raise GuestError(f"cannot start {launcher.command[0]}: {error.strerror}") from error
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> "Guest":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        """The launcher's process."""
        return self._process.pid

    def text(self) -> str:
        """All of the console so far."""
        return "".join(f"{line}\n" for line in self.lines)

    def errors(self) -> str:
        """What the launcher said on stderr."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()

    def expect(
        self,
        pattern: str,
        *,
        silence: float = 120.0,
        limit: float = 1800.0,
        seen: Callable[[float, str], None] | None = None,
    ) -> re.Match[str]:
        """Reads on until a line matches, and returns the match.

        `silence` and `limit` (seconds) tell a hang, not a slow machine: raises `GuestError` after so
        long without a line, or in all. `seen` is called with the seconds since the
        start and each line, and with an empty one every `HEARTBEAT_SECONDS` while the guest is silent.
        """
        begun = time.monotonic()
        while True:
            line = self._next(min(silence, begun + limit - time.monotonic()), seen)
            if line is None:
                raise GuestError(f"the guest ended before {pattern!r}{self._last()}")
            if match := re.search(pattern, line):
                return match

    def wait(
        self, *, silence: float = 120.0, seen: Callable[[float, str], None] | None = None
    ) -> int:
        """Reads the console to its end and returns the launcher's exit status."""
        while self._next(silence, seen) is not None:
            pass
        try:
            return self._process.wait(silence)
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"the console closed, but process {self.pid} runs on") from error

    def exit_status(self) -> int | None:
        """The launcher's exit status if it has ended by itself."""
        return self._process.poll()

    def kill(self) -> None:
        """Ends the process and everything it was asked to hold; no error if it has ended."""
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(signal_number)
                try:
                    self._process.wait(10)
                except subprocess.TimeoutExpired:
                    continue
        self._reader.join(10)
        self._log.close()
        self._errors.close()

    def _next(self, patience: float, seen: Callable[[float, str], None] | None) -> str | None:
        if self._ended:
            return None
        deadline = time.monotonic() + patience
        while True:
            try:
                left = min(deadline - time.monotonic(), HEARTBEAT_SECONDS)
                item = self._arrived.get(timeout=max(left, 0.0))
                break
            except queue.Empty:
                if time.monotonic() >= deadline:
                    raise GuestError(f"the guest fell silent or ran too long{self._last()}") from None
                if seen is not None:
                    seen(time.monotonic() - self.started, "")
        if item is None:
            self._ended = True
            return None
        self.lines.append(item[1])
        if seen is not None:
            seen(item[0] - self.started, item[1])
        return item[1]

    def _last(self) -> str:
        spoken = [line for line in self.lines if line.strip()]
        text = f"; last line: {spoken[-1][:200]}" if spoken else "; it printed nothing"
        errors = self.errors()
        return text + (f"; stderr: {errors.splitlines()[-1][:300]}" if errors else "")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            self._log.write(raw)
            self._log.flush()
            self._arrived.put((time.monotonic(), raw.decode(errors="replace").rstrip("\r\n")))
        self._arrived.put(None)
