"""The guest-physical memory map: layers painted over one another, published to all vCPUs.

Who changes it (i440FX for PAM, BARs, A20, the VGA window) owns a named layer. ``publish`` paints
the layers in order of priority, cuts what is covered, joins neighbours and hands the result to the
segment, which lets every vCPU acknowledge before it returns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.contract.segment import Segment

READ, WRITE, MMIO, IOAPIC = 1, 2, 4, 8
NO_OFFSET = 0xFFFF_FFFF_FFFF_FFFF

#: RAM above this goes behind the 4 GiB line, so that PCI has room below it
LOW_RAM_LIMIT = 0xC000_0000
ABOVE_4G = 1 << 32


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

    def cut(self, start: int, end: int) -> Region:
        """The part between two addresses inside the region."""
        skip = start - self.gpa

        def moved(offset: int) -> int:
            return offset if offset == NO_OFFSET else offset + skip

        return replace(
            self,
            gpa=start,
            size=end - start,
            read_offset=moved(self.read_offset),
            write_offset=moved(self.write_offset),
        )

    def joins(self, after: Region) -> bool:
        """Whether ``after`` is the plain continuation of this region."""
        return not self.flags & (MMIO | IOAPIC) and self.end == after.gpa and after == self.cut_behind(after)

    def cut_behind(self, after: Region) -> Region:
        return replace(self.cut(self.end, self.end + after.size))


def ram(gpa: int, size: int, offset: int) -> Region:
    """Plain RAM at segment offset ``offset``."""
    return Region(gpa, size, READ | WRITE, offset, offset)


def rom(gpa: int, size: int, offset: int) -> Region:
    """Memory whose writes are ignored."""
    return Region(gpa, size, READ, offset)


class MemoryMap:
    """Layers by name; a higher priority covers a lower one."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._layers: dict[str, tuple[int, tuple[Region, ...]]] = {}
        low = min(segment.ram_size, LOW_RAM_LIMIT)
        regions = [ram(0, low, segment.guest_offset)]
        if segment.ram_size > low:
            regions.append(ram(ABOVE_4G, segment.ram_size - low, segment.guest_offset + low))
        self.set("ram", 0, *regions)

    def set(self, name: str, priority: int, *regions: Region) -> None:
        """Replace a layer; takes effect with ``publish``."""
        self._layers[name] = (priority, regions)

    def remove(self, name: str) -> None:
        self._layers.pop(name, None)

    def flatten(self) -> list[Region]:
        """What the guest sees, sorted by address, without overlaps."""
        painted: list[Region] = []
        for _, regions in sorted(self._layers.values(), key=lambda layer: layer[0]):
            for region in regions:
                painted = [piece for old in painted for piece in _uncovered(old, region)]
                painted.append(region)
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


def _uncovered(old: Region, new: Region) -> list[Region]:
    if new.end <= old.gpa or old.end <= new.gpa:
        return [old]
    pieces = []
    if old.gpa < new.gpa:
        pieces.append(old.cut(old.gpa, new.gpa))
    if new.end < old.end:
        pieces.append(old.cut(new.end, old.end))
    return pieces
