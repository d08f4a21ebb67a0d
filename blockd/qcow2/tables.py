"""From guest clusters to host clusters: the L1 table, L2 tables and their bounded cache.

Source: "Qcow2 Image File Format", section "Cluster mapping".

Tables are written through: an entry is in the kernel before it is in the cache, and when a write
fails the table is read again, for nobody knows what it left. So the cache may be dropped at any time.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blockd._batch import ffi
from blockd.hostfile import HostFile
from blockd.qcow2.header import Header, Incompatible
from blockd.qcow2.refcounts import Clusters, Refcounts

Entries = npt.NDArray[np.uint64]

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET = 0x00FFFFFFFFFFFE00  # bits 9 to 55
#: bits that must be 0 in an L1 entry and in the entry of a standard cluster
L1_RESERVED = ~(COPIED | OFFSET) & (1 << 64) - 1
L2_RESERVED = ~(COPIED | OFFSET | ZERO) & (1 << 64) - 1

#: kinds of clusters
UNALLOCATED, ZEROES, DATA, PACKED = range(4)

#: bytes of L2 tables kept: enough for 256 GiB of 64 KiB clusters
CACHE_BYTES = 32 << 20

_COPIED, _COMPRESSED, _ZERO = np.uint64(COPIED), np.uint64(COMPRESSED), np.uint64(ZERO)
_OFFSET = np.uint64(OFFSET)


class Run(NamedTuple):
    """Guest clusters of one kind in a row; those of data lie in a row in the host, too."""

    kind: int
    first: int
    clusters: int
    #: the first one's entry
    entry: int


def _any_in(ordered: Entries, others: Entries) -> bool:
    """Is any of ``others`` among ``ordered``, which is not empty?"""
    at = np.searchsorted(ordered, others)
    at[at == len(ordered)] = 0
    return bool((ordered[at] == others).any())


class L2Table:
    """One L2 table in memory: as an array, and as a view of it that is quick for single entries. Extended
    entries have a bitmap each: see subclusters.py."""

    __slots__ = ("bitmap_view", "bitmaps", "entries", "offset", "view")

    def __init__(self, offset: int, entries: Entries, bitmaps: Entries | None = None) -> None:
        self.offset = offset
        self.entries = entries
        self.view = memoryview(entries)  # type: ignore[arg-type]
        #: empty where entries are not extended
        self.bitmaps: Entries = np.zeros(0, np.uint64) if bitmaps is None else bitmaps
        self.bitmap_view = memoryview(self.bitmaps)  # type: ignore[arg-type]

    def encode(self) -> bytes:
        """As it is on the disk."""
        return encode(self.entries, self.bitmaps if len(self.bitmaps) else None)


def encode(entries: Entries, bitmaps: Entries | None = None) -> bytes:
    """Entries as they are on the disk: each followed by its bitmap where they are extended."""
    if bitmaps is None:
        return entries.astype(">u8").tobytes()
    both = np.empty(2 * len(entries), ">u8")
    both[::2], both[1::2] = entries, bitmaps
    return both.tobytes()


def kinds(entries: Entries, layout: Layout) -> npt.NDArray[np.int8]:
    """The kind of each entry."""
    result = np.where(entries & np.uint64(layout.allocated) != 0, DATA, UNALLOCATED).astype(np.int8)
    if layout.version >= 3:
        result[entries & _ZERO != 0] = ZEROES
    result[entries & _COMPRESSED != 0] = PACKED
    return result


class Layout:
    """Widths that follow from the cluster size."""

    def __init__(self, header: Header) -> None:
        self.bits = header.cluster_bits
        self.size = header.cluster_size
        self.version = header.version
        self.extended = header.extended
        self.l2_bits = header.l2_bits
        self.l2_entries = 1 << self.l2_bits
        #: bits that must be 0 in the entry of a standard cluster
        self.l2_reserved = np.uint64(L2_RESERVED | ZERO if self.extended else L2_RESERVED)
        # "Compressed Clusters Descriptor"
        self.packed_shift = 62 - (header.cluster_bits - 8)
        self.packed_offset_mask = (1 << self.packed_shift) - 1
        self.packed_sectors_mask = (1 << (header.cluster_bits - 8)) - 1
        #: guest clusters lie in a file of their own, each at its own offset, without refcounts
        self.external = bool(header.incompatible & Incompatible.DATA_FILE)
        #: any of these bits makes a standard cluster an allocated one
        self.allocated = OFFSET | COPIED if self.external else OFFSET

    def decode(self, offset: int, raw: bytes) -> L2Table:
        """The L2 table at ``offset`` from its bytes."""
        numbers = np.frombuffer(raw, ">u8").astype(np.uint64)
        if not self.extended:
            return L2Table(offset, numbers)
        return L2Table(offset, numbers[::2].copy(), numbers[1::2].copy())

    def empty(self, offset: int) -> L2Table:
        """An L2 table with nothing in it."""
        return self.decode(offset, bytes(self.size))

    def packed(self, entry: int) -> tuple[int, int]:
        """(host offset, bytes that may belong to it) of a compressed cluster."""
        offset = entry & self.packed_offset_mask
        sectors = (entry >> self.packed_shift & self.packed_sectors_mask) + 1
        return offset, sectors * 512 - (offset & 511)

    def packed_clusters(self, entries: Entries) -> Clusters:
        """The host clusters that compressed clusters lie in, one named once for each."""
        offsets = (entries & np.uint64(self.packed_offset_mask)).astype(np.int64)
        sectors = (entries >> np.uint64(self.packed_shift) & np.uint64(self.packed_sectors_mask)).astype(
            np.int64
        )
        first = offsets >> self.bits
        last = ((offsets & ~511) + (sectors + 1) * 512 - 1) >> self.bits
        return np.concatenate((first, last[last != first]))

    def clusters_of(self, entries: Entries) -> Clusters:
        """The host clusters, sorted, that entries of an L2 table count for, as often as they do."""
        packed = entries & _COMPRESSED != 0
        standard = entries[~packed] & _OFFSET
        result = self.packed_clusters(entries[packed])
        if not self.external:
            used = (standard[standard != 0] >> np.uint64(self.bits)).astype(np.int64)
            result = np.concatenate((result, used))
        result.sort()
        return result


class Mapping:
    """The active tables of an open image. Callers hold the image's lock."""

    def __init__(self, file: HostFile, header: Header, refcounts: Refcounts) -> None:
        self._file = file
        self._header = header
        self._refcounts = refcounts
        self.layout = Layout(header)
        self._cache: OrderedDict[int, L2Table] = OrderedDict()
        self._cached_tables = max(4, CACHE_BYTES >> header.cluster_bits)
        refcounts.holds_table = self.holds_table
        #: no entries but those that C knows: see batch.h
        self.plain = not header.incompatible & Incompatible.EXTENDED_L2
        #: struct batch_tables: what is in memory, for C
        self.in_memory: Any = ffi.new("struct batch_tables *")
        self.in_memory.allocated = self.layout.allocated
        self.in_memory.cluster_bits, self.in_memory.table_bits = self.layout.bits, self.layout.l2_bits
        self.in_memory.zero_flag = self.layout.version >= 3
        self.reload()

    def reload(self) -> None:
        """Read the L1 table again: it has been replaced."""
        raw = self._file.read(self._header.l1_table_offset, 8 * self._header.l1_size)
        self.l1: Entries = np.frombuffer(raw, ">u8").astype(np.uint64)
        #: the same, quicker for single entries
        self.l1_view = memoryview(self.l1)  # type: ignore[arg-type]
        self._cache.clear()
        #: by L1 index: the address of a cached table's entries, else 0
        self._addresses = np.zeros(len(self.l1), np.uint64)
        self.in_memory.l1 = ffi.cast("uint64_t *", self.l1.ctypes.data)
        self.in_memory.l1_size = len(self.l1)
        self.in_memory.tables = ffi.cast("uint64_t *", self._addresses.ctypes.data)

    # ---- reading ---------------------------------------------------------------------------------
    def table(self, index: int) -> L2Table | None:
        """The L2 table of an L1 entry, or None where there is none; EIO where it cannot be one."""
        found = self._cache.get(index)
        if found is not None:
            self._cache.move_to_end(index)
            return found
        entry = self.l1_view[index]
        offset = entry & OFFSET
        if not offset:
            return None
        if (
            entry & L1_RESERVED
            or offset & (self.layout.size - 1)
            or offset >= self._file.size()
            or self._points_at_tables(np.array([offset], np.uint64))
        ):
            raise self._damaged(f"L1 entry {index} ({entry:#018x}) is not possible")
        table = self.layout.decode(offset, self._file.read(offset, self.layout.size))
        self._check(index, table)
        self._keep(index, table)
        return table

    def _keep(self, index: int, table: L2Table) -> None:
        self._cache[index] = table
        self._addresses[index] = table.entries.ctypes.data
        if len(self._cache) > self._cached_tables:
            self._addresses[self._cache.popitem(last=False)[0]] = 0

    def _forget(self, index: int) -> None:
        self._cache.pop(index, None)
        self._addresses[index] = 0

    def _check(self, index: int, table: L2Table) -> None:
        """Nothing in a table may point into metadata: a write there would destroy the image."""
        entries = table.entries
        if self.layout.external:
            self._check_external(index, entries)
            return
        standard = entries[entries & _COMPRESSED == 0]
        offsets = standard & _OFFSET
        bad = (offsets & np.uint64(self.layout.size - 1) != 0) | (standard & self.layout.l2_reserved != 0)
        if self.layout.version < 3:
            bad |= standard & _ZERO != 0
        bad |= (offsets == 0) & (standard & _COPIED != 0)
        if not self._file.read_only:
            used = np.unique(offsets[offsets != 0])
            tables = self.l1 & _OFFSET
            if len(used) and (_any_in(used, tables) or self._points_at_tables(used)):
                raise self._damaged(f"L2 table {index} points at metadata")
            # a write there would make the file as large as the entry says
            if len(used) and used[-1] > np.uint64(self._file.size() + self.layout.size):
                raise self._damaged(f"L2 table {index} points behind the end of the file")
        if bad.any():
            raise self._damaged(f"L2 table {index} has the impossible entry {int(standard[bad][0]):#018x}")

    def _check_external(self, index: int, entries: Entries) -> None:
        """ "The offset must match the guest offset", and nothing is compressed."""
        guest = np.arange(index << self.layout.l2_bits, (index + 1) << self.layout.l2_bits, dtype=np.uint64)
        allocated = entries & np.uint64(OFFSET | COPIED) != 0
        wrong = allocated & ((entries & _OFFSET) != guest << np.uint64(self.layout.bits))
        bad = wrong | (entries & _COMPRESSED != 0) | (entries & self.layout.l2_reserved != 0)
        if bad.any():
            raise self._damaged(f"L2 table {index} has the impossible entry {int(entries[bad][0]):#018x}")

    def _points_at_tables(self, used: Entries) -> bool:
        header, size = self._header, self.layout.size
        areas = (
            (header.l1_table_offset, header.l1_size * 8),
            (header.refcount_table_offset, header.refcount_table_clusters * size),
        )
        for start, length in areas:
            inside = (used >= np.uint64(start)) & (used < np.uint64(start + length))
            if inside.any():
                return True
        blocks = self._refcounts.table
        return _any_in(used, blocks[blocks != 0])

    def holds_table(self, first: int, count: int) -> bool:
        """Does any of these host clusters hold the header or a table that is in use?"""
        start, end = np.uint64(first << self.layout.bits), np.uint64((first + count) << self.layout.bits)
        tables = self.l1 & _OFFSET
        offsets = np.arange(start, end, self.layout.size, dtype=np.uint64)
        inside = (tables >= start) & (tables < end) & (tables != 0)
        return not first or bool(inside.any()) or self._points_at_tables(offsets)

    def runs(self, table: L2Table, first: int, count: int) -> list[Run]:
        """What entries ``first`` to ``first + count`` mean."""
        entries = table.entries[first : first + count]
        if count == 1:
            entry = table.view[first]
            return [Run(self.kind(entry), first, 1, entry)]
        found = kinds(entries, self.layout)
        edges = found[1:] != found[:-1]
        both_data = (found[1:] == DATA) & ~edges
        if both_data.any():
            offsets = entries & (_OFFSET | _COPIED)
            edges |= both_data & (offsets[1:] - offsets[:-1] != np.uint64(self.layout.size))
        edges |= found[1:] == PACKED
        starts = [0, *(np.flatnonzero(edges) + 1).tolist(), count]
        return [
            Run(int(found[at]), first + at, end - at, int(entries[at]))
            for at, end in zip(starts, starts[1:], strict=False)
        ]

    def kind(self, entry: int) -> int:
        if entry & COMPRESSED:
            return PACKED
        if entry & ZERO and self.layout.version >= 3:
            return ZEROES
        return DATA if entry & self.layout.allocated else UNALLOCATED

    def own_table(self, index: int) -> L2Table | None:
        """The L2 table of an L1 entry when it is at hand and the active L1 table's alone."""
        table = self._cache.get(index)
        return table if table is not None and self.l1_view[index] & COPIED else None

    # ---- changing --------------------------------------------------------------------------------
    def writable_table(self, index: int) -> tuple[L2Table, int | None]:
        """The L2 table of an L1 entry, made or copied where it does not belong to the active L1 table
        alone; and the cluster of the one that it replaces."""
        entry = self.l1_view[index]
        old = self.table(index)
        if old is not None and entry & COPIED:
            return old, None
        cluster, _ = self._refcounts.take(1)
        offset = cluster << self.layout.bits
        table = self.layout.empty(offset)
        if old is not None:
            table.entries[:] = old.entries & ~_COPIED
            table.bitmaps[:] = old.bitmaps
            self._file.write(offset, table.encode())
            self._file.sync()
        at = self._header.l1_table_offset + 8 * index
        try:
            self._file.write(at, (offset | COPIED).to_bytes(8, "big"))
        except OSError:
            self._forget(index)
            self.l1[index] = int.from_bytes(self._file.read(at, 8), "big")
            raise
        self.l1[index] = offset | COPIED
        self._keep(index, table)
        return table, None if old is None else old.offset >> self.layout.bits

    def store(self, index: int, table: L2Table, first: int, entries: Entries) -> None:
        """Write entries from ``first`` on; the table must be ``writable_table``'s."""
        try:
            self._file.write(table.offset + 8 * first, entries.astype(">u8").tobytes())
        except OSError:
            self._forget(index)
            raise
        table.entries[first : first + len(entries)] = entries

    def store_one(self, index: int, table: L2Table, at: int, entry: int) -> None:
        """The same for one entry."""
        try:
            self._file.write(table.offset + 8 * at, entry.to_bytes(8, "big"))
        except OSError:
            self._forget(index)
            raise
        table.view[at] = entry

    def _damaged(self, what: str) -> OSError:
        return OSError(errno.EIO, f"{self._file.file}: {what}; check the image")
