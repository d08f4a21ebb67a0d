"""Control registers, MSRs, CPUID, system calls, reset: sources as named."""

import struct
from collections.abc import Callable

import pytest

from tests.vcpu.guest import (
    CODE,
    CODE32,
    CODE64,
    DATA,
    GP,
    IF,
    LMA,
    LME,
    MSR_READ,
    MSR_WRITE,
    NE,
    PAE,
    PCIDE,
    PE,
    PG,
    SCE,
    SCRATCH,
    STACK3,
    TABLES,
    UD,
    USER_CODE32,
    USER_CODE64,
    Guest,
)
from vcpu._core import lib

Make = Callable[..., Guest]


def read_msr(make_guest: Make, index: int) -> int | None:
    guest = make_guest("long")
    guest.run(MSR_READ.format(index))
    return guest.rax if guest.done else None


def cpuid(make_guest: Make, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    guest = make_guest("long")
    guest.run(f"mov eax, {leaf:#x}\n mov ecx, {subleaf}\n cpuid")
    return guest.rax, guest.rbx, guest.rcx, guest.rdx


# ---- control registers: SDM vol. 2 MOV CR ----


@pytest.mark.parametrize(
    ("mode", "register", "value"),
    [
        ("legacy", "cr0", PG | 0x10),
        ("legacy", "cr0", PG | PE | 1 << 29),
        ("long", "cr0", PE | 0x10),
        ("long", "cr0", 1 << 32 | PG | PE),
        ("legacy", "cr4", 1 << 13),
        ("long", "cr4", 0),
        ("long", "cr4", PAE | 1),
        ("legacy", "cr4", PCIDE),
        ("long", "cr3", 1 << 40),
        ("long", "cr8", 16),
    ],
)
def test_values_that_control_registers_refuse(make_guest: Make, mode: str, register: str, value: int) -> None:
    guest = make_guest(mode)
    accumulator = "rax" if mode == "long" else "eax"
    guest.run(f"mov {accumulator}, {value:#x}\n mov {register}, {accumulator}")
    assert guest.vector == GP and guest.stack()[0] == 0


@pytest.mark.parametrize("register", [1, 5, 6, 7])
def test_control_registers_that_do_not_exist(make_guest: Make, register: int) -> None:
    guest = make_guest("legacy")
    guest.run(f".byte 0x0f, 0x20, {0xC0 | register << 3}")
    assert guest.vector == UD


def test_mod_of_a_mov_of_a_control_register_is_ignored(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.run(".byte 0x0f, 0x20, 0x18\n")  # mod = 0, CR3, EAX
    assert guest.done and guest.rax == TABLES


def test_cr8_is_the_task_priority(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.run("mov eax, 9\n mov cr8, rax\n mov rbx, cr8")
    assert guest.rbx == 9 and guest.arch.apic.tpr == 0x90


def test_lmsw_cannot_leave_protected_mode(make_guest: Make) -> None:
    guest = make_guest("protected")
    guest.run("mov eax, 0x000e\n lmsw ax\n smsw ecx\n clts\n smsw dx")
    assert guest.done and guest.rcx == PE | 0x1E | NE and guest.rdx & 0xFFFF == PE | 0x16 | NE


def test_long_mode_needs_pae(make_guest: Make) -> None:
    guest = make_guest("protected")
    guest.set(efer=LME)
    guest.run(f"mov eax, cr0\n or eax, {PG}\n mov cr0, eax")
    assert guest.vector == GP and not guest.efer & LMA


def test_xsetbv(make_guest: Make) -> None:
    for index, value, ok in ((0, 1, True), (0, 3, True), (0, 2, False), (0, 7, False), (1, 3, False)):
        guest = make_guest("long")
        guest.set(cr4=guest.cr4 | 1 << 18)
        guest.run(f"mov ecx, {index}\n mov eax, {value}\n xor edx, edx\n xsetbv\n xor ecx, ecx\n xgetbv")
        assert guest.done == ok
        assert not ok or guest.rax == value
    guest = make_guest("long")
    guest.run("xor ecx, ecx\n xgetbv")
    assert guest.vector == UD


# ---- MSRs ----


@pytest.mark.parametrize(
    "index", [0, 0x3A, 0x48, 0x10A, 0xC0000085, 0xC0010114, 0xC0011004, 0xDEADBEEF, 0x4B564D02, 0x4B564D05]
)
def test_an_msr_that_does_not_exist_faults(make_guest: Make, index: int) -> None:
    assert read_msr(make_guest, index) is None
    guest = make_guest("long")
    guest.run(MSR_WRITE.format(index, 0))
    assert guest.vector == GP


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0xC0000081, 0x0023001000000000),
        (0xC0000082, 0xFFFFFFFF81000000),
        (0xC0000083, 0xFFFFFFFF81000010),
        (0xC0000084, 0x47700),
        (0xC0000100, 0x7FFF00001000),
        (0xC0000101, 0xFFFF888000000000),
        (0xC0000102, 0x1000),
        (0xC0000103, 5),
        (0x174, 0x10),
        (0x175, 0xFFFFC90000000000),
        (0x277, 0x0407050600070106),
        (0x200, 0x80000000),
        (0x201, 0xFFC0000800),
        (0x250, 0x0606060606060606),
        (0x26F, 0x0505050505050505),
        (0x2FF, 0xC06),
        (0x17A, 4),
        (0x17B, 2**64 - 1),
        (0x400, 2**64 - 1),
        (0x401, 0),
        (0x1A0, 1),
        (0x3B, 1000),
        (0xC0010015, 0x01000010),
    ],
)
def test_msrs_that_keep_what_is_written(make_guest: Make, index: int, value: int) -> None:
    guest = make_guest("long")
    guest.run(MSR_WRITE.format(index, value) + MSR_READ.format(index))
    assert guest.done and guest.rax == value


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0xC0000082, 1 << 47),
        (0xC0000100, 1 << 63),
        (0x277, 2),
        (0x277, 8 << 8),
        (0x200, 2),
        (0x200, 1 << 40),
        (0x201, 1),
        (0x250, 3),
        (0x2FF, 7),
        (0x2FF, 1 << 12),
        (0xC0000080, 1 << 20),
        (0xC0000080, 0),
        (0xC0000103, 1 << 32),
        (0xFE, 0),
        (0x179, 0),
        (0x401, 1),
        (0xC0000084, 1 << 32),
    ],
)
def test_msrs_that_refuse_a_value(make_guest: Make, index: int, value: int) -> None:
    """Not canonical; memory types 2, 3, 7; reserved bits; EFER.LME with paging on; read-only."""
    guest = make_guest("long")
    guest.run(MSR_WRITE.format(index, value))
    assert guest.vector == GP and guest.stack()[0] == 0


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0xFE, 0x508),
        (0x179, 0x106),
        (0x8B, 0x03000027),
        (0xC0010010, 0),
        (0xC0010015, 1 << 24),
        (0xC001001F, 1 << 46),
        (0xC0010055, 0),
        (0x277, 0x0007040600070406),
        (0x2FF, 0),
        (0xC0010000, 0),
    ],
)
def test_msrs_after_reset(make_guest: Make, index: int, value: int) -> None:
    assert read_msr(make_guest, index) == value


