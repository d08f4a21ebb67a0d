"""``atoll run``: a machine from a command line in QEMU's spelling.

This half is quick to import: it understands the options and starts the fork server, which imports
what islands need while ``session`` imports what the coordinator needs.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import setproctitle

from coordinator import islands, runtime
from coordinator.cli import build, files, options
from coordinator.contract.errors import ConfigError


def run(arguments: list[str]) -> int:
    """The subcommand; returns the exit status of the guest's end."""
    if any(word in ("-h", "-help", "--help") for word in arguments):
        print(options.help_text())
        return 0
    try:
        settings = build.settings(arguments)
    except options.HelpWanted as text:
        print(text)
        return 0
    files.check(settings)
    setproctitle.setproctitle(f"atoll coordinator {settings.name}")
    with _signals_unwind(), _pidfile(settings.pidfile), runtime.folder(settings.name) as folder:
        islands.prepare(settings.name, folder)
        try:
            from coordinator.cli import session

            return session.run(settings, folder)
        finally:
            islands.dismiss()


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Until asyncio takes them, and again at the end, signals leave by the same way as errors."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)  # the process is about to exit


@contextlib.contextmanager
def _pidfile(path: str | None) -> Iterator[None]:
    """Holds our PID for as long as the machine lives."""
    if path is None:
        yield
        return
    file = Path(path)
    try:
        file.write_text(f"{os.getpid()}\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"-pidfile {path}: {getattr(error, 'strerror', error)}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if file.is_file():  # never a device node
                file.unlink()
