"""What is common to PS/2 devices: answers before data, ACK, and a command that waits for its parameter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

ACK = 0xFA
RESEND = 0xFE
BAT_OK = 0xAA


def nobody() -> None:
    """The controller is not attached yet."""


class Ps2Device(ABC):
    """A device on a PS/2 port. ``on_data`` tells the controller that `take` may have something."""

    def __init__(self) -> None:
        self.on_data: Callable[[], None] = nobody
        #: answers to commands; they go out before ``data``
        self.answers = bytearray()
        self.data = bytearray()
        #: the last byte sent, for RESEND
        self.last = 0
        #: command that waits for its parameter, 0 for none
        self.expect = 0

    def take(self) -> int | None:
        """The next byte for the controller, or None."""
        queue = self.answers or self.data
        if not queue:
            return None
        self.last = queue.pop(0)
        return self.last

    def answer(self, *values: int) -> None:
        self.answers.extend(values)

    def write(self, value: int) -> None:
        """A byte from the host: a command, or the parameter of the one before. It cuts off the answer
        that is still under way (IBM PS/2 HITR, "Keyboard", "Commands from the system")."""
        self.answers.clear()
        command, self.expect = self.expect, 0
        if command == 0 or not self.parameter(command, value):
            self.command(value)
        self.on_data()

    def clear(self) -> None:
        """Forget all that is under way."""
        self.answers.clear()
        self.data.clear()
        self.last = self.expect = 0

    @abstractmethod
    def command(self, value: int) -> None: ...

    @abstractmethod
    def parameter(self, command: int, value: int) -> bool:
        """Take the parameter of ``command``; False: it is a new command instead."""
