"""What is done to a whole image while it is open: snapshots and resizing.

Source: "Qcow2 Image File Format", section "Snapshots".
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from blockd.qcow2 import snapshots
from blockd.qcow2.bitmap_edit import BitmapSet
from blockd.qcow2.header import MAX_SNAPSHOTS, ExtensionType, rewrite, write_tables
from blockd.qcow2.snapshots import Snapshot
from blockd.qcow2.switch import Change, switch
from blockd.qcow2.tables import Entries
from blockd.qcow2.vmstate import VmState
from blockd.qcow2.walk import read_l1
from coordinator.contract.errors import BlockError

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image


@contextmanager
def at_rest(image: Qcow2Image) -> Iterator[None]:
    """Nothing moves, is reserved or waits to be freed, and nothing can begin."""
    with image.flushing, image.lock:
        image.drain()
        image.refcounts.give_back_reserved()
        image.flush()
        yield


def create(image: Qcow2Image, name: str, now: float | None = None) -> Snapshot:
    """Keep the state of the disk under a name."""
    now = time.time() if now is None else now
    with at_rest(image):
        made, change = creation(image, name, int(now * 1e9))
        change.commit()
        change.finish()
        return made


def creation(
    image: Qcow2Image,
    name: str,
    now_ns: int,
    clock_ns: int = 0,
    state: VmState | None = None,
    replace_named: bool = False,
) -> tuple[Snapshot, Change]:
    """A snapshot, ready to be taken into use: at UNIX time ``now_ns`` and guest time ``clock_ns``, with the
    machine's state where there is one, in the place of those with its name if ``replace_named``. The image is
    at rest."""
    if image.data is not image.host:
        raise OSError(errno.ENOTSUP, f"{image.file}: has an external data file, so it can have no snapshots")
    known = snapshots.load(image.host, image.header)
    if len(known) >= MAX_SNAPSHOTS:
        raise OSError(errno.EFBIG, f"{image.file}: has {MAX_SNAPSHOTS} snapshots already")
    ident = str(max((int(s.id) for s in known if s.id.isdecimal()), default=0) + 1)
    if replace_named:
        known = [snapshot for snapshot in known if snapshot.name != name]
    header = image.header
    active = image.mapping.l1[: max(1, header.l1_entries_for(header.size))]
    made = Snapshot(
        header.l1_table_offset,
        len(active),
        ident,
        name,
        now_ns // 10**9,
        now_ns % 10**9,
        clock_ns,
        state.size if state is not None else 0,
        header.size,
    )
    fresh = (made, state.table(active)) if state is not None else None
    return made, Change(image, active, header.size, [*known, made], made=fresh)


def apply(image: Qcow2Image, wanted: str) -> None:
    """Make the disk what it was."""
    with at_rest(image):
        known = snapshots.load(image.host, image.header)
        snapshot = snapshots.find(image.file, known, wanted)
        size, old = snapshot.disk_size, image.size
        if size > old:
            _resize_bitmaps(image, size)
        if image.tracker is not None:
            image.tracker.mark(0, old)
        switch(image, _disk_of(image, snapshot), size, known)
        if size < old:
            _resize_bitmaps(image, size)
        if image.tracker is not None:
            image.tracker.mark(0, size)


def application(image: Qcow2Image, snapshot: Snapshot) -> Change:
    """The same, ready to be taken into use, for a disk that still has the size it had then. The image is at
    rest."""
    known = snapshots.load(image.host, image.header)
    if image.tracker is not None:
        image.tracker.mark(0, image.size)
    return Change(image, _disk_of(image, snapshot), snapshot.disk_size, known)


def _disk_of(image: Qcow2Image, snapshot: Snapshot) -> Entries:
    """The L1 table of a snapshot without the machine's state, which lies behind the disk."""
    entries = read_l1(image, snapshot.l1_table_offset, snapshot.l1_size)
    return entries[: max(1, image.header.l1_entries_for(snapshot.disk_size))]


