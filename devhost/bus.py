"""The bus of a device host: who answers which port and address, and what the vCPUs know of it.

Devices are mapped here by wiring (pc.py). For each mapping the bus writes register descriptors and
the port map of the segment, so that a vCPU answers shadow and time registers by itself; what
reaches this process is dispatched through one dictionary per space, resolved when it is mapped.

After each event of a device its SHADOW registers and time sources are stored in the segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coordinator.contract.device import Device
from coordinator.contract.messages import SPACE_INTA, SPACE_PORT
from coordinator.contract.registers import Access, Register
from coordinator.contract.segment import SHADOW_ASK, Segment

#: an access that nobody answers reads as all ones
ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


@dataclass
class Slot:
    """A device as the bus knows it."""

    device: Device
    name: str
    id: int
    #: (index in shadow[], offset, range) of each shadow register
    shadows: list[tuple[int, int, str]] = field(default_factory=list)
    #: (index in time_source[], name)
    time_sources: list[tuple[int, str]] = field(default_factory=list)
    hazards: dict[str, int] = field(default_factory=dict)
    #: descriptor index of each (range, offset), made once and reused when a BAR moves
    descriptors: dict[tuple[str, int], int] = field(default_factory=dict)
    #: asked (range, offset, data written or None) before a sync access; True: not now, the vCPU asks again
    gate: Callable[[str, int, bytes | None], bool] | None = None
    #: told when an event of the device has ended
    settled: Callable[[], None] | None = None


@dataclass(frozen=True)
class Window:
    """One mapped range: ``base`` is subtracted from the address before the device sees it."""

    slot: Slot
    base: int
    size: int
    range_name: str


class Bus:
    """Mappings of one device host (``host`` is its index in the segment)."""

    def __init__(self, segment: Segment, host: int) -> None:
        self.segment = segment
        self.host = host
        self.slots: dict[int, Slot] = {}
        #: every window at a port, and the one that answers
        self._claims: dict[int, list[Window]] = {}
        self._ports: dict[int, Window] = {}
        self._memory: list[Window] = []
        self.inta: Callable[[], int] | None = None
        self._effects: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        #: -trace: called with (device name, register, width, data of all items, write)
        self.trace: Callable[[str, str, int, bytes, bool], None] | None = None

    # ---- mapping -------------------------------------------------------------------------------
    def add(self, device: Device, name: str) -> Slot:
        """Give a device its id; ``name`` is what tables and traces call it."""
        slot = Slot(device, name, self.segment.allocate_device(name))
        self.slots[slot.id] = slot
        return slot

    def map_ports(self, slot: Slot, base: int, range_name: str = "main", size: int | None = None) -> None:
        """Answer ports ``base`` and up with the device's range; where several do, the device added last. A
        vCPU that runs is sure to see it after ``segment.republish_map``."""
        window = Window(slot, base, size or slot.device.ranges[range_name].size, range_name)
        for port in range(base, base + window.size):
            self._claims.setdefault(port, []).append(window)
            self._show_port(port)

    def move_ports(self, slot: Slot, base: int | None, range_name: str) -> None:
        """Answer at another base, or nowhere; whoever calls publishes the map."""
        for port, claims in list(self._claims.items()):
            kept = [window for window in claims if window.slot is not slot or window.range_name != range_name]
            if len(kept) < len(claims):
                self._claims[port] = kept
                self._show_port(port)
        if base is not None:
            self.map_ports(slot, base, range_name)

    def _show_port(self, port: int) -> None:
        """The window on top answers."""
        if not self._claims[port]:
            del self._claims[port], self._ports[port]
            self.segment.ports[port] = 0
            return
        window = max(self._claims[port], key=lambda window: (window.slot.id, window.range_name))
        self._ports[port] = window
        offset = port - window.base
        register = window.slot.device.ranges[window.range_name].at(offset) or Register("unused", offset)
        self.segment.ports[port] = self._descriptor(window.slot, window.range_name, register, offset)

    def map_memory(self, slot: Slot, gpa: int, size: int, range_name: str = "main") -> tuple[int, int]:
        """Answer addresses ``gpa`` and up; returns (first_reg, regs) for the region in the memory map."""
        self._memory = [w for w in self._memory if not (w.slot is slot and w.range_name == range_name)]
        self._memory.append(Window(slot, gpa, size, range_name))
        registers = list(slot.device.ranges[range_name])
        indices = [self._descriptor(slot, range_name, r, r.offset) for r in registers]
        if indices and indices != list(range(indices[0], indices[0] + len(indices))):
            raise ValueError(f"{slot.name}: memory registers need consecutive descriptors")
        return (indices[0] if indices else 0), len(indices)

    def unmap_memory(self, slot: Slot, range_name: str = "main") -> None:
        self._memory = [w for w in self._memory if not (w.slot is slot and w.range_name == range_name)]

    def _descriptor(self, slot: Slot, range_name: str, register: Register, offset: int) -> int:
        key = (range_name, offset)
        if key in slot.descriptors:
            return slot.descriptors[key]
        index = self.segment.allocate_register()
        desc = self.segment.regs[index]
        desc.read_class, desc.write_class = register.read, register.write
        desc.host, desc.device = self.host, slot.id
        desc.widths = sum(register.widths)
        desc.offset, desc.length = register.offset, register.span
        desc.shift, desc.within, desc.plain = register.shift, offset - register.offset, register.plain
        if register.read is Access.SHADOW:
            desc.shadow = self.segment.allocate_shadow()
            slot.shadows.append((desc.shadow, offset, range_name))
        if register.read is Access.TIME:
            desc.time_source = self._time_source(slot, register)
        if register.hazard is not None:
            number = slot.hazards.get(register.hazard)
            if number is None:
                number = slot.hazards[register.hazard] = self.segment.allocate_hazard()
            if register.read is Access.SHADOW:
                desc.read_hazard = number
            if register.write is Access.POSTED:
                desc.write_hazard = number
        slot.descriptors[key] = index
        return index

    def _time_source(self, slot: Slot, register: Register) -> int:
        assert register.time_source is not None  # Register sees to it
        for index, name in slot.time_sources:
            if name == register.time_source:
                return index
        source = slot.device.time_sources[register.time_source]
        index = self.segment.allocate_time_source(source.mul, source.div, source.mask)
        slot.time_sources.append((index, register.time_source))
        return index

    # ---- effects -------------------------------------------------------------------------------
    def defer(self, function: Callable[..., None], *arguments: Any) -> None:
        """An effect of the event in hand on the rest of the machine: in order, after shadows are stored."""
        self._effects.append((function, arguments))

    def _perform(self) -> None:
        while self._effects:
            effects, self._effects = self._effects, []
            for function, arguments in effects:
                function(*arguments)

    # ---- events --------------------------------------------------------------------------------
    def publish(self, slot: Slot) -> None:
        """End an event of one device: store its shadow registers and time sources, then perform effects."""
        if slot.shadows or slot.time_sources:
            self.segment.storing_shadows(self.host, True)
            self._store(slot)
            self.segment.storing_shadows(self.host, False)
        self._perform()
        if slot.settled:
            slot.settled()

    def _store(self, slot: Slot) -> None:
        device = slot.device
        for index, offset, range_name in slot.shadows:
            value = device.peek(offset, range_name)
            self.segment.set_shadow(index, SHADOW_ASK if value is None else value)
        for index, name in slot.time_sources:
            self.segment.set_time_source(index, *device.time_state(name))

    def publish_all(self) -> None:
        """End an event that may have changed any device."""
        self.segment.storing_shadows(self.host, True)
        for slot in self.slots.values():
            if slot.shadows or slot.time_sources:
                self._store(slot)
        self.segment.storing_shadows(self.host, False)
        self._perform()
        for slot in self.slots.values():
            if slot.settled:
                slot.settled()

    def _window(self, space: int, addr: int) -> Window | None:
        if space == SPACE_PORT:
            return self._ports.get(addr)
        for window in self._memory:
            if window.base <= addr < window.base + window.size:
                return window
        return None

    def holds(self, space: int, addr: int, data: bytes | None) -> bool:
        """Whether a sync access (``data``: what it writes) must wait."""
        window = self._window(space, addr) if space != SPACE_INTA else None
        if window is None or window.slot.gate is None:
            return False
        return window.slot.gate(window.range_name, addr - window.base, data)

    def read(self, space: int, addr: int, width: int, count: int) -> bytes:
        """A sync read: ``count`` items of ``width`` bytes, little-endian."""
        if space == SPACE_INTA:
            return self._acknowledge()
        window = self._window(space, addr)
        if window is None:
            return b"\xff" * (width * count)
        device, offset = window.slot.device, addr - window.base
        if count == 1:
            data = _item(device.read(offset, width, window.range_name), width)
        elif space == SPACE_PORT:
            data = device.read_string(offset, width, count, window.range_name)
        else:
            items = (device.read(offset + i * width, width, window.range_name) for i in range(count))
            data = b"".join(_item(item, width) for item in items)
        if self.trace:
            self._trace(window, offset, width, data, write=False)
        self.publish(window.slot)
        return data

    def _acknowledge(self) -> bytes:
        """INTA: the vector of the interrupt controller."""
        vector = self.inta() if self.inta else 0xFF
        self._perform()
        return bytes([vector])

    def write(self, space: int, addr: int, width: int, count: int, data: bytes) -> None:
        """A sync write."""
        window = self._window(space, addr)
        if window is None:
            return
        device, offset = window.slot.device, addr - window.base
        if self.trace:
            self._trace(window, offset, width, data, write=True)
        if count == 1:
            device.write(offset, width, int.from_bytes(data[:width], "little"), window.range_name)
        elif space == SPACE_PORT:
            device.write_string(offset, width, data, window.range_name)
        else:
            for at in range(0, len(data), width):
                item = int.from_bytes(data[at : at + width], "little")
                device.write(offset + at, width, item, window.range_name)
        self.publish(window.slot)

    def post(self, space: int, addr: int, width: int, value: int) -> None:
        """A posted write, in ticket order."""
        window = self._window(space, addr)
        if window is None:
            return
        offset = addr - window.base
        if self.trace:
            self._trace(window, offset, width, _item(value, width), write=True)
        window.slot.device.write(offset, width, value, window.range_name)
        self.publish(window.slot)

    def _trace(self, window: Window, offset: int, width: int, data: bytes, write: bool) -> None:
        assert self.trace is not None
        registers = window.slot.device.ranges[window.range_name]
        self.trace(window.slot.name, registers.name(offset), width, data, write)


def _item(value: int, width: int) -> bytes:
    return (value & ONES[width]).to_bytes(width, "little")
