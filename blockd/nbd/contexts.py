"""Metadata contexts: what a client may ask NBD_CMD_BLOCK_STATUS about an export.

Source: NBD protocol, "Metadata querying"; the namespace "qemu:" as QEMU documents it for its server
(docs/interop/nbd.txt, "qemu:dirty-bitmap:", whose status bit 0 is NBD_STATE_DIRTY).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import NamedTuple

from blockd.image import Image
from blockd.qcow2.dirty import DirtyBitmap
from blockd.qcow2.image import Qcow2Image
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import BASE_ALLOCATION, STATE_HOLE, STATE_ZERO

DIRTY_BITMAP = "qemu:dirty-bitmap:"
STATE_DIRTY = 1 << 0
#: queries of NBD_OPT_LIST_META_CONTEXT that mean everything which begins so
_PREFIXES = ("base:", "qemu:", DIRTY_BITMAP)


class Context(NamedTuple):
    """One context of an export."""

    #: on the wire; not 0, which a list of contexts has
    number: int
    name: str
    #: (length, status flags) of a range, in order from its begin and not past its end; OSError
    status: Callable[[int, int], Iterator[tuple[int, int]]]


def contexts_of(image: Image, bitmaps: tuple[str, ...]) -> tuple[Context, ...]:
    """The contexts of an image: its allocation, and the dirty bitmaps that are named. BlockError when one of
    these cannot be read."""
    found = [Context(1, BASE_ALLOCATION, lambda offset, length: _allocation(image, offset, length))]
    for name in dict.fromkeys(bitmaps):
        if not isinstance(image, Qcow2Image):
            raise BlockError(f"{image.file}: {image.format} images have no bitmaps", errno.ENOTSUP)
        try:
            bitmap = DirtyBitmap(image, name)
        except OSError as error:
            text = f"{image.file}: bitmap {name!r} cannot be read: {error.strerror or error}"
            raise BlockError(text, error.errno or errno.EIO) from None
        found.append(Context(len(found) + 1, DIRTY_BITMAP + name, _dirt(bitmap)))
    return tuple(found)


def _allocation(image: Image, offset: int, length: int) -> Iterator[tuple[int, int]]:
    for extent in image.extents(offset, length):
        yield extent.length, (STATE_HOLE if extent.hole else 0) | (STATE_ZERO if extent.zero else 0)


def _dirt(bitmap: DirtyBitmap) -> Callable[[int, int], Iterator[tuple[int, int]]]:
    return lambda offset, length: (
        (run.length, STATE_DIRTY if run.dirty else 0) for run in bitmap.runs(offset, length)
    )


def select(contexts: tuple[Context, ...], queries: list[str], setting: bool) -> list[Context]:
    """Those that a list of queries means. A query is a name; when listing also a namespace, and no queries
    at all ask for everything ("NBD_OPT_LIST_META_CONTEXT", "NBD_OPT_SET_META_CONTEXT")."""
    if not queries:
        return [] if setting else list(contexts)
    wanted = set(queries)
    prefixes = () if setting else tuple(prefix for prefix in _PREFIXES if prefix in wanted)
    return [one for one in contexts if one.name in wanted or one.name.startswith(prefixes)]
