"""The bus of a device host: what it writes into the segment, what reaches a device, and in which order."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from coordinator.contract.device import Device
from coordinator.contract.messages import SPACE_INTA, SPACE_MEMORY, SPACE_PORT
from coordinator.contract.registers import Access, Register, RegisterMap, TimeSource
from coordinator.contract.segment import SHADOW_ASK, Segment
from coordinator.contract.state import Record
from devhost.bus import Bus

HOST = 0


class Nothing(Record, frozen=True, kw_only=True):
    kind = "sample"


class Sample(Device):
    """One register of each class. ``log`` is what has happened to it."""

    kind = "sample"
    ranges: ClassVar = {
        "main": RegisterMap(
            Register("DATA", 0, widths=(1, 2)),
            Register("SET", 2, read=Access.SHADOW, write=Access.POSTED, hazard="set", plain=True),
            Register("STATUS", 3, read=Access.SHADOW, hazard="set"),
            Register("KICK", 4, write=Access.POSTED, hazard="set"),
            Register("OTHER", 5, write=Access.POSTED, hazard="other"),
            size=8,
        ),
        "memory": RegisterMap(
            Register("CONTROL", 0, 8, (4, 8)),
            Register("COUNTER", 8, 8, (4, 8), read=Access.TIME, time_source="counter"),
            size=0x1000,
        ),
    }
    time_sources: ClassVar = {"counter": TimeSource(mul=1, div=100, mask=(1 << 64) - 1)}

    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.value = 0
        self.status: int | None = 0x11
        self.effect: Any = None

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        self.log.append(("read", range_name, offset, width))
        return 0x1234_5678_9ABC_DEF0

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        self.log.append(("write", range_name, offset, width, value))
        if offset == 2:
            self.value = value
        if self.effect:
            self.effect()

    def peek(self, offset: int, range_name: str = "main") -> int | None:
        self.log.append("peek")
        return self.value if offset == 2 else self.status

    def time_state(self, source: str) -> tuple[bool, int, int]:
        return False, 0, 42

    def reset(self, hard: bool = True) -> None: ...

    def save(self) -> Record:
        return Nothing()

    def load(self, record: Record) -> None: ...


class Rig:
    def __init__(self) -> None:
        self.segment = Segment.create(vcpus=1, ram=1 << 20)
        self.bus = Bus(self.segment, HOST)
        self.log: list[Any] = []
        self.device = Sample(self.log)
        self.slot = self.bus.add(self.device, "sample")

    def descriptor(self, port: int) -> Any:
        return self.segment.regs[self.segment.ports[port]]

    def shadow(self, port: int) -> int:
        header = self.segment.header
        shadows = self.segment._at("uint64_t *", header.shadow_offset)
        return int(shadows[self.descriptor(port).shadow])


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.bus.map_ports(rig.slot, 0x300)
    return rig


def test_descriptors_say_class_width_and_place(rig: Rig) -> None:
    data, status, kick = rig.descriptor(0x300), rig.descriptor(0x303), rig.descriptor(0x304)
    assert (data.read_class, data.write_class, data.widths) == (Access.SYNC, Access.SYNC, 1 | 2)
    assert (status.read_class, status.write_class, status.widths) == (Access.SHADOW, Access.SYNC, 1)
    assert (kick.read_class, kick.write_class) == (Access.SYNC, Access.POSTED)
    assert (data.host, data.device, rig.segment.device_name(data.device)) == (HOST, rig.slot.id, "sample")
    assert (rig.descriptor(0x302).plain, status.plain) == (1, 0)


def test_holes_of_a_range_are_sync_and_ports_beyond_it_nobodys(rig: Rig) -> None:
    assert rig.descriptor(0x307).read_class == Access.SYNC and rig.segment.ports[0x307]
    assert rig.segment.ports[0x308] == rig.segment.ports[0x2FF] == 0


def test_a_hazard_joins_the_posted_write_to_the_shadow_it_changes(rig: Rig) -> None:
    status, kick, other = rig.descriptor(0x303), rig.descriptor(0x304), rig.descriptor(0x305)
    assert status.read_hazard == kick.write_hazard != 0
    assert other.write_hazard not in (0, kick.write_hazard)
    assert (kick.read_hazard, status.write_hazard) == (0, 0)


def test_moving_keeps_the_descriptors(rig: Rig) -> None:
    """Else a BAR that moves for ever would use all of them up."""
    before = [rig.segment.ports[0x300 + i] for i in range(8)]
    for base in (0x400, 0x500, 0x304):
        rig.bus.move_ports(rig.slot, base, "main")
    assert [rig.segment.ports[0x304 + i] for i in range(8)] == before
    assert rig.segment.ports[0x300] == rig.segment.ports[0x400] == 0
    rig.bus.move_ports(rig.slot, None, "main")
    assert rig.segment.ports[0x304] == 0


def test_the_device_added_last_covers_and_gives_back(rig: Rig) -> None:
    """Whichever of the two comes to the ports first."""
    other = rig.bus.add(Sample([]), "cover")
    rig.bus.map_ports(other, 0x301, size=1)
    assert [rig.descriptor(port).device for port in (0x300, 0x301, 0x302)] == [
        rig.slot.id,
        other.id,
        rig.slot.id,
    ]
    rig.bus.move_ports(rig.slot, 0x2FD, "main")
    rig.bus.move_ports(rig.slot, 0x300, "main")
    assert rig.descriptor(0x301).device == other.id
    rig.bus.move_ports(other, None, "main")
    assert rig.descriptor(0x301).device == rig.slot.id


def test_memory_ranges_get_consecutive_descriptors(rig: Rig) -> None:
    first, count = rig.bus.map_memory(rig.slot, 0xF000_0000, 0x1000, "memory")
    assert count == 2
    control, counter = rig.segment.regs[first], rig.segment.regs[first + 1]
    assert (control.offset, control.length, counter.offset, counter.length) == (0, 8, 8, 8)
    assert counter.read_class == Access.TIME
    rig.bus.publish(rig.slot)
    assert rig.segment.time_source(counter.time_source) == 42
    assert rig.bus.map_memory(rig.slot, 0xE000_0000, 0x1000, "memory") == (first, count)


# ---- dispatch ----------------------------------------------------------------------------------------
def test_read_gives_the_width_asked_for(rig: Rig) -> None:
    assert rig.bus.read(SPACE_PORT, 0x300, 2, 1) == b"\xf0\xde"
    assert rig.log[0] == ("read", "main", 0, 2)


def test_memory_reads_go_on_to_the_next_address(rig: Rig) -> None:
    rig.bus.map_memory(rig.slot, 0xF000_0000, 0x1000, "memory")
    assert rig.bus.read(SPACE_MEMORY, 0xF000_0000, 4, 2) == b"\xf0\xde\xbc\x9a" * 2
    assert [entry for entry in rig.log if entry[0] == "read"] == [
        ("read", "memory", 0, 4),
        ("read", "memory", 4, 4),
    ]


def test_writes_reach_the_device_in_order(rig: Rig) -> None:
    rig.bus.write(SPACE_PORT, 0x300, 2, 1, b"\x34\x12")
    rig.bus.write(SPACE_PORT, 0x300, 1, 3, b"abc")
    rig.bus.map_memory(rig.slot, 0xF000_0000, 0x1000, "memory")
    rig.bus.write(SPACE_MEMORY, 0xF000_0010, 4, 2, bytes(range(8)))
    rig.bus.post(SPACE_PORT, 0x304, 1, 7)
    assert [entry for entry in rig.log if entry != "peek"] == [
        ("write", "main", 0, 2, 0x1234),
        *(("write", "main", 0, 1, byte) for byte in b"abc"),
        ("write", "memory", 0x10, 4, 0x0302_0100),
        ("write", "memory", 0x14, 4, 0x0706_0504),
        ("write", "main", 4, 1, 7),
    ]


def test_nobody_answers_with_ones(rig: Rig) -> None:
    assert rig.bus.read(SPACE_PORT, 0x2FF, 4, 1) == b"\xff" * 4
    assert rig.bus.read(SPACE_MEMORY, 0x1234_0000, 8, 2) == b"\xff" * 16
    rig.bus.write(SPACE_PORT, 0x2FF, 1, 1, b"\0")
    rig.bus.post(SPACE_MEMORY, 0x1234_0000, 1, 0)
    rig.bus.map_memory(rig.slot, 0xF000_0000, 0x1000, "memory")
    rig.bus.unmap_memory(rig.slot, "memory")
    assert rig.bus.read(SPACE_MEMORY, 0xF000_0000, 1, 1) == b"\xff"
    assert rig.log == []


def test_interrupt_acknowledge_without_a_controller(rig: Rig) -> None:
    assert rig.bus.read(SPACE_INTA, 0, 1, 1) == b"\xff"
    rig.bus.inta = lambda: 0x38
    assert rig.bus.read(SPACE_INTA, 0, 1, 1) == b"\x38"


# ---- order -------------------------------------------------------------------------------------------
def test_shadows_are_stored_before_effects(rig: Rig) -> None:
    """An interrupt handler on another CPU must not find the device older than its interrupt."""
    seen: list[int] = []
    rig.device.effect = lambda: rig.bus.defer(lambda: seen.append(rig.shadow(0x302)))
    rig.bus.post(SPACE_PORT, 0x302, 1, 0x5A)
    assert seen == [0x5A]


def test_effects_are_performed_in_order_with_those_they_bring_about(rig: Rig) -> None:
    order: list[str] = []

    def effect() -> None:
        rig.bus.defer(order.append, "first")
        rig.bus.defer(lambda: rig.bus.defer(order.append, "third"))
        rig.bus.defer(order.append, "second")

    rig.device.effect = effect
    rig.bus.write(SPACE_PORT, 0x300, 1, 1, b"\0")
    assert order == ["first", "second", "third"]


def test_a_shadow_that_asks(rig: Rig) -> None:
    rig.bus.publish_all()
    assert rig.shadow(0x303) == 0x11
    rig.device.status = None
    rig.bus.publish(rig.slot)
    assert rig.shadow(0x303) == SHADOW_ASK


def test_trace_names_device_and_register(rig: Rig) -> None:
    lines: list[Any] = []
    rig.bus.trace = lambda *line: lines.append(line)
    rig.bus.read(SPACE_PORT, 0x300, 1, 1)
    rig.bus.write(SPACE_PORT, 0x307, 1, 1, b"\x07")
    rig.bus.post(SPACE_PORT, 0x304, 1, 9)
    assert lines == [
        ("sample", "DATA", 1, b"\xf0", False),
        ("sample", "+0x7", 1, b"\x07", True),
        ("sample", "KICK", 1, b"\x09", True),
    ]
