"""Keeping dirty bitmaps true while an image is written.

Source: "Qcow2 Image File Format", sections "Bitmap directory" to "Dirty tracking bitmaps".

From the first write on, bitmaps that follow changes are marked in use; so one that a crash has left
behind is known to be out of date. They are stored, and the mark taken off, when the image is closed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from blockd.qcow2.bitmaps import AUTO, IN_USE, Bitmap, load
from blockd.qcow2.tables import OFFSET

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image

log = logging.getLogger(__name__)

#: bits of one bitmap that are kept in memory, a byte each
MOST_BITS = 1 << 26
_FLAGS_AT = 12
_ALL_ONES = 1


class _Tracked:
    """One bitmap in memory."""

    def __init__(self, image: Qcow2Image, bitmap: Bitmap) -> None:
        self.bitmap = bitmap
        size = image.header.cluster_size
        raw = image.host.read(bitmap.table_offset, 8 * bitmap.table_size)
        self.table = np.frombuffer(raw, ">u8").astype(np.uint64)
        self.per_cluster = size * 8
        self.bits: npt.NDArray[np.bool_] = np.zeros(len(self.table) * self.per_cluster, np.bool_)
        self.changed: npt.NDArray[np.bool_] = np.zeros(len(self.table), np.bool_)
        for index, entry in enumerate(self.table.tolist()):
            part = self.bits[index * self.per_cluster : (index + 1) * self.per_cluster]
            if entry & OFFSET:
                data = np.frombuffer(image.host.read(entry & OFFSET, size), np.uint8)
                part[:] = np.unpackbits(data, bitorder="little")
            elif entry & _ALL_ONES:
                part[:] = True

    def mark(self, offset: int, length: int) -> None:
        first = offset >> self.bitmap.granularity_bits
        last = (offset + length - 1) >> self.bitmap.granularity_bits
        self.bits[first : last + 1] = True
        self.changed[first // self.per_cluster : last // self.per_cluster + 1] = True

    def store(self, image: Qcow2Image) -> None:
        """Write what has changed, data before the table."""
        valid = -(-image.size >> self.bitmap.granularity_bits)
        self.bits[valid:] = False  # "unused tail bits must be zero"
        for index in np.flatnonzero(self.changed).tolist():
            part = self.bits[index * self.per_cluster : (index + 1) * self.per_cluster]
            offset = int(self.table[index]) & OFFSET
            if not offset:
                offset = image.refcounts.take(1)[0] << image.header.cluster_bits
                self.table[index] = offset
            image.host.write(offset, np.packbits(part, bitorder="little").tobytes())
        image.host.write(self.bitmap.table_offset, self.table.astype(">u8").tobytes())


class Tracker:
    """The bitmaps of an image that must follow its changes."""

    def __init__(self, image: Qcow2Image) -> None:
        """BlockError when the bitmap directory is damaged."""
        self._image = image
        self._following = [b for b in load(image.host, image.header) if b.flags & AUTO]
        self._tracked: list[_Tracked] | None = None

    def mark(self, offset: int, length: int) -> None:
        """A range is about to change. OSError when that cannot be noted."""
        if self._tracked is None:
            with self._image.lock:
                if self._tracked is None:
                    self._tracked = self._begin()
        for tracked in self._tracked:
            tracked.mark(offset, length)

    def _begin(self) -> list[_Tracked]:
        result = []
        for bitmap in self._following:
            if self.can_follow(bitmap):
                result.append(_Tracked(self._image, bitmap))
            else:
                log.warning("%s: bitmap %s cannot be kept up to date", self._image.file, bitmap.name)
            self._set_flags(bitmap, bitmap.flags | IN_USE)
        self._image.host.sync()
        return result

    def can_follow(self, bitmap: Bitmap) -> bool:
        """Is it consistent, and small enough for memory?"""
        header = self._image.header
        bits = -(-header.size >> bitmap.granularity_bits)
        entries = -(-bits // (header.cluster_size * 8))
        usable = bitmap.known and not bitmap.flags & IN_USE and 9 <= bitmap.granularity_bits <= 31
        return usable and entries == bitmap.table_size and bits <= MOST_BITS

    def live(self, name: str) -> npt.NDArray[np.bool_] | None:
        """The bits of a bitmap since the first write; None before it, when those in the file are true."""
        for tracked in self._tracked or ():
            if tracked.bitmap.name == name:
                return tracked.bits
        return None

    def store(self) -> None:
        """Make the bitmaps in the file those in memory; OSError leaves them marked."""
        if not self._tracked:
            return
        for tracked in self._tracked:
            tracked.store(self._image)
        self._image.host.sync()
        for tracked in self._tracked:
            self._set_flags(tracked.bitmap, tracked.bitmap.flags & ~IN_USE)
        self._tracked = None

    def _set_flags(self, bitmap: Bitmap, flags: int) -> None:
        self._image.host.write(bitmap.entry_offset + _FLAGS_AT, flags.to_bytes(4, "big"))
