"""``atoll img resize``: another size for the disk of an image."""

from __future__ import annotations

import errno
import re

from blockd.img import common
from blockd.img.create import PREALLOCATION, RAW_PREALLOCATION, preallocate, reserve_raw
from blockd.qcow2.image import Qcow2Image
from coordinator.contract.errors import BlockError, UsageError

_CHANGE = re.compile(r"-\d.*")


def run(arguments: list[str]) -> int:
    parser = common.Parser("resize", "Give the disk of an image another size: SIZE, or + or - a size.")
    parser.format_option()
    parser.quiet_option()
    parser.add_argument("--shrink", action="store_true", help="allow data behind the new end to be lost")
    parser.add_argument("--preallocation", choices=PREALLOCATION, default="off")
    parser.chain_option()
    parser.add_argument("file")
    parser.add_argument("size")
    if arguments and _CHANGE.fullmatch(arguments[-1]) and "--" not in arguments:  # a size, not an option
        arguments = [*arguments[:-1], "--", arguments[-1]]
    given = parser.parse_intermixed_args(arguments)
    image = common.open_image(given.file, given.format, read_only=False, allowed=given.allow_backing)
    try:
        old = image.size
        new = _size(given.size, old)
        if new < old and not given.shrink:
            raise BlockError("Use the --shrink option to perform a shrink operation.", errno.EINVAL)
        if not isinstance(image, Qcow2Image) and given.preallocation not in RAW_PREALLOCATION:
            raise UsageError(f"resize: --preallocation={given.preallocation} is not for raw images")
        with common.told_of(given.file):
            image.resize(new)
    finally:
        image.close()
    if given.preallocation != "off" and new > old:
        if isinstance(image, Qcow2Image):
            with common.told_of(given.file):
                preallocate(given.file, given.preallocation, old)
        else:
            reserve_raw(given.file, old, new - old)
    if not given.quiet:
        print("Image resized.")
    return 0


def _size(text: str, old: int) -> int:
    value = common.size(text.lstrip("+-"))
    new = old + value if text.startswith("+") else old - value if text.startswith("-") else value
    if new <= 0:
        raise UsageError("resize: the new size must be more than 0")
    return -(-new // 512) * 512