def delete(image: Qcow2Image, wanted: str) -> None:
    """Forget a snapshot."""
    with at_rest(image):
        known = snapshots.load(image.host, image.header)
        gone = snapshots.find(image.file, known, wanted)
        switch(image, image.mapping.l1, image.header.size, [s for s in known if s is not gone])


def resize(image: Qcow2Image, size: int) -> None:
    """Give the disk another size, a multiple of 512 bytes: new bytes are zero, lost ones are lost."""
    with at_rest(image):
        header = image.header
        if size == header.size:
            return
        _resize_bitmaps(image, size, trying=True)
        old = header.size
        entries = max(1, header.l1_entries_for(size))
        l1: Entries = np.zeros(entries, np.uint64)
        # what lies behind is a machine's state
        kept = min(entries, header.l1_entries_for(old))
        if size < old:
            _cut(image, size)
        else:
            _resize_bitmaps(image, size)
        l1[:kept] = image.mapping.l1[:kept]
        if image.data is not image.host and size > old:
            if image.data.size() > old:
                image.data.zero(old, image.data.size() - old)
            image.data.resize(max(size, image.data.size()))
        known = snapshots.load(image.host, header)
        if size > old and image.backing is not None and image.backing.size > old:
            if entries > header.l1_size:
                switch(image, l1, old, known)
            _hide_below(image, old, size)
            try:
                write_tables(image.host, header, size=size)
            finally:
                image.size = header.size
        else:
            switch(image, l1, size, known)
        if size < old:
            _resize_bitmaps(image, size)
        if image.data is not image.host and size < old:
            image.data.resize(size)


def _resize_bitmaps(image: Qcow2Image, size: int, trying: bool = False) -> None:
    """Fit the dirty bitmaps to a disk of that size, or with ``trying`` only see whether that can be. They
    are never shorter than the disk: so before it grows, and after it has been cut."""
    if image.tracker is None:
        return
    try:
        changed = BitmapSet(image)
        changed.resize(size)
        if not trying:
            changed.save()
    except BlockError as error:
        raise OSError(error.errno, f"{image.file}: {error}") from None


def make_empty(image: Qcow2Image) -> None:
    """Forget all content: everything reads as the backing file again, which has the same content already."""
    with at_rest(image):
        l1: Entries = np.zeros(len(image.mapping.l1), np.uint64)
        switch(image, l1, image.header.size, snapshots.load(image.host, image.header))


def set_backing(image: Qcow2Image, file: str | None, image_format: str | None) -> None:
    """Write another backing file into the header. BlockError when it does not fit."""
    with at_rest(image):
        changed = replace(image.header, backing_file=file, extensions=list(image.header.extensions))
        text = None if file is None or image_format is None else image_format.encode()
        changed.set_extension(ExtensionType.BACKING_FORMAT, text)
        rewrite(image.host, changed)
        image.header.backing_file, image.header.extensions = file, changed.extensions


def _cut(image: Qcow2Image, size: int) -> None:
    """Give up the clusters behind a new end that share an L2 table with it; what is left of the last
    cluster becomes zero, so that it is zero when the disk grows again."""
    header = image.header
    covered = header.cluster_size << image.mapping.layout.l2_bits
    stop = min(header.size, -(-size // covered) * covered)
    if stop > size:
        image.cut(size, stop - size)
        image.refcounts.give_back_reserved()
        image.flush()


def _hide_below(image: Qcow2Image, old: int, size: int) -> None:
    """Where the backing file is longer than the disk was, its bytes must not come to light. So they are
    covered, durably, before the disk has its new end, which nobody may see until then."""
    assert image.backing is not None
    image.size = size
    try:
        image.write_zeroes(old, min(size, image.backing.size) - old, unmap=True, fast=False)
        image.refcounts.give_back_reserved()
        image.flush()
    finally:
        image.size = old
