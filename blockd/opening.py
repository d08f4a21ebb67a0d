"""Opening what a name means, a file or an NBD server's export: the one way for all callers."""

from __future__ import annotations

import errno
from typing import Any

from blockd.files import OpenFile, open_file
from blockd.image import Image
from blockd.qcow2 import header
from blockd.qcow2.backing import Chain
from blockd.qcow2.image import Qcow2Image
from blockd.raw import RawImage
from coordinator.contract.config import IMAGE_FORMATS
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import is_network_name

#: what images of other formats begin with: (offset, bytes) -> name. Sources: "LUKS On-Disk Format", 2.1;
#: "QED Image File Format"; "VMware Virtual Disk Format 1.1", sparse extents and descriptors; [MS-VHDX] 2.2.1;
#: VirtualBox, VDICore.h
_FOREIGN = {
    (0, b"LUKS\xba\xbe"): "LUKS",
    (0, b"QED\0"): "QED",
    (0, b"KDMV"): "VMDK",
    (0, b"# Disk DescriptorFile"): "VMDK",
    (0, b"vhdxfile"): "VHDX",
    (0x40, b"\x7f\x10\xda\xbe"): "VDI",
}


def probe(file: str) -> str:
    """The format that a file claims to have: qcow2 by its magic number, else raw. BlockError for what claims
    to be of a format that is not known here, since its bytes are not the disk's."""
    host = open_file(file, read_only=True)
    try:
        begin = host.read(0, min(512, host.size()))
        for (at, magic), name in _FOREIGN.items():
            if begin.startswith(magic, at):
                text = f"{file}: looks like {name}, which is not supported (raw, if asked for, takes it)"
                raise BlockError(text, errno.ENOTSUP)
        return "qcow2" if header.is_qcow2(begin) else "raw"
    except OSError as error:
        raise BlockError(f"{file}: cannot be read: {error.strerror or error}", error.errno or 5) from None
    finally:
        host.close()


def open_raw_image(
    file: str, read_only: bool = False, granularity: int = 512, pad: bool = False, locked: bool = True
) -> Image:
    """A raw image: see RawImage, and NbdImage, which has no locks."""
    if is_network_name(file):
        from blockd.nbd.remote import NbdImage

        return NbdImage(file, read_only, granularity, pad)
    return RawImage(file, read_only, granularity, pad, locked)


def open_qcow2(
    file: str,
    read_only: bool = False,
    chain: Chain | None = None,
    open_file: OpenFile = open_file,
    **how: Any,
) -> Qcow2Image:
    """A qcow2 image and the chain below it: see Qcow2Image."""
    return Qcow2Image(file, read_only, chain, open_file, open_below, **how)


def open_below(file: str, image_format: str | None, chain: Chain) -> Image:
    """A backing file, of whatever format."""
    return open_image(file, image_format, read_only=True, pad=True, chain=chain)


def open_image(
    file: str,
    image_format: str | None = None,
    read_only: bool = False,
    granularity: int = 512,
    pad: bool = False,
    locked: bool = True,
    **how: Any,
) -> Image:
    """An image of a format; without one, of the format that it claims to have. ``granularity`` and ``pad``
    are for raw images, ``how`` (see Qcow2Image) for qcow2. Unless ``locked``, others may write it meanwhile.
    BlockError in one line when that cannot be."""
    image_format = image_format or probe(file)
    if image_format == "qcow2":
        return open_qcow2(file, read_only, locked=locked, **how)
    if image_format != "raw":
        text = f"{file}: format {image_format!r} is not supported ({' and '.join(IMAGE_FORMATS)} are)"
        raise BlockError(text, errno.ENOTSUP)
    if how.get("snapshot"):
        raise BlockError(f"{file}: a raw image has no snapshots", errno.ENOTSUP)
    return open_raw_image(file, read_only, granularity, pad, locked)
