"""Servers of others, and servers that say what they are told to say."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.tools import require_tool

Start = Callable[..., str]


class Foreign:
    """A server of another project at a UNIX socket, that can be killed and started again."""

    def __init__(self, command: list[str], pid_file: Path) -> None:
        self.command = command
        self._pid_file = pid_file
        self.start()

    def start(self) -> None:
        """Returns when it listens: only then is its pid file written."""
        self._pid_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        while not self._pid_file.exists() or not self._pid_file.read_text():
            try:
                self.process.wait(0.01)
                raise AssertionError(f"{self.command[0]} ended")
            except subprocess.TimeoutExpired:
                continue

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def foreign(runtime: Path) -> Iterator[Callable[..., Foreign]]:
    """Start nbdkit or qemu-nbd at ``socket``, or without one, as its arguments say."""
    running: list[Foreign] = []

    def start(tool: str, *arguments: str, socket: str | None = None) -> Foreign:
        require_tool(tool)
        pid_file = runtime / f"pid{len(running)}"
        option, common = {
            "nbdkit": ("-U", ["-f", f"--pidfile={pid_file}"]),
            "qemu-nbd": ("-k", ["-t", "-e8", f"--pid-file={pid_file}"]),
        }[tool]
        place = [option, socket] if socket else []
        running.append(Foreign([tool, *common, *place, *arguments], pid_file))
        return running[-1]

    yield start
    for server in running:
        server.kill()


@pytest.fixture
def nbdkit(runtime: Path, foreign: Callable[..., Foreign]) -> Start:
    """Start nbdkit; its socket."""

    def start(*arguments: str) -> str:
        path = str(runtime / f"kit{len(list(runtime.iterdir()))}")
        foreign("nbdkit", *arguments, socket=path)
        return path

    return start


@pytest.fixture
def qemu_nbd(runtime: Path, foreign: Callable[..., Foreign]) -> Start:
    """Start qemu-nbd; its socket."""

    def start(*arguments: str) -> str:
        path = str(runtime / f"qemu{len(list(runtime.iterdir()))}")
        foreign("qemu-nbd", *arguments, socket=path)
        return path

    return start
