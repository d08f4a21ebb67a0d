"""``atoll img convert``: copy an image into another format, without its zeroes.

What is written is durable at the end only where ``-t`` asks for that: the default is ``unsafe``, as in
qemu-img. A target that was not finished, for whatever reason but SIGKILL, does not stay: it is removed when
it was made, and emptied when it was overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

from blockd.files import unsafe_file
from blockd.image import Image
from blockd.img import common, copying
from blockd.img.copying import Piece
from blockd.img.create import parse_options, preallocate, qcow2_options
from blockd.qcow2.compression import compress
from blockd.qcow2.image import Qcow2Image
from blockd.raw import RawImage
from coordinator.contract.config import IMAGE_FORMATS
from coordinator.contract.errors import BlockError, UsageError
from coordinator.contract.nbd import is_network_name

#: zeroes of a raw image are left out in pieces of so many bytes, as qemu-img does
SPARSE = 4096
#: qemu-img's names of cache modes -> whether what is written with them is durable at the end
CACHE_MODES = {"unsafe": False, "none": True, "writeback": True, "writethrough": True, "directsync": True}


class Packed(NamedTuple):
    """Whole neighbouring clusters, compressed."""

    offset: int
    clusters: list[bytes]


class Interrupted(Exception):
    """A signal asks for an end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def run(arguments: list[str]) -> int:
    given = _parser().parse_intermixed_args(arguments)
    target_format = given.target_format or "raw"
    _check(given, target_format)
    snapshot = given.snapshot
    if snapshot is not None:
        snapshot = snapshot.removeprefix("snapshot.id=").removeprefix("snapshot.name=")
    how: dict[str, Any] = {"snapshot": snapshot, "locked": not given.force_share}
    source = common.open_image(given.source, given.format, allowed=given.allow_backing, **how)
    try:
        if os.path.exists(given.target) and os.path.samefile(given.source, given.target):
            raise BlockError(f"{given.target}: is the source", errno.EINVAL)
        _convert(source, given, target_format)
    except Interrupted as interrupt:
        print(f"atoll img: convert: ended by {interrupt}, {given.target} is not complete", file=sys.stderr)
        return 128 + interrupt.number
    finally:
        source.close()
    return 0


def _parser() -> common.Parser:
    parser = common.Parser("convert", "Copy an image into another format.")
    parser.format_option(about="format of the source")
    parser.format_option("-O", "target_format", "format of the target (raw)")
    parser.add_argument("-c", dest="compress", action="store_true", help="compress the target")
    parser.add_argument("-C", dest="offload", action="store_true", help="let the kernel copy (raw to raw)")
    parser.progress_option()
    parser.quiet_option()
    parser.add_argument("-n", dest="existing", action="store_true", help="the target exists already")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="NAME=VALUE,...",
                        help="of the target; 'atoll img create -o help' lists them")  # fmt: skip
    parser.add_argument("-l", dest="snapshot", metavar="NAME", help="copy the state of a snapshot")
    parser.add_argument("-B", dest="backing", metavar="FILE", help="backing file of the target")
    parser.add_argument("-F", dest="backing_format", choices=IMAGE_FORMATS, help="its format")
    parser.add_argument("--bitmaps", action="store_true", help="copy dirty bitmaps, too")
    parser.add_argument("--skip-broken-bitmaps", action="store_true", help="but no unusable ones")
    parser.add_argument("-m", dest="threads", type=int, default=8, help="threads at most, of 1 to 16 (8)")
    parser.add_argument(
        "-S", dest="sparse", type=common.size, help="shortest stretch of zeroes to leave out (4k), 0 for none"
    )
    parser.add_argument(
        "-t", dest="cache", choices=CACHE_MODES, default="unsafe", help="all but unsafe make it durable"
    )
    parser.share_option("read the source also while another process writes it")
    parser.add_argument("-W", dest="unordered", action="store_true", help="no effect")
    parser.ignored("-T", "-r")
    parser.chain_option()
    parser.add_argument("source")
    parser.add_argument("target")
    return parser


def _check(given: argparse.Namespace, target_format: str) -> None:
    """Options that do not go together."""
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
    if not 1 <= given.threads <= 16:
        raise UsageError("convert: -m must be 1 to 16")
    if given.sparse is not None and given.sparse % 512:
        raise UsageError("convert: -S must be a multiple of 512")
    if given.offload and (given.compress or given.sparse is not None):
        raise UsageError("convert: -C goes with neither -c nor -S")


def _convert(source: Image, given: argparse.Namespace, target_format: str) -> None:
    names = []
    if given.bitmaps:
        from blockd.img import bitmap_copy  # slow to import, and rarely used

        names = bitmap_copy.chosen(source, given.skip_broken_bitmaps)
    with _interruptible():
        try:
            with common.discarded_on_failure() as making:
                preallocation = "off"
                if not given.existing:
                    preallocation = _create(making, given, target_format, source.size)
                if preallocation != "off":
                    preallocate(given.target, preallocation)
                if source.size:
                    _copy(source, given, target_format)
                if names:
                    bitmap_copy.copy(source, names, given.target)
        except BrokenPipeError:
            raise  # of standard output
        except OSError as error:
            text = f"{given.target}: cannot be written: {error.strerror or error}"
            raise BlockError(text, error.errno or errno.EIO) from None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Interrupted, once; then they do what they do by default."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in before:
            signal.signal(other, signal.SIG_DFL)
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _create(making: common.Making, given: argparse.Namespace, target_format: str, disk_size: int) -> str:
    """Make the target; returns how it is to be preallocated."""
    named = parse_options(given.options)
    if is_network_name(given.target):
        text = f"{given.target}: an export cannot be created; -n writes to one that is there"
        raise BlockError(text, errno.ENOTSUP)
    if target_format == "raw":
        making.raw(given.target, disk_size)
        return "off"
    options, preallocation = qcow2_options(disk_size, named)
    if given.backing is not None:
        options.backing_file, options.backing_format = given.backing, given.backing_format
    making.qcow2(given.target, options)
    return preallocation