def test_fs_and_gs_base_are_the_segments_own(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.put(DATA, 0x55)
    guest.run(MSR_WRITE.format(0xC0000100, DATA) + "mov rbx, fs:[0]")
    assert guest.rbx == 0x55


def test_tsc_and_its_adjustment(make_guest: Make) -> None:
    """Writing TSC moves TSC_ADJUST by as much (SDM vol. 3 section 17.17.3). Time stands still."""
    guest = make_guest("long")
    guest.segment.stop_time()
    guest.run(
        "rdtsc\n mov ebx, eax\n"
        + MSR_WRITE.format(0x10, 1 << 40)
        + "rdtsc\n mov edi, edx\n"
        + MSR_READ.format(0x3B)
    )
    assert guest.done and guest.rdi == 1 << 8
    assert guest.rax == (1 << 40) - guest.segment.guest_tsc() == (1 << 40) - guest.rbx


def test_rdtscp_rdpmc_and_tsd(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.arch.tsc_aux = 3
    guest.run("rdtscp\n mov ebx, ecx\n mov ecx, 2\n rdpmc\n mov ecx, 4\n rdpmc")
    assert guest.rbx == 3 and guest.vector == GP
    guest = make_guest("long", 3)
    guest.set(cr4=guest.cr4 | 4)
    guest.run("rdtsc")
    assert guest.vector == GP


# ---- CPUID: AMD 25481, SDM vol. 2 ----


def test_identity(make_guest: Make) -> None:
    eax, ebx, ecx, edx = cpuid(make_guest, 0)
    assert struct.pack("<3I", ebx, edx, ecx) == b"AuthenticAMD" and eax == 0xD
    brand = b"".join(
        struct.pack("<4I", *cpuid(make_guest, leaf)) for leaf in (0x80000002, 0x80000003, 0x80000004)
    )
    assert brand.rstrip(b"\0") == b"Atoll Virtual CPU"
    _, ebx, ecx, edx = cpuid(make_guest, 0x40000000)
    assert struct.pack("<3I", ebx, ecx, edx) == b"KVMKVMKVM\0\0\0"


def test_features_are_those_of_the_design(make_guest: Make) -> None:
    """x86-64-v2 (SSE3 SSSE3 SSE4 CX16 POPCNT LAHF) and more; no AVX, MONITOR, VMX, SVM."""
    _, _, ecx, edx = cpuid(make_guest, 1)
    for bit in (0, 1, 9, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 30, 31):
        assert ecx >> bit & 1, bit
    for bit in (3, 5, 12, 28, 29):
        assert not ecx >> bit & 1, bit
    assert not edx & 2 and edx >> 9 & 1  # no VME; APIC
    _, ebx, _, _ = cpuid(make_guest, 7)
    assert ebx & (1 | 2 | 1 << 7 | 1 << 10 | 1 << 20) == 1 | 2 | 1 << 7 | 1 << 10 | 1 << 20
    _, _, ecx, edx = cpuid(make_guest, 0x80000001)
    assert edx & (1 << 11 | 1 << 20 | 1 << 27 | 1 << 29) == 1 << 11 | 1 << 20 | 1 << 27 | 1 << 29
    assert ecx & 1 and not ecx & 4  # LAHF; no SVM
    assert cpuid(make_guest, 0x80000007)[3] == 1 << 8  # invariant TSC
    assert cpuid(make_guest, 0x80000008)[0] == 0x3028
    assert cpuid(make_guest, 0xD)[:3] == (3, 576, 576)
    assert cpuid(make_guest, 0x12345) == (0, 0, 0, 0)


def test_osxsave_follows_cr4(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set(cr4=guest.cr4 | 1 << 18)
    guest.run("mov eax, 1\n cpuid")
    assert guest.rcx >> 27 & 1
    assert not cpuid(make_guest, 1)[2] >> 27 & 1


# ---- system calls: APM vol. 3 ----

STAR = (USER_CODE32 & ~3) << 48 | CODE64 << 32


def test_syscall_and_sysret(make_guest: Make) -> None:
    """SYSRET to 64-bit code takes STAR's selector + 16, SYSCALL's SS its own + 8."""
    guest = make_guest("long", 3)
    guest.arch.star, guest.arch.lstar, guest.arch.fmask = STAR, DATA, IF
    guest.set(efer=guest.efer | SCE, rflags=0x246)
    guest.write(DATA, b"\xeb\xfe")
    guest.run("syscall\n inc r15")
    assert (guest.rip, guest.rcx, guest.r11, guest.cpl) == (DATA, CODE + 2, 0x246, 0)
    assert (guest.cs, guest.ss, guest.rflags) == (CODE64, CODE64 + 8, 0x46)
    assert (guest.arch.seg[1].attr, guest.arch.seg[2].attr) == (0xA09B, 0xC093)
    guest.write(DATA, b"\x48\x0f\x07")
    guest.resume()
    assert guest.done and guest.r15 == 1 and guest.cpl == 3
    assert (guest.cs, guest.ss, guest.rflags & IF) == (USER_CODE64, (USER_CODE32 & ~3) + 8 | 3, IF)
    assert guest.rsp == STACK3


def test_syscall_from_compatibility_mode(make_guest: Make) -> None:
    guest = make_guest("compat", 3)
    guest.arch.star, guest.arch.lstar, guest.arch.cstar = STAR, SCRATCH, DATA
    guest.set(efer=guest.efer | SCE)
    guest.write(DATA, b"\x0f\x07")  # sysret, 32-bit
    guest.run("syscall\n inc edi")
    assert guest.done and (guest.cs, guest.rdi, guest.rcx) == (USER_CODE32, 1, CODE + 2)


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        ("long", "syscall"),
        ("long", "sysenter"),
        ("compat", "sysenter"),
        ("long", "sysexitd"),
        ("long", "sysretq"),
    ],
)
def test_system_calls_that_are_undefined(make_guest: Make, mode: str, code: str) -> None:
    """EFER.SCE is clear; SYSENTER and SYSEXIT do not exist in an AMD processor's long mode."""
    guest = make_guest(mode)
    guest.arch.sysenter_cs = CODE32
    guest.run(code)
    assert guest.vector == UD


def test_sysenter_and_sysexit_of_protected_mode(make_guest: Make) -> None:
    guest = make_guest("legacy", 3)
    guest.arch.sysenter_cs, guest.arch.sysenter_eip, guest.arch.sysenter_esp = CODE32, DATA, 0x7800
    guest.set(rflags=0x202)
    guest.write(DATA, b"\xeb\xfe")
    guest.run("mov edx, offset end_of_code\n mov ecx, esp\n sysenter")
    assert (guest.rip, guest.cs, guest.ss, guest.rsp, guest.cpl, guest.rflags) == (
        DATA,
        CODE32,
        CODE32 + 8,
        0x7800,
        0,
        2,
    )
    guest.write(DATA, b"\x0f\x35")
    guest.resume()
    assert guest.done and (guest.cs, guest.ss, guest.cpl, guest.rsp) == (
        CODE32 + 16 | 3,
        CODE32 + 24 | 3,
        3,
        STACK3,
    )
    guest = make_guest("legacy", 3)
    guest.run("sysenter")
    assert guest.vector == GP and guest.stack()[0] == 0  # SYSENTER_CS is null


# ---- reset: SDM vol. 3 table 9-1 ----


def test_power_on(make_guest: Make) -> None:
    guest = make_guest("long")
    lib.core_power_on(guest.cpu)
    arch = guest.arch
    assert (guest.rip, guest.cs, arch.seg[1].base, arch.seg[1].limit) == (0xFFF0, 0xF000, 0xFFFF0000, 0xFFFF)
    assert (guest.cr0, guest.cr2, guest.cr3, guest.cr4, guest.efer, guest.rflags) == (
        0x60000010,
        0,
        0,
        0,
        0,
        2,
    )
    assert guest.rdx == 0x300F10 == cpuid(make_guest, 1)[0]
    assert (guest.dr(6), guest.dr(7)) == (0xFFFF0FF0, 0x400)
    assert (arch.idtr.base, arch.idtr.limit, arch.gdtr.limit, arch.xcr0) == (0, 0xFFFF, 0xFFFF, 1)
    assert (arch.fpu.cw, arch.fpu.mxcsr, arch.activity) == (0x40, 0x1F80, 0)


def test_init_keeps_what_it_must(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.arch.star = 0x1234
    guest.arch.vec[0].q[0] = 77
    guest.changed()
    guest.run("nop")
    guest.block.posted_init = 1
    guest.segment.attend(0, 2)
    lib.core_run(guest.cpu, 0)
    assert guest.cs == 0xF000 and guest.efer == 0 and guest.cr0 & ~0x60000000 == 0x10
    assert guest.arch.star == 0x1234 and guest.arch.vec[0].q[0] == 77


def test_rdrand(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.run("rdrand rax\n setc bl\n rdrand rcx\n rdrand dx")
    assert guest.done and guest.rbx & 0xFF == 1 and guest.rax != guest.rcx and guest.rdx < 0x10000


@pytest.mark.parametrize(
    "code",
    [
        "rsm",
        "vmrun rax",
        "vmload rax",
        "vmlaunch",
        "vmread rax, rbx",
        "monitor",
        "mwait",
        "getsec",
        "rdseed eax",
        "clac",
        "stac",
    ],
)
def test_instructions_that_the_model_lacks(make_guest: Make, code: str) -> None:
    guest = make_guest("long")
    guest.run(code)
    assert guest.vector == (None if code in ("clac", "stac") else UD)


def test_smap_instructions(make_guest: Make) -> None:
    """#UD at CPL 3 (SDM vol. 2, CLAC)."""
    guest = make_guest("long")
    guest.run("stac\n pushfq\n pop rbx\n clac\n pushfq\n pop rcx")
    assert guest.done and guest.rbx >> 18 & 1 and not guest.rcx >> 18 & 1
    guest = make_guest("long", 3)
    guest.run("stac")
    assert guest.vector == UD
