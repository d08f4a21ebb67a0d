"""What an image is, whatever its format: a row of bytes that can be read, written and made durable.

Contract for every format
- Offsets and lengths are bytes; a caller stays within ``size``.
- Methods may be called from several threads at once. Requests that overlap have no order among
  them unless the first has returned before the second is made.
- Failures are ``OSError`` with ``errno`` set; nothing else leaves a method for bad data in a file.
- A write has reached the kernel when it returns, with all metadata that points to it: a killed
  process loses nothing. It survives loss of power after ``flush``, or at once with ``fua``.
"""

from __future__ import annotations

import abc
import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from blockd.batch import Direct

#: anything that os.pwritev takes without a copy
Buffer = bytes | bytearray | memoryview


class Extent(NamedTuple):
    """``length`` bytes that are all of one kind: see ``STATE_HOLE`` and ``STATE_ZERO`` of NBD."""

    length: int
    hole: bool
    zero: bool


class Image(abc.ABC):
    """One open image, with its locks."""

    #: path as the user gave it, for messages
    file: str
    #: "raw", "qcow2"
    format: str
    #: bytes a client sees
    size: int
    read_only: bool

    @abc.abstractmethod
    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``."""

    @abc.abstractmethod
    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        """Write all of ``data``; with ``fua`` it is durable when this returns."""

    def direct(self) -> Direct | None:
        """The short way to this image's bytes, if there is one; requests that go it are not seen by
        ``read_into`` and ``write``."""
        return None

    @abc.abstractmethod
    def flush(self) -> None:
        """Make everything durable whose write had returned before this was called."""

    @abc.abstractmethod
    def trim(self, offset: int, length: int) -> None:
        """The bytes are not needed any more: a hint, what they read as is undefined."""

    @abc.abstractmethod
    def write_zeroes(self, offset: int, length: int, unmap: bool, fast: bool, fua: bool = False) -> None:
        """Make the bytes zero. ``unmap`` allows a hole; ``fast`` asks for EOPNOTSUPP rather than
        for writing that many zeroes."""

    @abc.abstractmethod
    def prefetch(self, offset: int, length: int) -> None:
        """The bytes will be read soon: a hint."""

    @abc.abstractmethod
    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """What is allocated, in order from ``offset``, never past ``offset + length``."""

    def resize(self, size: int) -> None:
        """Give the disk another size; new bytes are zero. Not every format can."""
        raise OSError(errno.EOPNOTSUPP, f"{self.format} images cannot be resized while they are open")

    @abc.abstractmethod
    def close(self) -> None:
        """Release file and locks. No other method may be running, or be called afterwards."""
