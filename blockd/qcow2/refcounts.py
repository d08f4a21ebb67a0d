"""Reference counts of host clusters, and the clusters that are handed out.

Source: "Qcow2 Image File Format", section "Host cluster management".

How allocation survives a crash. Clusters are *reserved* in batches: zeroed, the file made long enough,
their refcounts set to 1, and all of that made durable by one fdatasync. Only then are they handed out
one by one. So whatever points to a cluster is always younger than its refcount, on the disk too, and
an unwritten part of a new cluster reads as zeroes after any crash. What a crash leaves reserved is
leaked, never corrupt. Clusters that are given back are counted down only after the flush that made
the table entry durable which no longer points to them.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections import OrderedDict, deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from blockd.hostfile import HostFile
from blockd.qcow2.header import MAX_REFCOUNT_TABLE, Header, write_tables

Clusters = npt.NDArray[np.int64]
Counts = npt.NDArray[np.unsignedinteger]

#: type of a decoded block's entries, by refcount_order
_DECODED: tuple[np.dtype[np.unsignedinteger], ...] = (
    *(np.dtype(np.uint8),) * 4,
    np.dtype(np.uint16),
    np.dtype(np.uint32),
    np.dtype(np.uint64),
)
#: bytes of decoded blocks kept
CACHE_BYTES = 8 << 20
#: a batch begins small, so that a small image stays small, and doubles while more is asked for
FIRST_BATCH, LARGEST_BATCH = 16, 1024
LARGEST_BATCH_BYTES = 64 << 20
#: a cluster's offset must stay below 64 PB ("Cluster mapping")
MAX_OFFSET = 1 << 56


def decode(raw: bytes, order: int) -> Counts:
    """Entries of a refcount block. Below a byte, bit 0 is the least significant one."""
    if order >= 3:
        return np.frombuffer(raw, f">u{1 << (order - 3)}").astype(_DECODED[order])
    packed = np.frombuffer(raw, np.uint8)
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8).reshape(-1)


def encode(values: Counts, order: int) -> bytes:
    """The reverse of ``decode``; below a byte, ``values`` fill whole bytes."""
    if order >= 3:
        return values.astype(f">u{1 << (order - 3)}").tobytes()
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    rows = values.astype(np.uint8).reshape(-1, 8 // bits)
    return np.bitwise_or.reduce(rows << shifts, axis=1).astype(np.uint8).tobytes()


def runs_of(clusters: Clusters) -> list[tuple[int, int]]:
    """(first, count) of each unbroken run in sorted cluster numbers."""
    if not len(clusters):
        return []
    edges = np.flatnonzero(np.diff(clusters) != 1) + 1
    firsts = np.concatenate(([0], edges))
    counts = np.diff(np.concatenate((firsts, [len(clusters)])))
    return list(zip(clusters[firsts].tolist(), counts.tolist(), strict=True))


class Refcounts:
    """The refcount table and blocks of an open image. Callers hold the image's lock."""

    def __init__(self, file: HostFile, header: Header) -> None:
        self._file = file
        self._header = header
        self.bits = header.cluster_bits
        self.order = header.refcount_order
        self.per_block = (header.cluster_size * 8) >> self.order
        self.maximum = (1 << (1 << self.order)) - 1
        self._cache: OrderedDict[int, Counts] = OrderedDict()
        self._cached_blocks = max(2, CACHE_BYTES // (self.per_block * _DECODED[self.order].itemsize))
        self._reserved: deque[tuple[int, int]] = deque()
        self._batch = FIRST_BATCH
        #: (first, count) -> do any of these clusters hold the header or a table?
        self.holds_table: Callable[[int, int], bool] = lambda first, count: False
        #: no cluster below is free, as far as is known
        self._search_from = 0
        self.reload()

    def reload(self) -> None:
        """Read the table again: it has been replaced."""
        length = self._header.refcount_table_clusters << self.bits
        raw = self._file.read(self._header.refcount_table_offset, length)
        self.table = np.frombuffer(raw, ">u8").astype(np.uint64)
        self._cache.clear()
        self._search_from = 0

    # ---- reading ---------------------------------------------------------------------------------
    def block_offset(self, index: int) -> int:
        """Where a refcount block lies; 0 when there is none. EIO for what cannot be an offset."""
        if index >= len(self.table):
            return 0
        offset = int(self.table[index])
        if offset & (self._header.cluster_size - 1) or offset >= MAX_OFFSET:
            raise OSError(errno.EIO, f"{self._file.file}: refcount block offset {offset:#x} is not possible")
        return offset

    def block(self, index: int) -> Counts | None:
        """The counts of a block, or None where there is none; to be changed by ``_store`` only."""
        found = self._cache.get(index)
        if found is not None:
            self._cache.move_to_end(index)
            return found
        offset = self.block_offset(index)
        if not offset:
            return None
        values = decode(self._file.read(offset, self._header.cluster_size), self.order)
        self._keep(index, values)
        return values

    def _keep(self, index: int, values: Counts) -> None:
        self._cache[index] = values
        if len(self._cache) > self._cached_blocks:
            self._cache.popitem(last=False)

    def get(self, cluster: int) -> int:
        values = self.block(cluster // self.per_block)
        return 0 if values is None else int(values[cluster % self.per_block])

    def all(self, clusters: int) -> npt.NDArray[np.uint64]:
        """The counts of the first ``clusters`` clusters."""
        result = np.zeros(clusters, np.uint64)
        for index in range(-(-clusters // self.per_block)):
            values = self.block(index)
            if values is not None:
                part = result[index * self.per_block : (index + 1) * self.per_block]
                part[:] = values[: len(part)]
        return result

    # ---- changing --------------------------------------------------------------------------------
    def change(self, clusters: Clusters, delta: int) -> Clusters:
        """Add ``delta`` to the counts of clusters (sorted; one that is named twice counts twice), and
        write them to the kernel. Returns those that became free.

        OSError when a count would leave its range: EIO below zero, for then the image is damaged, and
        EOVERFLOW above. A failed write leaves unknown what is on the disk, so that is read again.
        """
        freed = []
        blocks = clusters // self.per_block
        for index in np.unique(blocks).tolist():
            inside, times = np.unique(clusters[blocks == index] % self.per_block, return_counts=True)
            values = self.block(index)
            if values is None:
                if delta < 0:
                    raise OSError(errno.EIO, f"{self._file.file}: cluster has no refcount; check the image")
                values = self._add_block(index)
            low, high = int(inside[0]), int(inside[-1]) + 1
            new = values[inside].astype(np.int64) + delta * times
            if (new < 0).any():
                raise OSError(errno.EIO, f"{self._file.file}: refcount would fall below 0; check the image")
            if self.order < 6 and (new > self.maximum).any():
                raise OSError(errno.EOVERFLOW, f"{self._file.file}: refcount would exceed {self.maximum}")
            changed = values.copy()
            changed[inside] = new.astype(values.dtype)
            self._store(index, changed, low, high)
            freed.append(inside[new == 0] + index * self.per_block)
        result = np.concatenate(freed) if freed else np.zeros(0, np.int64)
        if delta < 0 and len(result):
            self._search_from = min(self._search_from, int(result[0]))
        return result

    def _store(self, index: int, values: Counts, low: int, high: int) -> None:
        """Write the entries from ``low`` to ``high`` of a block."""
        if self.order < 3:
            per_byte = 8 >> self.order
            low -= low % per_byte
            high += -high % per_byte
        at = self.block_offset(index) + ((low << self.order) >> 3)
        try:
            self._file.write(at, encode(values[low:high], self.order))
        except OSError:
            self._cache.pop(index, None)
            raise
        self._keep(index, values)

    # ---- handing out -----------------------------------------------------------------------------
    def take(self, wanted: int) -> tuple[int, int]:
        """(first, count) of up to ``wanted`` neighbouring clusters: refcount 1 and zeroes, durably."""
        if not self._reserved:
            self._reserve(max(self._batch, min(wanted, LARGEST_BATCH)))
            limit = max(FIRST_BATCH, min(LARGEST_BATCH, LARGEST_BATCH_BYTES >> self.bits))
            self._batch = min(self._batch * 2, limit)
        first, count = self._reserved.popleft()
        if count > wanted:
            self._reserved.appendleft((first + wanted, count - wanted))
            count = wanted
        return first, count

    def take_adjacent(self, cluster: int) -> bool:
        """Take exactly this cluster, if it is the next one reserved."""
        if not self._reserved or self._reserved[0][0] != cluster:
            return False
        self.take(1)
        return True

    def give_back_reserved(self) -> None:
        """Free what was reserved and not handed out, and shorten the file by it."""
        spans = sorted(self._reserved)
        self._reserved.clear()
        self._batch = FIRST_BATCH
        if not spans:
            return
        self.change(np.concatenate([np.arange(first, first + count) for first, count in spans]), -1)
        end = -(-self._file.size() >> self.bits) if self._file.size() else 0
        for first, count in reversed(spans):
            if first + count != end:
                break
            end = first
            self._file.resize(end << self.bits)

    def _reserve(self, wanted: int) -> None:
        clusters = self._find_free(wanted)
        runs = runs_of(clusters)
        self._prepare(runs)
        self.change(clusters, 1)
        self._file.sync()
        self._reserved.extend(runs)
        self._search_from = int(clusters[-1]) + 1

    def _prepare(self, runs: list[tuple[int, int]]) -> None:
        """Zeroes where there may be something else, and a file that is long enough. EIO when refcounts say
        that a table is free."""
        size = self._file.size()
        for first, count in runs:
            if self.holds_table(first, count):
                raise OSError(errno.EIO, f"{self._file.file}: refcounts are wrong; check the image")
        for first, count in runs:
            if first << self.bits < size:
                self._file.zero(first << self.bits, count << self.bits)
        end = (runs[-1][0] + runs[-1][1]) << self.bits
        if end > size:
            self._file.resize(end)

    def _find_free(self, wanted: int) -> Clusters:
        """Free clusters, at least one and all in the range of one refcount block, which is made where it
        is missing."""
        for index in itertools.count(self._search_from // self.per_block):
            values = self.block(index)
            if values is None:
                values = self._add_block(index)
            start = (
                self._search_from - index * self.per_block
                if index * self.per_block < self._search_from
                else 0
            )
            free = np.flatnonzero(values[start:] == 0)[:wanted]
            if len(free):
                return free + (index * self.per_block + start)
        raise AssertionError("a refcount block without end")

    # ---- blocks and the table --------------------------------------------------------------------
    def _add_block(self, index: int) -> Counts:
        """A refcount block where there is none. It lies in the first cluster that it counts itself,
        which is free, as everything is that has no refcount block."""
        if index >= len(self.table):
            self._grow_table(index)
            found = self.block(index)
            if found is not None:
                return found
        own = index * self.per_block
        if own << self.bits >= MAX_OFFSET:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        values = np.zeros(self.per_block, _DECODED[self.order])
        values[0] = 1
        self._prepare([(own, 1)])
        self._file.write(own << self.bits, encode(values, self.order))
        self._file.sync()
        at = self._header.refcount_table_offset + 8 * index
        self._file.write(at, (own << self.bits).to_bytes(8, "big"))
        self._file.sync()
        self.table[index] = own << self.bits
        self._keep(index, values)
        return values

    def _grow_table(self, index: int) -> None:
        """A larger refcount table, behind everything, with the blocks that count it and themselves."""
        size, order = self._header.cluster_size, self.order
        start = max(index * self.per_block, -(-self._file.size() // size))
        entries = len(self.table)
        blocks: list[int] = []
        table_clusters = 0
        while True:
            last = start + table_clusters + len(blocks)
            needed = list(range(start // self.per_block, last // self.per_block + 1))
            entries_wanted = max(needed[-1] + 1, entries + entries // 2 + 1)
            clusters = -(-entries_wanted * 8 // size)
            if len(needed) == len(blocks) and clusters == table_clusters:
                break
            blocks, table_clusters = needed, clusters
        if table_clusters * size > max(MAX_REFCOUNT_TABLE, size):
            raise OSError(errno.EFBIG, f"{self._file.file}: the refcount table cannot grow further")
        table = np.zeros(table_clusters * size // 8, np.uint64)
        table[:entries] = self.table
        self._file.resize((start + table_clusters + len(blocks)) * size)
        for number, block_index in enumerate(blocks):
            counts = np.zeros(self.per_block, _DECODED[order])
            low, high = start - block_index * self.per_block, start + table_clusters + len(blocks)
            counts[max(low, 0) : max(high - block_index * self.per_block, 0)] = 1
            offset = (start + table_clusters + number) * size
            table[block_index] = offset
            self._file.write(offset, encode(counts, order))
        self._file.write(start * size, table.astype(">u8").tobytes())
        self._file.sync()
        old = self._header.refcount_table_offset // size
        old_clusters = self._header.refcount_table_clusters
        try:
            write_tables(
                self._file,
                self._header,
                refcount_table_offset=start * size,
                refcount_table_clusters=table_clusters,
            )
        except OSError:
            self.reload()
            raise
        self.table = table
        self.change(np.arange(old, old + old_clusters), -1)
