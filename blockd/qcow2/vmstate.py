"""The machine's state in an internal snapshot: data behind the end of the disk.

Source: "Qcow2 Image File Format", sections "Snapshots" ("VM state") and "Cluster mapping"; where it begins
is QEMU's: at the first L1 entry that the disk does not need. QEMU writes it through the active tables and
gives it up there; here it goes to clusters that only the snapshot's own tables will name, so the disk is not
touched.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from blockd.qcow2 import snapshots
from blockd.qcow2.header import MAX_L1_BYTES, Header
from blockd.qcow2.refcounts import Clusters
from blockd.qcow2.tables import COPIED, Entries, encode
from coordinator.contract.errors import BlockError

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image
    from blockd.qcow2.snapshots import Snapshot

#: the bitmap of an extended entry whose subclusters are all allocated
_WHOLE = np.uint64(0xFFFFFFFF)


def start_of(header: Header, disk_size: int) -> int:
    """Where the state begins behind a disk of that size, bytes."""
    return header.l1_entries_for(disk_size) << (header.cluster_bits + header.l2_bits)


class VmState:
    """A state that is being stored. A crash leaves its clusters leaked, ``drop`` free: nothing points to them
    before a snapshot does."""

    def __init__(self, image: Qcow2Image) -> None:
        self.image = image
        self.size = 0
        self._bits = image.header.cluster_bits
        self._clusters: list[Clusters] = []
        #: the tables of before: when they have been switched, the clusters are free
        self._tables = self._in_use()

    def _in_use(self) -> tuple[int, int]:
        return self.image.header.l1_table_offset, self.image.header.refcount_table_offset

    def append(self, data: memoryview) -> None:
        """More of it; only the last piece may end within a cluster."""
        image, at = self.image, 0
        with image.lock:
            while at < len(data):
                first, count = image.refcounts.take(-(-(len(data) - at) >> self._bits))
                self._clusters.append(np.arange(first, first + count))
                piece = data[at : at + (count << self._bits)]
                image.host.write(first << self._bits, piece)
                at += len(piece)
        self.size += len(data)

    def table(self, active: Entries) -> Entries:
        """L1 entries of a snapshot: those of the disk, and behind them the state's, whose L2 tables are
        written now. OSError where it would be too large."""
        image, layout = self.image, self.image.mapping.layout
        if self._tables != self._in_use():
            text = f"{image.file}: was changed while the machine's state was being stored"
            raise OSError(errno.ESTALE, text)
        hosts = np.concatenate(self._clusters) if self._clusters else np.zeros(0, np.int64)
        tables = -(-len(hosts) // layout.l2_entries)
        if (len(active) + tables) * 8 > MAX_L1_BYTES:
            text = f"{image.file}: its clusters are too small for a state of {self.size} bytes"
            raise OSError(errno.EFBIG, text)
        places: list[int] = []
        for number in range(tables):
            part = hosts[number * layout.l2_entries : (number + 1) * layout.l2_entries]
            entries = np.zeros(layout.l2_entries, np.uint64)
            entries[: len(part)] = part.astype(np.uint64) << np.uint64(self._bits)
            bitmaps = np.where(entries != 0, _WHOLE, np.uint64(0)) if layout.extended else None
            cluster, _ = image.refcounts.take(1)
            self._clusters.append(np.array([cluster]))
            image.host.write(cluster << self._bits, encode(entries, bitmaps))
            places.append(cluster << self._bits)
        return np.concatenate((active & ~np.uint64(COPIED), np.array(places, np.uint64)))

    def drop(self) -> None:
        """It is not wanted: its clusters are free after the next flush."""
        with self.image.lock:
            if self._clusters and self._tables == self._in_use():
                self.image.condemn(np.sort(np.concatenate(self._clusters)))
            self._clusters.clear()


class StoredState:
    """The state of a snapshot, to be read while the image is in use: its tables do not change."""

    def __init__(self, image: Qcow2Image, snapshot: Snapshot) -> None:
        """BlockError where the entry names what cannot be there."""
        header = image.header
        self._at, self.size = start_of(header, snapshot.disk_size), snapshot.vm_state_size
        covered = snapshot.l1_size << (header.cluster_bits + header.l2_bits)
        if not 0 < self.size <= covered - self._at:
            text = f"snapshot {snapshot.name!r}: a machine's state of {self.size} bytes is not there"
            raise BlockError(f"{image.file}: {text}", errno.EINVAL)
        self._view = type(image)(
            image.file, True, locked=False, snapshot=f"snapshot.id={snapshot.id}", backed=False
        )

    def read_into(self, offset: int, view: memoryview) -> None:
        self._view.read_into(self._at + offset, view)

    def close(self) -> None:
        self._view.close_files()


def named(image: Qcow2Image, tag: str) -> Snapshot | None:
    """The first snapshot of exactly that name."""
    return next((s for s in snapshots.load(image.host, image.header) if s.name == tag), None)
