"""The IOAPIC against the 82093AA datasheet (290566), and level interrupts around their EOI."""

from __future__ import annotations

import pytest

from coordinator.contract._segment import lib
from coordinator.contract.counters import pin_counters
from coordinator.contract.segment import Segment
from tests.contract.conftest import enable_apics, take
from tests.contract.test_attention import run_all

VECTOR = 0x71
MASKED, LEVEL, REMOTE_IRR, LOGICAL = 1 << 16, 1 << 15, 1 << 14, 1 << 11
NMI, EXTINT = 4 << 8, 7 << 8


@pytest.fixture
def apics(segment: Segment) -> Segment:
    enable_apics(segment)
    return segment


def write(segment: Segment, index: int, value: int) -> None:
    lib.ioapic_write(segment.header, 0x00, index)
    lib.ioapic_write(segment.header, 0x10, value)


def read(segment: Segment, index: int) -> int:
    lib.ioapic_write(segment.header, 0x00, index)
    return int(lib.ioapic_read(segment.header, 0x10))


def program(segment: Segment, pin: int, low: int, dest: int = 1) -> None:
    write(segment, 0x11 + 2 * pin, dest << 24)
    write(segment, 0x10 + 2 * pin, low)


def pin(segment: Segment, number: int, level: bool, source: int = 0) -> None:
    segment.pin_set(number, source, level)


def test_registers(segment: Segment) -> None:
    assert read(segment, 0x01) == 0x0017_0011  # section 3.2.2: 24 entries, version 11h
    write(segment, 0x00, 0xFFFF_FFFF)
    assert read(segment, 0x00) == 0x0F00_0000  # section 3.2.1
    assert read(segment, 0x02) == 0x0F00_0000  # section 3.2.3: loaded with the ID
    write(segment, 0x01, 0)
    assert read(segment, 0x01) == 0x0017_0011
    assert [read(segment, 0x10 + 2 * n) for n in range(24)] == [MASKED] * 24  # section 3.2.4: reset value
    assert read(segment, 0x40) == 0 and read(segment, 0xFF) == 0
    assert lib.ioapic_read(segment.header, 0x00) == 0xFF
    assert lib.ioapic_read(segment.header, 0x20) == 0


def test_reserved_and_status_bits_of_an_entry_are_not_written(segment: Segment) -> None:
    program(segment, 5, 0xFFFF_FFFF, 0xAB)
    assert read(segment, 0x1A) == 0x1FFFF & ~(REMOTE_IRR | 1 << 12)
    write(segment, 0x1B, 0xFFFF_FFFF)
    assert read(segment, 0x1B) == 0xFF00_0000


def test_edge_delivers_once_a_rise(apics: Segment) -> None:
    program(apics, 4, VECTOR)
    pin(apics, 4, True)
    assert take(apics, 1) == {VECTOR}
    pin(apics, 4, True)
    pin(apics, 4, False)
    assert take(apics, 1) == set()
    pin(apics, 4, True)
    assert take(apics, 1) == {VECTOR}
    assert pin_counters(apics) == {4: 2}


def test_masked_edges_are_ignored_and_not_held(apics: Segment) -> None:
    program(apics, 4, VECTOR | MASKED)
    pin(apics, 4, True)
    program(apics, 4, VECTOR)
    assert take(apics, 1) == set()


def test_masked_level_is_delivered_when_unmasked(apics: Segment) -> None:
    program(apics, 9, VECTOR | LEVEL | MASKED)
    pin(apics, 9, True)
    assert take(apics, 1) == set()
    program(apics, 9, VECTOR | LEVEL)
    assert take(apics, 1) == {VECTOR}


def test_level_waits_for_eoi(apics: Segment) -> None:
    program(apics, 9, VECTOR | LEVEL)
    pin(apics, 9, True)
    assert take(apics, 1) == {VECTOR}
    assert apics.vcpu(1).posted_tmr[VECTOR >> 6] & 1 << (VECTOR & 63)
    assert read(apics, 0x22) & REMOTE_IRR
    pin(apics, 9, False)
    pin(apics, 9, True)
    assert take(apics, 1) == set()
    lib.fabric_eoi(apics.header, VECTOR + 1)
    assert read(apics, 0x22) & REMOTE_IRR
    lib.fabric_eoi(apics.header, VECTOR)
    assert take(apics, 1) == {VECTOR}  # still asserted: again
    pin(apics, 9, False)
    lib.fabric_eoi(apics.header, VECTOR)
    assert take(apics, 1) == set()
    assert not read(apics, 0x22) & REMOTE_IRR


