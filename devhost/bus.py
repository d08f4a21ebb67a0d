"""The bus of a device host: who answers which port and address, and what the vCPUs know of it.

Devices are mapped here by wiring (pc.py). For each mapping the bus writes register descriptors and
the port map of the segment, so that a vCPU answers shadow and time registers by itself; what
reaches this process is dispatched through one dictionary per space, resolved when it is mapped.

An event changes devices, which are ``touched``, and leaves effects on the rest of the machine. When it
ends, SHADOW registers and time sources of the touched devices are stored in the segment, then the effects
are performed. The service has several events end together, and commits in between (commit.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coordinator.contract.device import Device
from coordinator.contract.messages import SPACE_INTA, SPACE_PORT
from coordinator.contract.registers import Access, Register
from coordinator.contract.segment import SHADOW_ASK, Segment

Effect = tuple[Callable[..., Any], tuple[Any, ...]]

#: an access that nobody answers reads as all ones
ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


@dataclass(eq=False)
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
    #: what a write to this device may change besides it and the interrupt lines
    also: tuple[Slot, ...] = ()
    #: unplugged: nothing of it is left for the guest
    absent: bool = False
    #: its checkpoint as last committed, encoded, and where
    committed: bytes | None = None
    state_slot: int = -1


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
        #: who answers INTA, and knows the interrupt lines
        self.pic: Slot | None = None
        self.effects: list[Effect] = []
        #: of the event in hand: what it may have changed, in order
        self.touched: dict[Slot, None] = {}
        #: what is committed with the devices and is none
        self.beside: tuple[Slot, ...] = ()
        #: events end when the service says so
        self.grouped = False
        #: indices in the segment by what they are for; a successor goes on with those of its predecessor
        self.known: dict[str, int] = {}
        #: the port map is not shown yet, see ``show_ports``
        self.silent = False
        #: told whose the work in hand is, see hand.py: called with (device id, space, address, write)
        self.in_hand: Callable[[int, int, int, bool], None] = lambda device, space, address, write: None
        #: -trace: called with (device name, register, width, data of all items, write)
        self.trace: Callable[[str, str, int, bytes, bool], None] | None = None

    # ---- mapping -------------------------------------------------------------------------------
    def add(self, device: Device, name: str) -> Slot:
        """Give a device its id; ``name`` is what tables and traces call it."""
        slot = Slot(device, name, self._index(f"device {name}", lambda: self.segment.allocate_device(name)))
        self.slots[slot.id] = slot
        return slot

    def _index(self, what: str, allocate: Callable[[], int]) -> int:
        index = self.known.get(what)
        if index is None:
            index = self.known[what] = allocate()
        return index

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
            if not self.silent:
                self.segment.ports[port] = 0
            return
        window = max(self._claims[port], key=lambda window: (window.slot.id, window.range_name))
        self._ports[port] = window
        offset = port - window.base
        if not self.silent:
            self.segment.ports[port] = self._port_descriptor(window, offset)

    def _port_descriptor(self, window: Window, offset: int) -> int:
        register = window.slot.device.ranges[window.range_name].at(offset) or Register("unused", offset)
        return self._descriptor(window.slot, window.range_name, register, offset)

    def show_ports(self) -> None:
        """End being ``silent``: the port map is as it is here, for ports of this host."""
        self.silent = False
        shown = self.segment.port_map
        for port in np.flatnonzero(shown).tolist():
            if port not in self._ports and self.segment.regs[shown[port]].host == self.host:
                shown[port] = 0
        for port, window in self._ports.items():
            shown[port] = self._port_descriptor(window, port - window.base)

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
        place = f"{slot.name} {range_name} {offset:#x}"
        index = self._index(f"register {place}", self.segment.allocate_register)
        desc = self.segment.regs[index]
        desc.read_class, desc.write_class = register.read, register.write
        desc.host, desc.device = self.host, slot.id
        desc.widths = sum(register.widths)
        desc.offset, desc.length = register.offset, register.span
        desc.shift, desc.within, desc.plain = register.shift, offset - register.offset, register.plain
        if register.read is Access.SHADOW:
            desc.shadow = self._index(f"shadow {place}", self.segment.allocate_shadow)
            slot.shadows.append((desc.shadow, offset, range_name))
        if register.read is Access.TIME:
            desc.time_source = self._time_source(slot, register)
        if register.hazard is not None:
            number = slot.hazards.get(register.hazard)
            if number is None:
                what = f"hazard {slot.name} {register.hazard}"
                number = slot.hazards[register.hazard] = self._index(what, self.segment.allocate_hazard)
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
        shape = slot.device.time_sources[register.time_source]
        index = self._index(
            f"time {slot.name} {register.time_source}",
            lambda: self.segment.allocate_time_source(shape.mul, shape.div, shape.mask),
        )
        slot.time_sources.append((index, register.time_source))
        return index

    # ---- events --------------------------------------------------------------------------------
    def defer(self, function: Callable[..., Any], *arguments: Any) -> None:
        """An effect of the event in hand on the rest of the machine: in order, after shadows are stored. That
        it is performed twice in a row must do no harm, where a successor may have to: see commit.py."""
        self.effects.append((function, arguments))

    def touch(self, *slots: Slot) -> None:
        """The event in hand may change these devices."""
        for slot in slots:
            self.touched[slot] = None

    def fired(self, *slots: Slot) -> None:
        """A timer of the first one has come, or another thing that it has waited for; it may change these."""
        self.in_hand(slots[0].id, 0, 0, False)
        self.touch(*slots)

    def touch_all(self) -> None:
        """It may change any."""
        self.touch(*self.slots.values(), *self.beside)

    def publish(self, slot: Slot) -> None:
        """An event of one device has ended, or a part of a larger one."""
        self.touched[slot] = None
        if slot.settled:
            slot.settled()
        if not self.grouped:
            self.show()

    def publish_all(self) -> None:
        """One that may have changed any device."""
        self.touch_all()
        self.settle()
        if not self.grouped:
            self.show()

    def settle(self) -> None:
        """Tell those who watch the touched devices."""
        for slot in list(self.touched):
            if slot.settled:
                slot.settled()

    def show(self, performed: Callable[[], None] = lambda: None) -> None:
        """Store shadow registers and time sources of what was touched, then perform the effects;
        ``performed``
        is called behind each."""
        storing = [slot for slot in self.touched if slot.shadows or slot.time_sources]
        self.touched.clear()
        if storing:
            self.segment.storing_shadows(self.host, True)
            for slot in storing:
                self._store(slot)
            self.segment.storing_shadows(self.host, False)
        while self.effects:
            effects, self.effects = self.effects, []
            for function, arguments in effects:
                function(*arguments)
                performed()

    def _store(self, slot: Slot) -> None:
        device = slot.device
        for index, offset, range_name in slot.shadows:
            value = None if slot.absent else device.peek(offset, range_name)
            self.segment.set_shadow(index, SHADOW_ASK if value is None else value)
        for index, name in slot.time_sources:
            state = (False, 0, ONES[8]) if slot.absent else device.time_state(name)
            self.segment.set_time_source(index, *state)

    # ---- accesses ------------------------------------------------------------------------------
    def _window(self, space: int, addr: int) -> Window | None:
        found: Window | None = None
        if space == SPACE_PORT:
            found = self._ports.get(addr)
        else:
            for window in self._memory:
                if window.base <= addr < window.base + window.size:
                    found = window
                    break
        return None if found is None or found.slot.absent else found

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
        self.in_hand(window.slot.id, space, addr, False)
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
        if self.pic is not None:
            self.in_hand(self.pic.id, SPACE_INTA, 0, False)
        absent = self.pic is not None and self.pic.absent
        vector = self.inta() if self.inta and not absent else 0xFF
        if self.pic is not None:
            self.publish(self.pic)
        elif not self.grouped:
            self.show()
        return bytes([vector])

    def write(self, space: int, addr: int, width: int, count: int, data: bytes) -> None:
        """A sync write."""
        window = self._window(space, addr)
        if window is None:
            return
        self.in_hand(window.slot.id, space, addr, True)
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
        self.touch(*window.slot.also)
        self.publish(window.slot)

    def post(self, space: int, addr: int, width: int, value: int) -> None:
        """A posted write, in ticket order."""
        window = self._window(space, addr)
        if window is None:
            return
        self.in_hand(window.slot.id, space, addr, True)
        offset = addr - window.base
        if self.trace:
            self._trace(window, offset, width, _item(value, width), write=True)
        window.slot.device.write(offset, width, value, window.range_name)
        self.touch(*window.slot.also)
        self.publish(window.slot)

    def _trace(self, window: Window, offset: int, width: int, data: bytes, write: bool) -> None:
        assert self.trace is not None
        registers = window.slot.device.ranges[window.range_name]
        self.trace(window.slot.name, registers.name(offset), width, data, write)


def _item(value: int, width: int) -> bytes:
    return (value & ONES[width]).to_bytes(width, "little")
