"""``atoll img rebase``: another backing file for an image, or none.

The disk does not change: what differs between the old and the new backing file, and is not in the image,
is copied into it first. With -u only the name is written.
"""

from __future__ import annotations

import errno

from blockd.image import Image
from blockd.img import common
from blockd.qcow2.backing import plain_path, read_below, resolve
from blockd.qcow2.image import Qcow2Image
from blockd.qcow2.operations import set_backing
from blockd.qcow2.tables import UNALLOCATED
from coordinator.contract.config import IMAGE_FORMATS
from coordinator.contract.errors import BlockError, UsageError


def run(arguments: list[str]) -> int:
    parser = common.Parser("rebase", "Give an image another backing file.")
    parser.format_option()
    parser.add_argument("-b", dest="backing", metavar="FILE", required=True, help="an empty name for none")
    parser.add_argument("-F", dest="backing_format", choices=IMAGE_FORMATS, help="its format")
    parser.add_argument("-u", dest="unsafe", action="store_true", help="write the name only")
    parser.progress_option()
    parser.quiet_option()
    parser.ignored("-t", "-T")
    parser.chain_option()
    parser.add_argument("file")
    given = parser.parse_intermixed_args(arguments)
    name = given.backing or None
    if name is not None and given.backing_format is None:
        raise UsageError("rebase: the format of the backing file is needed (-F)")
    if name is not None and plain_path(given.file, name) is None:
        raise BlockError(f"backing file {name!r} is no plain file name and no NBD export", errno.EINVAL)
    image = common.open_qcow2(
        given.file, given.format, False, "backing file", allowed=given.allow_backing, backed=not given.unsafe
    )
    try:
        if not given.unsafe:
            new = None
            if name is not None:
                path = resolve(given.file, name, ("*",))
                new = common.open_image(path, given.backing_format, allowed=given.allow_backing)
            try:
                _take_over(image, new, common.Progress(given.progress, image.size))
            finally:
                if new is not None:
                    new.close()
            image.flush()
        set_backing(image, name, given.backing_format)
    finally:
        image.close()
    return 0


def _take_over(image: Qcow2Image, new: Image | None, progress: common.Progress) -> None:
    """Copy what reads differently from below."""
    old = image.backing
    for kind, start, size, _ in list(image.map(0, image.size)):
        if kind != UNALLOCATED:
            continue
        for first, end in _not_zero([old, new], start, size, image.header.cluster_size):
            for at, length in common.chunks(first, end - first):
                before, after = bytearray(length), bytearray(length)
                if old is not None:
                    read_below(old, at, memoryview(before))
                if new is not None:
                    read_below(new, at, memoryview(after))
                _copy_differences(image, at, before, after)
                progress.at(at + length)
    progress.end()


def _not_zero(below: list[Image | None], start: int, length: int, cluster: int) -> list[tuple[int, int]]:
    """(begin, end) of the ranges in which one of the images may have data, in order and in whole clusters as
    far as the range has those."""
    found = []
    for image in below:
        inside = 0 if image is None else min(length, image.size - start)
        if image is None or inside <= 0:
            continue
        at = start
        for extent in image.extents(start, inside):
            if not extent.zero:
                first, last = at // cluster * cluster, -(-(at + extent.length) // cluster) * cluster
                found.append((max(start, first), min(start + length, last)))
            at += extent.length
    merged: list[tuple[int, int]] = []
    for first, last in sorted(found):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def _copy_differences(image: Qcow2Image, at: int, before: bytearray, after: bytearray) -> None:
    if before == after:
        return
    size = image.header.cluster_size
    for inside in range(0, len(before), size):
        piece = before[inside : inside + size]
        if piece == after[inside : inside + size]:
            continue
        if piece.strip(b"\0"):
            image.write(at + inside, piece)
        else:
            image.write_zeroes(at + inside, len(piece), unmap=True, fast=False)
