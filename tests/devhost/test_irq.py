"""Interrupt lines into the 8259 pair and the IOAPIC."""

from __future__ import annotations

import pytest

from coordinator.contract.segment import Segment
from devhost.a20 import KEYBOARD, PORT_92, A20Gate
from devhost.bus import Bus
from devhost.chips.i8259 import I8259
from devhost.irq import InterruptRequest, IoapicPin, IrqLines


class Board:
    def __init__(self) -> None:
        self.segment = Segment.create(vcpus=2, ram=1 << 20)
        self.bus = Bus(self.segment, 0)
        self.lines = IrqLines(self.bus)
        self.pic = I8259(InterruptRequest(self.bus))
        self.lines.pic = self.pic
        for name, vector, cascade in (("master", 0x20, 4), ("slave", 0x28, 2)):
            self.pic.write(0, 1, 0x11, name)
            for word in (vector, cascade, 1, 0):
                self.pic.write(1, 1, word, name)
        self.settle()

    def settle(self) -> None:
        """The end of an event."""
        self.bus.publish_all()

    def pin(self, number: int) -> int:
        return int(self.segment.fabric.pin_sources[number])

    @property
    def intr(self) -> list[int]:
        return [self.segment.vcpu(i).extint_level for i in range(2)]


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.mark.parametrize(("irq", "pin"), [(0, 2), (1, 1), (4, 4), (9, 9), (14, 14), (15, 15)])
def test_isa_interrupts_at_the_ioapic(board: Board, irq: int, pin: int) -> None:
    """As the MADT says: identity but for interrupt 0."""
    source = board.lines.pin(irq)
    source.set(True)
    assert board.pin(pin) == 0  # an effect: not before the event's shadows are stored
    board.settle()
    assert board.pin(pin) == 1 and sum(board.pin(i) for i in range(24)) == 1
    source.set(False)
    board.settle()
    assert board.pin(pin) == 0


def test_intr_goes_to_every_vcpu(board: Board) -> None:
    source = board.lines.pin(4)
    source.set(True)
    board.settle()
    assert all(board.intr)
    assert board.pic.acknowledge() == 0x24
    board.settle()
    assert not any(board.intr)


def test_a_shared_line_is_high_while_any_source_is(board: Board) -> None:
    first, second = board.lines.pin(10), board.lines.pin(10)
    steps = (
        (first, True, 1), (second, True, 1), (second, True, 1),
        (first, False, 1), (second, False, 0), (first, False, 0),
    )  # fmt: skip
    for source, level, expected in steps:
        source.set(level)
        board.settle()
        assert board.pin(10) == expected


def test_a_pin_of_its_own_beside_the_isa_line(board: Board) -> None:
    """HPET timers routed to a pin that an ISA line has, too."""
    line, timer = board.lines.pin(11), IoapicPin(board.bus, 11)
    timer.set(True)
    line.set(True)
    board.settle()
    assert board.pin(11) == 0b11
    line.set(False)
    board.settle()
    assert board.pin(11) == 0b10
    timer.set(False)
    board.settle()
    assert board.pin(11) == 0


def test_either_switch_opens_a20() -> None:
    changes: list[bool] = []
    gate = A20Gate(changes.append)
    keyboard, port = gate.pin(KEYBOARD), gate.pin(PORT_92)
    for pin, level in ((port, False), (keyboard, True), (keyboard, False), (port, True), (keyboard, True)):
        pin.set(level)
    assert changes == [False, True] and gate.is_open
