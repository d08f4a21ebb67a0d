"""The image of an export, by its format and by what the export is for: a drive of a machine, or a client's.

The drive sees whole sectors; a disk whose format was guessed cannot be made to look like another one; and
one that is thrown away in the end has a layer above it.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

import msgspec

from blockd import files, opening, scratch
from blockd.hostfile import read_only_hint
from blockd.image import Buffer, Image
from blockd.nbd.remote import NbdImage
from blockd.qcow2.backing import Chain
from blockd.qcow2.create import Options, create
from blockd.qcow2.header import is_qcow2
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


def open_raw(wanted: config.Export) -> Image:
    """A disk in whole sectors, or a CD-ROM, which is never written and padded to a whole sector."""
    if wanted.load_snapshot:
        raise BlockError(f"{wanted.file}: raw images have no snapshots", errno.ENOTSUP)
    if wanted.media is config.Media.CDROM:
        return opening.open_raw_image(wanted.file, read_only=True, granularity=CD_SECTOR, pad=True)
    granularity = DISK_SECTOR if wanted.sectors else 1
    if wanted.inactive:
        return RawImage(wanted.file, True, granularity, locked=False)
    return opening.open_raw_image(wanted.file, wanted.read_only, granularity)


def open_qcow2(wanted: config.Export) -> Image:
    """A qcow2 image with its chain of backing files, as far as those are allowed."""
    snapshot = wanted.load_snapshot or None
    read_only = wanted.read_only or wanted.media is config.Media.CDROM or snapshot is not None
    read_only |= wanted.inactive
    opener = files.unsafe_file if wanted.unsafe else files.open_file
    chain, locked = Chain(wanted.backing_allowed), not wanted.inactive
    image = opening.open_qcow2(wanted.file, read_only, chain, opener, locked=locked, snapshot=snapshot)
    if image.size % DISK_SECTOR:
        size = image.size
        image.close()
        raise BlockError(f"{wanted.file}: a disk of {size} bytes has no whole number of sectors", 22)
    return image


def open_probed(wanted: config.Export) -> Image:
    """What the file claims to be. The guest of a raw disk could make that claim, too: so a disk that was
    found to be raw is kept from becoming anything else."""
    if opening.probe(wanted.file) == "qcow2":
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
    image_format = wanted.format if wanted.format != "auto" else opening.probe(wanted.file)
    base = FORMATS[image_format](msgspec.structs.replace(wanted, read_only=True))
    size = base.size
    base.close()
    with scratch.nameless(wanted.id) as layer:
        file = absolute_name(wanted.file)
        if not os.stat(layer).st_size:
            create(layer, Options(size, backing_file=file, backing_format=image_format))
        image = opening.open_qcow2(layer, False, Chain((file, *wanted.backing_allowed)), files.unsafe_file)
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
