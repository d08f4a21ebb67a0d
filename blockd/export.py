"""Exports: which image is served under which name, and to whom.

An export lives from open to retirement. While it lives its image stays open; retirement first
finishes or discards the requests of every session, so afterwards nothing of the image changes
any more. A new medium under the same name is a new export with the next epoch.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

from blockd.export_image import DISK_SECTOR, open_image
from blockd.image import Image
from blockd.lease.image import LeasedImage
from blockd.nbd.contexts import contexts_of
from blockd.qcow2.check import repair
from blockd.qcow2.image import Qcow2Image
from coordinator.contract import config
from coordinator.contract.errors import BlockError

log = logging.getLogger(__name__)


class Counters:
    """What has been asked of an export. Each session counts for itself, without a lock."""

    __slots__ = ("errors", "flushes", "read_bytes", "reads", "write_bytes", "writes", "zeroes")

    def __init__(self) -> None:
        self.reads = self.read_bytes = 0
        self.writes = self.write_bytes = 0
        self.flushes = 0
        #: trim and write-zeroes requests
        self.zeroes = 0
        #: requests answered with an error
        self.errors = 0

    def add(self, other: Counters) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class Session(Protocol):
    """A client that has chosen an export."""

    counters: Counters

    def peer_gone(self) -> bool:
        """Has the client closed its end?"""
        ...

    def end(self) -> None:
        """Finish the request being served, discard the rest, and return when nothing is served any
        more."""
        ...


class Export:
    """One image under one name."""

    def __init__(self, wanted: config.Export, image: Image, epoch: int) -> None:
        """BlockError when a bitmap that is wanted cannot be read."""
        self.name = wanted.id
        self.image = image
        self.media = wanted.media
        self.epoch = epoch
        self.description = wanted.description or f"{wanted.media.value}, {image.format}"
        self.discard = wanted.discard
        self.writethrough = wanted.writethrough
        self.detect_zeroes = wanted.detect_zeroes
        self.contexts = contexts_of(image, wanted.bitmaps)
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()
        self._retired = False
        self._past = Counters()
        #: whoever had it before has died, and may have left clusters that nothing refers to
        self.inherited = False

    def join(self, session: Session) -> bool:
        """Let a session begin; False when the export is being retired.

        A client that died may have left requests in its socket, and comes back with the same ones:
        so whatever sessions have lost their client are ended first. Otherwise an old write could land
        on a newer one.
        """
        with self._lock:
            lost = [other for other in self._sessions if other.peer_gone()]
        for other in lost:
            other.end()
        with self._lock:
            if not self._retired:
                self._sessions.add(session)
            return not self._retired

    def leave(self, session: Session) -> None:
        """A session has ended (called once by each that joined)."""
        with self._lock:
            self._sessions.discard(session)
            self._past.add(session.counters)

    def end_sessions(self) -> None:
        """End every session, so that clients come back with nothing under way. The export stays."""
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.end()

    def retire(self) -> None:
        """End every session, make the image durable and close it. BlockError when the flush fails; the
        image is closed all the same."""
        with self._lock:
            self._retired = True
            sessions = list(self._sessions)
        for session in sessions:
            session.end()
        try:
            self.image.flush()
        except OSError as error:
            raise BlockError(f"{self.image.file}: flush failed: {error.strerror}", error.errno or 5) from None
        else:
            self._win_back()
        finally:
            self.image.close()

    def _win_back(self) -> None:
        """Free what a process that died had taken and not used yet; its successor has no time for that while
        a guest waits."""
        if not self.inherited:
            return
        try:
            image = self.image.held() if isinstance(self.image, LeasedImage) else self.image
            if isinstance(image, Qcow2Image) and not image.read_only:
                repair(image, everything=False)
        except (OSError, BlockError) as error:
            log.warning("%s: leaked clusters stay: %s", self.image.file, error)

    def resize(self, size: int) -> None:
        """Make the disk larger. Sessions that are there go on with the size they were told, for NBD has no
        word for another one; so it never shrinks. BlockError when it cannot be."""
        file = self.image.file
        if self.image.read_only:
            raise BlockError(f"{file}: is served read-only, so its size cannot change", errno.EROFS)
        if len(self.contexts) > 1:
            raise BlockError(f"{file}: its bitmaps are served, so its size cannot change", errno.EBUSY)
        if size < self.image.size or size % DISK_SECTOR:
            has = self.image.size
            text = f"{file}: a disk that is served can only grow, by whole sectors (it has {has} bytes)"
            raise BlockError(text, errno.EINVAL)
        try:
            self.image.resize(size)
        except OSError as error:
            text = f"{file}: cannot be resized: {error.strerror or error}"
            raise BlockError(text, error.errno or errno.EIO) from None

    def describe(self) -> dict[str, Any]:
        """What QueryExports tells."""
        with self._lock:
            total = Counters()
            total.add(self._past)
            for session in self._sessions:
                total.add(session.counters)
            clients = len(self._sessions)
        return {
            "id": self.name,
            "file": self.image.file,
            "format": self.image.format,
            "media": self.media.value,
            "size": self.image.size,
            "read_only": self.image.read_only,
            "epoch": self.epoch,
            "clients": clients,
            **total.as_dict(),
        }


class ExportTable:
    """All exports by name, in the order in which they were opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._exports: dict[str, Export] = {}
        self._epochs: dict[str, int] = {}

    def find(self, name: str) -> Export | None:
        """The export of that name. The empty name ("default export") means the only one there is."""
        with self._lock:
            if name == "" and len(self._exports) == 1:
                return next(iter(self._exports.values()))
            return self._exports.get(name)

    def named(self, name: str) -> Export:
        """The export of exactly that name; BlockError when there is none."""
        with self._lock:
            export = self._exports.get(name)
        if export is None:
            raise BlockError(f"no export is named {name!r}", errno.ENOENT)
        return export

    def names(self) -> list[str]:
        with self._lock:
            return list(self._exports)

    def all(self) -> list[Export]:
        with self._lock:
            return list(self._exports.values())

    def open(self, wanted: config.Export, opener: Callable[[config.Export], Image] = open_image) -> Export:
        """Open an export; one of that name that is open is retired, and only if the new file is good."""
        image = opener(wanted)
        with self._lock:
            epoch = self._epochs.get(wanted.id, 0) + 1
            try:
                export = Export(wanted, image, epoch)
            except BlockError:
                image.close()
                raise
            self._epochs[wanted.id] = epoch
            old = self._exports.get(wanted.id)
            self._exports[wanted.id] = export
        if old is not None:
            old.retire()
        return export

    def close(self, name: str) -> None:
        """Retire one export; BlockError when there is none of that name."""
        with self._lock:
            export = self._exports.pop(name, None)
        if export is None:
            raise BlockError(f"no export is named {name!r}", 2)
        export.retire()

    def close_all(self) -> list[str]:
        """Retire every export; returns the errors that this brought, in one line each."""
        errors = []
        for name in self.names():
            try:
                self.close(name)
            except BlockError as error:
                errors.append(str(error))
        return errors

    def describe(self) -> list[dict[str, Any]]:
        return [export.describe() for export in self.all()]
