"""The host side of a drive: a block device that works on requests while the guest runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class BlockBackend(Protocol):
    """Asynchronous block device. Offsets and lengths are bytes.

    Each request returns a cookie at once. Its end is one event, ``drive.complete(cookie, errno)``
    with errno 0 or a POSIX number; it never comes from inside the call that started the request.
    Requests that overlap must end as if made one after the other.
    """

    @property
    def size(self) -> int: ...

    @property
    def read_only(self) -> bool: ...

    def read(self, offset: int, length: int, into: Sequence[memoryview]) -> int:
        """Fill ``into``, whose lengths sum to ``length``."""
        ...

    def write(self, offset: int, length: int, data: Sequence[Buffer]) -> int:
        """Store ``data``, whose lengths sum to ``length`` and which stay valid until the end."""
        ...

    def flush(self) -> int:
        """Make all completed writes durable."""
        ...

    def cancel(self, cookie: int) -> None:
        """No completion is wanted, and the request's views are not touched after this returns.

        A write that has begun may still reach the medium, whole and at its own place.
        """
        ...
