"""Segments for the tests of the contract."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from coordinator.contract._segment import lib
from coordinator.contract.segment import NO_OFFSET, Segment

RAM = 1 << 20


@dataclass(frozen=True)
class Region:
    """A memory region as the segment takes it."""

    gpa: int
    size: int
    flags: int
    read_offset: int = NO_OFFSET
    write_offset: int = NO_OFFSET
    host: int = 0
    device: int = 0
    first_reg: int = 0
    regs: int = 0


def ram_at(segment: Segment, gpa: int, size: int, skip: int = 0) -> Region:
    offset = segment.guest_offset + skip
    return Region(gpa, size, lib.REGION_READ | lib.REGION_WRITE, offset, offset)


@pytest.fixture
def segment() -> Iterator[Segment]:
    """Four vCPUs, 1 MiB of RAM at 0, running time."""
    made = Segment.create(vcpus=4, ram=RAM, rom=1 << 16)
    made.publish_map([ram_at(made, 0, RAM)])
    yield made
    made.close()


def enable_apics(segment: Segment) -> None:
    """As vCPUs publish themselves after reset and a write of 1FFh to SVR: xAPIC, flat model, ID = number."""
    for index in range(segment.vcpus):
        block = segment.vcpu(index)
        block.apic_id, block.apic_dfr, block.apic_ldr = index, 0xFFFF_FFFF, 1 << (24 + index)
        block.apic_mode, block.apic_sw_enabled = 1, 1


def posted(segment: Segment, vcpu: int) -> set[int]:
    """Vectors that wait in posted_irr."""
    words = segment.vcpu(vcpu).posted_irr
    return {word * 64 + bit for word in range(4) for bit in range(64) if words[word] >> bit & 1}


def take(segment: Segment, vcpu: int) -> set[int]:
    """The same, and they are taken."""
    vectors = posted(segment, vcpu)
    for word in range(4):
        segment.vcpu(vcpu).posted_irr[word] = 0
    return vectors
