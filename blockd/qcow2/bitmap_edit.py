"""Changing which dirty bitmaps an image has, and what they say.

Source: "Qcow2 Image File Format", sections "Bitmaps extension" to "Dirty tracking bitmaps".

New bitmap data, tables and directory are written beside the old ones and made durable; then the header
extension points to the new directory, and what only the old one used is given up. So any crash leaves the
old set or the new one, and at worst leaked clusters.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from blockd.qcow2 import header as headers
from blockd.qcow2.bitmaps import (
    AUTO,
    IN_USE,
    MAX_BITMAPS,
    MAX_GRANULARITY_BITS,
    MAX_NAME,
    MIN_GRANULARITY_BITS,
    MOST_BITS,
    Bitmap,
    Bits,
    bitmap_clusters,
    extension_data,
    load,
    read_bits,
)
from blockd.qcow2.header import Autoclear, ExtensionType
from blockd.qcow2.tracking import Tracker
from coordinator.contract.errors import BlockError

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image

#: attempts to find clusters in a row
_TRIES = 64


class BitmapSet:
    """The bitmaps of an open image, to be changed and saved. The image is at rest all the while."""

    def __init__(self, image: Qcow2Image) -> None:
        """BlockError when the bitmap directory is damaged."""
        self._image = image
        if image.tracker is not None:
            image.tracker.store()
        # without the bit "the bitmaps extension data must be considered inconsistent"
        consistent = image.header.autoclear & Autoclear.BITMAPS
        known = load(image.host, image.header) if consistent else []
        #: name -> entry, and new content or None where it stays
        self._wanted: dict[str, tuple[Bitmap, Bits | None]] = {b.name: (b, None) for b in known}

    def bitmaps(self) -> list[Bitmap]:
        return [bitmap for bitmap, _ in self._wanted.values()]

    def add(self, name: str, granularity: int | None = None, enabled: bool = True) -> None:
        """A new bitmap with nothing marked; ``granularity`` is bytes for each bit."""
        if self._image.header.version < 3:
            raise BlockError("Cannot store dirty bitmaps in qcow2 v2 files", errno.ENOTSUP)
        if not name:
            raise BlockError("Bitmap name cannot be empty", errno.EINVAL)
        if len(name.encode("utf-8", "surrogateescape")) > MAX_NAME:
            raise BlockError(f"Name length exceeds maximum ({MAX_NAME} characters)", errno.EINVAL)
        if name in self._wanted:
            raise BlockError(f"Bitmap already exists: {name}", errno.EEXIST)
        if len(self._wanted) >= MAX_BITMAPS:
            raise BlockError("Maximum number of persistent bitmaps is already reached", errno.EFBIG)
        if granularity is None:
            granularity = min(max(self._image.header.cluster_size, 4096), 65536)
        bits = granularity.bit_length() - 1
        if granularity != 1 << bits or bits < MIN_GRANULARITY_BITS:
            raise BlockError("Granularity must be power of 2 and at least 512", errno.EINVAL)
        if bits > MAX_GRANULARITY_BITS:
            raise BlockError("Granularity must be at most 2 GiB", errno.EINVAL)
        made = Bitmap(name, 0, 0, AUTO if enabled else 0, bits)
        self._wanted[name] = made, self._empty(made)

    def remove(self, name: str) -> None:
        """Forget a bitmap, also one that cannot be used."""
        self._find(name)
        del self._wanted[name]

    def clear(self, name: str) -> None:
        bitmap = self.usable(name)
        self._wanted[name] = bitmap, self._empty(bitmap)

    def enable(self, name: str, enabled: bool = True) -> None:
        """Let a bitmap follow changes, or not."""
        bitmap = self.usable(name)
        flags = bitmap.flags | AUTO if enabled else bitmap.flags & ~AUTO
        self._wanted[name] = replace(bitmap, flags=flags), self._wanted[name][1]

    def merge(self, name: str, source: BitmapSet, source_name: str) -> None:
        """Mark what a bitmap marks that may be another image's."""
        target = self.usable(name)
        other = source.usable(source_name)
        sizes = self._image.size, source._image.size
        if sizes[0] != sizes[1]:
            text = (
                f"Bitmaps are of different sizes (destination size is {sizes[0]}, source size is {sizes[1]})"
            )
            raise BlockError(f"{text} and can't be merged", errno.EINVAL)
        bits = self.content(name)
        bits |= scaled(source.content(source_name), other.granularity_bits, target.granularity_bits)[
            : len(bits)
        ]
        self._wanted[name] = target, bits

    def resize(self, size: int) -> None:
        """Fit all bitmaps to a disk of another size: new bits are 0, lost ones are lost. BlockError when
        one of them cannot be used."""
        for name in list(self._wanted):
            bitmap = self.usable(name)
            bits = self._empty(bitmap, size)
            old = self.content(name)[: len(bits)]
            bits[: len(old)] = old
            self._wanted[name] = bitmap, bits

    def usable(self, name: str) -> Bitmap:
        """A bitmap whose content can be believed and changed."""
        bitmap = self._find(name)
        if bitmap.flags & IN_USE:
            text = f"Bitmap '{name}' is inconsistent and cannot be used; 'bitmap --remove' deletes it"
            raise BlockError(text, errno.EINVAL)
        known = MIN_GRANULARITY_BITS <= bitmap.granularity_bits <= MAX_GRANULARITY_BITS
        if not bitmap.known or not known:
            raise BlockError(f"Bitmap '{name}' is of a kind that is not known here", errno.ENOTSUP)
        return bitmap

    def content(self, name: str) -> Bits:
        """The bits of a bitmap, as many as its disk needs."""
        bitmap, bits = self._wanted[name]
        if bits is None:
            count = len(self._empty(bitmap))
            bits = read_bits(self._image.host, self._image.header, bitmap)[:count]
            if len(bits) < count:
                raise BlockError(f"Bitmap '{name}' is shorter than its disk", errno.EINVAL)
        return bits

    def _find(self, name: str) -> Bitmap:
        if name not in self._wanted:
            raise BlockError(f"Dirty bitmap '{name}' not found", errno.ENOENT)
        return self._wanted[name][0]

    def _empty(self, bitmap: Bitmap, size: int | None = None) -> Bits:
        count = bitmap.bits_for(self._image.size if size is None else size)
        if count > MOST_BITS:
            raise BlockError(f"Bitmap '{bitmap.name}' has too many bits: {count}", errno.EFBIG)
        return np.zeros(count, np.bool_)

    # ---- saving ----------------------------------------------------------------------------------
    def save(self) -> None:
        """Write the set. OSError or BlockError leaves the old one."""
        image = self._image
        before = np.zeros(0, np.int64)
        if image.header.autoclear & Autoclear.BITMAPS:
            before = bitmap_clusters(image.host, image.header)
        taken: list[tuple[int, int]] = []
        changed = replace(image.header, extensions=list(image.header.extensions))
        try:
            entries = [self._written(bitmap, bits, taken) for bitmap, bits in self._wanted.values()]
            changed.set_extension(ExtensionType.BITMAPS, None)
            changed.autoclear &= ~int(Autoclear.BITMAPS)
            if entries:
                data = b"".join(entry.encode() for entry in entries)
                at = self._write_row(data, taken)
                extension = extension_data(len(entries), len(data), at)
                changed.set_extension(ExtensionType.BITMAPS, extension)
                changed.autoclear |= int(Autoclear.BITMAPS)
            changed.encode()  # it must fit
            image.host.sync()
        except (OSError, BlockError):
            for first, count in taken:
                image.condemn(np.arange(first, first + count))
            raise
        try:
            headers.rewrite(image.host, changed)
        except OSError:
            changed = image.read_header(repair=True)  # whichever is on the disk now
            raise
        finally:
            image.header.extensions, image.header.autoclear = changed.extensions, changed.autoclear
            used = bool(changed.autoclear & Autoclear.BITMAPS)
            image.tracker = Tracker(image) if used else None
        after = bitmap_clusters(image.host, image.header) if entries else np.zeros(0, np.int64)
        image.refcounts.change(np.setdiff1d(before, after), -1)
        image.refcounts.give_back_reserved()
        image.flush()

    def _written(self, bitmap: Bitmap, bits: Bits | None, taken: list[tuple[int, int]]) -> Bitmap:
        """The entry, with new content in new clusters."""
        if bits is None:
            return bitmap
        size = self._image.header.cluster_size
        per_cluster = size * 8
        table = np.zeros(-(-len(bits) // per_cluster), np.uint64)
        for index in range(len(table)):
            part = bits[index * per_cluster : (index + 1) * per_cluster]
            if part.any():
                data = np.packbits(part, bitorder="little").tobytes()
                table[index] = self._write_row(data, taken)
        at = self._write_row(table.astype(">u8").tobytes(), taken)
        return replace(bitmap, table_offset=at, table_size=len(table))

    def _write_row(self, data: bytes, taken: list[tuple[int, int]]) -> int:
        """Write into new clusters that lie in a row; their offset."""
        image, bits = self._image, self._image.header.cluster_bits
        wanted = -(-len(data) >> bits)
        if not wanted:
            return 0
        for _ in range(_TRIES):
            first, count = image.refcounts.take(wanted)
            if count == wanted:
                break
            image.condemn(np.arange(first, first + count))
        else:
            raise OSError(errno.ENOSPC, f"{image.file}: no {wanted} clusters in a row are free")
        taken.append((first, count))
        image.host.write(first << bits, data.ljust(wanted << bits, b"\0"))
        return first << bits


def scaled(bits: Bits, old: int, new: int) -> Bits:
    """Bits of 1 << old bytes each as bits of 1 << new bytes: what was marked is marked."""
    if new <= old:
        return np.repeat(bits, 1 << (old - new))
    ratio = 1 << (new - old)
    padded = np.concatenate((bits, np.zeros(-len(bits) % ratio, np.bool_)))
    return np.logical_or.reduce(padded.reshape(-1, ratio), axis=1)
