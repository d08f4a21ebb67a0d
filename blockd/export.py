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

import msgspec

from blockd import scratch
from blockd.hostfile import read_only_hint
from blockd.image import Buffer, Image
from blockd.nbd.contexts import contexts_of
from blockd.nbd.remote import NbdImage
from blockd.opening import open_file, open_raw_image, probe, unsafe_file
from blockd.opening import open_image as open_named
from blockd.qcow2.backing import Chain
from blockd.qcow2.create import Options, create
from blockd.qcow2.header import is_qcow2
from blockd.qcow2.image import Qcow2Image
from blockd.raw import RawImage
from coordinator.contract import config
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import absolute_name, is_network_name

log = logging.getLogger(__name__)

#: bytes by which a qcow2 image is known
JUDGED = 4

#: ATA sector (ATA8-ACS, 3.1.57) and CD-ROM user data (MMC-6, 4.2.3.4), in bytes
DISK_SECTOR = 512
CD_SECTOR = 2048


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
        finally:
            self.image.close()

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


def open_raw(wanted: config.Export) -> Image:
    """A disk in whole sectors, or a CD-ROM, which is never written and padded to a whole sector."""
    if wanted.load_snapshot:
        raise BlockError(f"{wanted.file}: raw images have no snapshots", errno.ENOTSUP)
    if wanted.media is config.Media.CDROM:
        return open_raw_image(wanted.file, read_only=True, granularity=CD_SECTOR, pad=True)
    granularity = DISK_SECTOR if wanted.sectors else 1
    if wanted.inactive:
        return RawImage(wanted.file, True, granularity, locked=False)
    return open_raw_image(wanted.file, wanted.read_only, granularity)


def open_qcow2(wanted: config.Export) -> Image:
    """A qcow2 image with its chain of backing files, as far as those are allowed."""
    snapshot = wanted.load_snapshot or None
    read_only = wanted.read_only or wanted.media is config.Media.CDROM or snapshot is not None
    read_only |= wanted.inactive
    opener = unsafe_file if wanted.unsafe else open_file
    chain, locked = Chain(wanted.backing_allowed), not wanted.inactive
    image = open_named(
        wanted.file, "qcow2", read_only, chain=chain, open_file=opener, locked=locked, snapshot=snapshot
    )
    if image.size % DISK_SECTOR:
        size = image.size
        image.close()
        raise BlockError(f"{wanted.file}: a disk of {size} bytes has no whole number of sectors", 22)
    return image


def open_probed(wanted: config.Export) -> Image:
    """What the file claims to be. The guest of a raw disk could make that claim, too: so a disk that was
    found to be raw is kept from becoming anything else."""
    if probe(wanted.file) == "qcow2":
        return open_qcow2(wanted)
    if wanted.read_only or wanted.load_snapshot or wanted.media is config.Media.CDROM or wanted.inactive:
        return open_raw(wanted)
    log.warning(
        "%s: no format was given, and raw was guessed; say %s to lift limits on block 0",
        wanted.file,
        wanted.raw_option,
    )
    kind = ProbedNbdImage if is_network_name(wanted.file) else ProbedRawImage
    image = kind(wanted.file, granularity=DISK_SECTOR if wanted.sectors else 1)
    image.raw_option = wanted.raw_option
    return image


def _check_start(image: ProbedRawImage | ProbedNbdImage, offset: int, data: Buffer) -> None:
    """EPERM when a write would make the first bytes of a raw disk those of another format."""
    if offset < JUDGED:
        start = bytearray(JUDGED)
        image.read_into(0, memoryview(start))
        new = bytes(data[: JUDGED - offset])
        start[offset : offset + len(new)] = new
        if is_qcow2(bytes(start)):
            text = f"{image.file}: block 0 would make it look like qcow2; say {image.raw_option}"
            raise OSError(errno.EPERM, text)


class ProbedRawImage(RawImage):
    """A raw disk that stays one."""

    judged_below = JUDGED
    raw_option = "format=raw"

    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        _check_start(self, offset, data)
        super().write(offset, data, fua)


class ProbedNbdImage(NbdImage):
    """The same on a server."""

    raw_option = "format=raw"

    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        _check_start(self, offset, data)
        super().write(offset, data, fua)


def open_throwaway(wanted: config.Export) -> Image:
    """The image as it is, with a layer above it that takes all writes and that nobody can find again."""
    image_format = wanted.format if wanted.format != "auto" else probe(wanted.file)
    base = FORMATS[image_format](msgspec.structs.replace(wanted, read_only=True))
    size = base.size
    base.close()
    with scratch.nameless() as layer:
        file = absolute_name(wanted.file)
        create(layer, Options(size, backing_file=file, backing_format=image_format))
        image = Qcow2Image(layer, False, Chain((file, *wanted.backing_allowed)), unsafe_file)
    image.file = wanted.file
    return image


#: format name to what opens it
FORMATS: dict[str, Callable[[config.Export], Image]] = {
    "raw": open_raw,
    "qcow2": open_qcow2,
    "auto": open_probed,
}


def open_image(wanted: config.Export) -> Image:
    """The image of an export; BlockError in one line when it cannot be."""
    opener = FORMATS.get(wanted.format)
    if opener is None:
        known = ", ".join(sorted(FORMATS))
        raise BlockError(f"{wanted.file}: format {wanted.format!r} is unknown (known: {known})", 22)
    if wanted.snapshot and wanted.media is config.Media.DISK:
        opener = open_throwaway
    with read_only_hint(wanted.read_only_option):
        image = opener(wanted)
    if not image.size:  # no drive has a medium without sectors
        image.close()
        raise BlockError(f"{wanted.file}: is empty", errno.EINVAL)
    return image


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
