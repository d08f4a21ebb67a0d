"""An export of an NBD server as the file that an image of another format lies in."""

from __future__ import annotations

import errno

from blockd.hostfile import HostFile, Identity
from blockd.nbd.remote import NbdImage


class NbdFile(HostFile):
    """As a block device: its size is what it is, and what does not fit is ENOSPC."""

    def __init__(self, file: str, read_only: bool = False, unsafe: bool = False) -> None:
        """BlockError when the export cannot be had."""
        self.file = file
        self.read_only = read_only
        self.unsafe = unsafe
        self._image = NbdImage(file, read_only, granularity=1)

    def lock(self, writable: bool) -> bool:
        """There are no locks over NBD, and nobody expects them: not worth a warning."""
        return True

    def size(self) -> int:
        return self._image.size

    def identity(self) -> Identity:
        return self._image.address.identity

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, view: memoryview) -> None:
        self._image.read_into(offset, view)

    def prefetch(self, offset: int, length: int) -> None:
        self._image.prefetch(offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._image.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        inside = min(length, self.size() - offset)
        if inside > 0:
            self._image.write_zeroes(offset, inside, unmap=True, fast=False)

    def reserve(self, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, f"{self.file}: nothing can be preallocated over NBD")

    def resize(self, size: int) -> None:
        if size > self.size():
            raise OSError(errno.ENOSPC, f"{self.file}: the export does not grow")

    def sync(self) -> None:
        if not self.unsafe:
            self._image.flush()

    def close(self) -> None:
        self._image.close()
