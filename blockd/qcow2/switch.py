"""Switching an image to other tables, all at once: snapshots, resizing and repair.

Whatever changes refcounts and COPIED flags together cannot be done in place without a moment at which
they contradict each other. So the new L1 table, the L2 tables whose flags change, the snapshot table and
the whole refcount structure are written beside the old ones, made durable, and taken into use by one
write of header bytes 24 to 71, which lie in one sector. A crash leaves the old state or the new one, and
at worst leaked clusters. The price is a walk over all tables: about 1/8,000 of the allocated data.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from blockd.qcow2.header import MAX_L1_BYTES, MAX_REFCOUNT_TABLE, write_tables
from blockd.qcow2.refcounts import encode, runs_of
from blockd.qcow2.snapshots import Snapshot
from blockd.qcow2.subclusters import mended
from blockd.qcow2.tables import COMPRESSED, COPIED, OFFSET, Entries, L2Table
from blockd.qcow2.walk import (
    Walk,
    clusters_in,
    impossible,
    mark_fixed,
    mark_snapshot,
    mark_tree,
    tables_of,
    valid_tables,
)

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image

_COPIED, _COMPRESSED, _OFFSET = np.uint64(COPIED), np.uint64(COMPRESSED), np.uint64(OFFSET)


class _Space:
    """Clusters that neither the old nor the new state uses, and those behind the end of the file."""

    def __init__(self, free: npt.NDArray[np.bool_]) -> None:
        self._runs = runs_of(np.flatnonzero(free))
        self.end = len(free)
        self.taken: list[tuple[int, int]] = []

    def take(self, count: int) -> int:
        """The first of ``count`` neighbouring clusters."""
        for number, (first, length) in enumerate(self._runs):
            if length >= count:
                self._runs[number] = (first + count, length - count)
                break
        else:
            first = self.end
            self.end += count
        if count:
            self.taken.append((first, count))
        return first


class Change:
    """Other tables for an image, whole and durable beside those in use: taken into use by ``commit``, after
    which ``finish`` gives back what is not used any more, or ``undo`` goes back.

    The image is at rest from before this is made until the end; left without ``commit`` it does nothing.
    """

    def __init__(
        self,
        image: Qcow2Image,
        l1: Entries,
        size: int,
        known: list[Snapshot],
        repairing: bool = False,
        made: tuple[Snapshot, Entries] | None = None,
    ) -> None:
        """See ``switch``. ``made``: a snapshot, one of ``known``, whose L1 table is not on the disk yet."""
        self.image = image
        header, layout, refcounts = image.header, image.mapping.layout, image.refcounts
        cluster_size, bits = header.cluster_size, header.cluster_bits
        # nobody refers to these, so that they would be free in the new refcounts
        refcounts.give_back_reserved()
        if image.condemned:
            image.flush()
        if len(l1) * 8 > MAX_L1_BYTES:
            raise OSError(errno.EFBIG, f"{image.file}: the disk would be too large for its cluster size")
        l1 = (l1 & ~_COPIED).copy()
        if repairing:
            l1[~valid_tables(l1, layout)] = 0
            l1[(l1 & _OFFSET) >= np.uint64(image.host.size())] = 0
        clusters = clusters_in(image)
        walk = Walk(np.zeros(clusters, np.uint64))
        mark_fixed(walk, image)
        mark_tree(walk, image, l1, "active table")
        for snapshot in known:
            if made is not None and snapshot is made[0]:
                mark_tree(walk, image, made[1], f"snapshot {snapshot.id}")
            else:
                mark_snapshot(walk, image, snapshot)
        if walk.errors and not repairing:
            raise OSError(errno.EIO, f"{image.file}: {walk.errors[0]}; check the image first")
        counts = walk.counts
        if refcounts.order < 6 and len(counts) and int(counts.max()) > refcounts.maximum:
            raise OSError(
                errno.EOVERFLOW, f"{image.file}: refcounts of {1 << refcounts.order} bits are too narrow"
            )

        self._old = np.zeros(clusters, np.uint64) if repairing else refcounts.all(clusters)
        space = _Space(np.zeros(clusters, bool) if repairing else (counts == 0) & (self._old == 0))
        counts = _copy_tables(image, l1, counts, space)
        if made is not None:
            made[0].l1_table_offset = space.take(-(-len(made[1]) * 8 // cluster_size)) << bits
            made[0].l1_size = len(made[1])
            image.host.write(made[0].l1_table_offset, made[1].astype(">u8").tobytes())
        snapshot_data = b"".join(snapshot.encode() for snapshot in known)
        l1_at = space.take(-(-len(l1) * 8 // cluster_size))
        snapshots_at = space.take(-(-len(snapshot_data) // cluster_size))
        flags = _table_flags(l1, counts, bits)
        image.host.write(l1_at << bits, (l1 | flags).astype(">u8").tobytes())
        if snapshot_data:
            image.host.write(snapshots_at << bits, snapshot_data)
        table_at, table_clusters, self._new = _write_refcounts(image, counts, space)
        image.host.resize(max(image.host.size(), space.end << bits))
        self._make_durable()
        self._fields = {
            "size": size,
            "l1_size": len(l1),
            "l1_table_offset": l1_at << bits,
            "refcount_table_offset": table_at << bits,
            "refcount_table_clusters": table_clusters,
            "nb_snapshots": len(known),
            "snapshots_offset": snapshots_at << bits if known else 0,
        }
        self._before = {name: getattr(header, name) for name in self._fields}

    def _make_durable(self) -> None:
        """The new tables survive loss of power from here on; nothing refers to them yet."""
        self.image.host.sync()

    def commit(self) -> None:
        """Take the new tables into use; OSError leaves open which are, ``undo`` settles it."""
        self._use(self._fields)

    def undo(self) -> None:
        """The tables of before: nothing of them has been given back yet."""
        self._use(self._before)

    def _use(self, fields: dict[str, int]) -> None:
        image = self.image
        try:
            write_tables(image.host, image.header, **fields)
        finally:
            image.size = image.header.size
            image.refcounts.reload()
            image.mapping.reload()

    def finish(self) -> None:
        """Give the host the space of what is not used any more."""
        _discard(self.image, self._old, self._new)


def switch(
    image: Qcow2Image,
    l1: Entries,
    size: int,
    known: list[Snapshot],
    repairing: bool = False,
) -> None:
    """Make ``l1`` the active table, ``size`` the disk's and ``known`` the snapshots.

    With ``repairing``, entries that cannot be are dropped and refcounts are not believed. OSError leaves
    the image as it was: EIO when the tables are damaged, EOVERFLOW when refcounts are too narrow.
    """
    change = Change(image, l1, size, known, repairing)
    change.commit()
    change.finish()


def _copy_tables(
    image: Qcow2Image, l1: Entries, counts: npt.NDArray[np.uint64], space: _Space
) -> npt.NDArray[np.uint64]:
    """Copy the L2 tables whose entries change, and let ``l1`` point to the copies."""
    layout, bits = image.mapping.layout, image.header.cluster_bits
    for index, table in tables_of(image, l1):
        entries = table.entries
        new = np.where(impossible(entries, layout), np.uint64(0), entries)
        standard = new & _COMPRESSED == 0
        clusters = ((new & _OFFSET) >> np.uint64(bits)).astype(np.int64)
        inside = standard & (clusters > 0) & (clusters < len(counts))
        if not layout.external:
            new[standard & (clusters >= len(counts))] = 0
        if not layout.external:
            new &= ~_COPIED
        else:
            inside[:] = False
        own = np.flatnonzero(inside)
        new[own[counts[clusters[own]] == 1]] |= _COPIED
        copy = mended(L2Table(0, new, table.bitmaps), layout)
        if (new == entries).all() and (copy.bitmaps == table.bitmaps).all():
            continue
        at = space.take(1)
        image.host.write(at << bits, copy.encode())
        counts[table.offset >> bits] -= np.uint64(1)
        l1[index] = at << bits
    return counts


def _table_flags(l1: Entries, counts: npt.NDArray[np.uint64], bits: int) -> Entries:
    """COPIED for each L2 table that is the active table's alone; those not counted yet are copies."""
    clusters = ((l1 & _OFFSET) >> np.uint64(bits)).astype(np.int64)
    padded = np.zeros(max(len(counts), int(clusters.max(initial=0)) + 1), np.uint64)
    padded[: len(counts)] = counts
    # a copy has no count yet, or lies in a cluster that had none
    return np.where((clusters != 0) & (padded[clusters] <= 1), _COPIED, np.uint64(0))


