"""The posted ring as a device host reads it (ring.c has the protocol)."""

from __future__ import annotations

import time
from typing import Any

from coordinator.contract._segment import ffi, lib

#: a ticket that is drawn but not filled yet is looked for this many times before the host yields
SPINS = 100


class Ring:
    """One device host's end; only the host's thread uses it."""

    def __init__(self, header: Any, host: int) -> None:
        self._header = header
        self._host = host
        self._block = ffi.cast(
            "struct host_block *", ffi.cast("char *", header) + header.host_offset + header.host_stride * host
        )
        self._entry = ffi.new("struct posted_entry *")
        #: ticket of the next entry to take
        self.ticket: int = self._block.applied

    def take(self, upto: int | None = None) -> tuple[int, int, int, int] | None:
        """The next entry as (space, addr, width, value), or None.

        ``upto`` None: None where none is whole. Else entries below ticket ``upto`` are waited for: their
        writers are about to fill them.
        """
        if upto is not None and self.ticket >= upto:
            return None
        looks = 0
        while not lib.ring_take(self._header, self._host, self.ticket, self._entry):
            if upto is None:
                return None
            looks += 1
            if looks > SPINS:
                time.sleep(0)
        entry = self._entry
        self.ticket += 1
        return entry.space, entry.addr, entry.width, entry.value

    def applied(self) -> None:
        """Everything taken so far has been applied and committed, and its shadows are stored."""
        if self._block.applied != self.ticket:
            self._block.posted_served += self.ticket - self._block.applied
            lib.ring_applied(self._header, self._host, self.ticket)

    def pending(self) -> bool:
        """Whether the next entry is whole."""
        return bool(lib.ring_take(self._header, self._host, self.ticket, self._entry))

    def sleeping(self, sleeps: bool) -> None:
        """Before the host polls: True, then ``pending`` once more. After: False."""
        if sleeps:
            lib.ring_sleep(self._header, self._host, self.ticket)
        else:
            lib.ring_awake(self._header, self._host)
