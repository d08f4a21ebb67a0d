"""``atoll img commit``: write what an image has over a backing file into that file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack

from blockd.image import Image
from blockd.img import common
from blockd.qcow2 import operations
from blockd.qcow2.backing import Chain, resolve
from blockd.qcow2.image import Qcow2Image
from blockd.qcow2.tables import UNALLOCATED, ZEROES
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import is_network_name


def run(arguments: list[str]) -> int:
    parser = common.Parser("commit", "Write what an image has over its backing file into that file.")
    parser.format_option()
    parser.add_argument("-d", dest="keep", action="store_true", help="do not empty the image afterwards")
    parser.add_argument(
        "-b", dest="base", metavar="FILE", help="a backing file further down; the image is not emptied then"
    )
    parser.progress_option()
    parser.quiet_option()
    parser.ignored("-t", "-r")
    parser.chain_option()
    parser.add_argument("file")
    given = parser.parse_intermixed_args(arguments)
    keep = given.keep or given.base is not None
    with ExitStack() as stack:
        image = common.open_qcow2(given.file, given.format, keep, "backing file", backed=False)
        stack.callback(image.close)
        above, path, base_format = _down_to_base(image, given, stack)
        base = common.open_image(path, base_format, read_only=False, allowed=given.allow_backing)
        stack.callback(base.close)
        if base.size < image.size:
            base.resize(image.size)
        _copy(above, base, common.Progress(given.progress, image.size))
        base.flush()
        if not keep:
            operations.make_empty(image)
    if not given.quiet:
        print("Image committed.")
    return 0


def _down_to_base(
    image: Qcow2Image, given: common.argparse.Namespace, stack: ExitStack
) -> tuple[list[Qcow2Image], str, str | None]:
    """The images above the base, each opened by itself, and the base's name and format."""
    above, chain = [image], Chain(tuple(given.allow_backing))
    while True:
        last = above[-1]
        chain = chain.below(last.file, last.host.identity())
        name, image_format = last.header.backing_file, last.header.backing_format
        if name is None:
            if given.base is None:
                raise BlockError("Image does not have a backing file", errno.EINVAL)
            raise _not_in_chain(given)
        path = resolve(last.file, name, chain.allowed)
        if given.base is None or _is_meant(given.base, last.file, path):
            return above, path, image_format
        middle = common.open_image(path, image_format, backed=False)
        stack.callback(middle.close)
        if not isinstance(middle, Qcow2Image):
            raise _not_in_chain(given)
        above.append(middle)


def _not_in_chain(given: common.argparse.Namespace) -> BlockError:
    text = f"Did not find '{given.base}' in the backing chain of '{given.file}'"
    return BlockError(text, errno.ENOENT)


def _is_meant(base: str, image: str, path: str) -> bool:
    """Does ``base`` mean that backing file? It counts from the folder of the image that names it, as names in
    images do, or from the working directory."""
    if is_network_name(path) or is_network_name(base):
        return base == path
    places = os.path.join(os.path.dirname(os.path.realpath(image)), base), base
    return os.path.realpath(path) in [os.path.realpath(place) for place in places]


def _pieces(above: list[Qcow2Image], start: int, length: int) -> Iterator[tuple[Qcow2Image | None, int, int]]:
    """(image that answers for it, offset, bytes) of what does not come from the base; None for zeroes."""
    image, below = above[0], above[1:]
    for kind, at, size, _ in image.map(start, length):
        if kind != UNALLOCATED:
            yield None if kind == ZEROES else image, at, size
        elif below:
            inside = max(0, min(size, below[0].size - at))
            if inside:
                yield from _pieces(below, at, inside)
            if inside < size:
                yield None, at + inside, size - inside  # behind the end of what lies below


def _copy(above: list[Qcow2Image], base: Image, progress: common.Progress) -> None:
    buffer = memoryview(bytearray(common.CHUNK))
    for source, at, size in _pieces(above, 0, above[0].size):
        if source is None:
            base.write_zeroes(at, size, unmap=True, fast=False)
            continue
        for start, length in common.chunks(at, size):
            source.read_into(start, buffer[:length])
            base.write(start, buffer[:length])
            progress.at(start + length)
    progress.end()
