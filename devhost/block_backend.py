"""A drive's block device: one NBD connection to the block daemon, driven by the device host's loop.

The daemon closes an export for a while when its lease is about to change hands. A connection that is lost
with nothing in flight is therefore made again only when there is something to ask.

A daemon that is not there is being replaced, however long that takes: the coordinator ends the machine when
it cannot be, and the guest's time stands still. So requests wait, and fail only where the daemon refuses the
export, or has another one under this name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from coordinator.contract.errors import BlockError
from devhost.block_client import BlockClient, Completion
from devhost.faults import Faults

log = logging.getLogger(__name__)

#: how long a daemon that takes a connection may be silent before it counts as not there, seconds
HANDSHAKE_SECONDS = 1.0


class NbdBackend:
    """``devhost.ide.backend.BlockBackend`` over a connected client. ``completed(cookie, errno)`` is the
    drive's; ``settled()`` ends the event that some completions are."""

    def __init__(self, client: BlockClient, faults: Faults | None = None) -> None:
        self.client = client
        self._faults = faults or Faults()
        self.completed: Callable[[int, int], None] = lambda cookie, errno: None
        self.settled: Callable[[], None] = lambda: None
        #: told of a completion before the drive, by the place of its request in the export
        self.answered: Callable[[int], None] = lambda place: None
        self._connected = True
        self._places: dict[int, int] = {}

    @property
    def size(self) -> int:
        return self.client.size

    @property
    def read_only(self) -> bool:
        return self.client.read_only

    @property
    def can_flush(self) -> bool:
        return self.client.can_flush

    def read(self, offset: int, views: Sequence[memoryview]) -> int:
        return self._asked(self.client.read(offset, views), offset)

    def write(self, offset: int, views: Sequence[memoryview]) -> int:
        return self._asked(self.client.write(offset, views), offset)

    def flush(self) -> int:
        return self._asked(self.client.flush())

    def _asked(self, cookie: int, place: int = 0) -> int:
        """It never completes in here."""
        self._places[cookie] = place
        self._faults.at("block-sent")
        return cookie

    def cancel(self, cookie: int) -> None:
        """The request touches guest memory no more; its drive ignores the completion."""
        self.client.cancel(cookie)

    # ---- for the loop ----------------------------------------------------------------------------
    @property
    def connected(self) -> bool:
        """There is something to poll."""
        return self._connected

    @property
    def lost(self) -> bool:
        """Requests wait for a connection: ``seek`` it again and again."""
        return not self._connected and bool(self.client.pending)

    def fileno(self) -> int:
        return self.client.fileno()

    @property
    def wants_write(self) -> bool:
        return self.client.wants_write

    def on_writable(self) -> None:
        self.client.on_writable()

    def on_readable(self) -> None:
        """Deliver completions."""
        try:
            self._deliver(self.client.on_readable())
        except BlockError as error:
            log.debug("%s", error)  # exports are closed when a medium or a lease goes
            self.client.drop()
            self._connected = False

    def seek(self) -> None:
        """Look whether the daemon is there, and send it what waits."""
        try:
            self._connected = self.client.try_reconnect(HANDSHAKE_SECONDS)
        except BlockError as error:
            log.error("%s", error)
            self._deliver(self.client.fail_pending())

    def _deliver(self, done: list[Completion]) -> None:
        if done:
            self._faults.at("block-answered")
        for cookie, errno in done:
            self.answered(self._places.pop(cookie, 0))
            self.completed(cookie, errno)
        if done:
            self.settled()

    def close(self) -> None:
        self.client.close()
