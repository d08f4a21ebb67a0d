"""Reading a persistent dirty bitmap: which bytes of a disk it marks.

Source: "Qcow2 Image File Format", sections "Bitmap directory" to "Dirty tracking bitmaps".
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from blockd.qcow2.bitmaps import AUTO, IN_USE, Bitmap, load
from blockd.qcow2.header import Autoclear, ExtensionType
from blockd.qcow2.tables import OFFSET
from coordinator.contract.errors import BlockError

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image

#: bits looked at in one step
_STEP = 1 << 19
_ALL_ONES = 1


class Run(NamedTuple):
    """``length`` bytes that are all dirty, or all not."""

    length: int
    dirty: bool


class DirtyBitmap:
    """One bitmap of an open image. One that follows the image's writes is read as they change it."""

    def __init__(self, image: Qcow2Image, name: str) -> None:
        """BlockError when there is no such bitmap, or nothing can be said by it."""
        self.name = name
        self._image = image
        #: bits that one entry of the table stands for
        self._per_entry = image.header.cluster_size * 8
        self._load(_find(image, name))

    def _load(self, bitmap: Bitmap) -> None:
        image = self._image
        #: changes when the bitmaps have been written anew, as for another size of the disk
        self._directory = image.header.extension(ExtensionType.BITMAPS)
        self._bits = bitmap.granularity_bits
        self._following = bool(bitmap.flags & AUTO)
        data = image.host.read(bitmap.table_offset, 8 * bitmap.table_size)
        self._table: list[int] = np.frombuffer(data, ">u8").tolist()

    def runs(self, offset: int, length: int) -> Iterator[Run]:
        """In order from ``offset``, ``length`` bytes in all, each other than the one before it. OSError when
        the bitmap cannot be read."""
        end = offset + length
        at, state = offset, None
        for bit, dirty in self._edges(offset >> self._bits, ((end - 1) >> self._bits) + 1):
            if dirty is state:
                continue
            if state is not None:
                yield Run((bit << self._bits) - at, state)
                at = bit << self._bits
            state = dirty
        if state is not None:
            yield Run(end - at, state)

    def _edges(self, first: int, last: int) -> Iterator[tuple[int, bool]]:
        """Bits from which on another value may hold, with that value, of [first, last)."""
        image = self._image
        if image.header.extension(ExtensionType.BITMAPS) != self._directory:
            self._load(next(b for b in load(image.host, image.header) if b.name == self.name))
        live = None
        if self._following and image.tracker is not None:
            live = image.tracker.live(self.name)
        while first < last:
            index = first // self._per_entry
            stop = min(last, first + _STEP, (index + 1) * self._per_entry)
            entry = self._table[index]
            if live is not None:
                yield from _changes(live[first:stop], first)
            elif entry & OFFSET:
                inside = first - index * self._per_entry
                size = (inside % 8 + stop - first + 7) // 8
                data = np.frombuffer(image.host.read((entry & OFFSET) + inside // 8, size), np.uint8)
                bits = np.unpackbits(data, bitorder="little").view(np.bool_)
                yield from _changes(bits[inside % 8 : inside % 8 + stop - first], first)
            else:
                yield first, bool(entry & _ALL_ONES)
            first = stop


def _changes(bits: npt.NDArray[np.bool_], first: int) -> Iterator[tuple[int, bool]]:
    """The first bit and each that differs from the one before it; ``first`` is the number of bits[0]."""
    value = bool(bits[0])
    yield first, value
    for at in np.flatnonzero(bits[1:] != bits[:-1]).tolist():
        value = not value
        yield first + at + 1, value


def _find(image: Qcow2Image, name: str) -> Bitmap:
    """A bitmap that can be believed."""
    header = image.header

    def refuse(why: str, number: int = errno.EINVAL) -> BlockError:
        return BlockError(f"{image.file}: bitmap {name!r} {why}", number)

    # "Bitmaps extension": without this bit its data is inconsistent
    known = load(image.host, header) if header.autoclear & Autoclear.BITMAPS else []
    bitmap = next((bitmap for bitmap in known if bitmap.name == name), None)
    if bitmap is None:
        raise refuse("is not there", errno.ENOENT)
    if bitmap.flags & IN_USE:
        raise refuse("is inconsistent (a program that kept it has crashed) and cannot be used")
    bits = -(-header.size >> bitmap.granularity_bits)
    if (
        not bitmap.known
        or not 9 <= bitmap.granularity_bits <= 31
        or bitmap.table_size < -(-bits // (header.cluster_size * 8))
    ):
        raise refuse("is of a kind that is not known here")
    if bitmap.flags & AUTO and image.tracker is not None and not image.tracker.can_follow(bitmap):
        raise refuse("is too large to be kept while the disk is written", errno.EFBIG)
    return bitmap
