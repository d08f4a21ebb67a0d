"""The memory map: lookup, publication, and that nobody uses an old map after its publisher has returned."""

from __future__ import annotations

import pytest

from coordinator.contract._segment import ffi, lib
from coordinator.contract.errors import SegmentError
from coordinator.contract.segment import Segment
from tests.contract.conftest import RAM, Region, ram_at
from tests.contract.test_attention import run_all


def find(segment: Segment, gpa: int) -> int | None:
    """First address of the region that holds gpa."""
    out = ffi.new("struct map_region *")
    return out.gpa if lib.seg_map_find(segment.header, gpa, out) else None


def test_find_hits_first_and_last_byte(segment: Segment) -> None:
    segment.publish_map([ram_at(segment, 0x1000, 0x1000), ram_at(segment, 0x4000, 0x2000, 0x1000)])
    assert [find(segment, gpa) for gpa in (0xFFF, 0x1000, 0x1FFF, 0x2000)] == [None, 0x1000, 0x1000, None]
    assert [find(segment, gpa) for gpa in (0x3FFF, 0x4000, 0x5FFF, 0x6000)] == [None, 0x4000, 0x4000, None]
    assert find(segment, 2**64 - 1) is None


def test_every_region_of_a_full_map_is_found(segment: Segment) -> None:
    segment.publish_map([ram_at(segment, i * 0x3000, 0x1000, i * 0x1000) for i in range(lib.SEG_MAX_REGIONS)])
    for i in range(lib.SEG_MAX_REGIONS):
        assert find(segment, i * 0x3000 + 0x800) == i * 0x3000
        assert find(segment, i * 0x3000 + 0x1000) is None


def test_maps_that_cannot_be_are_refused(segment: Segment) -> None:
    good = ram_at(segment, 0, 0x2000)
    bad_maps = [
        [ram_at(segment, 0x1000, 0x1000), ram_at(segment, 0, 0x1000)],  # not sorted
        [good, ram_at(segment, 0x1000, 0x1000)],  # overlap
        [ram_at(segment, 0x10, 0x1000)],
        [ram_at(segment, 0, 0x800)],
        [ram_at(segment, 0, 2 * RAM)],  # more memory than there is
        [Region(0, 0x1000, lib.REGION_READ, 0, 0)],  # the header as guest memory
        [Region(2**64 - 0x1000, 0x1000, lib.REGION_MMIO), Region(0, 0x1000, lib.REGION_MMIO)],
        [Region(0, 0x1000, lib.REGION_MMIO, host=lib.SEG_MAX_HOSTS)],
        [Region(0, 0x1000, lib.REGION_MMIO, first_reg=lib.SEG_MAX_REGS, regs=1)],
        [ram_at(segment, i * 0x1000, 0x1000) for i in range(lib.SEG_MAX_REGIONS + 1)],
    ]
    version = segment.header.map_version
    for regions in bad_maps:
        with pytest.raises(SegmentError):
            segment.publish_map(regions)
    assert segment.header.map_version == version


def test_parked_vcpus_are_not_waited_for_and_see_the_new_map(segment: Segment) -> None:
    for index in range(segment.vcpus):
        lib.vcpu_map_ack(segment.header, index)
    segment.publish_map([ram_at(segment, 0, 0x1000)])
    assert all(segment.vcpu(i).attention == 0 for i in range(segment.vcpus))
    assert lib.vcpu_unpark(segment.header, 0) == 1
    lib.vcpu_map_ack(segment.header, 0)
    lib.vcpu_park(segment.header, 0)
    assert lib.vcpu_unpark(segment.header, 0) == 0


def test_republish_keeps_the_map_and_changes_the_version(segment: Segment) -> None:
    version = segment.header.map_version
    segment.republish_map()
    assert segment.header.map_version == version + 1
    assert find(segment, 0x800) == 0


def test_no_vcpu_uses_an_old_map_after_publication(segment: Segment) -> None:
    """Each vCPU "translates", then uses the translation until it looks again; the publisher marks every
    version as retired once publish has returned. A use of a retired version is a stale TLB entry."""
    header = segment.header
    rounds, vcpus = 300, 2
    retired = 0  # versions below this must not be in use
    done = False

    def vcpu(index: int) -> None:
        def refill() -> int:
            lib.vcpu_map_ack(header, index)
            return int(segment.vcpu(index).map_ack)

        lib.vcpu_unpark(header, index)
        held = refill()
        turn = 0
        while not done:
            turn += 1
            for _ in range(3):
                floor = retired  # what was retired before the use began
                assert held >= floor, f"vCPU {index} uses map {held}, {floor} is in force"
            if lib.vcpu_take_attention(header, index) & lib.ATTN_MAP:
                held = refill()
            if turn % 3 == index:
                lib.vcpu_park(header, index)
                if lib.vcpu_unpark(header, index):
                    held = refill()
        lib.vcpu_park(header, index)

    def publisher() -> None:
        nonlocal retired, done
        try:
            for i in range(rounds):
                segment.publish_map([ram_at(segment, 0, 0x1000 * (1 + i % 2))])
                retired = int(header.map_version)
        finally:
            done = True

    run_all(publisher, *(lambda i=i: vcpu(i) for i in range(vcpus)))


def test_lookups_while_maps_change_see_one_map_or_the_other(segment: Segment) -> None:
    maps = [
        [ram_at(segment, 0, 0x10000)],
        [ram_at(segment, 0, 0x1000, 0x5000), ram_at(segment, 0x8000, 0x1000, 0x6000)],
    ]
    expected = {(0x10000, segment.guest_offset), (0x1000, segment.guest_offset + 0x6000)}
    segment.publish_map(maps[0])
    done = False
    seen = set()

    def reader() -> None:
        out = ffi.new("struct map_region *")
        while not done:
            assert lib.seg_map_find(segment.header, 0x8000, out)
            seen.add((out.size, out.read_offset))

    def publisher() -> None:
        nonlocal done
        try:
            for i in range(1000):
                segment.publish_map(maps[i % 2])
        finally:
            done = True

    run_all(reader, publisher)
    assert seen <= expected
