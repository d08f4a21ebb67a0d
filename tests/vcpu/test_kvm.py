"""KVM's paravirtual interface: Linux Documentation/virt/kvm/x86/ msr.rst, hypercalls.rst, cpuid.rst."""

import struct
from collections.abc import Callable

import pytest

from tests.vcpu.guest import (
    CODE,
    DATA,
    GP,
    HANDLERS,
    MSR_WRITE,
    SCRATCH,
    Guest,
)

Make = Callable[..., Guest]


# ---- KVM: Documentation/virt/kvm/x86/msr.rst and hypercalls.rst ----


def pvclock(page: bytes) -> tuple[int, int, int, int, int, int]:
    """version, tsc_timestamp, system_time, mul, shift, flags"""
    version, _, tsc, system, mul, shift, flags = struct.unpack("<IIQQIbB", page[:30])
    return version, tsc, system, mul, shift, flags


@pytest.mark.parametrize("khz", [1_000_000, 2_400_000, 800_000, 3_700_001])
def test_kvmclock(make_guest: Make, khz: int) -> None:
    guest = make_guest("long")
    guest.segment.stop_time()
    guest.segment.set_time(5_000_000_000, 1_700_000_000_123_456_789, khz)
    guest.segment.dirty[:] = 0
    guest.run(MSR_WRITE.format(0x4B564D01, DATA | 1) + MSR_WRITE.format(0x4B564D00, SCRATCH))
    version, tsc, system, mul, shift, flags = pvclock(guest.segment.dma_read(DATA, 32))
    assert version and version % 2 == 0 and flags == 1  # PVCLOCK_TSC_STABLE_BIT
    delta = guest.segment.guest_tsc() - tsc
    ns = system + ((delta << shift if shift >= 0 else delta >> -shift) * mul >> 32)
    assert abs(ns - guest.segment.guest_now()) < 100
    assert struct.unpack("<III", guest.segment.dma_read(SCRATCH, 12))[1:] == (1_700_000_000, 123_456_789)
    assert guest.segment.dirty[DATA >> 12] and guest.segment.dirty[SCRATCH >> 12]


def test_steal_time_reserved_bits(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.run(MSR_WRITE.format(0x4B564D03, DATA | 1))
    assert guest.done and guest.read(DATA + 8, 4) % 2 == 0
    guest.set(rip=CODE)
    guest.run(MSR_WRITE.format(0x4B564D03, DATA | 3))
    assert guest.vector == GP


@pytest.mark.parametrize("opcode", ["vmcall", "vmmcall"])
def test_hypercalls(make_guest: Make, opcode: str) -> None:
    guest = make_guest("long")
    guest.run(f"mov eax, 5\n xor ebx, ebx\n xor ecx, ecx\n {opcode}\n mov rdi, rax\n mov eax, 99\n {opcode}")
    assert guest.done and guest.rdi == 0 and guest.rax == 2**64 - 1000  # KICK_CPU; -KVM_ENOSYS
    assert guest.block.posted_kick == 1
    guest = make_guest("long", 3)
    guest.run(f"mov eax, 5\n {opcode}")
    assert guest.rax == 2**64 - 1  # -KVM_EPERM


def test_hypercall_send_ipi(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.arch.apic.svr = 0x1FF
    guest.changed()
    guest.run(
        "mov eax, 10\n mov ebx, 1\n xor ecx, ecx\n xor edx, edx\n mov esi, 0x51\n vmmcall\n sti\n nop\n nop"
    )
    assert guest.vector == 0x51 and guest.rax == 1


def test_a_kick_ends_hlt_whatever_if_is(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.run("mov eax, 5\n xor ebx, ebx\n xor ecx, ecx\n vmmcall\n cli\n hlt\n inc edi")
    assert guest.done and guest.rdi == 1


def test_eoi_in_memory(make_guest: Make) -> None:
    """MSR_KVM_PV_EOI_EN: bit 0 is set with an interrupt; a guest that clears it need not write EOI."""
    guest = make_guest("long")
    guest.arch.apic.svr = 0x1FF
    guest.changed()
    send = "mov eax, 10\n mov ebx, 1\n xor ecx, ecx\n xor edx, edx\n mov esi, {:#x}\n vmmcall\n"
    # the handler: btr dword ptr [DATA], 0; adc rdi, 1; iretq
    guest.write(
        HANDLERS + 0x510,
        bytes.fromhex("0fba3425") + struct.pack("<I", DATA) + bytes.fromhex("004883d70148cf"),
    )
    guest.run(MSR_WRITE.format(0x4B564D04, DATA | 1) + "sti\n" + 2 * (send.format(0x51) + "nop\n"))
    assert guest.done and guest.rdi == 4  # twice, and the bit was set each time
    assert guest.arch.apic.isr[1] == 0 and guest.read(DATA, 4) == 0
    guest.set(rip=CODE)
    guest.run(MSR_WRITE.format(0x4B564D04, DATA | 3))
    assert guest.vector == GP
