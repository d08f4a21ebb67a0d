"""Keeping dirty bitmaps true while an image is written.

Source: "Qcow2 Image File Format", sections "Bitmap directory" to "Dirty tracking bitmaps".

From the first write on, bitmaps that follow changes are marked in use; so one that a crash has left
behind is known to be out of date. They are stored, and the mark taken off, when the image is closed.
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from blockd.qcow2.bitmaps import (
    AUTO,
    IN_USE,
    MAX_GRANULARITY_BITS,
    MIN_GRANULARITY_BITS,
    MOST_BITS,
    Bitmap,
    bitmap_clusters,
    load,
    read_bits,
)
from blockd.qcow2.refcounts import runs_of
from blockd.qcow2.tables import OFFSET
from coordinator.contract.errors import BlockError

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image

log = logging.getLogger(__name__)

_FLAGS_AT = 12


class _Tracked:
    """One bitmap in memory."""

    def __init__(self, image: Qcow2Image, bitmap: Bitmap) -> None:
        self.bitmap = bitmap
        size = image.header.cluster_size
        raw = image.host.read(bitmap.table_offset, 8 * bitmap.table_size)
        self.table = np.frombuffer(raw, ">u8").astype(np.uint64)
        self.per_cluster = size * 8
        self.bits = read_bits(image.host, image.header, bitmap)
        self.changed: npt.NDArray[np.bool_] = np.zeros(len(self.table), np.bool_)

    def mark(self, offset: int, length: int) -> None:
        first = offset >> self.bitmap.granularity_bits
        last = (offset + length - 1) >> self.bitmap.granularity_bits
        self.bits[first : last + 1] = True
        self.changed[first // self.per_cluster : last // self.per_cluster + 1] = True

    def store(self, image: Qcow2Image) -> None:
        """Write what has changed, data before the table."""
        valid = self.bitmap.bits_for(image.size)
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
        self._look_where_they_lie()
        self._following = [b for b in load(image.host, image.header) if b.flags & AUTO]
        self._tracked: list[_Tracked] | None = None

    def _look_where_they_lie(self) -> None:
        """They are written in place, so they must have their places for themselves."""
        image = self._image
        clusters = bitmap_clusters(image.host, image.header)
        own = np.unique(clusters)
        inside = not len(own) or int(own[-1]) << image.header.cluster_bits < image.host.size()
        if not inside or len(own) < len(clusters):
            raise BlockError(f"{image.file}: bitmaps overlap or lie behind the end of the file", errno.EINVAL)
        if any(image.mapping.holds_table(first, count) for first, count in runs_of(own)):
            raise BlockError(f"{image.file}: bitmaps lie upon tables", errno.EINVAL)

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
        if not bitmap.known or bitmap.flags & IN_USE:
            return False
        if not MIN_GRANULARITY_BITS <= bitmap.granularity_bits <= MAX_GRANULARITY_BITS:
            return False
        bits = bitmap.bits_for(header.size)
        per_cluster = header.cluster_size * 8
        # the table is longer between the two steps of a change of size
        return -(-bits // per_cluster) <= bitmap.table_size <= MOST_BITS // per_cluster + 1

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
