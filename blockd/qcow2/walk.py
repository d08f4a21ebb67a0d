"""Counting every reference in an image, without trust in its refcounts.

Source: "Qcow2 Image File Format": all sections that say what a cluster can be used for.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from blockd.qcow2 import snapshots
from blockd.qcow2.bitmaps import bitmap_clusters
from blockd.qcow2.header import Autoclear
from blockd.qcow2.subclusters import impossible_bitmaps
from blockd.qcow2.tables import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    OFFSET,
    ZERO,
    Entries,
    L2Table,
    Layout,
)

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image

#: of a file whose references are counted: 16 TiB with clusters of 64 KiB
MOST_CLUSTERS = 1 << 28

Numbers = npt.NDArray[np.uint64]
_COPIED, _COMPRESSED, _OFFSET = np.uint64(COPIED), np.uint64(COMPRESSED), np.uint64(OFFSET)
_ZERO, _L1_RESERVED = np.uint64(ZERO), np.uint64(L1_RESERVED)


@dataclass
class Walk:
    """What was found."""

    #: references to each host cluster
    counts: Numbers
    #: what is wrong with the tables themselves, a line each
    errors: list[str] = field(default_factory=list)
    allocated: int = 0
    compressed: int = 0
    fragmented: int = 0

    def mark(self, clusters: npt.NDArray[np.int64], what: str) -> None:
        """Count a reference to each cluster; those behind the end of the file are errors."""
        outside = (clusters >= len(self.counts)) | (clusters < 0)
        if outside.any():
            self.errors.append(f"{what} points behind the end of the file")
            clusters = clusters[~outside]
        if len(clusters):
            low = int(clusters.min())
            found = np.bincount(clusters - low)
            self.counts[low : low + len(found)] += found.astype(np.uint64)

    def mark_bytes(self, offset: int, length: int, bits: int, what: str) -> None:
        if length:
            self.mark(np.arange(offset >> bits, ((offset + length - 1) >> bits) + 1), what)


def valid_tables(l1: Entries, layout: Layout) -> npt.NDArray[np.bool_]:
    """The L1 entries that may point to an L2 table."""
    offsets = l1 & _OFFSET
    return (offsets != 0) & (offsets & np.uint64(layout.size - 1) == 0) & (l1 & _L1_RESERVED == 0)


def impossible(entries: Entries, layout: Layout) -> npt.NDArray[np.bool_]:
    """Entries of an L2 table that cannot be."""
    offsets = entries & _OFFSET
    bad = (offsets & np.uint64(layout.size - 1) != 0) | (entries & layout.l2_reserved != 0)
    if not layout.external:
        bad |= (offsets == 0) & (entries & _COPIED != 0)
    if layout.version < 3:
        bad |= entries & _ZERO != 0
    return bad & (entries & _COMPRESSED == 0)


def tables_of(image: Qcow2Image, l1: Entries) -> Iterator[tuple[int, L2Table]]:
    """(L1 index, L2 table) of each L2 table of an L1 table that lies in the file."""
    layout = image.mapping.layout
    size = image.host.size()
    for index in np.flatnonzero(valid_tables(l1, layout)).tolist():
        offset = int(l1[index]) & OFFSET
        if offset < size:
            yield index, layout.decode(offset, image.host.read(offset, layout.size))


def read_l1(image: Qcow2Image, offset: int, entries: int) -> Entries:
    return np.frombuffer(image.host.read(offset, 8 * entries), ">u8").astype(np.uint64)


def mark_tree(walk: Walk, image: Qcow2Image, l1: Entries, what: str, active: bool = False) -> None:
    """Count what an L1 table refers to: its L2 tables and their clusters."""
    layout = image.mapping.layout
    used = l1 & _OFFSET != 0
    valid = valid_tables(l1, layout)
    for index in np.flatnonzero((used | (l1 & _L1_RESERVED != 0)) & ~valid).tolist():
        walk.errors.append(f"{what}: L1 entry {index} ({int(l1[index]):#018x}) is not possible")
    walk.mark(((l1[valid] & _OFFSET) >> np.uint64(layout.bits)).astype(np.int64), f"{what}: L1 table")
    next_offset = 0
    for index, table in tables_of(image, l1):
        entries = table.entries
        bad = impossible(entries, layout)
        if bad.any():
            walk.errors.append(f"{what}: L2 table {index} has {int(bad.sum())} impossible entries")
            entries = np.where(bad, np.uint64(0), entries)
        bad_bitmaps = impossible_bitmaps(table, layout)
        if bad_bitmaps.any():
            walk.errors.append(
                f"{what}: L2 table {index} has {int(bad_bitmaps.sum())} impossible subcluster bitmaps"
            )
        walk.mark(layout.clusters_of(entries), f"{what}: L2 table {index}")
        if active:
            next_offset = _statistics(walk, entries, layout, next_offset)


def _statistics(walk: Walk, entries: Entries, layout: Layout, next_offset: int) -> int:
    """As qemu-img counts: allocated clusters, and those that do not follow the last."""
    packed = entries & _COMPRESSED != 0
    plain = ~packed & (entries & np.uint64(layout.allocated) != 0)
    walk.compressed += int(packed.sum())
    walk.allocated += int(packed.sum()) + int(plain.sum())
    walk.fragmented += int(packed.sum())
    offsets = entries[plain] & _OFFSET
    if not len(offsets):
        return next_offset
    walk.fragmented += int((offsets[1:] != offsets[:-1] + np.uint64(layout.size)).sum())
    walk.fragmented += next_offset not in (0, int(offsets[0]))
    return int(offsets[-1]) + layout.size


def clusters_in(image: Qcow2Image) -> int:
    """Host clusters of the file; OSError when there are too many to be counted, 8 bytes each."""
    clusters = -(-image.host.size() // image.header.cluster_size)
    if clusters > MOST_CLUSTERS:
        raise OSError(errno.EFBIG, f"{image.file}: a file of {clusters} clusters is too large to be checked")
    return clusters


def walk_image(image: Qcow2Image) -> Walk:
    """Count all references of an image as it is on the disk."""
    header, bits = image.header, image.header.cluster_bits
    walk = Walk(np.zeros(clusters_in(image), np.uint64))
    mark_fixed(walk, image)
    walk.mark_bytes(
        header.refcount_table_offset, header.refcount_table_clusters << bits, bits, "refcount table"
    )
    table = image.refcounts.table
    misplaced = (table & np.uint64(header.cluster_size - 1)) != 0
    if misplaced.any():
        walk.errors.append(f"{int(misplaced.sum())} refcount blocks are not aligned to a cluster")
    blocks = table[(table != 0) & ~misplaced] >> np.uint64(bits)
    walk.mark(blocks.astype(np.int64), "refcount table")
    twice = len(blocks) - len(np.unique(blocks))
    if twice:
        walk.errors.append(f"{twice} refcount blocks are used twice")
    walk.mark_bytes(header.l1_table_offset, 8 * header.l1_size, bits, "header")
    mark_tree(walk, image, image.mapping.l1, "active table", active=True)
    known = snapshots.load(image.host, header)
    walk.mark_bytes(header.snapshots_offset, sum(s.stored for s in known), bits, "snapshot table")
    for snapshot in known:
        mark_snapshot(walk, image, snapshot)
    return walk


def mark_fixed(walk: Walk, image: Qcow2Image) -> None:
    """The header, and bitmaps while they count as consistent."""
    walk.mark(np.zeros(1, np.int64), "file")
    if image.header.autoclear & Autoclear.BITMAPS:
        walk.mark(bitmap_clusters(image.host, image.header), "bitmaps")


def mark_snapshot(walk: Walk, image: Qcow2Image, snapshot: snapshots.Snapshot) -> None:
    what = f"snapshot {snapshot.id}"
    walk.mark_bytes(snapshot.l1_table_offset, 8 * snapshot.l1_size, image.header.cluster_bits, what)
    mark_tree(walk, image, read_l1(image, snapshot.l1_table_offset, snapshot.l1_size), what)


def wrong_flags(image: Qcow2Image, counts: Numbers) -> Iterator[str]:
    """Entries of the active tables whose COPIED flag contradicts a refcount."""
    layout, l1 = image.mapping.layout, image.mapping.l1
    for index in np.flatnonzero(valid_tables(l1, layout)).tolist():
        cluster = (int(l1[index]) & OFFSET) >> layout.bits
        if cluster < len(counts) and (counts[cluster] == 1) != bool(int(l1[index]) & COPIED):
            yield f"ERROR OFLAG_COPIED L2 cluster: l1_index={index} refcount={counts[cluster]}"
    for index, table in tables_of(image, l1):
        if layout.external:
            continue  # the flag alone says that they are allocated
        entries = table.entries
        offsets = entries & _OFFSET
        plain = (offsets != 0) & (entries & _COMPRESSED == 0) & ~impossible(entries, layout)
        plain &= offsets >> np.uint64(layout.bits) < len(counts)
        want = counts[(offsets[plain] >> np.uint64(layout.bits)).astype(np.int64)] == 1
        have = entries[plain] & _COPIED != 0
        for at in np.flatnonzero(plain)[want != have].tolist():
            where = f"table {index}, entry {at}"
            yield f"ERROR OFLAG_COPIED data cluster: l2_entry={int(entries[at]):x} ({where})"
        if (entries[entries & _COMPRESSED != 0] & _COPIED != 0).any():
            yield f"ERROR OFLAG_COPIED compressed cluster in L2 table {index}"
