"""What the event in hand is about, for the coordinator: it is read when the host has died of it.

A number tells whether it is the same one that killed the last process, too: an access has its vCPU's serial,
a posted write its ticket, a timer the time at which it is due, a completion its request's place, a command
its serial.
"""

from __future__ import annotations

from typing import Any

from coordinator.contract._segment import lib

NOTHING: int = lib.HAND_NOTHING
ACCESS: int = lib.HAND_ACCESS
POSTED: int = lib.HAND_POSTED
TIMER: int = lib.HAND_TIMER
COMPLETION: int = lib.HAND_COMPLETION
COMMAND: int = lib.HAND_COMMAND
LOAD: int = lib.HAND_LOAD

#: where the serials of a vCPU's accesses leave room for its number
VCPU_SHIFT = 56


class Hand:
    """Over the host's block in the segment."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def takes(self, kind: int, number: int = 0) -> None:
        """Something begins; whose it is comes to be known later."""
        self._block.hand_kind = kind
        self._block.hand_device = 0
        self._block.hand_number = number

    def of(self, device: int, space: int = 0, address: int = 0, write: bool = False) -> None:
        """It concerns this device."""
        block = self._block
        block.hand_device, block.hand_space, block.hand_write = device, space, write
        block.hand_address = address
