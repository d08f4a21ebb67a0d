"""An open qcow2 image: reading, durability, opening and closing. Changes are in writer.py.

Source: "Qcow2 Image File Format".

One lock guards all tables. Data moves outside of it, within a *grace period*: clusters that were given
up are handed out again only when every transfer that began before has ended.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterable, Iterator

import numpy as np

from blockd.batch import Direct
from blockd.files import OpenFile, open_file
from blockd.hostfile import HostFile
from blockd.image import Buffer, Extent, Image
from blockd.qcow2 import backing, header, operations, snapshots
from blockd.qcow2.check import recount
from blockd.qcow2.compression import decompress
from blockd.qcow2.direct import DirectClusters
from blockd.qcow2.extended import ExtendedMapping, ExtendedWriter
from blockd.qcow2.header import Autoclear, ExtensionType, Header, Incompatible
from blockd.qcow2.refcounts import Clusters, Refcounts
from blockd.qcow2.tables import DATA, OFFSET, PACKED, UNALLOCATED, ZEROES, Mapping
from blockd.qcow2.tracking import Tracker
from blockd.qcow2.writer import MOST_CONDEMNED, Writer
from coordinator.contract.errors import BlockError

log = logging.getLogger(__name__)

#: (kind, position in the request, bytes, host offset or compressed entry)
Piece = tuple[int, int, int, int]

_KNOWN_AUTOCLEAR = int(Autoclear.BITMAPS | Autoclear.RAW_DATA_FILE)


class Qcow2Image(Image):
    """A qcow2 image and the chain below it."""

    format = "qcow2"

    def __init__(
        self,
        file: str,
        read_only: bool = False,
        chain: backing.Chain | None = None,
        open_file: OpenFile = open_file,
        open_below: backing.Opener | None = None,
        locked: bool = True,
        snapshot: str | None = None,
        repair: bool = False,
        backed: bool = True,
    ) -> None:
        """Open and lock; BlockError in one line when that cannot be.

        ``open_below`` opens the backing file; opening.py has the one that knows all formats. Without it
        an image that has one is refused.
        ``snapshot`` (its id or name) reads that state of the disk. ``repair`` opens what is marked corrupt
        or dirty as it is. Without ``backed`` the backing file stays closed and reads as zeroes.
        """
        self.file = file
        self.read_only = read_only
        chain = chain or backing.Chain()
        self.host = open_file(file, read_only)
        #: where guest clusters lie: in the image itself, or in a file of their own
        self.data = self.host
        self.backing: Image | None = None
        try:
            if locked and not self.host.lock(not read_only):
                log.warning("%s: its file system has no locks; nothing keeps a second writer away", file)
            self.header = self.read_header(repair)
            if snapshot is not None:
                snapshots.view(self.host, self.header, snapshot)
            self.size = self.header.size
            self.refcounts = Refcounts(self.host, self.header)
            tables = ExtendedMapping if self.header.extended else Mapping
            self.mapping = tables(self.host, self.header, self.refcounts)
            if self.header.incompatible & Incompatible.DATA_FILE:
                self.data = self._open_data(chain, open_file, locked)
            below = chain.below(file, self.host.identity())
            if self.header.backing_file is not None and backed:
                if open_below is None:
                    raise BlockError(f"{file}: has a backing file, which nobody opens", errno.ENOTSUP)
                self.backing = backing.open_backing(
                    file, self.header.backing_file, self.header.backing_format, below, open_below
                )
        except OSError as error:
            self.close_files()
            raise BlockError(f"{file}: cannot be read: {error.strerror or error}", error.errno or 5) from None
        except BaseException:
            self.close_files()
            raise
        self.lock = threading.RLock()
        self._quiet = threading.Condition(self.lock)
        self._moving = [0, 0]
        self._epoch = 0
        #: taken before ``lock``
        self.flushing = threading.RLock()
        self.condemned: list[Clusters] = []
        self.condemned_count = 0
        self._bits = self.header.cluster_bits
        self._mask = self.header.cluster_size - 1
        self._per_table = self.mapping.layout.l2_bits
        self._writer = ExtendedWriter(self) if self.header.extended else Writer(self)
        self.tracker: Tracker | None = None
        if not read_only and not repair:
            try:
                self._begin_writing()
            except OSError as error:
                self.close_files()
                text = f"{file}: cannot be written: {error.strerror or error}"
                raise BlockError(text, error.errno or errno.EIO) from None
            except BaseException:
                self.close_files()
                raise

    def read_header(self, repair: bool) -> Header:
        size = self.host.size()
        first = self.host.read(0, min(size, 1 << header.MAX_CLUSTER_BITS))
        return header.parse(self.file, first, size, not self.read_only, repair)

    def _open_data(self, chain: backing.Chain, open_file: OpenFile, locked: bool) -> HostFile:
        """The external data file, which must lie where a backing file might."""
        name = self.header.data_file
        assert name is not None
        path = backing.resolve(self.file, name, chain.allowed, "data file")
        data = open_file(path, self.read_only)
        if data.identity() == self.host.identity():
            data.close()
            raise BlockError(f"{self.file}: is its own data file", errno.ELOOP)
        try:
            if locked:
                data.lock(not self.read_only)
        except BaseException:
            data.close()
            raise
        return data

    def _begin_writing(self) -> None:
        """Refcounts of an image that was not closed are counted again; features that are to be cleared
        by whoever writes are cleared."""
        if self.header.incompatible & Incompatible.DIRTY:
            recount(self)
            self.set_features(incompatible=self.header.incompatible & ~Incompatible.DIRTY)
        kept = self.header.autoclear & _KNOWN_AUTOCLEAR
        if self.header.extension(ExtensionType.BITMAPS) is None:
            kept &= ~int(Autoclear.BITMAPS)
        if self.header.autoclear != kept:
            self.set_features(autoclear=kept)
        if kept & Autoclear.BITMAPS:
            self.tracker = Tracker(self)

    def set_features(self, incompatible: int | None = None, autoclear: int | None = None) -> None:
        """Write feature bits, durably before and after."""
        self.host.sync()
        if incompatible is not None:
            self.header.incompatible = incompatible
        if autoclear is not None:
            self.header.autoclear = autoclear
        self.host.write(header.FEATURES_AT, self.header.features())
        self.host.sync()

    # ---- grace periods ---------------------------------------------------------------------------
    def enter(self) -> int:
        """A transfer begins; with the lock held."""
        epoch = self._epoch
        self._moving[epoch] += 1
        return epoch

    def leave(self, epoch: int) -> None:
        """The transfer has ended; without the lock."""
        with self.lock:
            self._moving[epoch] -= 1
            if not self._moving[epoch]:
                self._quiet.notify_all()

    def drain(self) -> None:
        """With the lock held: return, still with it, when no data moves."""
        while self._moving[0] or self._moving[1]:
            self._quiet.wait()

    # ---- reading ---------------------------------------------------------------------------------
    def read_into(self, offset: int, view: memoryview) -> None:
        with self.lock:
            pieces = self._locate(offset, len(view))
            epoch = self._epoch
            self._moving[epoch] += 1
        try:
            for kind, at, length, where in pieces:
                part = view if length == len(view) else view[at : at + length]
                if kind == DATA:
                    self.data.read_into(where, part)
                elif kind == PACKED:
                    inside = (offset + at) & self._mask
                    part[:] = self.unpack(where)[inside : inside + length]
                elif kind == UNALLOCATED and self.backing is not None:
                    backing.read_below(self.backing, offset + at, part)
                else:
                    part[:] = bytes(length)
        finally:
            self.leave(epoch)

    def direct(self) -> Direct | None:
        return DirectClusters(self) if self.mapping.plain else None

    def _locate(self, offset: int, length: int) -> list[Piece]:
        """Where a range lies. The lock is held."""
        if not length:  # at the end of the disk there may be no table
            return []
        if isinstance(self.mapping, ExtendedMapping):
            return self.mapping.locate(offset, length)
        bits, mask = self._bits, self._mask
        cluster = offset >> bits
        inside = offset & mask
        l2_bits = self._per_table
        mapping = self.mapping
        if inside + length <= mask + 1:
            table = mapping.table(cluster >> l2_bits)
            if table is None:
                return [(UNALLOCATED, 0, length, 0)]
            entry = table.view[cluster & ((1 << l2_bits) - 1)]
            kind = mapping.kind(entry)
            return [(kind, 0, length, (entry & OFFSET) + inside if kind == DATA else entry)]
        pieces: list[Piece] = []
        at = 0
        while at < length:
            index = cluster >> l2_bits
            first = cluster & ((1 << l2_bits) - 1)
            needed = (inside + (length - at) + mask) >> bits
            count = min(needed, (1 << l2_bits) - first)
            table = mapping.table(index)
            if table is None:
                piece = min((count << bits) - inside, length - at)
                pieces.append((UNALLOCATED, at, piece, 0))
                at += piece
                inside = 0
            else:
                for run in mapping.runs(table, first, count):
                    piece = min((run.clusters << bits) - inside, length - at)
                    where = (run.entry & OFFSET) + inside if run.kind == DATA else run.entry
                    pieces.append((run.kind, at, piece, where))
                    at += piece
                    inside = 0
            cluster += count
        return pieces

    def unpack(self, entry: int) -> bytes:
        """The cluster that a compressed entry means."""
        offset, length = self.mapping.layout.packed(entry)
        return decompress(self.host.read(offset, length), self.header.compression, self._mask + 1)

    def prefetch(self, offset: int, length: int) -> None:
        with self.lock:
            pieces = self._locate(offset, length)
        for kind, at, size, where in pieces:
            if kind == DATA:
                self.data.prefetch(where, size)
            elif kind == UNALLOCATED and self.backing is not None and offset + at < self.backing.size:
                self.backing.prefetch(offset + at, min(size, self.backing.size - offset - at))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data of the backing file counts as data."""
        pending: Extent | None = None
        for extent in self._extents(offset, length):
            if pending is not None and pending[1:] == extent[1:]:
                pending = pending._replace(length=pending.length + extent.length)
                continue
            if pending is not None:
                yield pending
            pending = extent
        if pending is not None:
            yield pending

    def _extents(self, offset: int, length: int) -> Iterator[Extent]:
        for kind, start, size, _ in self.map(offset, length):
            if kind == UNALLOCATED and self.backing is not None:
                inside = max(0, min(size, self.backing.size - start))
                if inside:
                    yield from self.backing.extents(start, inside)
                if size > inside:
                    yield Extent(size - inside, hole=True, zero=True)
            else:
                empty = kind in (UNALLOCATED, ZEROES)
                yield Extent(size, hole=empty, zero=empty)

    def map(self, offset: int, length: int) -> Iterator[Piece]:
        """(kind, guest offset, bytes, host offset or entry) of a range, of this image alone. Stretches
        without L2 tables are one piece, however long."""
        end = offset + length
        table_bits = self._bits + self._per_table
        while offset < end:
            index = offset >> table_bits
            with self.lock:
                if not int(self.mapping.l1[index]) & OFFSET:
                    last = (end - 1) >> table_bits
                    used = np.flatnonzero(self.mapping.l1[index : last + 1] & np.uint64(OFFSET))
                    stop = min(end, (index + int(used[0])) << table_bits if len(used) else end)
                    pieces: list[Piece] = [(UNALLOCATED, 0, stop - offset, 0)]
                else:
                    stop = min(end, (index + 1) << table_bits)
                    pieces = self._locate(offset, stop - offset)
            for kind, at, size, where in pieces:
                yield kind, offset + at, size, where
            offset = stop

    # ---- changing --------------------------------------------------------------------------------
    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        if self.tracker is not None:
            self._mark_dirty(offset, len(data))
        self._writer.write(offset, memoryview(data))
        if self.condemned_count > MOST_CONDEMNED or fua:
            self.flush()

    def write_zeroes(self, offset: int, length: int, unmap: bool, fast: bool, fua: bool = False) -> None:
        if self.tracker is not None:
            self._mark_dirty(offset, length)
        self._writer.write_zeroes(offset, length, unmap, fast)
        if self.condemned_count > MOST_CONDEMNED or fua:
            self.flush()

    def trim(self, offset: int, length: int) -> None:
        if self.tracker is not None:
            self._mark_dirty(offset, length)
        self._writer.trim(offset, length)
        if self.condemned_count > MOST_CONDEMNED:
            self.flush()

    def write_compressed(self, offset: int, *packed: bytes) -> None:
        """Store whole neighbouring clusters that are compressed already."""
        if self.tracker is not None:
            self._mark_dirty(offset, len(packed) << self._bits)
        self._writer.write_packed(offset, packed)

    def _mark_dirty(self, offset: int, length: int) -> None:
        """In the bitmaps that are followed now: a change of size may be making others."""
        with self.lock:
            if self.tracker is not None:
                self.tracker.mark(offset, length)

    def cut(self, offset: int, length: int) -> None:
        """Make zero what is about to be cut off, which no bitmap need know."""
        self._writer.write_zeroes(offset, length, unmap=True, fast=False)

    def preallocate(self, offset: int, length: int) -> None:
        """Give every cluster of a range its place; what is not there yet reads as zeroes."""
        self._writer.preallocate(offset, length)

    def resize(self, size: int) -> None:
        operations.resize(self, size)

    def settle(self, ranges: Iterable[tuple[int, int]]) -> bool:
        """Give clusters that are about to be written in part places of their own, with what they hold, at
        one cost for all. The lock is held. False when that is not called for; OSError when it failed."""
        return self._writer.settle(ranges)

    def condemn(self, clusters: Clusters) -> None:
        """Clusters to count down (sorted) after the next flush; with the lock held."""
        if len(clusters):
            self.condemned.append(clusters)
            self.condemned_count += len(clusters)

    def flush(self) -> None:
        if self.read_only:
            return
        with self.flushing:
            with self.lock:
                condemned, self.condemned = self.condemned, []
                self.condemned_count = 0
                epoch = self._epoch
                if condemned:  # else nobody waits, and the other half may not be empty at the next turn
                    self._epoch = 1 - epoch
            if self.data is not self.host:
                self.data.sync()
            self.host.sync()
            if condemned:
                with self.lock:
                    while self._moving[epoch]:
                        self._quiet.wait()
                    self._free(condemned)

    def _free(self, condemned: list[Clusters]) -> None:
        clusters = np.concatenate(condemned)
        clusters.sort()
        self.refcounts.change(clusters, -1)

    def close(self) -> None:
        """Give back what was reserved; OSError is logged, for an image is closed in any case."""
        try:
            if not self.read_only:
                with self.lock:
                    if self.tracker is not None:
                        self.tracker.store()
                    self.refcounts.give_back_reserved()
                self.flush()
                self.host.sync()
        except OSError as error:
            log.error("%s: %s at closing; 'atoll img check -r leaks' wins back its space", self.file, error)
        finally:
            self.close_files()

    def close_files(self) -> None:
        """Release files and locks, and nothing else."""
        self.host.close()
        if self.data is not self.host:
            self.data.close()
        if self.backing is not None:
            self.backing.close()
