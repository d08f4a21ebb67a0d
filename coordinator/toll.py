"""What a device host died of, and how often: a device that dies ``MOST_DEATHS`` times at the same thing would
do so for ever, so it is unplugged, and the rest goes on.

The host says in the segment what it has in hand, with a number that is the same when it is done again
(devhost/hand.py). Deaths at anything else in between begin the count anew, and so a host that is killed from
outside, however often, loses nothing. A record at which a process dies while it takes over counts only where
it dies of itself, since there is no number that would tell a killing from a fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordinator.contract._segment import lib
from coordinator.contract.messages import SPACE_INTA, SPACE_PORT

MOST_DEATHS = 3
#: deaths in a row without an event and with nothing in hand: it cannot even start
MOST_STARTS = 100

_WHAT = {
    lib.HAND_TIMER: "a timer",
    lib.HAND_COMPLETION: "the answer to a block request",
    lib.HAND_LOAD: "its state, as another process takes it over",
}


@dataclass(frozen=True)
class Work:
    """What is in hand. ``device`` 0: no single device's."""

    kind: int
    device: int
    space: int
    address: int
    write: bool
    number: int

    def __str__(self) -> str:
        if self.kind in _WHAT:
            return _WHAT[self.kind]
        if self.space == SPACE_INTA:
            return "an interrupt acknowledge"
        where = "port" if self.space == SPACE_PORT else "address"
        return f"a {'write to' if self.write else 'read of'} {where} {self.address:#x}"


def in_hand(block: Any) -> Work | None:
    """Of a host's block in the segment."""
    if block.begun == block.events or block.hand_kind == lib.HAND_NOTHING:
        return None
    access = block.hand_kind in (lib.HAND_ACCESS, lib.HAND_POSTED)
    return Work(
        int(block.hand_kind), int(block.hand_device), int(block.hand_space) if access else 0,
        int(block.hand_address) if access else 0, access and bool(block.hand_write), int(block.hand_number),
    )  # fmt: skip


class Toll:
    """Deaths of one device host."""

    def __init__(self) -> None:
        self._last: Work | None = None
        self._deaths = 0
        self._events = -1
        self._starts = 0

    def fatal(self, work: Work | None, events: int) -> bool:
        """Another death, with this in hand, after so many events: is it the one too many?"""
        if events != self._events:
            self._events, self._starts = events, 0
        self._starts += 1
        if work is None:
            return self._starts >= MOST_STARTS
        self._deaths = self._deaths + 1 if work == self._last else 1
        self._last = work
        return self._deaths >= MOST_DEATHS
