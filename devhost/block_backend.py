"""A drive's block device: one NBD connection to the block daemon, driven by the device host's loop.

The daemon closes an export for a while when its lease is about to change hands. A connection that is lost
with nothing in flight is therefore made again only when there is something to ask.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from coordinator.contract.errors import BlockError
from devhost.block_client import BlockClient, Completion
from devhost.faults import Faults

log = logging.getLogger(__name__)

#: how long the block daemon may be away before a drive reports errors, seconds. The host is deaf meanwhile,
#: and a daemon that has died ends the machine anyway
PATIENCE = 1.0


class NbdBackend:
    """``devhost.ide.backend.BlockBackend`` over a connected client. ``completed(cookie, errno)`` is the
    drive's; ``settled()`` ends the event that some completions are."""

    def __init__(self, client: BlockClient, faults: Faults | None = None) -> None:
        self.client = client
        self._faults = faults or Faults()
        self.completed: Callable[[int, int], None] = lambda cookie, errno: None
        self.settled: Callable[[], None] = lambda: None
        #: while there is no connection: an eventfd that is rung for each request
        self._bell: int | None = None

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
        return self._asked(self.client.read(offset, views))

    def write(self, offset: int, views: Sequence[memoryview]) -> int:
        return self._asked(self.client.write(offset, views))

    def flush(self) -> int:
        return self._asked(self.client.flush())

    def _asked(self, cookie: int) -> int:
        """Without a connection the loop hears of it by the bell; it never completes in here."""
        if self._bell is not None:
            os.eventfd_write(self._bell, 1)
        self._faults.at("block-sent")
        return cookie

    def cancel(self, cookie: int) -> None:
        """The request touches guest memory no more; its drive ignores the completion."""
        self.client.cancel(cookie)

    # ---- for the loop ----------------------------------------------------------------------------
    def fileno(self) -> int:
        return self.client.fileno() if self._bell is None else self._bell

    @property
    def wants_write(self) -> bool:
        return self.client.wants_write

    def on_writable(self) -> None:
        self.client.on_writable()

    def on_readable(self) -> None:
        """Deliver completions; a lost connection is made again, and if that cannot be, requests fail."""
        if self._bell is not None:
            os.eventfd_read(self._bell)
            self._come_back()
            return
        try:
            self._deliver(self.client.on_readable())
        except BlockError as error:
            if self.client.pending:
                log.info("%s", error)
                self._come_back()
            else:  # the daemon closes exports when a medium or a lease goes
                log.debug("%s", error)
                self._go_away()

    def _come_back(self) -> None:
        try:
            self.client.reconnect(PATIENCE)
        except BlockError as error:
            log.error("%s", error)
            done = self.client.fail_pending()
            self._go_away()
            self._deliver(done)
        else:
            self._close_bell()

    def _go_away(self) -> None:
        self.client.close()
        if self._bell is None:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC)

    def _close_bell(self) -> None:
        if self._bell is not None:
            os.close(self._bell)
            self._bell = None

    def _deliver(self, done: list[Completion]) -> None:
        if done:
            self._faults.at("block-answered")
        for cookie, errno in done:
            self.completed(cookie, errno)
        if done:
            self.settled()

    def close(self) -> None:
        self.client.close()
        self._close_bell()
