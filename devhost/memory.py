"""The guest-physical memory map: layers painted over one another, published to all vCPUs.

Who changes it (i440FX for PAM, BARs, A20, the VGA window) owns a named layer. ``publish`` paints
the layers in order of priority, cuts what is covered, joins neighbours and hands the result to the
segment, which lets every vCPU acknowledge before it returns.

Priorities are those of the i440FX (290549, section 4.1, "System address map"): DRAM answers before PCI,
except where the map has a hole for PCI - the VGA window at A0000h-BFFFFh, and above the top of memory.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from coordinator.contract.segment import NO_OFFSET, Segment

READ, WRITE, MMIO, IOAPIC = 1, 2, 4, 8

#: RAM above this goes behind the 4 GiB line, so that PCI has room below it
LOW_RAM_LIMIT = 0xC000_0000
ABOVE_4G = 1 << 32
MIB = 1 << 20
#: the hole that DRAM leaves for the display
VGA_HOLE = (0xA0000, 0xC0000)


class Layer(enum.IntEnum):
    """A higher one covers a lower one."""

    PCI = 0
    RAM = 1
    PAM = 2
    VGA = 3
    CHIPS = 4


@dataclass(frozen=True)
class Region:
    """As ``struct map_region``: gpa and size are page aligned."""

    gpa: int
    size: int
    flags: int
    read_offset: int = NO_OFFSET
    write_offset: int = NO_OFFSET
    host: int = 0
    device: int = 0
    first_reg: int = 0
    regs: int = 0

    @property
    def end(self) -> int:
        return self.gpa + self.size

    @property
    def plain(self) -> bool:
        """Memory, or nothing."""
        return not self.flags & (MMIO | IOAPIC)

    def cut(self, start: int, end: int) -> Region:
        """The part between two addresses inside the region."""
        return replace(self.behind(start - self.gpa), gpa=start, size=end - start)

    def behind(self, skip: int) -> Region:
        """The same region with its memory ``skip`` bytes further on."""

        def moved(offset: int) -> int:
            return offset if offset == NO_OFFSET else offset + skip

        return replace(self, read_offset=moved(self.read_offset), write_offset=moved(self.write_offset))

    def joins(self, after: Region) -> bool:
        """Whether ``after`` is the plain continuation of this region."""
        return (
            self.plain
            and self.end == after.gpa
            and after == replace(self.behind(self.size), gpa=after.gpa, size=after.size)
        )


def ram(gpa: int, size: int, offset: int) -> Region:
    """Plain RAM at segment offset ``offset``."""
    return Region(gpa, size, READ | WRITE, offset, offset)


def rom(gpa: int, size: int, offset: int) -> Region:
    """Memory whose writes are ignored."""
    return Region(gpa, size, READ, offset)


class MemoryMap:
    """Layers by name."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._layers: dict[str, tuple[Layer, tuple[Region, ...]]] = {}
        #: with the gate shut the second megabyte is the first (docs/quirks.md: only there)
        self.a20 = True
        base = segment.guest_offset
        low = min(segment.ram_size, LOW_RAM_LIMIT)
        hole, behind = VGA_HOLE
        regions = [ram(0, min(low, hole), base)]
        if low > behind:
            regions.append(ram(behind, low - behind, base + behind))
        if segment.ram_size > low:
            regions.append(ram(ABOVE_4G, segment.ram_size - low, base + low))
        self.set("ram", Layer.RAM, *regions)

    def set(self, name: str, priority: Layer, *regions: Region) -> None:
        """Replace a layer; takes effect with ``publish``. Of one priority, the layer set first lies below."""
        self._layers[name] = (priority, regions)

    def remove(self, name: str) -> None:
        self._layers.pop(name, None)

    def flatten(self) -> list[Region]:
        """What the guest sees, sorted by address, without overlaps."""
        painted: list[Region] = []
        for _, regions in sorted(self._layers.values(), key=lambda layer: layer[0]):
            for region in regions:
                painted = _paint(painted, region)
        if not self.a20:
            painted = _without_a20(painted)
        painted.sort(key=lambda region: region.gpa)
        joined: list[Region] = []
        for region in painted:
            if joined and joined[-1].joins(region):
                joined[-1] = replace(joined[-1], size=joined[-1].size + region.size)
            else:
                joined.append(region)
        return joined

    def publish(self) -> None:
        """Put the map in force for every vCPU; returns when all of them have it."""
        self.segment.publish_map(self.flatten())


def _paint(painted: list[Region], region: Region) -> list[Region]:
    return [*(piece for old in painted for piece in _uncovered(old, region)), region]


def _uncovered(old: Region, new: Region) -> list[Region]:
    if new.end <= old.gpa or old.end <= new.gpa:
        return [old]
    pieces = []
    if old.gpa < new.gpa:
        pieces.append(old.cut(old.gpa, new.gpa))
    if new.end < old.end:
        pieces.append(old.cut(new.end, old.end))
    return pieces


def _without_a20(painted: list[Region]) -> list[Region]:
    """Memory of the first megabyte shows in the second, too; what is not memory leaves a hole there."""
    second = Region(MIB, MIB, 0)
    aliases = []
    for region in painted:
        if region.plain and region.gpa < MIB:
            piece = region.cut(region.gpa, min(region.end, MIB))
            aliases.append(replace(piece, gpa=piece.gpa + MIB))
    return [piece for old in painted for piece in _uncovered(old, second)] + aliases
