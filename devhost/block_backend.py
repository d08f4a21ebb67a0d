"""A drive's block device: one NBD connection to the block daemon, driven by the device host's loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from coordinator.contract.errors import BlockError
from devhost.block_client import BlockClient, Completion

log = logging.getLogger(__name__)

#: how long the block daemon may be away before a drive reports errors, seconds
PATIENCE = 30.0

Buffer = bytes | bytearray | memoryview


class NbdBackend:
    """``devhost.ide.backend.BlockBackend`` over a connected client. ``completed(cookie, errno)`` is the drive's."""

    def __init__(self, client: BlockClient) -> None:
        self.client = client
        self.completed: Callable[[int, int], None] = lambda cookie, errno: None
        self._early: list[Completion] = []
        self._cancelled: set[int] = set()

    @property
    def size(self) -> int:
        return self.client.size

    @property
    def read_only(self) -> bool:
        return self.client.read_only

    def read(self, offset: int, length: int, into: Sequence[memoryview]) -> int:
        return self.client.read(offset, into)

    def write(self, offset: int, length: int, data: Sequence[Buffer]) -> int:
        return self.client.write(offset, [memoryview(piece) for piece in data])

    def flush(self) -> int:
        return self.client.flush()

    def cancel(self, cookie: int) -> None:
        """Wait for what is in flight, since its data lands in guest memory; then forget this one's completion."""
        self._cancelled.add(cookie)
        try:
            self._early += self.client.drain(PATIENCE)
        except BlockError as error:
            log.error("%s", error)
            self._early += self.client.fail_pending()

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

    @property
    def waiting(self) -> bool:
        """Completions that came while another request was cancelled."""
        return bool(self._early)

    def deliver_early(self) -> None:
        done, self._early = self._early, []
        self._deliver(done)

    def _deliver(self, done: list[Completion]) -> None:
        for cookie, errno in done:
            if cookie in self._cancelled:
                self._cancelled.discard(cookie)
            else:
                self.completed(cookie, errno)

    def close(self) -> None:
        self.client.close()
