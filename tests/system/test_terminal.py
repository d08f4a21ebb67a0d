"""A machine at a terminal: keys that are its own, and a terminal that is as before when it has ended.

Sources: termios(3), pty(7); QEMU's documentation of the character backend multiplexer (Ctrl-a keys).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.machine import PATIENCE, Machine


class Terminal:
    """A pseudo-terminal: we are the person in front of it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.screen = b""

    def close(self) -> None:
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(fd)

    def hang_up(self) -> None:
        os.close(self.master)

    def press(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def shows(self, text: bytes) -> None:
        """Waits for a text; what comes before it is forgotten."""
        while text not in self.screen:
            assert select.select([self.master], [], [], PATIENCE)[0], f"no {text!r} in {self.screen!r}"
            self.screen += os.read(self.master, 4096)
        self.screen = self.screen.partition(text)[2]

    @property
    def attributes(self) -> list[object]:
        return termios.tcgetattr(self.slave)

    @property
    def raw(self) -> bool:
        flags = termios.tcgetattr(self.slave)[3]
        return not flags & (termios.ICANON | termios.ECHO)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


@contextlib.contextmanager
def machine_at(terminal: Terminal, serial: str, *options: str) -> Iterator[Machine]:
    """With the terminal as its controlling one, so that keys can become signals."""

    def take() -> None:
        os.setsid()
        fcntl.ioctl(terminal.slave, termios.TIOCSCTTY, 0)

    with Machine(
        "-serial", serial, *options, stdin=terminal.slave, stdout=terminal.slave, preexec_fn=take
    ) as machine:  # fmt: skip
        terminal.shows(b"ready")
        assert terminal.raw
        yield machine


def test_keys_of_a_shared_terminal(terminal: Terminal) -> None:
    with machine_at(terminal, "mon:stdio") as machine:
        terminal.press(b"\x01h")
        terminal.shows(b"Ctrl-a x")
        terminal.press(b"\x03")  # Ctrl-C is the guest's
        terminal.shows(b"got 03")
        terminal.press(b"\x01\x01")
        terminal.shows(b"got 01")
        terminal.press(b"\x01c")
        terminal.shows(b"(atoll) ")
        terminal.press(b"info status\r")
        terminal.shows(b"VM status: running")
        terminal.shows(b"(atoll) ")
        terminal.press(b"info statuz\x7fs\r")  # line editing
        terminal.shows(b"VM status: running")
        terminal.shows(b"(atoll) ")
        terminal.press(b"\x01cz")
        terminal.shows(b"got 7a")
        terminal.press(b"\x01x")
        assert machine.wait() == 0
        assert terminal.attributes == terminal.before
        machine.gone()


def test_ctrl_c_ends_where_the_terminal_is_not_shared(terminal: Terminal) -> None:
    with machine_at(terminal, "stdio") as machine:
        terminal.press(b"\x03")
        assert machine.wait() == 130
        assert machine.errors() == "atoll run: ended by SIGINT"
        assert terminal.attributes == terminal.before
        machine.gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_in_order(terminal: Terminal, number: signal.Signals) -> None:
    with machine_at(terminal, "mon:stdio") as machine:
        machine.kill(number)
        assert machine.wait() == (130 if number == signal.SIGINT else 0)
        assert machine.errors() == f"atoll run: ended by {number.name}"
        assert terminal.attributes == terminal.before
        machine.gone()


def test_a_hung_up_terminal_ends_it(terminal: Terminal) -> None:
    with machine_at(terminal, "mon:stdio") as machine:
        terminal.hang_up()
        assert machine.wait() == 0
        machine.gone()


def test_monitor_alone_and_quit(terminal: Terminal, tmp_path: Path) -> None:
    with Machine(
        "-monitor", "stdio", "-serial", f"file:{tmp_path / 'log of it'}",
        stdin=terminal.slave, stdout=terminal.slave,
    ) as machine:  # fmt: skip
        terminal.shows(b"(atoll) ")
        terminal.press(b"info version\r")
        terminal.shows(b"(atoll)")
        terminal.shows(b"(atoll) ")
        terminal.press(b"quit\r")
        assert machine.wait() == 0
        assert terminal.attributes == terminal.before
        assert (tmp_path / "log of it").exists()
        machine.gone()


def test_a_terminal_is_restored_when_the_start_fails(terminal: Terminal, tmp_path: Path) -> None:
    with Machine(
        "-serial", "mon:stdio", "-qmp", f"unix:{tmp_path}/none/qmp,server=on,wait=off",
        stdin=terminal.slave, stdout=terminal.slave,
    ) as machine:  # fmt: skip
        assert machine.wait() == 1
        assert machine.errors().splitlines() == [
            f"atoll run: cannot listen on {tmp_path}/none/qmp: No such file or directory"
        ]
        assert terminal.attributes == terminal.before
        machine.gone()


def test_a_terminal_is_restored_when_an_island_dies(terminal: Terminal) -> None:
    with machine_at(terminal, "mon:stdio", "-x-commits", "off") as machine:  # so nobody takes its place
        os.kill(machine.roles()["devhost0"], signal.SIGKILL)
        assert machine.wait() == 1
        assert terminal.attributes == terminal.before
        machine.gone()


def test_commands_from_a_file(tmp_path: Path) -> None:
    script = tmp_path / "commands"
    script.write_text("info status\nquit\n")
    with script.open("rb") as file, Machine("-monitor", "stdio", "-S", stdin=file) as machine:
        machine.says("VM status: prelaunch")
        assert machine.wait() == 0
        machine.gone()


def test_a_reader_that_goes_does_not_end_the_guest() -> None:
    reader, writer = os.pipe()
    with Machine("-serial", "stdio", stdout=writer) as machine:
        os.close(writer)
        assert os.read(reader, 64).startswith(b"ready")
        os.close(reader)
        machine.type(b"aaO")
        assert machine.wait() == 0
        assert machine.errors() == ""
        machine.gone()


def test_a_reader_that_does_not_read_does_not_hold_up_the_end() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with Machine("-serial", "stdio", stdout=writer) as machine:
        os.close(writer)
        assert os.read(reader, 6) == b"ready\n"
        machine.type(b"a" * 2000)  # 7 characters of output each
        machine.kill(signal.SIGTERM)
        assert machine.wait() == 0
        machine.gone()
    os.close(reader)
