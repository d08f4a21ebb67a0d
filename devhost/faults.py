"""Named steps of an event at which a device host can be made to die, for experiments and tests.

The object is handed in; a host that has no experiment has one that does nothing.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from coordinator.contract.errors import ConfigError
from coordinator.contract.messages import SPACE_PORT

#: in the order in which an event passes them
POINTS = (
    "received",  # an access, posted writes, a due timer, completions or a command is in hand
    "block-sent",  # a block request has been made
    "block-answered",  # completions have come, and no drive has been told
    "applied",  # the devices have changed
    "committed",  # the change is the state from now on; nobody outside has seen it
    "shown",  # shadows are stored, effects performed, posted writes count as applied
    "replied",  # the vCPU or the coordinator has its answer
)


class Faults:
    """No fault at all."""

    def at(self, point: str) -> None:
        """The work has come to ``point``."""

    def access(self, space: int, address: int) -> None:
        """A register is about to be read or written."""


@dataclass
class Kill(Faults):
    """Die by SIGKILL when ``point`` is passed for the ``nth`` time."""

    point: str
    nth: int = 1

    def at(self, point: str) -> None:
        if point == self.point:
            self.nth -= 1
            if self.nth == 0:
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Poison(Faults):
    """Die by SIGSEGV whenever this port is accessed, as a device would that has a fault there."""

    port: int

    def access(self, space: int, address: int) -> None:
        if space == SPACE_PORT and address == self.port:
            os.kill(os.getpid(), signal.SIGSEGV)


def parse(text: str) -> Faults:
    """POINT, POINT:NTH or port:NUMBER, empty for none; ConfigError names what there is."""
    if not text:
        return Faults()
    if text.startswith("port:"):
        try:
            return Poison(int(text.removeprefix("port:"), 0))
        except ValueError:
            raise ConfigError(f"fault {text}: is not port:NUMBER") from None
    point, _, nth = text.partition(":")
    if point not in POINTS or (nth and not (nth.isascii() and nth.isdigit() and int(nth))):
        raise ConfigError(f"fault {text}: is not POINT:NTH with a point of {', '.join(POINTS)}")
    return Kill(point, int(nth or 1))
