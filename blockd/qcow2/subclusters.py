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

_ALL, _HALF = np.uint64(ALL), np.uint64(COUNT)
_COMPRESSED, _OFFSET = np.uint64(COMPRESSED), np.uint64(OFFSET)
_NUMBERS = np.arange(COUNT, dtype=np.uint64)


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
    entries = table.entries[first : first + count, None]
    bitmaps = table.bitmaps[first : first + count, None]
    shift = layout.bits - COUNT_BITS
    found = np.where(bitmaps >> (_NUMBERS + _HALF) & np.uint64(1) != 0, ZEROES, UNALLOCATED).astype(np.int8)
    found[bitmaps >> _NUMBERS & np.uint64(1) != 0] = DATA
    found[np.broadcast_to(entries & _COMPRESSED != 0, found.shape)] = PACKED
    has_host = entries & np.uint64(layout.allocated) != 0
    places = np.where(has_host, (entries & _OFFSET) + (_NUMBERS << np.uint64(shift)), np.uint64(0))
    kinds = found.reshape(-1)
    where = places.reshape(-1)
    begin, end = low >> shift, -(-high >> shift)
    kinds, where = kinds[begin:end], where[begin:end]
    edges = kinds[1:] != kinds[:-1]
    step = np.where(where[1:] != 0, np.uint64(1 << shift), np.uint64(0))
    edges |= (kinds[1:] != PACKED) & (where[1:] - where[:-1] != step)
    edges[COUNT - 1 - begin % COUNT :: COUNT] |= kinds[1:][COUNT - 1 - begin % COUNT :: COUNT] == PACKED
    starts = [0, *(np.flatnonzero(edges) + 1).tolist(), end - begin]
    result = []
    for start, stop in zip(starts, starts[1:], strict=False):
        at = max(low, (begin + start) << shift)
        size = min(high, (begin + stop) << shift) - at
        run_kind = int(kinds[start])
        if run_kind == PACKED:
            place = int(table.view[first + (at >> layout.bits)])
        else:
            place = int(where[start])
            if place or (layout.external and run_kind == DATA):
                place += at - ((begin + start) << shift)
        result.append((run_kind, at, size, place))
    return result
