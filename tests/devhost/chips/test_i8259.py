"""8259A pair against the datasheet (Intel 231468-003; chapters named) and PIIX3 (290550)."""

from __future__ import annotations

import pytest

from coordinator.contract.device import ListPin
from coordinator.contract.state import pack, unpack
from devhost.chips.i8259 import I8259, I8259Record

EOI = 0x20
SPECIFIC = 0x60


def board(icw4: int = 0x01) -> tuple[I8259, ListPin]:
    """A pair as a PC's firmware sets it up: vectors 08h and 70h, everything unmasked."""
    intr = ListPin()
    pic = I8259(intr)
    initialize(pic, "master", 0x08, 0x04, icw4)
    initialize(pic, "slave", 0x70, 0x02, icw4 & ~0x10)
    return pic, intr


def initialize(pic: I8259, chip: str, base: int, icw3: int, icw4: int) -> None:
    pic.write(0, 1, 0x11, chip)
    pic.write(1, 1, base, chip)
    pic.write(1, 1, icw3, chip)
    pic.write(1, 1, icw4, chip)
    pic.write(1, 1, 0x00, chip)


def isr(pic: I8259, chip: str = "master") -> int:
    pic.write(0, 1, 0x0B, chip)
    return pic.read(0, 1, chip)


def irr(pic: I8259, chip: str = "master") -> int:
    pic.write(0, 1, 0x0A, chip)
    return pic.read(0, 1, chip)


def test_interrupt_sequence_on_the_master() -> None:
    """"Interrupt sequence": INT; INTA gives T7-T3 and the level, sets the ISR bit and resets IRR."""
    pic, intr = board()
    assert not intr.level
    pic.set_input(4, True)
    assert intr.level and irr(pic) == 0x10
    assert pic.acknowledge() == 0x0C
    assert not intr.level and irr(pic) == 0 and isr(pic) == 0x10
    pic.write(0, 1, EOI, "master")
    assert isr(pic) == 0


def test_slave_interrupt_needs_two_eois() -> None:
    """"Cascade mode": the slave releases the vector; an EOI must be issued twice."""
    pic, intr = board()
    pic.set_input(14, True)
    assert intr.level
    assert pic.acknowledge() == 0x76
    assert isr(pic) == 0x04 and isr(pic, "slave") == 0x40
    pic.set_input(14, False)
    pic.set_input(14, True)
    assert not intr.level  # still in service
    pic.write(0, 1, EOI, "slave")
    assert not intr.level  # IR2 of the master is in service
    pic.write(0, 1, EOI, "master")
    assert intr.level
    assert pic.acknowledge() == 0x76


def test_higher_slave_request_waits_for_the_masters_eoi_unless_special_fully_nested() -> None:
    """"The special fully nested mode": further requests from the same slave are recognized."""
    for icw4, nested in ((0x01, False), (0x11, True)):
        pic, intr = board(icw4)
        pic.set_input(14, True)
        pic.acknowledge()
        pic.set_input(8, True)
        assert intr.level is nested


def test_fully_nested_priorities() -> None:
    """"Fully nested mode": IR0 is highest; lower and equal ones are inhibited until the EOI."""
    pic, intr = board()
    pic.set_input(3, True)
    pic.set_input(5, True)
    assert pic.acknowledge() == 0x0B
    assert not intr.level
    pic.set_input(1, True)
    assert pic.acknowledge() == 0x09
    pic.write(0, 1, EOI, "master")  # non-specific: the highest in service, IR1
    assert isr(pic) == 0x08
    pic.write(0, 1, EOI, "master")
    assert pic.acknowledge() == 0x0D


def test_mask() -> None:
    """OCW1: M = 1 inhibits a channel; it reads back."""
    pic, intr = board()
    pic.write(1, 1, 0xFB, "master")
    assert pic.read(1, 1, "master") == 0xFB
    pic.set_input(0, True)
    assert not intr.level
    pic.write(1, 1, 0xFA, "master")
    assert intr.level


def test_icw1_clears_the_edge_sense_and_the_mask() -> None:
    """ICW1 (a), (b): after it an input must make a low-to-high transition; IMR is cleared."""
    pic, intr = board()
    pic.write(1, 1, 0x55, "master")
    pic.set_input(3, True)
    initialize(pic, "master", 0x20, 0x04, 0x01)
    assert pic.read(1, 1, "master") == 0 and not intr.level
    pic.set_input(3, False)
    pic.set_input(3, True)
    assert pic.acknowledge() == 0x23


def test_icw1_without_icw4_and_single() -> None:
    """ICW1: SNGL = 1 means no ICW3; IC4 = 0 sets all functions of ICW4 to zero (no AEOI)."""
    pic, _ = board(icw4=0x03)
    pic.write(0, 1, 0x12, "master")
    pic.write(1, 1, 0x40, "master")
    pic.write(1, 1, 0xFE, "master")  # OCW1 already
    assert pic.read(1, 1, "master") == 0xFE
    pic.set_input(0, True)
    assert pic.acknowledge() == 0x40
    assert isr(pic) == 0x01


def test_spurious_irq7_has_no_isr_bit() -> None:
    """"Edge and level triggered modes": an input that falls before INTA gives the default IR7."""
    pic, intr = board()
    pic.set_input(3, True)
    pic.set_input(3, False)
    assert not intr.level
    assert pic.acknowledge() == 0x0F
    assert isr(pic) == 0


def test_spurious_irq15_leaves_ir2_in_service() -> None:
    pic, intr = board()
    pic.set_input(10, True)
    assert intr.level
    # the request goes away between the two INTA pulses, which no pin can do here: take it from
    # the slave while the master still has IR2
    pic.slave.imr = 0xFF
    assert pic.acknowledge() == 0x77
    assert isr(pic) == 0x04 and isr(pic, "slave") == 0


