"""Guest memory for devices, dirty pages, and writes into translated code."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.contract._segment import ffi, lib
from coordinator.contract.segment import NO_OFFSET, Segment
from tests.contract.conftest import Region, ram_at
from tests.contract.test_attention import run_all

PAGE = 4096


def dirty(segment: Segment) -> list[int]:
    return [int(page) for page in np.flatnonzero(segment.dirty)]


def code_events(segment: Segment, cursor: int = 0) -> list[int]:
    at, page = ffi.new("uint64_t *", cursor), ffi.new("uint64_t *")
    pages = []
    while (result := lib.seg_code_next(segment.header, at, page)) == 1:
        pages.append(page[0])
    assert result == 0
    return pages


def test_dma_marks_what_it_wrote(segment: Segment) -> None:
    assert segment.dma_write(0x1FFE, b"hello") == 5
    assert segment.dma_read(0x1FFE, 5) == b"hello"
    assert bytes(segment.ram[0x1FFE:0x2003]) == b"hello"
    assert dirty(segment) == [1, 2]


def test_dma_across_a_remapped_border_and_a_hole(segment: Segment) -> None:
    places = ((0, 0x8000), (PAGE, 0x3000), (0x4000, 0))
    segment.publish_map([ram_at(segment, gpa, PAGE, skip) for gpa, skip in places])
    assert segment.dma_write(PAGE - 2, b"abcd") == 4
    assert bytes(segment.ram[0x8FFE:0x9000]) == b"ab"
    assert bytes(segment.ram[0x3000:0x3002]) == b"cd"
    # two pages of hole between 2000h and 4000h
    assert segment.dma_write(2 * PAGE - 1, b"x" * (2 * PAGE + 3)) == 3
    assert segment.dma_read(2 * PAGE - 1, 2 * PAGE + 3) == b"x" + b"\xff" * 2 * PAGE + b"xx"


def test_rom_swallows_dma_and_mmio_is_no_memory(segment: Segment) -> None:
    segment.publish_map([
        Region(0xF0000, 0x10000, lib.REGION_READ, segment.rom_offset),
        Region(0xFEB00000, PAGE, lib.REGION_MMIO),
    ])  # fmt: skip
    segment.rom[:3] = 1
    assert segment.dma_write(0xF0000, b"abc") == 0
    assert segment.dma_read(0xF0000, 4) == b"\1\1\1\0"
    assert segment.dma_write(0xFEB00000, b"abc") == 0
    assert segment.dma_read(0xFEB00000, 2) == b"\xff\xff"
    assert dirty(segment) == []


def test_memory_may_be_read_and_written_in_two_places(segment: Segment) -> None:
    """As PAM with reads from ROM and writes to RAM (82441FX section 3.2.12)."""
    flags = lib.REGION_READ | lib.REGION_WRITE
    segment.publish_map([Region(0, PAGE, flags, segment.rom_offset, segment.guest_offset)])
    segment.rom[:2] = 5
    assert segment.dma_write(0, b"ab") == 2
    assert segment.dma_read(0, 2) == b"\5\5"
    assert bytes(segment.ram[:2]) == b"ab"


def test_addresses_at_the_end_of_the_space_do_not_wrap_into_ram(segment: Segment) -> None:
    assert segment.dma_write(2**64 - 2, b"ab") == 0
    assert segment.dma_read(2**64 - 2, 2) == b"\xff\xff"


def test_span_receives_straight_into_ram(segment: Segment) -> None:
    span = segment.dma_span(0x3000, 16)
    assert span is not None
    span[:4] = b"data"
    assert dirty(segment) == []
    segment.dma_written(0x3000, 4)
    assert dirty(segment) == [3]
    assert segment.dma_read(0x3000, 4) == b"data"
    assert segment.dma_span((1 << 20) - 8, 16) is None  # runs out of RAM
    assert segment.dma_span(1 << 30, 1) is None


@pytest.mark.parametrize(
    ("offset", "length", "hit"),
    [(0x2040, 1, True), (0x207F, 1, True), (0x203F, 1, False), (0x2080, 64, False), (0x1FFF, 0x42, True)],
)
def test_code_lines_are_64_bytes(segment: Segment, offset: int, length: int, hit: bool) -> None:
    lib.seg_code_mark(segment.header, 2, 0b10)
    segment.dma_write(offset, b"\x90" * length)
    assert code_events(segment) == ([2] if hit else [])
    for vcpu in range(segment.vcpus):
        assert bool(segment.vcpu(vcpu).attention & lib.ATTN_CODE) == hit


def test_a_hit_clears_the_page_so_that_the_next_write_is_cheap(segment: Segment) -> None:
    lib.seg_code_mark(segment.header, 2, 0b11)
    segment.dma_write(0x2000, b"\0")
    segment.dma_write(0x2000, b"\0")
    segment.dma_write(0x2040, b"\0")
    assert code_events(segment) == [2]


def test_a_cursor_that_fell_behind_is_told_so(segment: Segment) -> None:
    for _ in range(lib.SEG_CODE_SLOTS + 1):
        lib.seg_code_mark(segment.header, 2, 1)
        lib.seg_code_written(segment.header, 0x2000, 1)
    cursor, page = ffi.new("uint64_t *", 0), ffi.new("uint64_t *")
    assert lib.seg_code_next(segment.header, cursor, page) == -1
    assert lib.seg_code_next(segment.header, cursor, page) == 0


def test_written_outside_guest_memory_is_ignored(segment: Segment) -> None:
    for offset, length in ((0, 8), (segment.size, 8), (NO_OFFSET, 1), (segment.guest_offset - 1, 1)):
        lib.seg_written(segment.header, offset, length)
    assert dirty(segment) == []
    last = segment.header.guest_pages - 1
    lib.seg_written(segment.header, segment.guest_offset + last * PAGE, 1 << 40)
    assert dirty(segment) == [last]


def test_no_stale_translation_survives_concurrent_writers(segment: Segment) -> None:
    """Two writers store rising numbers and then report; a translator marks and reads. When all is quiet,
    either the translation has the last bytes, or an event that drops it is behind it in the log."""
    header = segment.header
    rounds = 2000
    word = ffi.cast("volatile uint64_t *", segment._at("uint64_t *", segment.guest_offset + 5 * PAGE))
    stop = [False, False]
    results = []

    def writer(index: int) -> None:
        for n in range(rounds):
            word[index] = n + 1
            lib.seg_code_written(header, 5 * PAGE + 8 * index, 8)
        stop[index] = True

    def translator() -> None:
        cursor, page = ffi.new("uint64_t *", 0), ffi.new("uint64_t *")
        valid, translated = False, (0, 0)
        while True:
            last = all(stop)
            while lib.seg_code_next(header, cursor, page):
                valid = False
            if valid and last:
                results.append(translated)
                return
            if not valid:
                lib.seg_code_mark(header, 5, 1)
                translated = (word[0], word[1])
                valid = True

    run_all(translator, lambda: writer(0), lambda: writer(1))
    assert results == [(rounds, rounds)]
