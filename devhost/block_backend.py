"""A drive's block device: one NBD connection to the block daemon, driven by the device host's loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from coordinator.contract.errors import BlockError
from devhost.block_client import BlockClient, Completion

log = logging.getLogger(__name__)

#: how long the block daemon may be away before a drive reports errors, seconds. The host is deaf meanwhile,
#: and a daemon that has died ends the machine anyway
PATIENCE = 1.0


class NbdBackend:
    """``devhost.ide.backend.BlockBackend`` over a connected client. ``completed(cookie, errno)`` is the
    drive's; ``settled()`` ends the event that some completions are."""

    def __init__(self, client: BlockClient) -> None:
        self.client = client
        self.completed: Callable[[int, int], None] = lambda cookie, errno: None
        self.settled: Callable[[], None] = lambda: None

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
        return self.client.read(offset, views)

    def write(self, offset: int, views: Sequence[memoryview]) -> int:
        return self.client.write(offset, views)

    def flush(self) -> int:
        return self.client.flush()

    def cancel(self, cookie: int) -> None:
        """The request touches guest memory no more; its drive ignores the completion."""
        self.client.cancel(cookie)

    # ---- for the loop ----------------------------------------------------------------------------
    def fileno(self) -> int:
        return self.client.fileno()

    @property
    def wants_write(self) -> bool:
        return self.client.wants_write

    def on_writable(self) -> None:
        self.client.on_writable()

    def on_readable(self) -> None:
        """Deliver completions; a lost connection is made again, and if that cannot be, requests fail."""
        try:
            done = self.client.on_readable()
        except BlockError as error:
            log.error("%s; connecting again", error)
            try:
                self.client.reconnect(PATIENCE)
                done = []
            except BlockError as fatal:
                log.error("%s", fatal)
                done = self.client.fail_pending()
        self._deliver(done)

    def _deliver(self, done: list[Completion]) -> None:
        for cookie, errno in done:
            self.completed(cookie, errno)
        if done:
            self.settled()

    def close(self) -> None:
        self.client.close()
