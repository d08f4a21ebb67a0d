"""Subclusters: the bitmaps of extended L2 entries, and what they mean.

Source: "Qcow2 Image File Format", section "Extended L2 Entries". Each entry is followed by 64 bits: of
subcluster x, bit x says that it is allocated and bit 32 + x that it reads as zeroes. With neither it
reads as the backing file; both at once cannot be, nor can an allocated one without a host cluster.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blockd.qcow2.tables import (
    COMPRESSED,
    DATA,
    OFFSET,
    PACKED,
    UNALLOCATED,
    ZEROES,
    L2Table,
    Layout,
)

#: subclusters in a cluster
COUNT = 32
COUNT_BITS = 5
#: all bits of one half of a bitmap
ALL = (1 << COUNT) - 1
ALL_ZERO = ALL << COUNT

_ALL, _ALL_ZERO, _HALF, _ONE = np.uint64(ALL), np.uint64(ALL_ZERO), np.uint64(COUNT), np.uint64(1)
_COMPRESSED, _OFFSET = np.uint64(COMPRESSED), np.uint64(OFFSET)


def span(first: int, end: int) -> int:
    """The bits of subclusters ``first`` to ``end``."""
    return (1 << end) - (1 << first)


def runs_of_bits(bits: int) -> list[tuple[int, int]]:
    """(first, end) of each unbroken run of set bits."""
    result, at = [], 0
    while bits:
        low = (bits & -bits).bit_length() - 1
        bits >>= low
        length = (bits + 1 & ~bits).bit_length() - 1
        result.append((at + low, at + low + length))
        bits >>= length
        at += low + length
    return result


def impossible_bitmaps(table: L2Table, layout: Layout) -> npt.NDArray[np.bool_]:
    """The entries whose bitmaps cannot be."""
    if not layout.extended:
        return np.zeros(0, np.bool_)
    bitmaps = table.bitmaps
    packed = table.entries & _COMPRESSED != 0
    without = ~packed & (table.entries & np.uint64(layout.allocated) == 0)
    overlap = bitmaps & (bitmaps >> _HALF) & _ALL != 0
    bad: npt.NDArray[np.bool_] = overlap | (without & (bitmaps & _ALL != 0)) | (packed & (bitmaps != 0))
    return bad


def mended(table: L2Table, layout: Layout) -> L2Table:
    """The table with bitmaps that can be; data is kept rather than zeroes."""
    bad = impossible_bitmaps(table, layout)
    if not bad.any():
        return table
    bitmaps = table.bitmaps.copy()
    without = table.entries & np.uint64(layout.allocated) == 0
    bitmaps[bad & without] &= np.uint64(ALL_ZERO)
    allocated = bitmaps & _ALL
    bitmaps[bad] &= ~(allocated[bad] << _HALF)
    bitmaps[table.entries & _COMPRESSED != 0] = 0
    return L2Table(table.offset, table.entries, bitmaps)


def kind(entry: int, bitmap: int, number: int) -> int:
    """The kind of one subcluster."""
    if entry & COMPRESSED:
        return PACKED
    if bitmap >> number & 1:
        return DATA
    return ZEROES if bitmap >> (COUNT + number) & 1 else UNALLOCATED


def runs(
    table: L2Table, layout: Layout, first: int, count: int, low: int, high: int
) -> list[tuple[int, int, int, int]]:
    """(kind, position, bytes, host offset or compressed entry) of the bytes ``low`` to ``high`` of
    ``count`` clusters from entry ``first`` on; positions count from the first cluster's begin. Runs of data
    lie in a row in the host, and so do those that have a host cluster behind their zeroes."""
    entries, bitmaps = table.entries[first : first + count], table.bitmaps[first : first + count]
    size, shift = 1 << layout.bits, layout.bits - COUNT_BITS
    # a cluster that is all of one kind is one piece, any other one is 32
    whole = (bitmaps == 0) | (bitmaps == _ALL) | (bitmaps == _ALL_ZERO)
    pieces = np.where(whole, 1, COUNT)
    ends = np.cumsum(pieces)
    cluster = np.repeat(np.arange(count), pieces)
    number = np.arange(int(ends[-1])) - np.repeat(ends - pieces, pieces)
    position = (cluster << layout.bits) + (number << shift)
    sizes = np.where(whole[cluster], size, 1 << shift)
    inside = slice(np.searchsorted(position, low, "right") - 1, np.searchsorted(position, high))
    cluster, number, position, sizes = cluster[inside], number[inside], position[inside], sizes[inside]

    entry, bits = entries[cluster], bitmaps[cluster] >> number.astype(np.uint64)
    kinds = np.where(bits >> _HALF & _ONE != 0, ZEROES, UNALLOCATED)
    kinds[bits & _ONE != 0] = DATA
    kinds[entry & _COMPRESSED != 0] = PACKED
    places = ((entry & _OFFSET) + (number << shift).astype(np.uint64)).astype(np.int64)
    places[entry & np.uint64(layout.allocated) == 0] = 0
    edges = (kinds[1:] != kinds[:-1]) | (kinds[1:] == PACKED)
    placed = places != 0
    edges |= (placed[1:] != placed[:-1]) | placed[1:] & (places[1:] - places[:-1] != sizes[:-1])
    starts = [0, *(np.flatnonzero(edges) + 1).tolist()]
    stops = [*position[starts[1:]].tolist(), high]
    result = []
    for start, stop in zip(starts, stops, strict=True):
        begin = int(position[start])
        at, run_kind, place = max(low, begin), int(kinds[start]), int(places[start])
        if run_kind == PACKED:
            place = int(entry[start])
        elif place or (layout.external and run_kind == DATA):
            place += at - begin
        result.append((run_kind, at, stop - at, place))
    return result
