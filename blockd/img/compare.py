"""``atoll img compare``: exit 0 when two images have the same content, 1 when not, 2 for an error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from blockd.image import Extent, Image
from blockd.img import common


def run(arguments: list[str]) -> int:
    parser = common.Parser("compare", "Compare the content of two images.")
    parser.format_option("-f", "first_format", "format of the first image")
    parser.format_option("-F", "second_format", "format of the second image")
    parser.progress_option()
    parser.quiet_option()
    parser.add_argument("-s", dest="strict", action="store_true", help="sizes and allocation must agree, too")
    parser.share_option()
    parser.ignored("-T")
    parser.chain_option()
    parser.add_argument("first")
    parser.add_argument("second")
    given = parser.parse_intermixed_args(arguments)
    how: dict[str, Any] = {"allowed": given.allow_backing, "locked": not given.force_share}
    first = common.open_image(given.first, given.first_format, **how)
    try:
        second = common.open_image(given.second, given.second_format, **how)
        try:
            told, status = compare(first, second, given.strict, given.progress)
        finally:
            second.close()
    finally:
        first.close()
    if not given.quiet:
        print(told)
    return status


def compare(first: Image, second: Image, strict: bool, progress: bool) -> tuple[str, int]:
    """What is to be said, and the exit status."""
    warning = ""
    if first.size != second.size:
        if strict:
            return "Strict mode: Image size mismatch!", 1
        warning = "Warning: Image size mismatch!\n"
    common_size = min(first.size, second.size)
    shown = common.Progress(progress, max(first.size, second.size))
    for at, length, one, two in _paired(first, second, common_size):
        shown.at(at)
        if strict and one.hole != two.hole:
            return f"Strict mode: Offset {at} block status mismatch!", 1
        if one.zero and two.zero:
            continue
        different = _difference(first, second, at, length)
        if different is not None:
            return f"{warning}Content mismatch at offset {different}!", 1
    longer = first if first.size > second.size else second
    different = _not_zero(longer, common_size)
    if different is not None:
        return f"{warning}Content mismatch at offset {different}!", 1
    shown.end()
    return f"{warning}Images are identical.", 0


def _paired(first: Image, second: Image, size: int) -> Iterator[tuple[int, int, Extent, Extent]]:
    """(offset, length, what the first has there, what the second has)."""
    ones, twos = first.extents(0, size), second.extents(0, size)
    at = 0
    one = two = Extent(0, True, True)
    while at < size:
        if not one.length:
            one = next(ones)
        if not two.length:
            two = next(twos)
        length = min(one.length, two.length)
        yield at, length, one, two
        at += length
        one, two = one._replace(length=one.length - length), two._replace(length=two.length - length)


def _difference(first: Image, second: Image, at: int, length: int) -> int | None:
    """The sector at which two ranges begin to differ."""
    most = min(length, common.CHUNK)
    one, two = memoryview(bytearray(most)), memoryview(bytearray(most))
    ones, twos = np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)
    for start, piece in common.chunks(at, length):
        first.read_into(start, one[:piece])
        second.read_into(start, two[:piece])
        if not np.array_equal(ones[:piece], twos[:piece]):
            return start + int(np.flatnonzero(ones[:piece] != twos[:piece])[0]) // 512 * 512
    return None


def _not_zero(image: Image, start: int) -> int | None:
    at = start
    for extent in image.extents(start, image.size - start):
        for offset, piece in common.chunks(at, 0 if extent.zero else extent.length):
            buffer = bytearray(piece)
            image.read_into(offset, memoryview(buffer))
            used = np.flatnonzero(np.frombuffer(buffer, np.uint8))
            if len(used):
                return offset + int(used[0]) // 512 * 512
        at += extent.length
    return None