def test_level_mode_by_elcr() -> None:
    """PIIX3 2.5.4.7: bit n = 1 makes IRQn level; a held line asks again after the EOI."""
    pic, intr = board()
    pic.write(0, 1, 0xFF, "elcr")
    pic.write(1, 1, 0xFF, "elcr")
    assert pic.read(0, 1, "elcr") == 0xF8 and pic.read(1, 1, "elcr") == 0xDE
    assert pic.read(0, 2, "elcr") == 0xDEF8
    pic.set_input(11, True)
    for _ in range(2):
        assert pic.acknowledge() == 0x73
        pic.write(0, 1, SPECIFIC | 3, "slave")
        pic.write(0, 1, SPECIFIC | 2, "master")
        assert intr.level
    pic.acknowledge()
    pic.set_input(11, False)
    pic.write(0, 1, SPECIFIC | 3, "slave")
    pic.write(0, 1, SPECIFIC | 2, "master")
    assert not intr.level


def test_edge_mode_asks_once() -> None:
    pic, intr = board()
    pic.set_input(4, True)
    pic.acknowledge()
    pic.write(0, 1, EOI, "master")
    assert not intr.level


def test_automatic_eoi() -> None:
    """"Automatic end of interrupt mode": the ISR bit is reset at the end of the sequence."""
    pic, _ = board(icw4=0x03)
    pic.set_input(6, True)
    assert pic.acknowledge() == 0x0E
    assert isr(pic) == 0


def test_two_slave_requests_in_automatic_eoi_mode() -> None:
    """The slave's INT falls in the INTA sequence, so the second request is a new edge at IR2."""
    pic, intr = board(icw4=0x03)
    pic.set_input(12, True)
    pic.set_input(14, True)
    assert pic.acknowledge() == 0x74
    assert intr.level
    assert pic.acknowledge() == 0x76
    assert not intr.level


def test_automatic_rotation() -> None:
    """"Automatic rotation": rotate on non-specific EOI - figure 10: IR4 served goes to the bottom."""
    pic, _ = board()
    pic.set_input(4, True)
    pic.acknowledge()
    pic.write(0, 1, 0xA0, "master")
    pic.set_input(5, True)
    pic.set_input(3, True)
    assert pic.acknowledge() == 0x0D  # IR5 is highest now


def test_rotation_in_automatic_eoi_mode() -> None:
    pic, _ = board(icw4=0x03)
    pic.write(0, 1, 0x80, "master")
    pic.set_input(4, True)
    pic.acknowledge()
    pic.set_input(3, True)
    pic.set_input(5, True)
    assert pic.acknowledge() == 0x0D
    pic.write(0, 1, 0x00, "master")  # clear: lowest stays IR5
    assert pic.acknowledge() == 0x0B


def test_specific_rotation() -> None:
    """"Specific rotation": if IR5 is bottom, IR6 has the highest priority."""
    pic, _ = board()
    pic.write(0, 1, 0xC5, "master")
    pic.set_input(0, True)
    pic.set_input(6, True)
    assert pic.acknowledge() == 0x0E
    pic.write(0, 1, 0xE6, "master")  # rotate on specific EOI, L = 6
    assert isr(pic) == 0
    pic.set_input(7, True)
    assert pic.acknowledge() == 0x0F


def test_special_mask_mode() -> None:
    """"Special mask mode": a masked level in service enables all other levels, lower ones too."""
    pic, intr = board()
    pic.set_input(2 + 1, True)
    pic.acknowledge()
    pic.set_input(5, True)
    assert not intr.level
    pic.write(1, 1, 0x08, "master")
    pic.write(0, 1, 0x68, "master")
    assert pic.acknowledge() == 0x0D
    pic.write(0, 1, EOI, "master")  # not the masked IS bit
    assert isr(pic) == 0x08
    pic.write(0, 1, 0x48, "master")
    pic.set_input(5, False)
    pic.set_input(5, True)
    assert not intr.level


def test_poll() -> None:
    """"Poll command": bit 7 and the level in bits 2-0; sets the IS bit."""
    pic, intr = board()
    pic.write(0, 1, 0x0C, "master")
    assert pic.read(0, 1, "master") & 0x80 == 0
    pic.set_input(5, True)
    pic.write(0, 1, 0x0C, "master")
    assert pic.read(0, 1, "master") == 0x85
    assert isr(pic) == 0x20 and not intr.level


def test_save_and_load_between_icws_and_in_service() -> None:
    pic, _ = board()
    pic.set_input(9, True)
    pic.acknowledge()
    pic.set_input(12, True)
    pic.set_input(1, True)
    pic.write(0, 1, 0x11, "slave")
    pic.write(1, 1, 0x50, "slave")
    intr = ListPin()
    other = I8259(intr)
    other.load(unpack(pack(pic.save()), I8259Record))
    assert intr.level
    other.write(1, 1, 0x02, "slave")
    other.write(1, 1, 0x01, "slave")
    other.set_input(8, True)
    assert other.acknowledge() == 0x09
    other.write(0, 1, EOI, "master")
    other.write(0, 1, EOI, "master")
    assert other.acknowledge() == 0x50


@pytest.mark.parametrize("irq", [i for i in range(16) if i != 2])
def test_every_input_has_its_vector(irq: int) -> None:
    pic, _ = board()
    pic.set_input(irq, True)
    assert pic.acknowledge() == (0x08 + irq if irq < 8 else 0x70 + irq - 8)
