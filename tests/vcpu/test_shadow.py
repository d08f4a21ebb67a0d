"""Shadow registers that ask for a round trip, and registers that are no more than what was written."""

from __future__ import annotations

import pytest

from coordinator.contract.segment import SHADOW_ASK
from tests.vcpu.test_io import POSTED, SHADOW, Machine, machine

__all__ = ["machine"]  # the fixture

#: IDE: a read of Status has an effect while an interrupt is pending; Device is plain, and selects the drive
STATUS, DEVICE = 0x1F7, 0x1F6
READ_STATUS = f"mov dx, {STATUS}\n in al, dx\n"


@pytest.fixture
def channel(machine: Machine) -> tuple[Machine, int, int]:
    """(machine, shadow of Status, shadow of Device)"""
    hazard = machine.segment.allocate_hazard()
    status, device = machine.segment.allocate_shadow(), machine.segment.allocate_shadow()
    machine.map_port(STATUS, read_class=SHADOW, shadow=status, read_hazard=hazard)
    reading = {"read_class": SHADOW, "shadow": device, "read_hazard": hazard}
    machine.map_port(DEVICE, **reading, write_class=POSTED, write_hazard=hazard, plain=1)
    machine.segment.set_shadow(status, 0x50)
    machine.segment.set_shadow(device, 0xA0)
    return machine, status, device


def test_a_shadow_that_asks_is_a_round_trip(channel: tuple[Machine, int, int]) -> None:
    machine, status, _ = channel
    machine.run(READ_STATUS)
    assert (machine.eax & 0xFF, machine.requests) == (0x50, [])
    machine.segment.set_shadow(status, SHADOW_ASK)
    # the host has cleared the interrupt
    machine.before_reply = lambda: machine.segment.set_shadow(status, 0x51)
    machine.replies = [b"\x58"]
    machine.run(READ_STATUS)
    assert machine.eax & 0xFF == 0x58
    machine.run(READ_STATUS)
    assert machine.eax & 0xFF == 0x51
    assert machine.requests == [(0, STATUS, 1, 1, False, b"")]
    assert machine.counts == {"chip": {"shadow": 2, "sync": 1}}


def test_writing_what_is_there_already_marks_no_hazard(channel: tuple[Machine, int, int]) -> None:
    machine, _, _ = channel
    machine.run(f"mov dx, {DEVICE}\n mov al, 0xa0\n out dx, al\n" + READ_STATUS)
    assert (machine.eax & 0xFF, machine.requests) == (0x50, [])
    assert machine.ring.take() == (0, DEVICE, 1, 0xA0)  # it is posted all the same


def test_writing_another_value_does(channel: tuple[Machine, int, int]) -> None:
    machine, _, device = channel
    select = f"mov dx, {DEVICE}\n mov al, 0xb0\n out dx, al\n"
    machine.replies = [b"\x00", b"\x00"]
    machine.run(select + READ_STATUS)
    assert len(machine.requests) == 1
    machine.run(select + READ_STATUS)  # the shadow is of before the first one, which is unapplied
    assert len(machine.requests) == 2
    for _ in range(2):
        machine.ring.take()
    machine.segment.set_shadow(device, 0xB0)
    machine.ring.applied()
    machine.run(select + READ_STATUS)
    assert len(machine.requests) == 2 and machine.eax & 0xFF == 0x50
