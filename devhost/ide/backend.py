"""The host side of a drive: a block device that works on requests while the guest runs on.

``devhost.block_client.BlockClient`` is one; tests have another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class BlockBackend(Protocol):
    """Asynchronous block device. Offsets and lengths are bytes.

    Each request returns a cookie at once. Its end is one event, ``drive.complete(cookie, errno)``
    with errno 0 or a POSIX number; it never comes from inside the call that started the request.
    Requests that overlap end as if made one after the other.
    """

    @property
    def size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    @property
    def can_flush(self) -> bool: ...

    def read(self, offset: int, views: Sequence[memoryview]) -> int:
        """Fill the views, in order."""
        ...

    def write(self, offset: int, views: Sequence[memoryview]) -> int:
        """Store the views, in order. They stay valid until the end of the request."""
        ...

    def flush(self) -> int:
        """Make all completed writes durable."""
        ...

    def cancel(self, cookie: int) -> None:
        """Nobody waits for this request any more: its views are not touched after this returns.

        A write still reaches the medium, as it was and at its own place. The completion may come; it
        is ignored.
        """
        ...
