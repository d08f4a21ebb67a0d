"""The memory map: painting, joining, A20, PAM - against a model that keeps one entry a page."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.contract.segment import NO_OFFSET, Segment
from devhost.memory import IOAPIC, MMIO, READ, WRITE, Layer, MemoryMap, Region, ram, rom

PAGE = 4096
MIB = 1 << 20
RAM = 8 * MIB


@pytest.fixture(scope="module")
def segment() -> Segment:
    return Segment.create(vcpus=1, ram=RAM, rom=MIB)


Seen = tuple[int, int, int, int]


def look(regions: list[Region], page: int) -> Seen | None:
    """(flags, where reads go, where writes go, device) of a page; None where nothing is."""
    for region in regions:
        if region.gpa <= page < region.end:
            skip = page - region.gpa
            read = region.read_offset + skip if region.flags & READ else NO_OFFSET
            write = region.write_offset + skip if region.flags & WRITE else NO_OFFSET
            return region.flags, read, write, region.device
    return None


def well_formed(regions: list[Region]) -> bool:
    ends = [0, *(region.end for region in regions)]
    return all(end <= region.gpa for end, region in zip(ends, regions, strict=False))


def test_ram_leaves_a_hole_for_the_display(segment: Segment) -> None:
    regions = MemoryMap(segment).flatten()
    assert [(r.gpa, r.end) for r in regions] == [(0, 0xA0000), (0xC0000, RAM)]
    assert all(r.read_offset == r.write_offset == segment.guest_offset + r.gpa for r in regions)


def test_ram_beyond_3_gib_goes_above_4_gib() -> None:
    """-m 4608: 3 GiB below, 1.5 GiB from 4 GiB on, one block of the segment. Nothing of it is touched."""
    big = Segment.create(vcpus=1, ram=4608 * MIB)
    regions = MemoryMap(big).flatten()
    assert [(r.gpa, r.end) for r in regions] == [
        (0, 0xA0000),
        (0xC0000, 3 << 30),
        (4 << 30, (4 << 30) + 1536 * MIB),
    ]
    assert regions[2].read_offset == big.guest_offset + (3 << 30)
    big.close()


def test_ram_of_one_megabyte_and_of_less_than_the_hole() -> None:
    small = Segment.create(vcpus=1, ram=0x80000)
    assert [(r.gpa, r.end) for r in MemoryMap(small).flatten()] == [(0, 0x80000)]
    small.close()


def test_a_higher_layer_cuts_a_lower_one_and_takes_its_memory_along(segment: Segment) -> None:
    memory = MemoryMap(segment)
    memory.set("chip", Layer.CHIPS, Region(2 * MIB, PAGE, MMIO, device=7))
    before, chip, after = memory.flatten()[1:]
    assert (before.end, chip.gpa, chip.device, after.gpa) == (2 * MIB, 2 * MIB, 7, 2 * MIB + PAGE)
    assert after.read_offset == segment.guest_offset + 2 * MIB + PAGE
    memory.remove("chip")
    assert len(memory.flatten()) == 2


def test_pci_lies_below_ram(segment: Segment) -> None:
    """290549, 4.1: a BAR that the guest puts over DRAM is not seen there."""
    memory = MemoryMap(segment)
    memory.set("bar", Layer.PCI, ram(RAM - MIB, 2 * MIB, segment.rom_offset))
    assert look(memory.flatten(), RAM - PAGE) == (
        3,
        segment.guest_offset + RAM - PAGE,
        segment.guest_offset + RAM - PAGE,
        0,
    )
    assert look(memory.flatten(), RAM) == (3, segment.rom_offset + MIB, segment.rom_offset + MIB, 0)


def test_neighbours_are_joined_only_if_plain_and_continuous(segment: Segment) -> None:
    memory = MemoryMap(segment)
    base = segment.guest_offset
    memory.set("pam", Layer.PAM, ram(0xC0000, PAGE, base + 0xC0000), ram(0xC1000, PAGE, base + 0xC1000))
    assert len(memory.flatten()) == 2
    memory.set("pam", Layer.PAM, ram(0xC0000, PAGE, base + 0xC0000), ram(0xC1000, PAGE, base))
    assert len(memory.flatten()) == 4
    memory.set("pam", Layer.PAM, Region(RAM, PAGE, MMIO, device=3), Region(RAM + PAGE, PAGE, MMIO, device=3))
    assert len(memory.flatten()) == 4  # a device counts its registers from the start of its region


def test_reads_and_writes_may_go_apart(segment: Segment) -> None:
    """PAM "write only": reads see ROM while firmware copies itself into RAM."""
    memory = MemoryMap(segment)
    shadow = replace(
        rom(0xF0000, 0x10000, segment.rom_offset),
        flags=READ | WRITE,
        write_offset=segment.guest_offset + 0xF0000,
    )
    memory.set("pam", Layer.PAM, shadow)
    assert look(memory.flatten(), 0xF8000) == (
        3,
        segment.rom_offset + 0x8000,
        segment.guest_offset + 0xF8000,
        0,
    )


def test_a20_shut_shows_the_first_megabyte_twice(segment: Segment) -> None:
    memory = MemoryMap(segment)
    memory.set("pam", Layer.PAM, rom(0xF0000, 0x10000, segment.rom_offset))
    memory.set("vga", Layer.VGA, Region(0xA0000, 0x10000, MMIO, device=4))
    memory.a20 = False
    regions = memory.flatten()
    assert well_formed(regions)
    for page in range(0, MIB, PAGE):
        first, second = look(regions, page), look(regions, page + MIB)
        assert second == (first if first and not first[0] & MMIO else None)
    assert look(regions, 2 * MIB) == (3, segment.guest_offset + 2 * MIB, segment.guest_offset + 2 * MIB, 0)
    memory.a20 = True
    assert look(memory.flatten(), MIB) == (3, segment.guest_offset + MIB, segment.guest_offset + MIB, 0)


pages = st.integers(0, 40)
layers = st.lists(
    st.tuples(
        st.sampled_from(list(Layer)),
        pages,
        st.integers(1, 20),
        st.sampled_from((0, READ, WRITE, READ | WRITE, MMIO, READ | MMIO, IOAPIC)),
        st.integers(0, 200),
    ),
    max_size=10,
)


@settings(max_examples=200)
@given(layers, st.booleans())
def test_flattening_against_a_page_table(layered: list[tuple[Layer, int, int, int, int]], a20: bool) -> None:
    """Painting page by page gives the same; the C code takes every result."""
    segment = SMALL
    memory = MemoryMap(segment)
    memory.a20 = a20
    model: dict[int, Seen] = {page: s for page in range(0, MIB, PAGE) if (s := look(memory.flatten(), page))}
    painted = [(Layer.RAM, -1, dict(model))]
    for number, (layer, start, count, flags, offset) in enumerate(layered):
        gpa, at = 0x90000 + start * PAGE, segment.guest_offset + offset * PAGE
        region = Region(gpa, count * PAGE, flags, at, at + PAGE, device=number + 3)
        memory.set(f"layer{number}", layer, region)
        shown = {p: s for p in range(gpa, region.end, PAGE) if (s := look([region], p))}
        painted.append((layer, number, shown))
    expected: dict[int, Seen] = {}
    for _, _, shown in sorted(painted, key=lambda entry: entry[:2]):
        expected.update(shown)
    regions = memory.flatten()
    assert well_formed(regions)
    assert all(look(regions, page) == expected.get(page) for page in range(0, MIB, PAGE))
    memory.publish()
    assert [(r.gpa, r.size, r.flags) for r in segment.memory_map()] == [
        (r.gpa, r.size, r.flags) for r in regions
    ]


SMALL = Segment.create(vcpus=1, ram=MIB)
