"""The local APIC from guest code: SDM vol. 3 chapter 11. Guest time is set by hand, so nothing waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator.contract._segment import lib
from tests.vcpu.guest import CODE, GP, Guest

Make = Callable[..., Guest]

BASE = 0xFEE00000
ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x320, 0x350, 0x360, 0x370
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0
MASKED, PERIODIC, DEADLINE, SELF = 0x10000, 0x20000, 0x40000, 0x40000
APIC_BASE, TSC_DEADLINE, X2 = 0x1B, 0x6E0, 0x800
ENABLED, EXTENDED, BSP = 0x800, 0x400, 0x100
IF = 0x200


def write(register: int, value: int) -> str:
    return f"mov dword ptr [{BASE + register:#x}], {value:#x}\n"


def read(register: int, into: str = "eax") -> str:
    return f"mov {into}, [{BASE + register:#x}]\n"


def wrmsr(index: int, value: int) -> str:
    high, low = value >> 32, value & 0xFFFFFFFF
    return f"mov ecx, {index:#x}\n mov eax, {low:#x}\n mov edx, {high:#x}\n wrmsr\n"


def rdmsr(index: int) -> str:
    return f"mov ecx, {index:#x}\n rdmsr\n"


ENABLE = write(SVR, 0x1FF)


@pytest.fixture
def guest(make_guest: Make) -> Guest:
    """Flat 32-bit protected mode; guest time stands at 0."""
    made = make_guest("protected")
    made.segment.stop_time()
    made.segment.set_time(0, 0)
    return made


def at_time(guest: Guest, ns: int) -> None:
    """Guest time becomes ns; who waits for it is told."""
    guest.segment.set_time(ns, 0)
    guest.segment.attend(0, lib.ATTN_TIMER)


def run(guest: Guest, source: str, budget: int = 200) -> None:
    """Run a snippet from its beginning, wherever the guest stands."""
    guest.set(rip=CODE)
    guest.run(source, budget)


def value_of(guest: Guest, register: int) -> int:
    run(guest, read(register))
    assert guest.done
    return guest.rax


# ---- registers ----
def test_reset_values(guest: Guest) -> None:
    """Section 11.4.7.1"""
    expected = dict.fromkeys((ID, TPR, PPR, LDR, ESR, ICR_LOW, INITIAL, DIVIDE), 0)
    expected |= dict.fromkeys((LVT_TIMER, LVT_LINT1, LVT_ERROR), MASKED) | {DFR: 0xFFFFFFFF, SVR: 0xFF}
    assert {register: value_of(guest, register) for register in expected} == expected
    assert value_of(guest, LVT_LINT0) == 0x700  # quirk: virtual wire mode, as firmware sets it
    version = value_of(guest, VERSION)
    assert 0x10 <= version & 0xFF <= 0x15 and version >> 16 & 0xFF == 6


def test_only_writable_bits_are_written(guest: Guest) -> None:
    for register, mask in ((LVT_TIMER, 0x700FF), (LVT_LINT0, 0x1A7FF), (LVT_ERROR, 0x100FF), (TPR, 0xFF),
                           (LDR, 0xFF000000), (DIVIDE, 0xB), (SVR, 0x3FF)):  # fmt: skip
        run(guest, ENABLE + write(register, 0xFFFFFFFF) + read(register))
        assert guest.rax == mask, hex(register)
    run(guest, write(DFR, 0) + read(DFR))
    assert guest.rax == 0x0FFFFFFF
    run(guest, write(ID, 0xFFFFFFFF) + read(ID))
    assert guest.rax == 0


def test_software_disable_masks_the_vector_table(guest: Guest) -> None:
    """Section 11.4.7.2"""
    run(guest, ENABLE + write(LVT_ERROR, 0x40) + write(SVR, 0xFF) + read(LVT_ERROR))
    assert guest.rax == 0x40 | MASKED
    run(guest, write(LVT_ERROR, 0x40) + read(LVT_ERROR))
    assert guest.rax == 0x40 | MASKED


def test_addressing_is_published_for_senders(guest: Guest) -> None:
    block = guest.segment.vcpu(0)
    assert (block.apic_id, block.apic_mode, block.apic_sw_enabled) == (0, 1, 0)
    run(guest, ENABLE + write(LDR, 0x04000000) + write(DFR, 0))
    assert (block.apic_ldr, block.apic_dfr, block.apic_sw_enabled) == (0x04000000, 0x0FFFFFFF, 1)


# ---- priorities ----
def ipi(vector: int) -> str:
    return write(ICR_LOW, SELF | vector)


def test_self_ipi_is_requested_then_in_service(guest: Guest) -> None:
    run(guest, ENABLE + ipi(0x51) + read(IRR + 0x20))
    assert guest.rax == 1 << 0x11
    run(guest, ENABLE + ipi(0x51) + "sti\n nop\n nop")
    assert guest.vector == 0x51
    assert guest.rflags & IF == 0
    assert value_of(guest, ISR + 0x20) == 1 << 0x11
    assert value_of(guest, IRR + 0x20) == 0
    assert value_of(guest, PPR) == 0x50
    run(guest, write(EOI, 0) + read(ISR + 0x20))
    assert guest.rax == 0
    assert value_of(guest, PPR) == 0


def test_highest_vector_first_and_classes_nest(guest: Guest) -> None:
    """Section 11.8.3: by vector; only a higher class interrupts a handler."""
    run(guest, ENABLE + ipi(0x52) + ipi(0x61) + ipi(0x51) + "sti\n nop\n nop")
    assert guest.vector == 0x61
    run(guest, "sti\n nop\n nop")
    assert guest.done  # 52h and 51h are of a lower class
    run(guest, ipi(0x6F) + "sti\n nop\n nop")
    assert guest.done  # same class
    run(guest, ipi(0x71) + "sti\n nop\n nop")
    assert guest.vector == 0x71
    order = []
    for _ in range(4):
        run(guest, write(EOI, 0) + "sti\n nop\n nop")
        order.append(guest.vector)
        if guest.done:
            break
    # 61h is still in service behind 71h
    assert order == [None]
    for expected in (0x6F, 0x52, 0x51):
        run(guest, write(EOI, 0) + "sti\n nop\n nop")
        assert guest.vector == expected


def test_tpr_holds_a_class_back(guest: Guest) -> None:
    run(guest, ENABLE + write(TPR, 0x50) + ipi(0x5F) + "sti\n nop\n nop")
    assert guest.done
    run(guest, "sti\n nop\n" + write(TPR, 0x4F) + "nop\n nop")
    assert guest.vector == 0x5F


def test_cr8_is_the_task_priority_class(make_guest: Make) -> None:
    guest = make_guest("long")
    run(guest, "mov eax, 7\n mov cr8, rax\n mov rbx, cr8")
    assert guest.rbx == 7
    assert guest.arch.apic.tpr == 0x70


def test_interrupts_wait_for_the_sti_shadow(guest: Guest) -> None:
    run(guest, ENABLE + ipi(0x51) + "xor eax, eax\n sti\n inc eax\n inc eax")
    assert guest.vector == 0x51
    assert guest.rax == 1


# ---- errors ----
def test_error_status(guest: Guest) -> None:
    """Section 11.5.3: a write latches what was collected since the last one."""
    run(guest, ENABLE + ipi(3) + read(ESR))
    assert guest.rax == 0
    run(guest, write(ESR, 0) + read(ESR))
    assert guest.rax == 0x20  # send illegal vector
    run(guest, read(0x3C0) + write(ESR, 0) + read(ESR))
    assert guest.rax == 0x80  # illegal register address
    run(guest, write(ESR, 0) + read(ESR))
    assert guest.rax == 0


def test_error_interrupt(guest: Guest) -> None:
    run(guest, ENABLE + write(LVT_ERROR, 0xE1) + ipi(3) + "sti\n nop\n nop")
    assert guest.vector == 0xE1


# ---- timer ----
TIMER = ENABLE + write(DIVIDE, 0xB)
DEADLINE_MODE = ENABLE + write(LVT_TIMER, DEADLINE | 0x40)


def test_one_shot(guest: Guest) -> None:
    at_time(guest, 1000)
    run(guest, TIMER + write(LVT_TIMER, 0x40) + write(INITIAL, 5000) + read(CURRENT) + "sti")
    assert (guest.done, guest.rax) == (True, 5000)
    at_time(guest, 3000)
    assert value_of(guest, CURRENT) == 3000
    assert guest.done
    at_time(guest, 6000)
    guest.resume()
    assert guest.vector == 0x40
    assert value_of(guest, CURRENT) == 0
    run(guest, write(EOI, 0) + "sti\n nop")
    at_time(guest, 20_000)
    guest.resume()
    assert guest.done


DIVISORS = {0: 2, 1: 4, 2: 8, 3: 16, 8: 32, 9: 64, 0xA: 128, 0xB: 1}


@pytest.mark.parametrize(("code", "divisor"), DIVISORS.items())
def test_divide_configuration(guest: Guest, code: int, divisor: int) -> None:
    """Figure 11-10"""
    at_time(guest, 0)
    run(guest, ENABLE + write(DIVIDE, code) + write(INITIAL, 1000))
    at_time(guest, 100 * divisor)
    assert value_of(guest, CURRENT) == 900


def test_periodic_goes_on_and_missed_periods_are_one(guest: Guest) -> None:
    run(guest, TIMER + write(LVT_TIMER, PERIODIC | 0x40) + write(INITIAL, 1000) + "sti\n nop")
    for now in (1000, 2100, 7500):
        at_time(guest, now)
        guest.resume()
        assert guest.vector == 0x40
        run(guest, write(EOI, 0) + "sti\n nop\n nop")
        assert guest.done
    assert value_of(guest, CURRENT) == 500
    at_time(guest, 7999)
    guest.resume()
    assert guest.done
    run(guest, write(INITIAL, 0))
    at_time(guest, 100_000)
    run(guest, "sti\n nop")
    assert guest.done


def test_masked_timer_counts_without_interrupt(guest: Guest) -> None:
    run(guest, TIMER + write(INITIAL, 1000) + "sti")
    at_time(guest, 1500)
    guest.resume()
    assert guest.done
    run(guest, write(LVT_TIMER, 0x40) + "nop\n nop")
    assert guest.done


def test_tsc_deadline(guest: Guest) -> None:
    """Section 11.5.4.1; the TSC runs at 1 GHz here."""
    run(guest, wrmsr(TSC_DEADLINE, 5000) + rdmsr(TSC_DEADLINE))
    assert guest.rax == 0  # ignored in other modes
    run(guest, DEADLINE_MODE + wrmsr(TSC_DEADLINE, 5000) + rdmsr(TSC_DEADLINE) + "sti")
    assert (guest.rax, guest.done) == (5000, True)
    run(guest, write(INITIAL, 10) + read(CURRENT))
    assert guest.rax == 0
    at_time(guest, 4999)
    guest.resume()
    assert guest.done
    at_time(guest, 5000)
    guest.resume()
    assert guest.vector == 0x40
    run(guest, write(EOI, 0) + rdmsr(TSC_DEADLINE))
    assert guest.rax == 0  # disarmed
    run(guest, wrmsr(TSC_DEADLINE, 4000) + "sti\n nop\n nop")
    assert guest.vector == 0x40  # in the past: at once


def test_change_of_mode_disarms_the_deadline(guest: Guest) -> None:
    run(guest, DEADLINE_MODE + wrmsr(TSC_DEADLINE, 5000) + write(LVT_TIMER, 0x40) + "sti")
    at_time(guest, 9000)
    guest.resume()
    assert guest.done


def test_deadline_follows_tsc_adjust(guest: Guest) -> None:
    run(guest, DEADLINE_MODE + wrmsr(0x3B, 3000) + wrmsr(TSC_DEADLINE, 8000) + "sti")
    at_time(guest, 4999)
    guest.resume()
    assert guest.done
    at_time(guest, 5000)
    guest.resume()
    assert guest.vector == 0x40


def test_the_timer_thread_wakes_a_halted_and_interrupts_a_running_vcpu(guest: Guest) -> None:
    """With time running: HLT ends, and an endless loop is left, both only by the timer."""
    guest.segment.start_time()
    run(guest, TIMER + write(LVT_TIMER, 0x40) + write(INITIAL, 200_000) + "sti\n hlt", budget=50)
    assert guest.vector == 0x40
    run(guest, write(EOI, 0) + write(INITIAL, 200_000) + "sti\n 1: jmp 1b", budget=400_000_000)
    assert guest.vector == 0x40


# ---- x2APIC, section 11.12 ----
TO_X2 = wrmsr(APIC_BASE, BASE | ENABLED | EXTENDED | BSP)


def test_x2apic_registers(guest: Guest) -> None:
    run(guest, ENABLE + TO_X2 + rdmsr(X2 + 0x02))
    assert guest.rax == 0
    run(guest, rdmsr(X2 + 0x0D))
    assert guest.rax == 1  # logical ID of APIC ID 0: cluster 0, bit 0
    run(guest, wrmsr(X2 + 0x3F, 0x61) + rdmsr(X2 + 0x23))
    assert guest.rax == 1 << 1
    run(guest, "sti\n nop\n nop")
    assert guest.vector == 0x61
    run(guest, wrmsr(X2 + 0x0B, 0) + rdmsr(X2 + 0x13))
    assert guest.rax == 0
    run(guest, wrmsr(X2 + 0x30, 0x0000_0007_0000_0041) + rdmsr(X2 + 0x30))
    assert (guest.rax, guest.rdx) == (0x41, 7)
    run(guest, read(VERSION))  # the window is closed
    assert guest.rax == 0xFFFFFFFF


@pytest.mark.parametrize("register", [0x00, 0x0E, 0x31, 0x0B, 0x3F, 0x40, 0xFF])
def test_x2apic_reads_that_fault(guest: Guest, register: int) -> None:
    run(guest, TO_X2 + rdmsr(X2 + register))
    assert guest.vector == GP


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (0x02, 0), (0x0D, 1), (0x0B, 1), (0x28, 1), (0x08, 0x100), (0x0F, 0x400), (0x30, 0x1000_0041),
        (0x3F, 0x100), (0x38, 1 << 32), (0x20, 0), (0x32, 1 << 32),
    ],
)  # fmt: skip
def test_x2apic_writes_that_fault(guest: Guest, register: int, value: int) -> None:
    run(guest, TO_X2 + wrmsr(X2 + register, value))
    assert guest.vector == GP


def test_x2apic_msrs_fault_in_xapic_mode(guest: Guest) -> None:
    run(guest, rdmsr(X2 + 0x02))
    assert guest.vector == GP


@pytest.mark.parametrize(
    ("before", "value", "fault"),
    [
        ([], BASE | BSP, False),
        ([], BASE | BSP | EXTENDED, True),  # extended without enabled
        ([BASE | BSP], BASE | BSP | ENABLED | EXTENDED, True),  # disabled to x2APIC
        ([BASE | BSP | ENABLED | EXTENDED], BASE | BSP | ENABLED, True),  # x2APIC to xAPIC
        ([BASE | BSP | ENABLED | EXTENDED], BASE | BSP, False),
        ([], BASE | BSP | ENABLED | 1, True),
        ([], 1 << 45 | BASE | BSP | ENABLED, True),
    ],
)
def test_transitions_of_the_base_register(guest: Guest, before: list[int], value: int, fault: bool) -> None:
    """Figure 11-27"""
    run(guest, "".join(wrmsr(APIC_BASE, step) for step in before) + wrmsr(APIC_BASE, value))
    assert (guest.vector == GP) == fault


def test_the_window_moves_with_the_base(guest: Guest) -> None:
    run(guest, wrmsr(APIC_BASE, 0xFEC80000 | ENABLED | BSP) + "mov eax, [0xfec800f0]\n mov ebx, [0xfee000f0]")
    assert (guest.rax, guest.rbx) == (0xFF, 0xFFFFFFFF)


# ---- messages from others ----
def test_nmi_arrives_once_and_is_blocked_until_iret(guest: Guest) -> None:
    run(guest, "nop")
    guest.segment.post_interrupt(0, 4, 2)
    guest.resume()
    assert guest.vector == 2
    guest.segment.post_interrupt(0, 4, 2)
    run(guest, "nop\n nop")
    assert guest.done


def test_level_vector_is_ended_at_the_ioapic(guest: Guest) -> None:
    header = guest.segment.header
    run(guest, ENABLE + "sti")
    for index, value in ((0x22, 1 << 15 | 0x71), (0x23, 0)):
        lib.ioapic_write(header, 0, index)
        lib.ioapic_write(header, 0x10, value)
    guest.segment.pin_set(9, 0, True)
    guest.resume()
    assert guest.vector == 0x71
    assert value_of(guest, 0x180 + 0x30) == 1 << 0x11  # trigger mode register
    guest.segment.pin_set(9, 0, False)
    run(guest, write(EOI, 0) + "sti\n nop")
    assert guest.done
    lib.ioapic_write(header, 0, 0x22)
    assert lib.ioapic_read(header, 0x10) & 1 << 14 == 0
