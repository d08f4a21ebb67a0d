"""``atoll img convert --bitmaps``: dirty bitmaps of the source become the target's, too."""

from __future__ import annotations

import errno
import sys

from blockd.image import Image
from blockd.qcow2.bitmap_edit import BitmapSet
from blockd.qcow2.bitmaps import AUTO
from blockd.qcow2.image import Qcow2Image
from blockd.qcow2.operations import at_rest
from coordinator.contract.errors import BlockError


def chosen(source: Image, skip_broken: bool) -> list[str]:
    """The bitmaps that are to be copied. BlockError where one cannot be."""
    if not isinstance(source, Qcow2Image):
        raise BlockError(f"Format driver '{source.format}' does not support bitmaps", errno.ENOTSUP)
    known, names = BitmapSet(source), []
    for bitmap in known.bitmaps():
        try:
            known.usable(bitmap.name)
        except BlockError:
            if not skip_broken:
                text = f"Cannot copy inconsistent bitmap '{bitmap.name}'; try --skip-broken-bitmaps, or use "
                raise BlockError(f"{text}'bitmap --remove' to delete it", errno.EINVAL) from None
            print(f"atoll img: warning: Skipping inconsistent bitmap '{bitmap.name}'", file=sys.stderr)
        else:
            names.append(bitmap.name)
    return names


def copy(source: Image, names: list[str], target_file: str) -> None:
    """Copy what ``chosen`` said."""
    assert isinstance(source, Qcow2Image)
    target = Qcow2Image(target_file, backed=False)
    try:
        with at_rest(target):
            theirs, ours = BitmapSet(source), BitmapSet(target)
            for name in names:
                bitmap = theirs.usable(name)
                ours.add(name, 1 << bitmap.granularity_bits, bool(bitmap.flags & AUTO))
                ours.merge(name, theirs, name)
            ours.save()
    finally:
        target.close()