def _write_refcounts(
    image: Qcow2Image, counts: npt.NDArray[np.uint64], space: _Space
) -> tuple[int, int, npt.NDArray[np.uint64]]:
    """Write table and blocks for ``counts`` and for everything taken from ``space``, themselves
    included; returns where the table is, its clusters and the counts."""
    size, bits = image.header.cluster_size, image.header.cluster_bits
    per_block = image.refcounts.per_block
    blocks = table_clusters = 0
    while True:
        total = space.end + blocks + table_clusters
        needed = -(-total // per_block)
        needed_clusters = -(-needed * 8 // size)
        if needed <= blocks and needed_clusters <= table_clusters:
            break
        blocks, table_clusters = max(blocks, needed), max(table_clusters, needed_clusters)
    if table_clusters * size > max(MAX_REFCOUNT_TABLE, size):
        raise OSError(errno.EFBIG, f"{image.file}: the refcount table would be too large")
    table_at = space.take(table_clusters)
    places = [space.take(1) for _ in range(blocks)]
    result = np.zeros(blocks * per_block, np.uint64)
    result[: len(counts)] = counts
    for first, count in space.taken:
        result[first : first + count] = 1
    for number, place in enumerate(places):
        part = result[number * per_block : (number + 1) * per_block]
        image.host.write(place << bits, encode(part, image.refcounts.order))
    table = np.zeros(table_clusters * size // 8, ">u8")
    table[:blocks] = np.array(places, np.uint64) << np.uint64(bits)
    image.host.write(table_at << bits, table.tobytes())
    return table_at, table_clusters, result


def _discard(image: Qcow2Image, old: npt.NDArray[np.uint64], new: npt.NDArray[np.uint64]) -> None:
    """Give the host the space of clusters that have become free; what fails here harms nobody."""
    bits = image.header.cluster_bits
    try:
        for first, count in runs_of(np.flatnonzero((old > 0) & (new[: len(old)] == 0))):
            image.host.zero(first << bits, count << bits)
        used = np.flatnonzero(new)
        end = (int(used[-1]) + 1) << bits
        if end < image.host.size():
            image.host.resize(end)
    except OSError:
        return
