"""Start and watch the processes of a machine.

They come from a fork server (``prepare``): a process of its own that has imported what islands need
and never has a thread, so that no lock or ZeroMQ context is ever carried over a fork. A descriptor
that a child needs is an ``Inherited`` in its configuration and arrives there as a plain number; other
descriptors of the coordinator's do not reach it. Death is noticed at once through a pidfd.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import multiprocess
from multiprocess import forkserver, process, reduction, resource_tracker

from coordinator.contract.errors import AtollError, ConfigError, IslandError

NURSERY = "coordinator.nursery"
#: the machine's name, for the fork server's title in ``ps``
NAME_VARIABLE = "ATOLL_NURSERY_OF"
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)
#: how long the exit status of a process that has ended may take to get here, seconds
STATUS_SECONDS = 2.0
#: how much of a log's end is looked at, bytes
LOG_END = 64 << 10

_context = multiprocess.get_context("forkserver")


def prepare(machine: str, folder: Path) -> None:
    """Start the fork server of a machine. It imports in the background; the first island waits for it.

    Its socket is in the machine's runtime folder, which is private. Nothing of ours is tracked
    (there are no named semaphores), so the tracker, a whole further interpreter, is left out.
    """
    untracked = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    resource_tracker.ensure_running = lambda: None
    resource_tracker.getfd = lambda: untracked
    process.current_process()._config["tempdir"] = str(folder)
    forkserver.set_forkserver_preload([NURSERY])
    os.environ[NAME_VARIABLE] = machine
    # NumPy's OpenBLAS starts a thread for each core where it is not told otherwise
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    # the terminal's signals are the coordinator's; ignored ones stay so in all that start from here
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in TERMINAL_SIGNALS}
    try:
        forkserver.ensure_running()
    except OSError as error:
        raise ConfigError(f"cannot start the processes of the machine: {error.strerror}") from None
    finally:
        del os.environ[NAME_VARIABLE]
        for number, handler in handlers.items():
            signal.signal(number, handler)


def dismiss() -> None:
    """End the fork server; the islands have ended before."""
    server = forkserver._forkserver
    if server._forkserver_pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(
                server._forkserver_pid, signal.SIGKILL
            )  # it may still be importing, and has nothing to lose
        server._stop()


def nursery_pid() -> int | None:
    """Of the fork server."""
    pid: int | None = forkserver._forkserver._forkserver_pid
    return pid


class Inherited:
    """A descriptor that is duplicated into the child while it is being started."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _arrived, (reduction.DupFd(self.fd),)


def _arrived(handle: Any) -> int:
    fd: int = handle.detach()
    return fd


def redirect(fd: int, file: str, flags: int) -> None:
    """Let ``fd`` be an opened file."""
    opened = os.open(file, flags, 0o600)
    os.dup2(opened, fd)
    os.close(opened)


def _main(module: str, config: type[msgspec.Struct], fields: dict[str, Any]) -> None:
    """First function of a child. What it prints, a traceback too, goes to its log, not to the terminal."""
    from coordinator.contract.island import leave  # the coordinator starts us before it imports ZeroMQ

    redirect(0, os.devnull, os.O_RDONLY)
    for fd in (1, 2):
        redirect(fd, fields["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        importlib.import_module(module).main(config(**fields))
    except AtollError as error:
        raise SystemExit(str(error)) from None
    finally:
        leave()


class Island:
    """One process of the machine. ``role`` is "vcpu0", "devhost0", "blockd"; ``module`` has its ``main``."""

    def __init__(self, role: str, module: str, config: msgspec.Struct, log: Path) -> None:
        self.role = role
        self.log = log
        #: why we have killed it
        self._verdict: str | None = None
        fields = {name: getattr(config, name) for name in config.__struct_fields__}
        for name, value in fields.items():
            if name.endswith("_fd"):
                fields[name] = Inherited(value)
            elif name.endswith("_fds"):
                fields[name] = [Inherited(fd) for fd in value]
        self.process = _context.Process(target=_main, args=(module, type(config), fields), name=role)
        try:
            self.process.start()
            self.pid: int = self.process.pid
            self.pidfd = os.pidfd_open(self.pid)
        except (OSError, EOFError) as error:
            raise IslandError(
                f"cannot start {role}: {getattr(error, 'strerror', None) or 'it ended at once'}"
            ) from None

    def alive(self) -> bool:
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return not poller.poll(0)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def condemn(self, verdict: str) -> None:
        """Kill it for a reason, which will be told."""
        self._verdict = verdict
        self.kill()

    def reap(self, seconds: float) -> bool:
        """Wait for the end; True when it came."""
        poller = select.poll()
        poller.register(self.pidfd, select.POLLIN)
        return bool(poller.poll(int(seconds * 1000)))

    def close(self) -> None:
        os.close(self.pidfd)

    @property
    def was_killed(self) -> bool:
        """By somebody else, rather than by a fault of its own; once its ``epitaph`` is known."""
        return self._verdict is None and bool(self.process.exitcode == -signal.SIGKILL)

    def epitaph(self) -> str:
        """How it ended."""
        self.process.join(STATUS_SECONDS)
        code = self.process.exitcode
        if self._verdict is not None:
            how = self._verdict
        elif code is None or self.alive():
            how = "ended"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGSYS:
                how += " (it tried what its sandbox forbids)"
        else:
            how = f"ended with status {code}"
        return f"{self.role} (pid {self.pid}) {how}"

    def last_words(self) -> str:
        """The last line of its log, empty where it has none.

        In a log of all islands (-D) only lines with its name count.
        """
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - LOG_END))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        mine = "" if self.log.name == f"{self.role}.log" else f" {self.role}: "
        lines = [line for line in text.splitlines() if line.strip() and mine in line]
        return lines[-1].strip() if lines else ""
