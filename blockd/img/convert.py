"""``atoll img convert``: copy an image into another format, without its holes."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from blockd import opening
from blockd.image import Image
from blockd.img import common
from blockd.img.create import parse_options, preallocate, qcow2_options
from blockd.qcow2.bitmap_edit import BitmapSet
from blockd.qcow2.bitmaps import AUTO
from blockd.qcow2.compression import compress
from blockd.qcow2.create import create
from blockd.qcow2.image import Qcow2Image
from blockd.qcow2.operations import at_rest
from coordinator.contract.errors import BlockError, UsageError
from coordinator.contract.nbd import is_network_name

#: read at once
CHUNK = 2 << 20
#: zeroes of a raw image are left out in pieces of so many bytes, as qemu-img does
SPARSE = 4096
#: compressed clusters in flight
MOST_PENDING = 64


class Piece(NamedTuple):
    """Bytes to be written."""

    offset: int
    data: memoryview


def run(arguments: list[str]) -> int:
    parser = common.Parser("convert", "Copy an image into another format.")
    parser.format_option(about="format of the source")
    parser.format_option("-O", "target_format", "format of the target (raw)")
    parser.add_argument("-c", dest="compress", action="store_true", help="compress the target")
    parser.add_argument("-p", dest="progress", action="store_true")
    parser.add_argument("-q", dest="quiet", action="store_true")
    parser.add_argument("-n", dest="existing", action="store_true", help="the target exists already")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="NAME=VALUE,...")
    parser.add_argument("-l", dest="snapshot", metavar="NAME", help="copy the state of a snapshot")
    parser.add_argument("-B", dest="backing", metavar="FILE", help="backing file of the target")
    parser.add_argument("-F", dest="backing_format", choices=common.FORMATS)
    parser.add_argument("--bitmaps", action="store_true", help="copy dirty bitmaps, too")
    parser.add_argument("--skip-broken-bitmaps", action="store_true", help="but no unusable ones")
    parser.add_argument("-U", "--force-share", action="store_true")
    parser.add_argument("-W", dest="unordered", action="store_true", help="no effect")
    parser.ignored("-T", "-t", "-m", "-S", "-r")
    parser.chain_option()
    parser.add_argument("source")
    parser.add_argument("target")
    given = parser.parse_intermixed_args(arguments)
    target_format = given.target_format or "raw"
    if given.compress and target_format != "qcow2":
        raise BlockError("raw images cannot be compressed", errno.ENOTSUP)
    if given.backing is not None and target_format != "qcow2":
        raise BlockError("raw images have no backing file", errno.ENOTSUP)
    if given.backing is not None and given.backing_format is None:
        raise UsageError("convert: the format of the backing file is needed (-F)")
    if given.skip_broken_bitmaps and not given.bitmaps:
        raise UsageError("convert: Use of --skip-broken-bitmaps requires --bitmaps")
    if given.bitmaps and target_format != "qcow2":
        raise BlockError(f"Format driver '{target_format}' does not support bitmaps", errno.ENOTSUP)
    snapshot = given.snapshot
    if snapshot is not None:
        snapshot = snapshot.removeprefix("snapshot.id=").removeprefix("snapshot.name=")
    how = {"snapshot": snapshot} if snapshot is not None else {}
    source = common.open_image(given.source, given.format, allowed=given.allow_backing, **how)
    try:
        if os.path.exists(given.target) and os.path.samefile(given.source, given.target):
            raise BlockError(f"{given.target}: is the source", errno.EINVAL)
        names = _bitmaps(source, given) if given.bitmaps else []
        if not given.existing:
            _create(given, target_format, source.size)
        _copy(source, given, target_format)
        if names:
            assert isinstance(source, Qcow2Image)
            _copy_bitmaps(source, names, given.target)
    finally:
        source.close()
    return 0


def _bitmaps(source: Image, given: common.argparse.Namespace) -> list[str]:
    """The bitmaps that are to be copied. BlockError where one cannot be."""
    if not isinstance(source, Qcow2Image):
        raise BlockError(f"Format driver '{source.format}' does not support bitmaps", errno.ENOTSUP)
    known, names = BitmapSet(source), []
    for bitmap in known.bitmaps():
        try:
            known.usable(bitmap.name)
        except BlockError:
            if not given.skip_broken_bitmaps:
                text = f"Cannot copy inconsistent bitmap '{bitmap.name}'; try --skip-broken-bitmaps, or use "
                raise BlockError(f"{text}'bitmap --remove' to delete it", errno.EINVAL) from None
            print(f"atoll img: warning: Skipping inconsistent bitmap '{bitmap.name}'", file=sys.stderr)
        else:
            names.append(bitmap.name)
    return names


def _copy_bitmaps(source: Qcow2Image, names: list[str], target_file: str) -> None:
    target = Qcow2Image(target_file, backed=False)
    try:
        with at_rest(target):
            theirs, ours = BitmapSet(source), BitmapSet(target)
            for name in names:
                bitmap = theirs.usable(name)
                ours.add(name, 1 << bitmap.granularity_bits, bool(bitmap.flags & AUTO))
                ours.merge(name, theirs, name)
            ours.save()
    finally:
        target.close()


def _create(given: common.argparse.Namespace, target_format: str, disk_size: int) -> None:
    named = parse_options(given.options)
    if is_network_name(given.target):
        raise BlockError(f"{given.target}: an export cannot be created; -n writes to one that is there", 95)
    if target_format == "raw":
        common.make_raw(given.target, disk_size)
        return
    options, preallocation = qcow2_options(disk_size, named)
    if given.backing is not None:
        options.backing_file, options.backing_format = given.backing, given.backing_format
    create(given.target, options)
    if preallocation != "off":
        preallocate(given.target, preallocation)


def _copy(source: Image, given: common.argparse.Namespace, target_format: str) -> None:
    progress = common.Progress(given.progress and not given.quiet, source.size)
    if target_format == "raw":
        host = opening.open_file(given.target)
        try:
            if host.size() < source.size:
                raise BlockError(f"{given.target}: is smaller than the source", errno.ENOSPC)
            for piece in _pieces(source, SPARSE, progress, whole=given.existing):
                host.write(piece.offset, piece.data)
            host.sync()
        finally:
            host.close()
        progress.end()
        return
    allowed = ["*"] if given.backing is not None else given.allow_backing
    target = common.open_image(
        given.target, "qcow2", read_only=False, allowed=allowed, open_file=opening.unsafe_file
    )
    assert isinstance(target, Qcow2Image)
    try:
        if target.size < source.size:
            raise BlockError(f"{given.target}: is smaller than the source", errno.ENOSPC)
        whole = given.existing or given.backing is not None
        pieces = _pieces(source, target.header.cluster_size, progress, whole)
        if given.compress:
            _write_compressed(target, pieces)
        else:
            for piece in pieces:
                target.write(piece.offset, piece.data)
        target.flush()
    finally:
        target.close()
    host = opening.open_file(given.target)
    host.sync()
    host.close()
    progress.end()


def _pieces(source: Image, granularity: int, progress: common.Progress, whole: bool) -> Iterator[Piece]:
    """What is not zero, in order, in multiples of ``granularity`` but at the end; with ``whole``
    everything, since there may be something at the target. A piece is valid until the next one."""
    for offset, data in _read_ahead(source, _ranges(source, granularity, whole), max(CHUNK, granularity)):
        if whole:
            yield Piece(offset, data)
        else:
            yield from _without_zeroes(offset, data, granularity)
        progress.at(offset + len(data))


def _ranges(source: Image, granularity: int, whole: bool) -> Iterator[tuple[int, int]]:
    """(offset, length) of what has to be read."""
    longest = max(CHUNK, granularity)
    at = done = 0
    for extent in source.extents(0, source.size):
        stop = at + extent.length
        if whole or not extent.zero:
            offset = max(done, at // granularity * granularity)
            end = min(source.size, -(-stop // granularity) * granularity)
            while offset < end:
                length = min(longest, end - offset)
                yield offset, length
                offset += length
            done = offset
        at = stop


def _read_ahead(
    source: Image, ranges: Iterator[tuple[int, int]], longest: int
) -> Iterator[tuple[int, memoryview]]:
    """Read ranges, the next one while the last one is being used."""
    buffers = [memoryview(bytearray(longest)) for _ in range(2)]
    before: tuple[int, memoryview, Future[None]] | None = None
    with ThreadPoolExecutor(1) as pool:
        for number, (offset, length) in enumerate(ranges):
            buffer = buffers[number % 2][:length]
            reading = pool.submit(source.read_into, offset, buffer)
            if before is not None:
                before[2].result()
                yield before[0], before[1]
            before = offset, buffer, reading
        if before is not None:
            before[2].result()
            yield before[0], before[1]


def _without_zeroes(offset: int, data: memoryview, granularity: int) -> Iterator[Piece]:
    full = len(data) // granularity
    rows = np.frombuffer(data[: full * granularity], np.uint64).reshape(full, granularity // 8)
    used = rows[:, 0] != 0  # mostly that says it
    unclear = np.flatnonzero(~used)
    used[unclear] = rows[unclear].any(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], used, [False])).astype(np.int8)))
    for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield Piece(offset + first * granularity, data[first * granularity : last * granularity])
    rest = data[full * granularity :]
    if len(rest) and bytes(rest).strip(b"\0"):
        yield Piece(offset + full * granularity, rest)


def _write_compressed(target: Qcow2Image, pieces: Iterator[Piece]) -> None:
    """Compress in as many threads as there are processors; write in order."""
    size, method = target.header.cluster_size, target.header.compression
    pending: list[tuple[int, bytes, Future[bytes]]] = []

    def finish() -> None:
        offset, plain, future = pending.pop(0)
        packed = future.result()
        if len(packed) < size:
            target.write_compressed(offset, packed)
        else:
            target.write(offset, plain[: target.size - offset])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for piece in pieces:
            for inside in range(0, len(piece.data), size):
                plain = bytes(piece.data[inside : inside + size]).ljust(size, b"\0")
                pending.append((piece.offset + inside, plain, pool.submit(compress, plain, method)))
                if len(pending) >= MOST_PENDING:
                    finish()
        while pending:
            finish()
