"""Interrupt messages: destinations (SDM vol. 3 section 11.6.2), delivery modes, MSI, IPI."""

from __future__ import annotations

import pytest

from coordinator.contract._segment import lib
from coordinator.contract.segment import Segment
from tests.contract.conftest import enable_apics, posted, take

FIXED, LOWEST, SMI, NMI, INIT, SIPI, EXTINT = 0, 1, 2, 4, 5, 6, 7
VECTOR = 0x51


@pytest.fixture
def apics(segment: Segment) -> Segment:
    enable_apics(segment)
    return segment


def who(segment: Segment, vector: int = VECTOR) -> list[int]:
    """vCPUs that have the vector now; it is taken from them."""
    return [vcpu for vcpu in range(segment.vcpus) if vector in take(segment, vcpu)]


def send(
    segment: Segment, dest: int, logical: bool = False, mode: int = FIXED, wide: bool = False
) -> list[int]:
    lib.fabric_deliver(segment.header, mode, VECTOR, logical, dest, wide, 0)
    return who(segment)


def x2apic(segment: Segment) -> None:
    """Section 11.12.10.2: logical ID from the APIC ID; here IDs 0, 1, 16, 17 make two clusters."""
    for vcpu, apic_id in enumerate((0, 1, 16, 17)):
        block = segment.vcpu(vcpu)
        block.apic_mode, block.apic_id = 2, apic_id
        block.apic_ldr = apic_id >> 4 << 16 | 1 << (apic_id & 15)


def test_physical(apics: Segment) -> None:
    assert send(apics, 2) == [2]
    assert send(apics, 7) == []
    assert send(apics, 0xFF) == [0, 1, 2, 3]
    assert all(apics.vcpu(i).attention == lib.ATTN_IRQ for i in range(4))


def test_logical_flat(apics: Segment) -> None:
    assert send(apics, 0b0101, logical=True) == [0, 2]
    assert send(apics, 0xF0, logical=True) == []
    assert send(apics, 0xFF, logical=True) == [0, 1, 2, 3]


def test_logical_cluster(apics: Segment) -> None:
    for vcpu, ldr in enumerate((0x01, 0x02, 0x11, 0x12)):
        apics.vcpu(vcpu).apic_dfr, apics.vcpu(vcpu).apic_ldr = 0x0FFF_FFFF, ldr << 24
    assert send(apics, 0x03, logical=True) == [0, 1]
    assert send(apics, 0x12, logical=True) == [3]
    assert send(apics, 0x23, logical=True) == []
    assert send(apics, 0xFF, logical=True) == [0, 1, 2, 3]


def test_x2apic_destinations(apics: Segment) -> None:
    x2apic(apics)
    assert send(apics, 17, wide=True) == [3]
    assert send(apics, 0xFF, wide=True) == []  # an ID like any other
    assert send(apics, 0xFFFF_FFFF, wide=True) == [0, 1, 2, 3]
    assert send(apics, 0x0000_0003, logical=True, wide=True) == [0, 1]
    assert send(apics, 0x0001_0002, logical=True, wide=True) == [3]
    assert send(apics, 0x0002_0001, logical=True, wide=True) == []
    assert send(apics, 0xFFFF_FFFF, logical=True, wide=True) == [0, 1, 2, 3]


def test_disabled_apics(apics: Segment) -> None:
    apics.vcpu(0).apic_mode = 0
    apics.vcpu(1).apic_sw_enabled = 0
    assert send(apics, 0xFF) == [2, 3]
    # section 11.4.7.2: NMI, INIT and SIPI still arrive at a software-disabled one
    lib.fabric_deliver(apics.header, NMI, 0, 0, 0xFF, 0, 0)
    assert [apics.vcpu(i).posted_nmi for i in range(4)] == [0, 1, 1, 1]


def test_lowest_priority_goes_to_one_with_the_lowest_class(apics: Segment) -> None:
    for vcpu, ppr in enumerate((0x50, 0x20, 0x30, 0x2F)):
        apics.vcpu(vcpu).apic_ppr = ppr
    winners = [send(apics, 0xF, logical=True, mode=LOWEST) for _ in range(20)]
    assert all(len(winner) == 1 for winner in winners)
    assert {winner[0] for winner in winners} == {1, 3}  # class 2 both: turns
    assert send(apics, 0b0101, logical=True, mode=LOWEST) == [2]


@pytest.mark.parametrize("vector", [0, 15])
def test_illegal_vectors_are_taken_by_nobody(apics: Segment, vector: int) -> None:
    assert lib.fabric_deliver(apics.header, FIXED, vector, 0, 1, 0, 0) == 0
    assert lib.fabric_ipi(apics.header, 0, 1 << 56 | vector) == 0
    assert all(not posted(apics, vcpu) for vcpu in range(4))


