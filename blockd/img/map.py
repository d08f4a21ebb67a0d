"""``atoll img map``: where the data of an image lies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from blockd.image import Image
from blockd.img import common
from blockd.qcow2.image import Qcow2Image
from blockd.qcow2.tables import DATA, OFFSET, PACKED, UNALLOCATED


class Entry(NamedTuple):
    """A stretch of the disk; ``depth`` counts the images above the one that answers for it."""

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    offset: int | None
    file: str | None


def run(arguments: list[str]) -> int:
    parser = common.Parser("map", "Where the data of an image lies.")
    parser.format_option()
    parser.output_option()
    parser.add_argument("-s", "--start-offset", type=common.size, default=0)
    parser.add_argument("-l", "--max-length", type=common.size)
    parser.share_option()
    parser.chain_option()
    parser.add_argument("file")
    given = parser.parse_intermixed_args(arguments)
    image = common.open_image(
        given.file, given.format, allowed=given.allow_backing, locked=not given.force_share
    )
    try:
        start = min(given.start_offset, image.size)
        length = image.size - start
        if given.max_length is not None:
            length = min(length, given.max_length)
        entries = _merged(entries_of(image, start, length))
        if given.output == "json":
            _print_json(entries)
        else:
            _print(entries)
    finally:
        image.close()
    return 0


def entries_of(image: Image, start: int, length: int, depth: int = 0) -> Iterator[Entry]:
    """The stretches of a range, from the image that answers for each."""
    if not isinstance(image, Qcow2Image):
        at = start
        for extent in image.extents(start, length):
            yield Entry(at, extent.length, depth, True, extent.zero, not extent.zero, at, image.file)
            at += extent.length
        return
    for kind, at, size, where in image.map(start, length):
        if kind == DATA:
            yield Entry(at, size, depth, True, False, True, where, image.data.file)
        elif kind == PACKED:
            yield Entry(at, size, depth, True, False, True, None, image.file)
        elif kind != UNALLOCATED:
            place = where & OFFSET
            yield Entry(at, size, depth, True, True, False, place or None, image.file if place else None)
        else:
            below = image.backing
            inside = 0 if below is None else max(0, min(size, below.size - at))
            if below is not None and inside:
                yield from entries_of(below, at, inside, depth + 1)
            if inside < size:
                # subclusters that are not allocated may have a place, too
                place = (where & OFFSET) + inside if where & OFFSET else 0
                file = image.file if place else None
                yield Entry(at + inside, size - inside, depth, False, True, False, place or None, file)


def _merged(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Neighbours of one kind as one."""
    pending: Entry | None = None
    for entry in entries:
        if pending is not None:
            follows = (
                pending.offset is None
                if entry.offset is None
                else (pending.offset is not None and pending.offset + pending.length == entry.offset)
            )
            if follows and pending[2:6] == entry[2:6] and pending.file == entry.file:
                pending = pending._replace(length=pending.length + entry.length)
                continue
            yield pending
        pending = entry
    if pending is not None:
        yield pending


def _print_json(entries: Iterator[Entry]) -> None:
    rows = []
    for entry in entries:
        row: dict[str, Any] = {
            "start": entry.start,
            "length": entry.length,
            "depth": entry.depth,
            "present": entry.present,
            "zero": entry.zero,
            "data": entry.data,
        }
        if entry.offset is not None:
            row["offset"] = entry.offset
        rows.append(json.dumps(row))
    print("[" + ",\n".join(rows) + "]")


def _print(entries: Iterator[Entry]) -> None:
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for entry in entries:
        if entry.data and entry.offset is None:
            raise common.BlockError(f"{entry.file}: has compressed clusters; use --output=json", 22)
        if entry.data and not entry.zero:
            numbers = (hex(value) if value else "0" for value in (entry.start, entry.length, entry.offset))
            print("".join(f"{number:<16}" for number in numbers) + str(entry.file))
