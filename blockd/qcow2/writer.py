"""Changing the content of a qcow2 image: writes, zeroes, discards, compressed clusters.

Order, so that a killed process leaves nothing worse than leaks, and loss of power neither:
a cluster's refcount (see refcounts.py), its data, the L2 entry; the cluster that it replaces is counted
down after the next flush. Where a new cluster takes over older data (from a backing file, a snapshot, a
compressed cluster), that data is made durable before the entry, since it may have been flushed once.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from blockd.qcow2 import backing
from blockd.qcow2.header import Autoclear
from blockd.qcow2.tables import (
    COMPRESSED,
    COPIED,
    DATA,
    OFFSET,
    PACKED,
    UNALLOCATED,
    ZERO,
    Entries,
    L2Table,
    Run,
)

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image

_ZEROES = memoryview(bytes(1 << 20))
#: bytes of clusters that are copied with one sync
SETTLED_AT_ONCE = 2 << 20
#: clusters that may wait for the client's flush before one is made
MOST_CONDEMNED = 8192
#: of these bits, only COPIED is set in the entry of a cluster that is written in place
_IN_PLACE = COPIED | COMPRESSED | ZERO


class Writer:
    """What changes an image; one per image."""

    def __init__(self, image: Qcow2Image) -> None:
        self._image = image
        self._bits = image.header.cluster_bits
        self._size = image.header.cluster_size
        self._table_bits = image.mapping.layout.l2_bits
        #: where the next compressed cluster may go: behind the last one, in its host cluster
        self._packed_at = 0
        #: the content of a cluster that is being copied
        self._content_numbers = np.empty(self._size // 8, np.uint64)
        self._content_bytes = memoryview(self._content_numbers).cast("B")  # type: ignore[arg-type]
        self._external = image.mapping.layout.external
        #: the external data file must always read as the disk does
        self._raw_data = bool(image.header.autoclear & Autoclear.RAW_DATA_FILE)

    # ---- data ------------------------------------------------------------------------------------
    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data``: it, and what points to it, is in the kernel afterwards."""
        if (offset & (self._size - 1)) + len(data) <= self._size and self._write_one(offset, data):
            return
        image = self._image
        with image.lock:
            in_place = self._allocating(offset, data)
            if not in_place:
                return
            epoch = image.enter()
        try:
            for host, low, high in in_place:
                image.data.write(host, data[low:high])
        finally:
            image.leave(epoch)

    def _allocating(self, offset: int, data: memoryview) -> list[tuple[int, int, int]]:
        """Write what needs new clusters; (host offset, begin, end) of the parts of ``data`` that have their
        places, and are not written yet. The lock is held."""
        bits, size, mapping = self._bits, self._size, self._image.mapping
        at, end = offset, offset + len(data)
        in_place: list[tuple[int, int, int]] = []
        while at < end:
            cluster = at >> bits
            first = cluster & ((1 << self._table_bits) - 1)
            count = min(((end - 1) >> bits) - cluster + 1, (1 << self._table_bits) - first)
            index = cluster >> self._table_bits
            base = (index << self._table_bits) << bits
            table = self._writable(index)
            for run in mapping.runs(table, first, count):
                start = max(offset, base + (run.first << bits))
                stop = min(end, base + ((run.first + run.clusters) << bits))
                if run.kind == DATA and run.entry & COPIED:
                    host = (run.entry & OFFSET) + (start & (size - 1))
                    in_place.append((host, start - offset, stop - offset))
                else:
                    part = data[start - offset : stop - offset]
                    self._allocate(index, table, run, start, part)
            at = base + ((first + count) << bits)
        return in_place

    def _write_one(self, offset: int, data: memoryview) -> bool:
        """The usual cases of a write within one cluster: it has its place, or takes the place of nothing.
        False, and nothing is done, for any other."""
        image = self._image
        cluster = offset >> self._bits
        at = cluster & ((1 << self._table_bits) - 1)
        inside = offset & (self._size - 1)
        lock = image.lock
        with lock:
            index = cluster >> self._table_bits
            table = image.mapping.own_table(index)
            if table is None:
                return False
            entry = table.view[at]
            if not entry and image.backing is None and not self._external:
                host_cluster, _ = image.refcounts.take(1)
                host = host_cluster << self._bits
                try:
                    image.host.write(host + inside, data)
                except OSError:
                    image.condemn(np.array([host_cluster]))
                    raise
                image.mapping.store_one(index, table, at, host | COPIED)
                return True
            if entry & _IN_PLACE != COPIED:
                return False
            epoch = image.enter()
        try:
            image.data.write((entry & OFFSET) + inside, data)
        finally:
            image.leave(epoch)
        return True

    def _writable(self, index: int) -> L2Table:
        table, replaced = self._image.mapping.writable_table(index)
        if replaced is not None:
            self._image.condemn(np.array([replaced], np.int64))
        return table

    def _allocate(self, index: int, table: L2Table, run: Run, offset: int, data: memoryview) -> None:
        """Give clusters of a run that cannot be written in place new ones, with ``data`` in them; it
        begins in the first of them and ends in the last."""
        if self._external:
            self._allocate_external(index, table, run, offset, data)
            return
        image, bits, size = self._image, self._bits, self._size
        end = offset + len(data)
        guest = ((index << self._table_bits) + run.first) << bits
        done = 0
        while done < run.clusters:
            host_cluster, count = image.refcounts.take(run.clusters - done)
            host = host_cluster << bits
            start, stop = guest + (done << bits), guest + ((done + count) << bits)
            low, high = max(start, offset), min(stop, end)
            old = table.entries[run.first + done : run.first + done + count].copy()
            try:
                before = self._background(start, low - start, int(old[0]), 0)
                behind = self._background(high, stop - high, int(old[-1]), high & (size - 1))
                whole = data[low - offset : high - offset]
                if before is None and behind is None:
                    image.host.write(host + (low - start), whole)
                else:
                    head = before if before is not None else bytes(low - start)
                    image.host.write(host, b"".join((head, whole, behind or b"")))
                    image.host.sync()
            except OSError:
                # nothing points there: it is free again, once it has been zeroed
                image.condemn(np.arange(host_cluster, host_cluster + count))
                raise
            if count == 1:
                image.mapping.store_one(index, table, run.first + done, host | COPIED)
            else:
                entries = (np.arange(count, dtype=np.uint64) << np.uint64(bits)) + np.uint64(host | COPIED)
                image.mapping.store(index, table, run.first + done, entries)
            self._condemn_entries(old)
            done += count

    def _allocate_external(self, index: int, table: L2Table, run: Run, offset: int, data: memoryview) -> None:
        """The same in the external data file: a cluster has its place there already, and anything may be
        in it."""
        image = self._image
        start = ((index << self._table_bits) + run.first) << self._bits
        stop = start + (run.clusters << self._bits)
        end = offset + len(data)
        last = run.first + run.clusters - 1
        before = self._background(start, offset - start, table.view[run.first], 0)
        behind = self._background(end, stop - end, table.view[last], end & (self._size - 1))
        head = before if before is not None else bytes(offset - start)
        tail = behind if behind is not None else bytes(stop - end)
        whole = b"".join((head, data, tail))
        image.data.write(start, whole[: image.size - start])
        if head or tail:
            image.data.sync()
        self._store_external(index, table, run)

    def _store_external(self, index: int, table: L2Table, run: Run) -> None:
        first = (index << self._table_bits) + run.first
        clusters = np.arange(first, first + run.clusters, dtype=np.uint64)
        entries = (clusters << np.uint64(self._bits)) | np.uint64(COPIED)
        self._image.mapping.store(index, table, run.first, entries)

    def _background(self, offset: int, length: int, entry: int, inside: int) -> bytes | None:
        """What lies at ``offset`` now, in the cluster of ``entry`` from ``inside``; None when it is all
        zeroes."""
        if not length:
            return None
        image = self._image
        kind = image.mapping.kind(entry)
        if kind == DATA:
            data = image.data.read((entry & OFFSET) + inside, length)
        elif kind == PACKED:
            data = image.unpack(entry)[inside : inside + length]
        elif kind == UNALLOCATED and image.backing is not None and offset < image.backing.size:
            buffer = bytearray(length)
            backing.read_below(image.backing, offset, memoryview(buffer))
            data = bytes(buffer)
        else:
            return None
        return data if np.frombuffer(data, np.uint8).any() else None

    def _content(self, offset: int, entry: int) -> memoryview | None:
        """What the cluster of ``entry``, at ``offset`` of the disk, holds, until the next call; None when
        that is zeroes."""
        image, view = self._image, self._content_bytes
        kind = image.mapping.kind(entry)
        if kind == DATA:
            image.data.read_into(entry & OFFSET, view)
        elif kind == PACKED:
            view[:] = image.unpack(entry)
        elif kind == UNALLOCATED and image.backing is not None:
            backing.read_below(image.backing, offset, view)
        else:
            return None
        return view if self._content_numbers.any() else None

    def _condemn_entries(self, old: Entries) -> None:
        if old.any():
            self._packed_at = 0  # its cluster may be among them
            self._image.condemn(self._image.mapping.layout.clusters_of(old))

    def settle(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Give each cluster that one of these (offset, bytes) is a part of a place of its own, with what it
        holds, so that it can be written in place. One sync serves all copies. False, and nothing is done,
        when the first one needs no such thing, or images like this one cannot have it. The lock is held."""
        image, bits, table_mask = self._image, self._bits, (1 << self._table_bits) - 1
        if self._external or not image.mapping.plain or image.condemned_count > MOST_CONDEMNED:
            return False
        most = max(1, SETTLED_AT_ONCE >> bits)
        clusters: dict[int, L2Table] = {}
        for offset, length in ranges:
            cluster = offset >> bits
            if length < self._size and (offset + length - 1) >> bits == cluster and cluster not in clusters:
                table = self._writable(cluster >> self._table_bits)
                if table.view[cluster & table_mask] & _IN_PLACE != COPIED:
                    clusters[cluster] = table
            if not clusters or len(clusters) == most:
                break
        if clusters:
            self._settle(clusters)
        return bool(clusters)

    def _settle(self, clusters: dict[int, L2Table]) -> None:
        """The same for guest clusters with their tables."""
        image, bits, table_mask = self._image, self._bits, (1 << self._table_bits) - 1
        old = [table.view[cluster & table_mask] for cluster, table in clusters.items()]
        hosts: list[int] = []
        try:
            while len(hosts) < len(clusters):
                first, count = image.refcounts.take(len(clusters) - len(hosts))
                hosts += range(first, first + count)
            copied = False
            if image.backing is not None:
                for cluster, entry in zip(clusters, old, strict=True):
                    start = cluster << bits
                    if not entry and start < image.backing.size:
                        image.backing.prefetch(start, min(self._size, image.backing.size - start))
            for host, cluster, entry in zip(hosts, clusters, old, strict=True):
                content = self._content(cluster << bits, entry)
                if content is not None:
                    image.host.write(host << bits, content)
                    copied = True
            if copied:
                image.host.sync()
        except OSError:
            image.condemn(np.array(sorted(hosts), np.int64))
            raise
        done = 0
        try:
            for host, (cluster, table) in zip(hosts, clusters.items(), strict=True):
                at = cluster & table_mask
                image.mapping.store_one(cluster >> self._table_bits, table, at, host << bits | COPIED)
                done += 1
        finally:
            self._condemn_entries(np.array(old[:done], np.uint64))
            # after a failed write nobody knows whether its cluster is pointed at: it is leaked
            image.condemn(np.array(sorted(hosts[done + 1 :]), np.int64))

    # ---- zeroes ----------------------------------------------------------------------------------
    def write_zeroes(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        """Make a range zero: whole clusters by their entries, where the version knows zero clusters or
        nothing lies below; the rest by writing."""
        image = self._image
        if self._raw_data:
            image.data.zero(offset, length)
            return
        low, high = self._whole(offset, length)
        if low >= high:
            self._zero_part(offset, length)
            return
        by_entry = image.header.version >= 3 or image.backing is None
        if not by_entry and fast:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._zero_part(offset, low - offset)
        if by_entry:
            self._clear(low, high, ZERO if image.header.version >= 3 else 0, keep=not unmap)
        else:
            self._zero_part(low, high - low)
        self._zero_part(high, offset + length - high)

    def trim(self, offset: int, length: int) -> None:
        """Give up whole clusters. They read as zeroes afterwards, not as the backing file; where that
        cannot be said, they stay."""
        image = self._image
        low, high = self._whole(offset, length)
        if low >= high:
            return
        if self._raw_data:
            image.data.zero(low, high - low)
            return
        if image.backing is None:
            self._clear(low, high, 0, keep=False)
        elif image.header.version >= 3:
            self._clear(low, high, ZERO, keep=False)

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """The whole clusters within a range; the last cluster of the disk may be less than one."""
        mask = self._size - 1
        end = offset + length
        low = (offset + mask) & ~mask
        high = end if end == self._image.size else end & ~mask
        return (low, high) if low < high else (offset, offset)

    def _zero_part(self, offset: int, length: int) -> None:
        """Write zeroes where something else is read."""
        while length:
            piece = min(length, len(_ZEROES))
            for kind, start, size, _ in list(self._image.map(offset, piece)):
                below = self._image.backing is not None and kind == UNALLOCATED
                if kind in (DATA, PACKED) or below:
                    self.write(start, _ZEROES[:size])
            offset += piece
            length -= piece

    def _clear(self, low: int, high: int, entry: int, keep: bool) -> None:
        """Set the entries of whole clusters to ``entry``; with ``keep``, clusters that are written in
        place stay allocated behind their zero flag."""
        image, bits, table_bits = self._image, self._bits, self._table_bits
        mapping = image.mapping
        cluster, last = low >> bits, (high - 1) >> bits
        while cluster <= last:
            index = cluster >> table_bits
            first = cluster & ((1 << table_bits) - 1)
            count = min(last - cluster + 1, (1 << table_bits) - first)
            with image.lock:
                if mapping.l1[index] & np.uint64(OFFSET) or image.backing is not None:
                    self._clear_table(index, first, count, entry, keep)
            cluster += count
            rest = mapping.l1[cluster >> table_bits : (last >> table_bits) + 1]
            if image.backing is None and not rest.any():
                return

    def _clear_table(self, index: int, first: int, count: int, entry: int, keep: bool) -> None:
        image, mapping = self._image, self._image.mapping
        table = mapping.table(index)
        if table is not None:
            entries = table.entries[first : first + count]
            if (entries == entry).all() or (image.backing is None and not entries.any()):
                return
        table = self._writable(index)
        old = table.entries[first : first + count].copy()
        new = np.full(count, entry, np.uint64)
        if keep and entry == ZERO:
            kept = (old & np.uint64(COPIED) != 0) & (old & np.uint64(COMPRESSED) == 0)
            new[kept] = old[kept] | np.uint64(ZERO)
            given_up = old[~kept]
        else:
            given_up = old
        if image.backing is None:
            new[old == 0] = 0
        mapping.store(index, table, first, new)
        self._condemn_entries(given_up)

    def preallocate(self, offset: int, length: int) -> None:
        """Allocate whatever is not allocated in a range, without writing data. Over a backing file the
        new clusters hide it, so that is for ranges that nothing lies below."""
        image, bits, mapping = self._image, self._bits, self._image.mapping
        cluster, last = offset >> bits, (offset + length - 1) >> bits
        while cluster <= last:
            index = cluster >> self._table_bits
            first = cluster & ((1 << self._table_bits) - 1)
            count = min(last - cluster + 1, (1 << self._table_bits) - first)
            with image.lock:
                table = self._writable(index)
                for run in mapping.runs(table, first, count):
                    if run.kind == UNALLOCATED:
                        self._place(index, table, run)
            cluster += count

    def _place(self, index: int, table: L2Table, run: Run) -> None:
        if self._external:
            start = ((index << self._table_bits) + run.first) << self._bits
            self._image.data.zero(start, run.clusters << self._bits)
            self._image.data.sync()
            self._store_external(index, table, run)
            return
        done = 0
        while done < run.clusters:
            host, count = self._image.refcounts.take(run.clusters - done)
            entries = (np.arange(host, host + count, dtype=np.uint64) << np.uint64(self._bits)) | np.uint64(
                COPIED
            )
            self._image.mapping.store(index, table, run.first + done, entries)
            done += count

    # ---- compressed clusters ---------------------------------------------------------------------
    def write_packed(self, offset: int, packed: Sequence[bytes]) -> None:
        """Store whole clusters, one behind the other, each compressed to fewer bytes than it has."""
        image = self._image
        if self._external:
            raise OSError(errno.ENOTSUP, f"{image.file}: has an external data file, so nothing is compressed")
        cluster, done, entries = offset >> self._bits, 0, 1 << self._table_bits
        with image.lock:
            while done < len(packed):
                at = (cluster + done) & (entries - 1)
                part = packed[done : done + entries - at]
                self._pack((cluster + done) >> self._table_bits, at, part)
                done += len(part)

    def _pack(self, index: int, at: int, packed: Sequence[bytes]) -> None:
        """The same within one L2 table, from its entry ``at`` on."""
        image = self._image
        try:
            places = self._rooms([len(data) for data in packed])
            first = 0
            for last in range(len(packed)):
                end = places[last] + len(packed[last])
                if last + 1 == len(packed) or places[last + 1] != end:
                    image.host.write(places[first], b"".join(packed[first : last + 1]))
                    first = last + 1
            image.host.sync()
        except OSError:
            self._packed_at = 0
            raise
        table = self._writable(index)
        shift = image.mapping.layout.packed_shift
        entries = [
            COMPRESSED | ((place & 511) + len(data) - 1) >> 9 << shift | place
            for place, data in zip(places, packed, strict=True)
        ]
        old = table.entries[at : at + len(packed)].copy()
        image.mapping.store(index, table, at, np.array(entries, np.uint64))
        self._condemn_entries(old)

    def _rooms(self, lengths: list[int]) -> list[int]:
        """Host offsets with room for so many bytes each, counted for: behind the last compressed cluster,
        or in a new host cluster. Neighbours share host clusters; sectors that the entry names are counted,
        too."""
        refcounts, bits, mask = self._image.refcounts, self._bits, self._size - 1
        at = self._packed_at
        uses = refcounts.get(at >> bits) if at & mask else 0  # of the host cluster that ``at`` is in
        shared: list[int] = []
        result = []
        for length in lengths:
            cluster = at >> bits
            last = ((at + length - 1) | 511) >> bits
            if at & mask and uses < refcounts.maximum and (
                last == cluster or refcounts.take_adjacent(cluster + 1)
            ):
                shared.append(cluster)
                uses = uses + 1 if last == cluster else 1
            else:
                cluster, _ = refcounts.take(1)
                at, uses = cluster << bits, 1
            result.append(at)
            at += length
        if shared:
            refcounts.change(np.array(sorted(shared)), 1)
        self._packed_at = at if at & mask else 0
        return result
