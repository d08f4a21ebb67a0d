"""Memory that is made ready before the guest stops: exactly what was told of, and nothing is changed."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.contract._segment import ffi
from coordinator.contract.errors import MigrationError
from coordinator.contract.segment import PAGE, Segment
from coordinator.migrate import ram

PAGES = 256
RUNS = ((3, 2), (100, 1), (200, 56))


@pytest.fixture
def segment() -> Segment:
    return Segment.create(vcpus=1, ram=PAGES * PAGE)


def ready(segment: Segment, *runs: tuple[int, int], write: bool = True) -> None:
    asyncio.run(ram.Ahead(segment, runs, write).run())


def test_writing_gives_pages_to_what_was_told_of(segment: Segment) -> None:
    ready(segment, *RUNS)
    assert tuple(ram.data_runs(segment)) == RUNS
    assert not any(bytes(ffi.buffer(ffi.cast("char *", segment.guest_address), PAGES * PAGE)))


def test_nothing_is_changed(segment: Segment) -> None:
    page = ffi.cast("char *", segment.guest_address + 3 * PAGE)
    ffi.memmove(page, b"guest", 5)
    for write in (True, False):
        ready(segment, *RUNS, write=write)
        assert bytes(ffi.buffer(page, 5)) == b"guest"


NO_MEMORY = [(-1, 1), (0, 0), (0, -1), (PAGES, 1), (0, PAGES + 1), (1 << 70, 1), (1, 1 << 70)]


@pytest.mark.parametrize("run", NO_MEMORY)
def test_what_is_no_memory_is_refused(segment: Segment, run: tuple[int, int]) -> None:
    with pytest.raises(MigrationError, match="does not fit"):
        ram.Ahead(segment, (RUNS[0], run), write=True)
    assert not list(ram.data_runs(segment))


def test_their_number_is_bounded(segment: Segment) -> None:
    with pytest.raises(MigrationError, match="does not fit"):
        ram.Ahead(segment, [(1, 1)] * (ram.MOST_RUNS + 1), write=True)


def test_slices_cover_runs_once() -> None:
    pieces = list(ram.slices([(5, ram.SLICE + 1), (1 << 20, 3)]))
    assert pieces == [(5, ram.SLICE), (5 + ram.SLICE, 1), (1 << 20, 3)]
