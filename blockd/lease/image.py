"""An image that is written only while its lease is held.

Every write, or batch of writes, looks first whether the lease still has its name (fstat), every flush reads
the record again afterwards. What was under way when the lease was taken away may still land: see
docs/images.md, "Leases".
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from blockd.batch import Batch, Direct
from blockd.image import Buffer, Extent, Image
from blockd.lease.lease import Lease
from blockd.qcow2.image import Qcow2Image


class _LeasedDirect:
    """The short way, open as long as the lease is held; then the image's methods refuse."""

    def __init__(self, inner: Direct, lease: Lease) -> None:
        self._inner, self._lease = inner, lease

    def serve(self, batch: Batch) -> None:
        try:
            self._lease.glance()
        except OSError:
            batch.c.done = 0
        else:
            self._inner.serve(batch)


class LeasedImage(Image):
    """``lease`` None: the image is inactive, opened read-only, and waits for its lease. Clients see it as it
    will be, so that they need not be told anew; what they write meanwhile is refused."""

    def __init__(self, inner: Image, lease: Lease | None) -> None:
        self.inner = inner
        self.file, self.format, self.size = inner.file, inner.format, inner.size
        self.read_only = False
        self._lease = lease

    def _glance(self) -> None:
        if self._lease is None:
            raise PermissionError(errno.EPERM, f"{self.file}: its lease has not been granted yet")
        self._lease.glance()

    def held(self) -> Image:
        """The image itself, for what is done to it as a whole; OSError when the lease is gone."""
        if self._lease is None:
            raise PermissionError(errno.EPERM, f"{self.file}: its lease has not been granted yet")
        self._lease.check()
        return self.inner

    def read_into(self, offset: int, view: memoryview) -> None:
        self.inner.read_into(offset, view)

    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        self._glance()
        self.inner.write(offset, data, fua)

    def direct(self) -> Direct | None:
        inner = self.inner.direct()
        if inner is None or self._lease is None:
            return inner  # of an inactive image for reads alone
        return _LeasedDirect(inner, self._lease)

    def flush(self) -> None:
        if self._lease is not None:
            self._lease.glance()  # a flush of qcow2 writes, too
            self.inner.flush()
            self._lease.check()

    def trim(self, offset: int, length: int) -> None:
        self._glance()
        self.inner.trim(offset, length)

    def write_zeroes(self, offset: int, length: int, unmap: bool, fast: bool, fua: bool = False) -> None:
        self._glance()
        self.inner.write_zeroes(offset, length, unmap, fast, fua)

    def prefetch(self, offset: int, length: int) -> None:
        self.inner.prefetch(offset, length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self.inner.extents(offset, length)

    def resize(self, size: int) -> None:
        self._glance()
        self.inner.resize(size)
        self.size = self.inner.size

    def close(self) -> None:
        """Without the lease nothing is written, not even at the end."""
        try:
            if self._lease is not None:
                self._lease.check()
        except OSError:
            if isinstance(self.inner, Qcow2Image):
                self.inner.close_files()
                return
        self.inner.close()