def _copy(source: Image, given: argparse.Namespace, target_format: str) -> None:
    allowed = given.allow_backing if given.existing else ["*"]  # the user has just named them
    how = {"open_file": unsafe_file} if target_format == "qcow2" else {}
    target = common.open_image(given.target, target_format, read_only=False, allowed=allowed, **how)
    try:
        if target.size < source.size:
            raise BlockError(f"{given.target}: is smaller than the source", errno.ENOSPC)
        progress = common.Progress(given.progress and not given.quiet, source.size)
        if not (given.offload and _offload(source, target, progress, tell=given.existing)):
            _transform(source, target, given, progress)
        _finish(target, CACHE_MODES[given.cache])
    except BaseException:
        _close_files(target)
        raise
    target.close()
    progress.end()


def _finish(target: Image, durable: bool) -> None:
    """What closing would do, but with its errors told."""
    if isinstance(target, Qcow2Image):
        with target.lock:
            target.refcounts.give_back_reserved()
        target.host.unsafe = target.data.unsafe = not durable
        target.flush()
    elif durable:
        target.flush()


def _close_files(target: Image) -> None:
    """Of an image that is worthless."""
    if isinstance(target, Qcow2Image):
        target.close_files()
    else:
        target.close()


def _transform(source: Image, target: Image, given: argparse.Namespace, progress: common.Progress) -> None:
    """Read in threads, where zeroes are found and clusters compressed; write here."""
    sparse = SPARSE if given.sparse is None else given.sparse
    if isinstance(target, Qcow2Image):
        granularity = max(sparse, target.header.cluster_size)
    else:
        granularity = sparse or SPARSE
    # zeroes are written, too, where there may be something else
    tell = bool(given.existing) or given.backing is not None
    work: Callable[[int, memoryview], list[Piece | Packed]]
    if given.compress:
        assert isinstance(target, Qcow2Image)
        work = _compression(target, tell)
    elif sparse == 0:
        work = _whole
    else:

        def work(offset: int, data: memoryview) -> list[Piece | Packed]:
            return [*copying.find_zeroes(offset, data, granularity, tell)]

    workers = copying.threads(given.threads)
    parts = copying.parts(source, granularity, whole=sparse == 0)
    with contextlib.closing(copying.transform(source, parts, work, workers)) as done:
        for part, pieces in done:
            if pieces is None:
                pieces = [Piece(part.offset, part.length, None)] if tell else []
            for piece in pieces:
                _write(target, piece)
            progress.at(part.offset + part.length)


def _write(target: Image, piece: Piece | Packed) -> None:
    if isinstance(piece, Packed):
        assert isinstance(target, Qcow2Image)
        target.write_compressed(piece.offset, *piece.clusters)
    elif piece.data is not None:
        target.write(piece.offset, piece.data)
    else:
        target.write_zeroes(piece.offset, piece.length, unmap=True, fast=False)


def _whole(offset: int, data: memoryview) -> list[Piece | Packed]:
    return [Piece(offset, len(data), data)]


def _compression(target: Qcow2Image, tell: bool) -> Callable[[int, memoryview], list[Piece | Packed]]:
    """Compresses clusters; those that do not become smaller stay as they are."""
    size, method = target.header.cluster_size, target.header.compression

    def work(offset: int, data: memoryview) -> list[Piece | Packed]:
        result: list[Piece | Packed] = []
        for piece in copying.find_zeroes(offset, data, size, tell):
            if piece.data is None:
                result.append(piece)
                continue
            for inside in range(0, piece.length, size):
                plain = piece.data[inside : inside + size]
                at = piece.offset + inside
                packed = compress(plain if len(plain) == size else bytes(plain).ljust(size, b"\0"), method)
                last = result[-1] if inside else None
                cut = len(plain) < size and at + len(plain) < target.size  # there is more in the cluster
                if len(packed) < size and not cut:
                    if isinstance(last, Packed):
                        last.clusters.append(packed)
                    else:
                        result.append(Packed(at, [packed]))
                elif isinstance(last, Piece):
                    data = piece.data[last.offset - piece.offset : inside + len(plain)]
                    result[-1] = Piece(last.offset, len(data), data)
                else:
                    result.append(Piece(at, len(plain), plain))
        return result

    return work


def _offload(source: Image, target: Image, progress: common.Progress, tell: bool) -> bool:
    """Whatever is no hole is copied by the kernel, which may share it between the files. False where it
    cannot."""
    if not (isinstance(source, RawImage) and isinstance(target, RawImage)):
        return False
    for part in copying.parts(source, SPARSE, whole=False):
        at, end = part.offset, part.offset + part.length
        while at < end:
            length = end - at
            if not part.zero:
                try:
                    length = source.copy_to(target, at, length)
                except OSError as error:
                    if error.errno in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                        return False
                    raise
            elif tell:
                target.write_zeroes(at, length, unmap=True, fast=False)
            at += length
            progress.at(at)
    return True
