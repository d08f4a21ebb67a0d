"""Hardware case 12 for the chips: any access, any width, any value, at any time, never raises; and a
chip saved at any moment and loaded into a fresh one goes on alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.contract.clock import ManualClock
from coordinator.contract.device import Device, ListPin
from coordinator.contract.registers import Access
from coordinator.contract.state import pack, unpack
from devhost.chips.acpi_pm import AcpiPm
from devhost.chips.debug_port import DebugPort
from devhost.chips.hpet import Hpet
from devhost.chips.i8042 import I8042
from devhost.chips.i8237 import I8237
from devhost.chips.i8254 import I8254
from devhost.chips.i8259 import I8259
from devhost.chips.isa_debug_exit import IsaDebugExit
from devhost.chips.keycodes import QCODES
from devhost.chips.mc146818 import Mc146818
from devhost.chips.ns16550 import Ns16550
from devhost.chips.port61 import Port61
from devhost.chips.port92 import Port92
from devhost.chips.reset_control import ResetControl


@dataclass
class Board:
    """What a chip is wired to; ``events`` is all that it does to the outside, in order."""

    clock: ManualClock = field(default_factory=ManualClock)
    pins: list[ListPin] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)

    def pin(self) -> ListPin:
        self.pins.append(ListPin())
        return self.pins[-1]

    def call(self, *what: Any) -> None:
        self.events.append(what)

    # the terminal of a UART
    def output(self, data: bytes) -> None:
        self.events.append(data)

    def room_made(self) -> None:
        pass


def _wall(board: Board) -> Callable[[], int]:
    return lambda: 1_795_000_000_000_000_000 + board.clock.now()


CHIPS: dict[str, Callable[[Board], Device]] = {
    "i8259": lambda board: I8259(board.pin()),
    "i8254": lambda board: I8254(board.clock, board.pin()),
    "port61": lambda board: Port61(I8254(board.clock, board.pin())),
    "mc146818": lambda board: Mc146818(board.clock, _wall(board), board.pin()),
    "i8042": lambda board: I8042(board.clock, board.pin(), board.pin(), board.pin(), board.call),
    "ns16550": lambda board: Ns16550(board.clock, board.pin(), board),
    "acpi_pm": lambda board: AcpiPm(board.clock, board.pin(), board.call),
    "hpet": lambda board: Hpet(
        board.clock, board.pin(), board.pin(), board.pin(), {n: board.pin() for n in range(20, 24)}
    ),
    "i8237": lambda board: I8237(),
    "port92": lambda board: Port92(board.pin(), board.call),
    "reset_control": lambda board: ResetControl(board.call),
    "debug_port": lambda board: DebugPort(board.output),
    "isa_debug_exit": lambda board: IsaDebugExit(board.call),
}

#: (kind of step, place, width, value); each chip makes of place and value what it can
STEPS = st.lists(
    st.tuples(
        st.sampled_from(("read", "read", "write", "write", "write", "time", "host")),
        st.integers(0, 0xFFFF),
        st.sampled_from((1, 1, 1, 2, 4, 8)),
        st.one_of(st.integers(0, 255), st.integers(0, 2**64 - 1)),
    ),
    max_size=60,
)
#: ns: from a tick to the alarm of tomorrow
ADVANCES = (1, 100, 10_000, 838_000, 5_000_000, 70_000_000, 1_000_000_000)


def step(board: Board, device: Device, what: tuple[str, int, int, int]) -> Any:
    """Do one step; the result is what the guest or the host sees of it."""
    kind, place, width, value = what
    names = list(device.ranges)
    name = names[place % len(names)]
    registers = list(device.ranges[name])
    register = registers[place // 7 % len(registers)]
    # mostly a register, now and then any offset of the range
    offset = register.offset + place % register.span if place & 3 else place % (device.ranges[name].size + 4)
    if kind == "read":
        shown = None
        if register.read is Access.SHADOW and offset == register.offset and width in register.widths:
            peeked = device.peek(offset, name)
            shown = None if peeked is None else peeked & (1 << 8 * width) - 1
        got = device.read(offset, width, name)
        assert 0 <= got < 1 << 8 * width
        assert shown in (None, got)
        return got
    if kind == "write":
        device.write(offset, width, value & (1 << 8 * width) - 1, name)
    elif kind == "time":
        board.clock.advance(ADVANCES[value % len(ADVANCES)])
    else:
        return host(device, place, value)
    return None


def host(device: Device, place: int, value: int) -> Any:
    """Something happens on the other side of the chip."""
    if isinstance(device, I8259):
        if value & 3 == 0:
            return device.acknowledge()
        device.set_input(place % 16, bool(value & 1))
    elif isinstance(device, I8254):
        device.set_gate(place % 3, bool(value & 1))
    elif isinstance(device, I8042):
        if value & 1:
            device.mouse_event(place % 700 - 350, value % 700 - 350, place % 9 - 4, value & 7)
        else:
            device.key_event(sorted(QCODES)[place % len(QCODES)], bool(value & 2))
    elif isinstance(device, Ns16550):
        if value & 7 == 0:
            device.receive_break()
        return device.receive(bytes(place % 20)), device.room()
    elif isinstance(device, AcpiPm):
        device.press_power_button()
    return None


@pytest.mark.parametrize("kind", CHIPS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(before=STEPS, after=STEPS)
def test_any_access_and_save_at_any_moment(
    kind: str, before: list[tuple[str, int, int, int]], after: list[tuple[str, int, int, int]]
) -> None:
    board = Board()
    device = CHIPS[kind](board)
    device.reset(True)
    for each in before:
        step(board, device, each)

    other_board = Board(ManualClock(board.clock.now()))
    other = CHIPS[kind](other_board)
    record = device.save()
    other.load(unpack(pack(record), type(record)))
    assert [pin.level for pin in other_board.pins] == [pin.level for pin in board.pins]
    for each_board in (board, other_board):
        each_board.events.clear()
        for pin in each_board.pins:
            pin.changes.clear()

    for each in after:
        assert step(other_board, other, each) == step(board, device, each), each
    assert other_board.events == board.events
    assert [pin.changes for pin in other_board.pins] == [pin.changes for pin in board.pins]
    assert pack(other.save()) == pack(device.save())


@pytest.mark.parametrize("kind", CHIPS)
def test_every_shadow_and_time_source_can_be_asked(kind: str) -> None:
    """The bus asks after each event, by offset."""
    device = CHIPS[kind](Board())
    for name, registers in device.ranges.items():
        for register in registers:
            if register.read is Access.SHADOW:
                for offset in range(register.offset, register.offset + register.span):
                    value = device.peek(offset, name)
                    assert value is None or 0 <= value < 1 << 64
            if register.read is Access.TIME:
                assert register.time_source in device.time_sources
                running, offset_ns, frozen = device.time_state(register.time_source)
                assert isinstance(running, bool) and offset_ns >= 0 and frozen >= 0


@pytest.mark.parametrize("kind", CHIPS)
def test_reset_gives_a_fresh_chip(kind: str) -> None:
    """Reset after use: all that a fresh, reset chip says, it says too (battery and wall clock apart)."""
    board = Board()
    device = CHIPS[kind](board)
    device.reset(True)
    fresh = pack(device.save())
    for name, registers in device.ranges.items():
        for register in registers:
            for value in (0xFF, 0x36, 0x11):
                device.write(register.offset, register.widths[-1], value, name)
    device.reset(True)
    if kind not in ("mc146818", "i8237"):  # CMOS; the 8237's addresses and the pages survive
        assert pack(device.save()) == fresh
