"""Copying the content of an image: parts of it are read and prepared by threads, and written in order.

Every part has a buffer of its own while it is under way. What is done with a part beside reading it (finding
zeroes, compressing) is done in the thread that reads it, with the interpreter's lock released.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np

from blockd.image import Extent, Image
from coordinator.contract.errors import BlockError

#: read at once: small enough to be written while it is still in the processor's cache
PART = 2 << 20
#: a hole that is shorter than this is read with its neighbours, and found again among their zeroes
SHORT_HOLE = 64 << 10

Result = TypeVar("Result")


class Part(NamedTuple):
    """A stretch of the disk; ``zero`` when it is known to be zero, so that nothing is read."""

    offset: int
    length: int
    zero: bool


class Piece(NamedTuple):
    """Bytes to be written; ``data`` is None for zeroes."""

    offset: int
    length: int
    data: memoryview | None


def threads(most: int) -> int:
    """How many threads pay, of at most so many."""
    return max(1, min(most, len(os.sched_getaffinity(0))))


def parts(source: Image, granularity: int, whole: bool) -> Iterator[Part]:
    """The disk in parts, in order, that begin at multiples of ``granularity``; without a gap. With
    ``whole``, nothing counts as known to be zero."""
    longest = max(PART, granularity)
    done = 0
    for start, stop in [(0, source.size)] if whole else _data(source, granularity):
        if start > done:
            yield Part(done, start - done, True)
        while start < stop:
            length = min(longest, stop - start)
            yield Part(start, length, False)
            start += length
        done = stop
    if done < source.size:
        yield Part(done, source.size - done, True)


def _data(source: Image, granularity: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not known to be zero, widened to multiples of ``granularity``, in order."""
    start = stop = at = 0
    shortest = max(SHORT_HOLE, granularity)
    for extent in _extents(source):
        if not extent.zero:
            if at - stop >= shortest:
                if stop > start:
                    yield start, stop
                start = at // granularity * granularity
            stop = min(source.size, -(-(at + extent.length) // granularity) * granularity)
        at += extent.length
    if stop > start:
        yield start, stop


def _extents(source: Image) -> Iterator[Extent]:
    try:
        yield from source.extents(0, source.size)
    except OSError as error:
        raise unreadable(source, error) from None


def unreadable(source: Image, error: OSError) -> BlockError:
    return BlockError(f"{source.file}: cannot be read: {error.strerror or error}", error.errno or errno.EIO)


def transform(
    source: Image, jobs: Iterator[Part], work: Callable[[int, memoryview], Result], workers: int
) -> Generator[tuple[Part, Result | None], None, None]:
    """Read parts and apply ``work`` (offset, bytes) to them, in ``workers`` threads and ahead of whoever
    consumes this; None for what is known to be zero. A result may hold on to the bytes until the next one
    is asked for. BlockError when the source cannot be read."""

    def run(part: Part, buffer: memoryview) -> Result:
        view = buffer[: part.length]
        try:
            source.read_into(part.offset, view)
        except OSError as error:
            raise unreadable(source, error) from None
        return work(part.offset, view)

    waiting: deque[tuple[Part, memoryview | None, Future[Result] | None]] = deque()
    spare: list[memoryview] = []
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    try:
        more = True
        while more or waiting:
            while more and len(waiting) <= 2 * workers:
                part = next(jobs, None)
                if part is None:
                    more = False
                elif part.zero:
                    waiting.append((part, None, None))
                else:
                    buffer = spare.pop() if spare else memoryview(bytearray(part.length))
                    if len(buffer) < part.length:
                        buffer = memoryview(bytearray(part.length))
                    waiting.append((part, buffer, pool.submit(run, part, buffer)))
            if waiting:
                part, used, future = waiting.popleft()
                yield part, future.result() if future is not None else None
                if used is not None:
                    spare.append(used)
    finally:
        pool.shutdown(cancel_futures=True)


def find_zeroes(offset: int, data: memoryview, granularity: int, tell: bool) -> list[Piece]:
    """``data`` without its zeroes, in multiples of ``granularity`` but at the end of the disk; with ``tell``
    the zeroes are pieces too."""
    full = len(data) // granularity
    rows = np.frombuffer(data[: full * granularity], np.uint64).reshape(full, granularity // 8)
    used = rows[:, 0] != 0  # mostly that says it
    unclear = np.flatnonzero(~used)
    if len(unclear) == full:
        used = np.bitwise_or.reduce(rows, axis=1) != 0
    elif len(unclear):
        used[unclear] = np.bitwise_or.reduce(rows[unclear], axis=1) != 0
    if full * granularity < len(data):
        used = np.append(used, bytes(data[full * granularity :]).strip(b"\0") != b"")
    edges = [0, *(np.flatnonzero(used[1:] != used[:-1]) + 1).tolist(), len(used)]
    result = []
    for first, last in zip(edges, edges[1:], strict=False):
        low, high = first * granularity, min(last * granularity, len(data))
        if used[first]:
            result.append(Piece(offset + low, high - low, data[low:high]))
        elif tell:
            result.append(Piece(offset + low, high - low, None))
    return result