def test_two_sources_share_a_level_pin(apics: Segment) -> None:
    program(apics, 11, VECTOR | LEVEL)
    pin(apics, 11, True, source=0)
    pin(apics, 11, True, source=3)
    take(apics, 1)
    pin(apics, 11, False, source=0)
    lib.fabric_eoi(apics.header, VECTOR)
    assert take(apics, 1) == {VECTOR}
    pin(apics, 11, False, source=3)
    lib.fabric_eoi(apics.header, VECTOR)
    assert take(apics, 1) == set()
    assert lib.pin_level(apics.header, 11) == 0


def test_writing_edge_clears_remote_irr(apics: Segment) -> None:
    """How software ends a level interrupt at an IOAPIC of version below 20h, which has no EOI register."""
    program(apics, 9, VECTOR | LEVEL)
    pin(apics, 9, True)
    program(apics, 9, VECTOR | MASKED)
    program(apics, 9, VECTOR | MASKED | LEVEL)
    assert not read(apics, 0x22) & REMOTE_IRR


def test_one_vector_at_two_pins_is_ended_at_both(apics: Segment) -> None:
    for number in (9, 10):
        program(apics, number, VECTOR | LEVEL)
        pin(apics, number, True)
        pin(apics, number, False)
    lib.fabric_eoi(apics.header, VECTOR)
    assert not (read(apics, 0x22) | read(apics, 0x24)) & REMOTE_IRR


def test_a_level_that_nobody_takes_is_not_outstanding(apics: Segment) -> None:
    apics.vcpu(1).apic_sw_enabled = 0
    program(apics, 9, VECTOR | LEVEL)
    pin(apics, 9, True)
    assert not read(apics, 0x22) & REMOTE_IRR
    apics.vcpu(1).apic_sw_enabled = 1
    lib.fabric_resolve(apics.header)
    assert take(apics, 1) == {VECTOR}


def test_other_delivery_modes(apics: Segment) -> None:
    program(apics, 2, NMI | LEVEL)  # section 3.2.4: NMI is treated as edge
    pin(apics, 2, True)
    assert apics.vcpu(1).posted_nmi == 1
    assert not read(apics, 0x14) & REMOTE_IRR
    program(apics, 0, EXTINT)
    pin(apics, 0, True)
    assert apics.vcpu(1).extint_level == lib.EXTINT_MESSAGE
    program(apics, 3, VECTOR | LOGICAL, dest=0b1010)
    pin(apics, 3, True)
    assert take(apics, 1) == take(apics, 3) == {VECTOR}


@pytest.mark.parametrize("number", [24, 255, 2**31])
def test_pins_that_do_not_exist(apics: Segment, number: int) -> None:
    pin(apics, number, True)
    assert lib.pin_level(apics.header, number) == 0


def test_no_level_interrupt_is_lost_around_eoi(apics: Segment) -> None:
    """A device raises its line for each piece of work, the handler lowers it when it has taken all;
    the handler, on another CPU, takes the vector, serves and ends it. A rise that fell between EOI and
    its look at the pin would leave work behind for ever."""
    header, block = apics.header, apics.vcpu(1)
    program(apics, 9, VECTOR | LEVEL)
    rounds = 4000
    work = [0]
    served = 0

    def device() -> None:
        for _ in range(rounds):
            while work[0]:
                pass
            work[0] = 1
            lib.pin_set(header, 9, 0, 1)

    def handler() -> None:
        nonlocal served
        while served < rounds:
            lib.vcpu_sleep(header, 1, lib.SEG_NO_OFFSET)
            lib.vcpu_take_attention(header, 1)
            if not block.posted_irr[VECTOR >> 6]:
                continue
            block.posted_irr[VECTOR >> 6] = 0
            if work[0]:
                lib.pin_set(header, 9, 0, 0)
                served += 1
                work[0] = 0
            lib.fabric_eoi(header, VECTOR)

    run_all(device, handler)
    assert served == rounds