def test_trigger_mode_comes_with_the_vector(apics: Segment) -> None:
    block = apics.vcpu(1)
    lib.fabric_post(apics.header, 1, FIXED, VECTOR, 1)
    assert block.posted_tmr[VECTOR >> 6] == 1 << (VECTOR & 63)
    take(apics, 1)
    lib.fabric_post(apics.header, 1, FIXED, VECTOR, 0)
    assert block.posted_tmr[VECTOR >> 6] == 0


def test_smi_is_ignored(apics: Segment) -> None:
    lib.fabric_deliver(apics.header, SMI, 0, 0, 1, 0, 0)
    assert apics.vcpu(1).attention == 0


# ---- MSI, section 11.11 ----
def msi(
    segment: Segment, dest: int, logical: bool = False, hint: bool = False, data: int = VECTOR
) -> list[int]:
    segment.msi(0xFEE0_0000 | dest << 12 | hint << 3 | logical << 2, data)
    return who(segment)


def test_msi(apics: Segment) -> None:
    assert msi(apics, 3) == [3]
    assert msi(apics, 0b0110, logical=True) == [1, 2]
    assert len(msi(apics, 0b0110, logical=True, hint=True)) == 1
    assert len(msi(apics, 0xF, logical=True, data=LOWEST << 8 | VECTOR)) == 1
    assert msi(apics, 1, data=1 << 15 | VECTOR) == []  # level, de-asserted
    assert msi(apics, 1, data=1 << 15 | 1 << 14 | VECTOR) == [1]
    assert not apics.msi(0xFED0_0000, VECTOR)
    assert msi(apics, 2, data=NMI << 8) == []
    assert apics.vcpu(2).posted_nmi == 1


# ---- IPI, section 11.6.1 ----
def ipi(segment: Segment, icr: int, sender: int = 1) -> list[int]:
    lib.fabric_ipi(segment.header, sender, icr)
    return who(segment)


def test_ipi_shorthands(apics: Segment) -> None:
    assert ipi(apics, 2 << 56 | VECTOR) == [2]
    assert ipi(apics, 2 << 56 | 1 << 18 | VECTOR) == [1]
    assert ipi(apics, 2 << 18 | VECTOR) == [0, 1, 2, 3]
    assert ipi(apics, 3 << 18 | VECTOR) == [0, 2, 3]
    assert ipi(apics, 0b1001 << 56 | 1 << 11 | VECTOR) == [0, 3]


def test_ipi_of_an_x2apic_has_32_bits_of_destination(apics: Segment) -> None:
    x2apic(apics)
    assert ipi(apics, 16 << 32 | VECTOR) == [2]
    assert ipi(apics, 0x0001_0003 << 32 | 1 << 11 | VECTOR) == [2, 3]


def test_init_and_sipi(apics: Segment) -> None:
    target = apics.vcpu(2)
    lib.fabric_ipi(apics.header, 0, 2 << 56 | SIPI << 8 | 0x10)
    assert target.posted_sipi == 0x110
    lib.fabric_ipi(apics.header, 0, 2 << 56 | INIT << 8 | 1 << 14 | 1 << 15)
    assert (target.posted_init, target.posted_sipi) == (1, 0)  # a SIPI of before the INIT is void
    target.posted_init = 0
    lib.fabric_ipi(apics.header, 0, 2 << 56 | INIT << 8 | 1 << 15)  # de-assert
    assert target.posted_init == 0
    lib.fabric_ipi(apics.header, 0, 2 << 56 | SIPI << 8 | 0x9F)
    assert target.posted_sipi == 0x19F
    assert all(apics.vcpu(i).posted_init == apics.vcpu(i).posted_sipi == 0 for i in (0, 1, 3))


def test_pic_reaches_lint0_of_every_vcpu(apics: Segment) -> None:
    apics.pic_intr(True)
    assert [apics.vcpu(i).extint_level for i in range(4)] == [lib.EXTINT_WIRE] * 4
    assert all(lib.vcpu_take_attention(apics.header, i) for i in range(4))
    apics.pic_intr(True)  # no change, no attention
    assert apics.vcpu(0).attention == 0
    lib.fabric_deliver(apics.header, EXTINT, 0, 0, 2, 0, 0)
    apics.pic_intr(False)
    assert [apics.vcpu(i).extint_level for i in range(4)] == [0, 0, lib.EXTINT_MESSAGE, 0]
