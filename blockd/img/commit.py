"""``atoll img commit``: write what an image has over its backing file into that file, and empty it."""

from __future__ import annotations

import errno
import os

from blockd.image import Image
from blockd.img import common
from blockd.qcow2 import operations
from blockd.qcow2.backing import resolve
from blockd.qcow2.image import Qcow2Image
from blockd.qcow2.tables import UNALLOCATED, ZEROES
from coordinator.contract.errors import BlockError

CHUNK = 2 << 20


def run(arguments: list[str]) -> int:
    parser = common.Parser("commit", "Write what an image has over its backing file into that file.")
    parser.format_option()
    parser.add_argument("-d", dest="keep", action="store_true", help="do not empty the image afterwards")
    parser.add_argument("-b", dest="base", metavar="FILE", help="the backing file, if it is the next one")
    parser.add_argument("-p", dest="progress", action="store_true")
    parser.add_argument("-q", dest="quiet", action="store_true")
    parser.ignored("-t", "-r")
    parser.chain_option()
    parser.add_argument("file")
    given = parser.parse_intermixed_args(arguments)
    image = common.open_qcow2(given.file, given.format, False, "backing file", backed=False)
    try:
        name = image.header.backing_file
        if name is None:
            raise BlockError("Image does not have a backing file", errno.EINVAL)
        path = resolve(given.file, name, tuple(given.allow_backing))
        if given.base is not None and os.path.realpath(given.base) != os.path.realpath(path):
            raise BlockError(
                f"{given.base}: is not the next backing file; committing further is not supported", 95
            )
        base = common.open_image(
            path, image.header.backing_format, read_only=False, allowed=given.allow_backing
        )
        try:
            _grow(base, image.size)
            _copy(image, base, common.Progress(given.progress, image.size))
            base.flush()
        finally:
            base.close()
        if not given.keep:
            operations.make_empty(image)
    finally:
        image.close()
    if not given.quiet:
        print("Image committed.")
    return 0


def _grow(base: Image, disk_size: int) -> None:
    """The backing file may be shorter than the image."""
    if base.size >= disk_size:
        return
    base.resize(disk_size)


def _copy(image: Qcow2Image, base: Image, progress: common.Progress) -> None:
    buffer = memoryview(bytearray(CHUNK))
    for kind, start, size, _ in image.map(0, image.size):
        if kind == UNALLOCATED:
            continue
        if kind == ZEROES:
            base.write_zeroes(start, size, unmap=True, fast=False)
            continue
        at, end = start, start + size
        while at < end:
            piece = min(CHUNK, end - at)
            image.read_into(at, buffer[:piece])
            base.write(at, buffer[:piece])
            at += piece
            progress.at(at)
    progress.end()
