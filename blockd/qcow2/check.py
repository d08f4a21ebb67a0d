"""Checking an image: refcounts against references, and repair.

Source: "Qcow2 Image File Format"; the figures and their names are those of ``qemu-img check``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from blockd.qcow2 import snapshots
from blockd.qcow2.header import Incompatible
from blockd.qcow2.operations import at_rest
from blockd.qcow2.switch import switch
from blockd.qcow2.walk import walk_image, wrong_flags

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image

#: lines about single clusters; the figures count all
MOST_LINES = 200


@dataclass
class Report:
    """What a check has found, or a repair has left."""

    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    image_end_offset: int = 0
    lines: list[str] = field(default_factory=list)

    def exit_status(self) -> int:
        """qemu-img's: 0 all is well, 2 corruptions, 3 leaks."""
        return 2 if self.corruptions else 3 if self.leaks else 0

    def as_dict(self, file: str) -> dict[str, Any]:
        """The members of ImageCheck; counts of zero are left out as qemu-img does."""
        result: dict[str, Any] = {
            "image-end-offset": self.image_end_offset,
            "total-clusters": self.total_clusters,
            "check-errors": 0,
            "filename": file,
            "format": "qcow2",
        }
        optional = {
            "allocated-clusters": self.allocated_clusters,
            "fragmented-clusters": self.fragmented_clusters,
            "compressed-clusters": self.compressed_clusters,
            "corruptions": self.corruptions,
            "leaks": self.leaks,
            "corruptions-fixed": self.corruptions_fixed,
            "leaks-fixed": self.leaks_fixed,
        }
        return result | {name: value for name, value in optional.items() if value}


def check(image: Qcow2Image) -> Report:
    """Compare refcounts with references. OSError when the image cannot be read."""
    walk = walk_image(image)
    counts = walk.counts
    stored = image.refcounts.all(len(counts))
    report = Report(lines=[f"ERROR {line}" for line in walk.errors])
    missing = np.flatnonzero(stored < counts)
    leaked = np.flatnonzero(stored > counts)
    for cluster in missing[:MOST_LINES].tolist():
        report.lines.append(f"ERROR cluster {cluster} refcount={stored[cluster]} reference={counts[cluster]}")
    for cluster in leaked[:MOST_LINES].tolist():
        report.lines.append(
            f"Leaked cluster {cluster} refcount={stored[cluster]} reference={counts[cluster]}"
        )
    flags = list(wrong_flags(image, stored))
    report.lines += flags[:MOST_LINES]
    report.corruptions = len(walk.errors) + len(missing) + len(flags)
    report.leaks = len(leaked)
    report.total_clusters = -(-image.size // image.header.cluster_size)
    report.allocated_clusters = walk.allocated
    report.compressed_clusters = walk.compressed
    report.fragmented_clusters = walk.fragmented
    used = np.flatnonzero(stored)
    report.image_end_offset = (int(used[-1]) + 1) << image.header.cluster_bits if len(used) else 0
    return report


def repair(image: Qcow2Image, everything: bool) -> Report:
    """Free leaked clusters; with ``everything`` also put right what is damaged: entries that cannot be
    are dropped, all refcounts counted again, and the marks dirty and corrupt removed."""
    with at_rest(image):
        before = check(image)
        marked = image.header.incompatible & (Incompatible.DIRTY | Incompatible.CORRUPT)
        if everything and (before.corruptions or marked):
            recount(image)
            if marked:
                image.set_features(incompatible=image.header.incompatible & ~int(marked))
        elif before.leaks:
            _free_leaks(image)
            image.host.sync()
        after = check(image)
    after.corruptions_fixed = max(0, before.corruptions - after.corruptions)
    after.leaks_fixed = max(0, before.leaks - after.leaks)
    after.lines = before.lines
    return after


def recount(image: Qcow2Image) -> None:
    """Count all references again and write new refcounts."""
    known = snapshots.load(image.host, image.header)
    switch(image, image.mapping.l1, image.header.size, known, repairing=True)


def _free_leaks(image: Qcow2Image) -> None:
    """Count down what is counted too often. A cluster that is left with one reference needs its COPIED
    flag, too, which cannot be set in the same moment: then all is counted again, if all tables are good."""
    walk = walk_image(image)
    stored, counts = image.refcounts.all(len(walk.counts)), walk.counts
    leaked = stored > counts
    if (leaked & (counts == 1)).any():
        if not walk.errors and not (stored < counts).any():
            recount(image)
            return
        leaked &= counts != 1
    surplus = stored.astype(np.int64) - counts.astype(np.int64)
    for extra in np.unique(surplus[leaked]).tolist():
        image.refcounts.change(np.flatnonzero(leaked & (surplus == extra)), -int(extra))
