"""Start and watch the processes of a machine.

Processes are spawned, never forked: a fork would carry ZeroMQ's threads and locks along. A
descriptor that a child needs is an ``Inherited`` in its configuration and arrives there as a plain
number. Death is noticed at once through a pidfd.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import multiprocess
from multiprocess import reduction

from coordinator.contract.errors import AtollError, IslandError

_context = multiprocess.get_context("spawn")


class Inherited:
    """A descriptor that is duplicated into the child while it is being spawned."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _arrived, (reduction.DupFd(self.fd),)


def _arrived(handle: Any) -> int:
    fd: int = handle.detach()
    return fd


def _main(entry: Callable[[Any], None], config: type[msgspec.Struct], fields: dict[str, Any]) -> None:
    """First function of a child."""
    try:
        entry(config(**fields))
    except AtollError as error:
        raise SystemExit(str(error)) from None


class Island:
    """One process of the machine. ``role`` is "vcpu0", "devhost0", "blockd"."""

    def __init__(self, role: str, entry: Callable[[Any], None], config: msgspec.Struct, log: Path) -> None:
        self.role = role
        self.log = log
        fields = {name: getattr(config, name) for name in config.__struct_fields__}
        for name, value in fields.items():
            if name.endswith("_fd"):
                fields[name] = Inherited(value)
            elif name.endswith("_fds"):
                fields[name] = [Inherited(fd) for fd in value]
        self.process = _context.Process(target=_main, args=(entry, type(config), fields), name=role)
        try:
            self.process.start()
        except OSError as error:
            raise IslandError(f"cannot start {role}: {error.strerror}") from None
        self.pid: int = self.process.pid
        self.pidfd = os.pidfd_open(self.pid)

    def alive(self) -> bool:
        return bool(self.process.is_alive())

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def reap(self, seconds: float) -> bool:
        """Wait for the end; True when it came."""
        self.process.join(seconds)
        return not self.alive()

    def close(self) -> None:
        os.close(self.pidfd)

    def epitaph(self) -> str:
        """How it ended, with the last line of its log: for the user."""
        self.process.join(0.2)
        code = self.process.exitcode
        if code is None:
            how = "is still running"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with status {code}"
        try:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            lines = []
        return f"{self.role} (pid {self.pid}) {how}" + (f"; its log ends: {lines[-1].strip()}" if lines else "")
