"""The short way to the clusters of a qcow2 image that have their place: see blockd/batch.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockd._batch import lib
from blockd.batch import READ_ONLY, Batch
from blockd.hostfile import HostFile

if TYPE_CHECKING:
    from blockd.qcow2.image import Qcow2Image


class DirectClusters:
    """Where things lie is looked up under the image's lock, the bytes move outside of it, in a grace period:
    as the image's own methods have it."""

    def __init__(self, image: Qcow2Image) -> None:
        self._image = image
        #: where bytes can be moved by system calls alone: not on a file that is elsewhere, or is watched
        self._local = type(image.data) is HostFile

    def serve(self, batch: Batch) -> None:
        image, c = self._image, batch.c
        c.writes_from = READ_ONLY if image.read_only else 0
        if not self._local:
            with image.lock:
                self._settle(batch)
            c.done = 0
            return
        c.fd = image.data.fd
        with image.lock:
            tables = image.mapping.in_memory
            tables.backed = image.backing is not None
            if not lib.batch_plan(c, tables) and not (self._settle(batch) and lib.batch_plan(c, tables)):
                c.done = 0
                return
            epoch = image.enter()
        try:
            if image.tracker is None or self._mark(batch):
                lib.batch_run(c)
        finally:
            image.leave(epoch)

    def _settle(self, batch: Batch) -> bool:
        """Give clusters that the waiting writes are parts of places of their own, at one cost for all.
        False when the first request is no such write, or it cannot be done."""
        if not lib.batch_peek(batch.c) or not batch.c.requests[0].writes:
            return False
        try:
            return self._image.settle(batch.written())
        except OSError:
            return False  # each write will find out for itself

    def _mark(self, batch: Batch) -> bool:
        """Note in the bitmaps what will change. False, and nothing is to be done, when that fails: each
        request will find out for itself."""
        tracker = self._image.tracker
        assert tracker is not None
        try:
            for offset, length in batch.written():
                tracker.mark(offset, length)
        except OSError:
            batch.c.done = 0
            return False
        return True
