"""Images with extended L2 entries: their tables, and writing by subclusters.

Source: "Qcow2 Image File Format", section "Extended L2 Entries"; the bitmaps are in subclusters.py.

The orders of writer.py hold for subclusters too. An entry and its bitmap are 16 bytes at a multiple of 16,
so they lie in one sector, and are always written together by one call: a sector that is written whole or
not at all never shows one without the other, whichever of several writes are lost.

A subcluster that becomes allocated inside a host cluster that is there already may find old bytes there
(of before it was zeroed, or of another program). Then it is filled whole, and made durable before its
bit is set. That is not needed where this process has taken the cluster, zeroed as all are, and has not
written there since: ``untouched`` remembers that for the last clusters.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from blockd.qcow2 import backing, subclusters
from blockd.qcow2.header import Autoclear
from blockd.qcow2.subclusters import ALL, ALL_ZERO, COUNT, COUNT_BITS, runs_of_bits, span
from blockd.qcow2.tables import (
    COMPRESSED,
    COPIED,
    OFFSET,
    PACKED,
    UNALLOCATED,
    Entries,
    L2Table,
    Mapping,
    Run,
    encode,
)
from blockd.qcow2.writer import Writer

if TYPE_CHECKING:
    from blockd.qcow2.image import Piece, Qcow2Image

#: host clusters of which is remembered what has not been written yet
MOST_UNTOUCHED = 4096
_COPIED, _COMPRESSED = np.uint64(COPIED), np.uint64(COMPRESSED)
_ALL, _ALL_ZERO = np.uint64(ALL), np.uint64(ALL_ZERO)


class ExtendedMapping(Mapping):
    """The active tables of an image with extended L2 entries."""

    def reload(self) -> None:
        super().reload()
        #: host cluster -> subclusters that are zero on the disk, since nothing has been written there
        self.untouched: OrderedDict[int, int] = OrderedDict()

    def remember(self, cluster: int, untouched: int) -> None:
        self.untouched[cluster] = untouched
        if len(self.untouched) > MOST_UNTOUCHED:
            self.untouched.popitem(last=False)

    def locate(self, offset: int, length: int) -> list[Piece]:
        """Where a range lies; the lock is held."""
        layout = self.layout
        bits, l2_bits = layout.bits, layout.l2_bits
        shift = bits - COUNT_BITS
        inside = offset & ((1 << shift) - 1)
        if inside + length <= 1 << shift:
            cluster = offset >> bits
            table = self.table(cluster >> l2_bits)
            if table is None:
                return [(UNALLOCATED, 0, length, 0)]
            at = cluster & ((1 << l2_bits) - 1)
            entry = table.view[at]
            number = offset >> shift & (COUNT - 1)
            kind = subclusters.kind(entry, table.bitmap_view[at], number)
            if kind != PACKED and entry & layout.allocated:
                entry = (entry & OFFSET) + (number << shift) + inside
            return [(kind, 0, length, entry)]
        pieces: list[Piece] = []
        at, end = offset, offset + length
        while at < end:
            index = at >> (bits + l2_bits)
            base = index << (bits + l2_bits)
            stop = min(end, base + (1 << (bits + l2_bits)))
            table = self.table(index)
            if table is None:
                pieces.append((UNALLOCATED, at - offset, stop - at, 0))
            else:
                first = (at - base) >> bits
                start = base + (first << bits)
                count = ((stop - 1) >> bits) - (start >> bits) + 1
                for kind, position, size, place in subclusters.runs(
                    table, layout, first, count, at - start, stop - start
                ):
                    pieces.append((kind, start + position - offset, size, place))
            at = stop
        return pieces

    def _check(self, index: int, table: L2Table) -> None:
        super()._check(index, table)
        bad = subclusters.impossible_bitmaps(table, self.layout)
        if bad.any():
            bitmap = int(table.bitmaps[bad][0])
            raise self._damaged(f"L2 table {index} has the impossible subcluster bitmap {bitmap:#018x}")

    def store(
        self, index: int, table: L2Table, first: int, entries: Entries, bitmaps: Entries | None = None
    ) -> None:
        """Write entries and their bitmaps; without those, standard clusters are allocated whole."""
        if bitmaps is None:
            standard = (entries & _COMPRESSED == 0) & (entries & np.uint64(self.layout.allocated) != 0)
            bitmaps = np.where(standard, _ALL, np.uint64(0))
        self._write(index, table.offset + 16 * first, encode(entries, bitmaps))
        table.entries[first : first + len(entries)] = entries
        table.bitmaps[first : first + len(entries)] = bitmaps

    def store_one(self, index: int, table: L2Table, at: int, entry: int, bitmap: int | None = None) -> None:
        """The same for one entry."""
        if bitmap is None:
            bitmap = ALL if entry and not entry & COMPRESSED else 0
        data = entry.to_bytes(8, "big") + bitmap.to_bytes(8, "big")
        self._write(index, table.offset + 16 * at, data)
        table.view[at] = entry
        table.bitmap_view[at] = bitmap

    def _write(self, index: int, offset: int, data: bytes) -> None:
        try:
            self._file.write(offset, data)
        except OSError:
            self._forget(index)
            raise


class ExtendedWriter(Writer):
    """What changes an image with extended L2 entries."""

    def __init__(self, image: Qcow2Image) -> None:
        super().__init__(image)
        mapping = image.mapping
        assert isinstance(mapping, ExtendedMapping)
        self._mapping: ExtendedMapping = mapping
        self._shift = self._bits - COUNT_BITS

    # ---- data ------------------------------------------------------------------------------------
    def _allocating(self, offset: int, data: memoryview) -> list[tuple[int, int, int]]:
        bits, table_mask = self._bits, (1 << self._table_bits) - 1
        at, end = offset, offset + len(data)
        in_place: list[tuple[int, int, int]] = []
        while at < end:
            cluster = at >> bits
            index, number = cluster >> self._table_bits, cluster & table_mask
            table = self._writable(index)
            stop = min(end, (cluster + 1) << bits)
            part = data[at - offset : stop - offset]
            entry = table.view[number]
            if entry & (COPIED | COMPRESSED) == COPIED:
                if self._touched(at, stop) & ~table.bitmap_view[number]:
                    self._fill(index, table, number, at, part)
                else:
                    host = (entry & OFFSET) + (at & (self._size - 1))
                    in_place.append((host, at - offset, stop - offset))
            elif self._external or len(part) < self._size:
                self._replace(index, table, number, at, part)
            else:
                count = self._replaceable(table, number, (end - at) >> bits)
                stop = at + (count << bits)
                self._allocate_whole(index, table, number, count, data[at - offset : stop - offset])
            at = stop
        return in_place

    def _write_one(self, offset: int, data: memoryview) -> bool:
        """The usual case of a write within one cluster: all of it has its place. Else False, and nothing
        is done."""
        image = self._image
        cluster = offset >> self._bits
        number = cluster & ((1 << self._table_bits) - 1)
        with image.lock:
            table = self._mapping.own_table(cluster >> self._table_bits)
            if table is None:
                return False
            entry = table.view[number]
            if entry & (COPIED | COMPRESSED) != COPIED:
                return False
            if self._touched(offset, offset + len(data)) & ~table.bitmap_view[number]:
                return False
            epoch = image.enter()
        try:
            image.data.write((entry & OFFSET) + (offset & (self._size - 1)), data)
        finally:
            image.leave(epoch)
        return True

    def _touched(self, start: int, stop: int) -> int:
        """The bits of the subclusters that a range within one cluster lies in."""
        first = start >> self._shift & (COUNT - 1)
        return span(first, first + (-(-stop >> self._shift) - (start >> self._shift)))

    def _replaceable(self, table: L2Table, first: int, most: int) -> int:
        """How many entries in a row, at least one, are of no cluster that is written in place."""
        count = min(most, (1 << self._table_bits) - first)
        entries = table.entries[first : first + count]
        own = np.flatnonzero(entries & (_COPIED | _COMPRESSED) == _COPIED)
        return int(own[0]) if len(own) else count

    def _fill(self, index: int, table: L2Table, number: int, offset: int, data: memoryview) -> None:
        """Write within a cluster that has its place, where subclusters are not allocated yet."""
        entry, bitmap = table.view[number], table.bitmap_view[number]
        cluster = (entry & OFFSET) >> self._bits
        touched = self._touched(offset, offset + len(data))
        missing = touched & ~bitmap
        untouched = self._mapping.untouched.pop(cluster, 0)  # after a failed write nobody knows
        known = untouched & missing == missing
        image, inside = self._image, offset & (self._size - 1)
        head, tail = self._edges(offset, data, bitmap)
        copied = head is not None or tail is not None
        if not known:
            head, tail = self._zeroes_for(offset, data, bitmap, head, tail)
        whole = b"".join((head or b"", data, tail or b""))
        self._write_data((entry & OFFSET) + inside - len(head or b""), whole)
        if copied or not known:
            image.data.sync()
        self._mapping.store_one(index, table, number, entry, (bitmap | touched) & ~(touched << COUNT))
        if untouched & ~touched:
            self._mapping.remember(cluster, untouched & ~touched)

    def _replace(self, index: int, table: L2Table, number: int, offset: int, data: memoryview) -> None:
        """Write within a cluster that has no place, or one that others use, too: into a new one, with the
        allocated subclusters of the old one."""
        image = self._image
        entry, bitmap = table.view[number], table.bitmap_view[number]
        inside = offset & (self._size - 1)
        touched = self._touched(offset, offset + len(data))
        packed = bool(entry & COMPRESSED)
        kept = ALL if packed else bitmap & ALL
        if self._external:
            host = (offset >> self._bits) << self._bits
        else:
            host = image.refcounts.take(1)[0] << self._bits
        try:
            head, tail = self._edges(offset, data, kept)
            copied = head is not None or tail is not None
            if self._external:
                head, tail = self._zeroes_for(offset, data, kept, head, tail)
            old = image.unpack(entry) if packed else b""
            for first, end in runs_of_bits(kept):
                low, high = first << self._shift, end << self._shift
                if inside <= low and high <= inside + len(data):
                    continue
                copied = True
                if packed:
                    image.host.write(host + low, old[low:high])
                else:
                    image.host.write(host + low, image.host.read((entry & OFFSET) + low, high - low))
            whole = b"".join((head or b"", data, tail or b""))
            self._write_data(host + inside - len(head or b""), whole)
            if copied or self._external:
                image.data.sync()
        except OSError:
            if not self._external:
                image.condemn(np.array([host >> self._bits]))
            raise
        present = kept | touched
        zero = 0 if packed else bitmap & ALL_ZERO & ~(touched << COUNT)
        before = table.entries[number : number + 1].copy()
        self._mapping.store_one(index, table, number, host | COPIED, present | zero)
        if not self._external:
            self._condemn_entries(before)
            if present != ALL:
                self._mapping.remember(host >> self._bits, ALL & ~present)

    def _allocate_whole(self, index: int, table: L2Table, first: int, count: int, data: memoryview) -> None:
        """Whole clusters into new ones."""
        image, bits = self._image, self._bits
        done = 0
        while done < count:
            cluster, got = image.refcounts.take(count - done)
            try:
                image.host.write(cluster << bits, data[done << bits : (done + got) << bits])
            except OSError:
                image.condemn(np.arange(cluster, cluster + got))
                raise
            old = table.entries[first + done : first + done + got].copy()
            self._mapping.store(index, table, first + done, self._entries(cluster, got))
            self._condemn_entries(old)
            done += got

    def _entries(self, cluster: int, count: int) -> Entries:
        clusters = np.arange(cluster, cluster + count, dtype=np.uint64)
        return (clusters << np.uint64(self._bits)) | _COPIED

    def _edges(self, offset: int, data: memoryview, allocated: int) -> tuple[bytes | None, bytes | None]:
        """What lies below, before and behind ``data`` in the subclusters that it begins and ends in; None
        where those are allocated, or all of that is zero."""
        mask = (1 << self._shift) - 1
        end = offset + len(data)
        before, behind = offset & mask, -end & mask
        head = tail = None
        if before and not allocated >> (offset >> self._shift & (COUNT - 1)) & 1:
            head = self._under(offset - before, before)
        if behind and not allocated >> (end >> self._shift & (COUNT - 1)) & 1:
            tail = self._under(end, behind)
        return head, tail

    def _zeroes_for(
        self, offset: int, data: memoryview, allocated: int, head: bytes | None, tail: bytes | None
    ) -> tuple[bytes | None, bytes | None]:
        """The same with zeroes where there may be anything."""
        mask = (1 << self._shift) - 1
        end = offset + len(data)
        before, behind = offset & mask, -end & mask
        if head is None and before and not allocated >> (offset >> self._shift & (COUNT - 1)) & 1:
            head = bytes(before)
        if tail is None and behind and not allocated >> (end >> self._shift & (COUNT - 1)) & 1:
            tail = bytes(behind)
        return head, tail

    def _under(self, offset: int, length: int) -> bytes | None:
        """What a range within one subcluster reads as now; None when it is all zeroes."""
        (kind, _, _, _), *_ = self._mapping.locate(offset, length)
        below = self._image.backing
        if kind != UNALLOCATED or below is None or offset >= below.size:
            return None
        buffer = bytearray(length)
        backing.read_below(below, offset, memoryview(buffer))
        return bytes(buffer) if buffer.strip(b"\0") else None

    def _write_data(self, host: int, data: bytes) -> None:
        """An external data file ends with the disk."""
        self._image.data.write(host, data[: self._image.size - host] if self._external else data)

    def _condemn_entries(self, old: Entries) -> None:
        super()._condemn_entries(old)
        if self._mapping.untouched:
            for cluster in self._mapping.layout.clusters_of(old).tolist():
                self._mapping.untouched.pop(cluster, None)

    # ---- zeroes ----------------------------------------------------------------------------------
    def write_zeroes(self, offset: int, length: int, unmap: bool, fast: bool) -> None:
        """Make a range zero: whole subclusters by their bits, the rest by writing."""
        image = self._image
        mask, end = (1 << self._shift) - 1, offset + length
        low = (offset + mask) & ~mask
        high = end if end == image.size else end & ~mask
        if image.header.autoclear & Autoclear.RAW_DATA_FILE:
            super().write_zeroes(offset, length, unmap, fast)
        elif low >= high:
            self._zero_part(offset, length)
        else:
            self._zero_part(offset, low - offset)
            self._clear(low, high, 0, keep=not unmap)
            self._zero_part(high, end - high)

    def _clear(self, low: int, high: int, entry: int, keep: bool) -> None:
        """Let whole subclusters read as zeroes. Clusters that are zero altogether are given up, unless
        ``keep`` says otherwise."""
        mask = self._size - 1
        first, last = min(high, (low + mask) & ~mask), max(low, high & ~mask)
        if high == self._image.size:
            last = high  # nothing is behind it
        if first > low:
            self._clear_bits(low, first, keep)
        if last > first:
            super()._clear(first, last, entry, keep)
        if max(last, first) < high:
            self._clear_bits(max(last, first), high, keep)

    def _clear_bits(self, low: int, high: int, keep: bool) -> None:
        """Zero bits of some subclusters of one cluster."""
        image = self._image
        cluster = low >> self._bits
        index, number = cluster >> self._table_bits, cluster & ((1 << self._table_bits) - 1)
        touched = self._touched(low, high)
        with image.lock:
            table = self._mapping.table(index)
            if table is None and image.backing is None:
                return
            if table is not None and table.view[number] & COMPRESSED:
                self._zero_part(low, high - low)
                return
            entry, bitmap = (table.view[number], table.bitmap_view[number]) if table else (0, 0)
            new = (bitmap | touched << COUNT) & ~touched
            if new == bitmap or (not entry and not bitmap and image.backing is None):
                return
            table = self._writable(index)
            if entry and not new & ALL and not keep:
                old = table.entries[number : number + 1].copy()
                self._mapping.store_one(index, table, number, 0, new & ALL_ZERO)
                self._condemn_entries(old)
            else:
                self._mapping.store_one(index, table, number, entry, new)

    def _clear_table(self, index: int, first: int, count: int, entry: int, keep: bool) -> None:
        image, mapping = self._image, self._mapping
        bitmap = np.uint64(0) if image.backing is None else _ALL_ZERO
        table = mapping.table(index)
        if table is not None:
            entries, bitmaps = (array[first : first + count] for array in (table.entries, table.bitmaps))
            if not entries.any() and (bitmaps == bitmap).all():
                return
        table = self._writable(index)
        old = table.entries[first : first + count].copy()
        kept = np.zeros(count, np.bool_)
        if keep:
            kept = (old & _COPIED != 0) & (old & _COMPRESSED == 0)
        new = np.where(kept, old, np.uint64(0))
        mapping.store(index, table, first, new, np.where(kept, _ALL_ZERO, bitmap))
        self._condemn_entries(old[~kept])

    def _place(self, index: int, table: L2Table, run: Run) -> None:
        """Over a backing file the new clusters stay without allocated subclusters, so they hide nothing."""
        hides = self._image.backing is None
        if self._external:
            start = ((index << self._table_bits) + run.first) << self._bits
            self._image.data.zero(start, run.clusters << self._bits)
            self._image.data.sync()
        done = 0
        while done < run.clusters:
            first = run.first + done
            if self._external:
                host, count = (index << self._table_bits) + first, run.clusters
            else:
                host, count = self._image.refcounts.take(run.clusters - done)
            bitmaps = table.bitmaps[first : first + count].copy()
            if hides:
                bitmaps[:] = _ALL
            self._mapping.store(index, table, first, self._entries(host, count), bitmaps)
            done += count
