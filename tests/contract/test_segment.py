"""The segment as an object: layout, rejection of what does not fit, allocation, counters."""

from __future__ import annotations

import os

import numpy as np
import pytest

from coordinator.contract._segment import ffi, lib
from coordinator.contract.counters import host_counters, pin_counters, vcpu_counters
from coordinator.contract.errors import SegmentError
from coordinator.contract.segment import Segment


def test_two_mappings_share_memory(segment: Segment) -> None:
    other = Segment.attach(segment.fd)
    segment.ram[5] = 7
    segment.rom[:4] = np.frombuffer(b"rom!", dtype=np.uint8)
    assert other.ram[5] == 7
    assert bytes(other.rom[:4]) == b"rom!"
    assert other.vcpus == 4


def test_parts_are_page_aligned_and_disjoint(segment: Segment) -> None:
    header = segment.header
    starts = [
        header.vcpu_offset, header.host_offset, header.ports_offset, header.regs_offset, header.shadow_offset,
        header.maps_offset, header.fabric_offset, header.code_offset, header.dirty_offset,
        header.code_mask_offset, header.guest, header.vram, header.rom,
    ]  # fmt: skip
    assert starts == sorted(starts)
    assert all(start % 4096 == 0 for start in starts)
    assert header.vcpu_stride >= ffi.sizeof("struct vcpu_block")
    assert header.rom + header.rom_size == header.size == os.fstat(segment.fd).st_size


def test_size_is_sealed(segment: Segment) -> None:
    for size in (segment.size - 4096, segment.size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.fd, size)


def test_descriptor_is_not_inherited_by_accident(segment: Segment) -> None:
    assert not os.get_inheritable(segment.fd)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("magic", 0x1234, "magic 0x1234"),
        ("layout", 999, "layout 999"),
        ("size", 4096, "its header says 4096"),
        ("guest", 0, "guest is 0"),
        ("vcpus", 3, "this build expects"),
    ],
)
def test_attach_names_what_differs(segment: Segment, field: str, value: int, text: str) -> None:
    setattr(segment.header, field, value)
    with pytest.raises(SegmentError, match=text) as caught:
        Segment.attach(segment.fd)
    assert "\n" not in str(caught.value)


def test_attach_rejects_a_short_file() -> None:
    fd = os.memfd_create("short")
    with pytest.raises(SegmentError, match="too short"):
        Segment.attach(fd)
    os.close(fd)


@pytest.mark.parametrize("arguments", [{"vcpus": 0}, {"vcpus": 33}, {"ram": 0}, {"ram": 5000}, {"hosts": 9}])
def test_create_rejects_impossible_sizes(arguments: dict[str, int]) -> None:
    with pytest.raises(SegmentError):
        Segment.create(**{"vcpus": 1, "ram": 4096, **arguments})


def test_indices_are_handed_out_once_and_run_out(segment: Segment) -> None:
    other = Segment.attach(segment.fd)
    taken = [s.allocate_hazard() for _ in range(5) for s in (segment, other)]
    assert taken == list(range(1, 11))  # 0 means none
    with pytest.raises(SegmentError, match="no room"):
        for _ in range(lib.SEG_MAX_HAZARDS):
            segment.allocate_hazard()


def test_counters_by_name(segment: Segment) -> None:
    device = segment.allocate_device("ide0")
    block = segment.vcpu(1)
    block.instructions = 77
    block.accesses[device][lib.ACCESS_POSTED] = 3
    block.accesses[0][lib.ACCESS_NOBODY] = 2
    block.exits[lib.EXIT_IO] = 4
    block.vectors[0x30] = 5
    counters = vcpu_counters(segment, 1)
    assert counters["instructions"] == 77
    assert counters["accesses"] == {"nobody": {"nobody": 2}, "ide0": {"posted": 3}}
    assert counters["exits"] == {"io": 4}
    assert counters["vectors"] == {0x30: 5}
    segment.count_roundtrip(0, device)
    assert host_counters(segment, 0)["roundtrips"] == {"ide0": 1}
    assert pin_counters(segment) == {}
