"""Exceptions and their delivery, IRET, double and triple fault: SDM vol. 3 chapter 6."""

from collections.abc import Callable

import pytest

from tests.vcpu.guest import (
    AC,
    BP,
    CODE,
    CODE32,
    CODE64,
    DATA,
    DATA32,
    DB,
    DE_,
    DF,
    FREE,
    GDT,
    GP,
    HANDLERS,
    IDT,
    IF,
    IOPL3,
    NM,
    NP,
    NT,
    OF,
    OVERFLOW,
    PF,
    RF,
    SCRATCH,
    SS_,
    STACK0,
    STACK3,
    STACK_IST,
    TF,
    TS,
    TSS,
    UD,
    USER_CODE32,
    USER_CODE64,
    USER_DATA,
    Guest,
    descriptor,
)

Make = Callable[..., Guest]
SHUTDOWN = 3  # enum activity
ALL = ("protected", "legacy", "pae", "long", "compat")


@pytest.mark.parametrize(("mode", "cpl"), [("real", 0), *((mode, cpl) for mode in ALL for cpl in (0, 3))])
@pytest.mark.parametrize(
    ("code", "vector", "back"),
    [
        ("int3", BP, 1),
        ("int 0x80", 0x80, 2),
        (".byte 0xf1", DB, 1),
        ("ud2", UD, 0),
        ("xor ecx, ecx\n div ecx", DE_, None),
    ],
)
def test_frame(make_guest: Make, mode: str, cpl: int, code: str, vector: int, back: int | None) -> None:
    """The address behind a trap or of a fault (RF then), CS, flags; SS:SP on a change of stack."""
    guest = make_guest(mode, cpl)
    guest.set(rflags=0x246)
    before = guest.rsp, guest.ss, guest.cs
    guest.run(code)
    assert guest.vector == vector
    rip, cs, flags, sp, ss, *_ = guest.stack()
    lengths = {"real": 3 + 0}
    at = CODE + (back if back is not None else lengths.get(mode, 2))
    assert (rip, cs) == (at, before[2])
    assert flags & 0xFFFFFF & ~0x8D5 == 0x202 | (RF if back in (0, None) and mode != "real" else 0)
    if cpl or mode in ("long", "compat"):
        assert (sp, ss) == (before[0], before[1])
    assert guest.cpl == 0
    assert not guest.rflags & (IF | TF | RF | NT)  # interrupt gates and real mode clear IF
    if cpl and mode in ("long", "compat"):
        assert guest.ss == 0
    if mode in ("long", "compat"):
        assert guest.rsp == (STACK0 if cpl else before[0] & ~15) - 40


def test_trap_gate_leaves_if(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.set_gate(0x80, CODE32, HANDLERS + 0x800, 0xF)
    guest.set(rflags=0x202)
    guest.run("int 0x80")
    assert guest.vector == 0x80 and guest.rflags & IF


def test_16_bit_gates(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.set_gate(0x80, CODE32, HANDLERS + 0x800, 0x6)
    guest.run("int 0x80")
    assert guest.vector == 0x80 and guest.stack(2)[:3] == [CODE + 2, CODE32, 0x0002]


@pytest.mark.parametrize(
    ("mode", "vector", "setup", "fault", "error"),
    [
        ("legacy", 0x80, {"dpl": 0}, GP, 0x80 * 8 + 2),
        ("long", 0x80, {"dpl": 0}, GP, 0x80 * 8 + 2),
        ("legacy", 0x80, {"dpl": 3, "present": False}, NP, 0x80 * 8 + 2),
        ("long", 0x80, {"dpl": 3, "present": False}, NP, 0x402),
    ],
)
def test_a_software_interrupt_checks_the_gate(
    make_guest: Make, mode: str, vector: int, setup: dict[str, int], fault: int, error: int
) -> None:
    guest = make_guest(mode, 3)
    guest.set_gate(vector, CODE64 if mode == "long" else CODE32, HANDLERS, 0xE, **setup)
    guest.run(f"nop\n int {vector}")
    assert guest.vector == fault and guest.stack()[:2] == [error, CODE + 1]


def test_an_exception_does_not_check_the_gates_dpl_and_says_ext(make_guest: Make) -> None:
    guest = make_guest("legacy", 3)
    guest.set_gate(UD, CODE32, HANDLERS + UD * 16, 0xE, dpl=0)
    guest.run("ud2")
    assert guest.vector == UD
    guest = make_guest("legacy", 3)
    guest.set_gate(UD, CODE32, HANDLERS, 0xE, present=False)
    guest.run("ud2")
    assert guest.vector == NP and guest.stack()[0] == UD * 8 + 3


@pytest.mark.parametrize(
    ("selector", "fault", "error"),
    [
        (0, GP, 0),
        (FREE, GP, FREE),
        (FREE + 8, NP, FREE + 8),
        (FREE + 16, GP, FREE + 16),
        (DATA32, GP, DATA32),
    ],
)
def test_code_segment_of_a_gate(make_guest: Make, selector: int, fault: int, error: int) -> None:
    guest = make_guest("legacy")
    guest.set_descriptor(FREE + 8, descriptor(0, 0xFFFFF, 0xC01B))
    guest.set_descriptor(FREE + 16, descriptor(0, 0xFFFFF, 0xC0FB))
    guest.set_gate(0x80, selector, HANDLERS, 0xE)
    guest.run("int 0x80")
    assert guest.vector == fault and guest.stack()[:2] == [error, CODE]


def test_idt_limit(make_guest: Make) -> None:
    for mode, limit, error in (
        ("legacy", 0x80 * 8 + 6, 0x402),
        ("long", 0x80 * 16 + 14, 0x402),
        ("real", 0x80 * 4 + 2, None),
    ):
        guest = make_guest(mode)
        guest.arch.idtr.limit = limit
        guest.run("int 0x80")
        assert guest.vector == GP
        assert error is None or guest.stack()[0] == error


def test_ist_and_alignment_of_the_stack(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set_gate(UD, CODE64, HANDLERS + UD * 16, 0xE, extra=1)
    guest.run("ud2")
    assert guest.rsp == STACK_IST - 40
    guest = make_guest("long")
    guest.set(rsp=STACK0 - 0x123)
    guest.run("ud2")
    assert guest.rsp == ((STACK0 - 0x123) & ~15) - 40 and guest.stack()[3] == STACK0 - 0x123


def test_into_and_bound(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.set(rflags=2 | OF)
    guest.run("into")
    assert guest.vector == OVERFLOW and guest.stack()[0] == CODE + 1
    guest = make_guest("legacy")
    guest.run("into")
    assert guest.done
    guest = make_guest("legacy")
    guest.put(DATA, 5 | 10 << 32)
    guest.run(
        f"mov eax, 5\n bound eax, [{DATA}]\n mov eax, 10\n bound eax, [{DATA}]\n"
        f"mov eax, 11\n bound eax, [{DATA}]"
    )
    assert guest.vector == 5


# ---- inner stacks ----


@pytest.mark.parametrize(
    ("ss", "fault", "error"),
    [(0, TS, 1), (USER_DATA, TS, (USER_DATA & ~3) | 1), (FREE, TS, FREE | 1), (FREE + 8, SS_, FREE + 9)],
)
def test_inner_stack_of_the_tss(make_guest: Make, ss: int, fault: int, error: int) -> None:
    """SDM vol. 2, INT: #TS names the stack segment, #SS when it is not present. The nested fault finds the
    same TSS: so its gate is a conforming segment of the same level that needs no inner stack."""
    guest = make_guest("legacy", 3)
    guest.set_descriptor(FREE, descriptor(0, 0xFFFFF, 0xC091))
    guest.set_descriptor(FREE + 8, descriptor(0, 0xFFFFF, 0xC013))
    guest.set_descriptor(FREE + 16, descriptor(0, 0xFFFFF, 0xC09F))
    guest.put(TSS + 8, ss, 4)
    guest.set_gate(fault, FREE + 16, HANDLERS + fault * 16, 0xE)
    guest.run("ud2")
    assert guest.vector == fault and guest.cpl == 3
    assert guest.stack()[:2] == [error, CODE]


# ---- double and triple fault: table 6-5 ----


def test_contributory_then_contributory_is_a_double_fault(make_guest: Make) -> None:
    for mode in ("legacy", "long"):
        guest = make_guest(mode)
        guest.set_gate(GP, CODE64 if mode == "long" else CODE32, HANDLERS, 0xE, present=False)
        guest.run(f"mov eax, {FREE}\n mov ds, eax")
        assert guest.vector == DF and guest.stack()[:2] == [0, CODE + 5]


def test_page_fault_in_a_page_faults_delivery_is_a_double_fault(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set_gate(DF, CODE64, HANDLERS + DF * 16, 0xE, extra=1)
    guest.set_pte(STACK0 - 0x1000, 0)
    guest.run("push rax")
    assert guest.vector == DF and guest.rsp == STACK_IST - 48
    assert guest.stack()[:2] == [0, CODE]
    assert guest.cr2 >> 12 == (STACK0 - 0x1000) >> 12


def test_benign_then_contributory_is_serial(make_guest: Make) -> None:
    """#UD whose gate is not present: #NP alone. A contributory fault then a page fault: also serial."""
    guest = make_guest("legacy")
    guest.set_gate(UD, CODE32, HANDLERS, 0xE, present=False)
    guest.run("ud2")
    assert guest.vector == NP
    guest = make_guest("long", 3)
    guest.set_gate(GP, CODE64, HANDLERS + GP * 16, 0xE, extra=1)
    guest.set_pte(STACK_IST - 0x1000, 0)
    guest.run("hlt")
    assert guest.vector == PF and guest.stack()[:2] == [2, CODE]


@pytest.mark.parametrize("mode", ["real", "legacy", "long"])
def test_triple_fault(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    guest.arch.idtr.limit = 0
    exit_reason = guest.run("ud2")
    assert exit_reason == 4 and guest.activity == SHUTDOWN  # EXIT_SHUTDOWN


# ---- IRET ----


def test_iret_to_each_level(make_guest: Make) -> None:
    for mode, code in (("legacy", USER_CODE32), ("long", USER_CODE64), ("long", USER_CODE32)):
        guest = make_guest(mode)
        push = "push {}\n" if mode == "legacy" else "mov rax, {}\n push rax\n"
        frame = (USER_DATA, STACK3, 0x3202, code, DATA)
        guest.write(DATA, b"\xeb\xfe")
        guest.run("".join(push.format(item) for item in frame) + ("iret" if mode == "legacy" else "iretq"))
        assert (guest.rip, guest.cs, guest.cpl, guest.ss, guest.rsp) == (DATA, code, 3, USER_DATA, STACK3)
        assert guest.rflags == 0x3202
        for name in ("ds", "es", "fs", "gs"):
            assert getattr(guest, name) == 0  # DPL 0 data is not for CPL 3


def test_iret_keeps_if_and_iopl_from_ring_3(make_guest: Make) -> None:
    guest = make_guest("long", 3)
    guest.set(rflags=2)
    guest.run(
        f"mov rax, rsp\n push {USER_DATA}\n push rax\n push {0x3202 | AC}\n push {USER_CODE64}\n"
        "lea rax, end_of_code[rip]\n push rax\n iretq"
    )
    assert guest.done and guest.rflags == 2 | AC


@pytest.mark.parametrize(
    ("cs", "ss", "error"),
    [
        (0, USER_DATA, 0),
        (DATA32, USER_DATA, DATA32),
        (USER_CODE32, DATA32, DATA32),
        (USER_CODE32 & ~3, USER_DATA, USER_CODE32 & ~3),
    ],
)
def test_iret_checks(make_guest: Make, cs: int, ss: int, error: int) -> None:
    guest = make_guest("legacy")
    guest.run(f"push {ss}\n push {STACK3}\n push 2\n push {cs}\n push {DATA}\n iret")
    assert guest.vector == GP and guest.stack()[0] == error


def test_iret_in_long_mode_with_nt_is_gp(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set(rflags=2 | NT)
    guest.run("iretq")
    assert guest.vector == GP and guest.stack()[0] == 0


def test_iret_within_ring_0_of_long_mode_takes_a_null_stack_segment(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.run(
        f"push 0\n push {STACK0 - 0x100}\n push 2\n push {CODE64}\n"
        "lea rax, end_of_code[rip]\n push rax\n iretq"
    )
    assert guest.done and (guest.ss, guest.rsp) == (0, STACK0 - 0x100)


def test_iret_ends_the_blocking_of_nmi(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.arch.nmi_blocked = 1
    guest.run(f"pushfd\n push {CODE32}\n push offset end_of_code\n iret")
    assert guest.done and guest.arch.nmi_blocked == 0


def test_nmi_is_held_until_iret(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.run("nop")
    guest.block.posted_nmi = 1
    guest.segment.attend(0, 2)  # ATTN_IRQ
    guest.resume()
    assert guest.vector == 2 and guest.arch.nmi_blocked == 1
    sp = guest.rsp
    guest.block.posted_nmi = 1
    guest.segment.attend(0, 2)
    guest.resume()
    assert guest.rsp == sp


def test_sti_shadow_and_interrupt(make_guest: Make) -> None:
    """The instruction behind STI runs before an interrupt is taken (SDM vol. 2)."""
    guest = make_guest("legacy")
    guest.arch.apic.svr = 0x1FF
    guest.changed()
    guest.run("nop")
    guest.block.posted_irr[1] = 1 << 0x10  # vector 50h
    guest.segment.attend(0, 2)
    guest.set(rip=CODE)
    guest.run("nop\n sti\n inc ecx\nbehind: inc edx")
    assert (
        guest.vector == 0x50
        and guest.stack()[0] == guest.labels["behind"]
        and (guest.rcx, guest.rdx) == (1, 0)
    )


def test_a_fault_in_the_middle_of_a_rep_keeps_what_was_done(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set_pte(SCRATCH, 0)
    guest.set(rsi=0x9000, rdi=SCRATCH - 0x10, rcx=0x20)
    guest.run("cld\n rep movsb")
    assert guest.vector == PF and (guest.rsi, guest.rdi, guest.rcx) == (0x9010, SCRATCH, 0x10)
    assert guest.cr2 == SCRATCH and guest.stack()[1] == CODE + 1


@pytest.mark.parametrize(
    "code",
    [
        "hlt",
        "cli",
        "sti",
        "in al, 0x80",
        "out dx, al",
        "mov rax, cr0",
        "lgdt [0]",
        "wbinvd",
        "rdmsr",
        "clts",
        "invlpg [0]",
        "mov rax, dr7",
        "swapgs",
        "xsetbv",
        "sysretq",
    ],
)
def test_privileged_instructions(make_guest: Make, code: str) -> None:
    guest = make_guest("long", 3)
    guest.set(cr4=guest.cr4 | 1 << 18, efer=guest.efer | 1)
    guest.run(code)
    assert guest.vector == GP and guest.stack()[:2] == [0, CODE]


def test_io_permission_map(make_guest: Make) -> None:
    """A clear bit allows the port; the map must reach one byte behind (SDM vol. 1 section 18.5.2)."""
    for offset, size, allowed in ((0x80 // 8, 1, True), (0x80 // 8, 2, True), (0x80 // 8, 4, False)):
        guest = make_guest("long", 3)
        guest.put(TSS + 0x68 + offset, 0xFFFC, 2)
        guest.run(f"mov edx, 0x80\n in {({1: 'al', 2: 'ax', 4: 'eax'})[size]}, dx")
        assert guest.done == allowed
    guest = make_guest("long", 3)
    guest.set(rflags=2 | IOPL3)
    guest.run("in al, 0x80\n cli\n sti")
    assert guest.done


def test_handlers_see_lazy_flags(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.run("mov eax, -1\n add eax, 1\n ud2")
    assert guest.stack()[2] & 0xFF == 0x57  # CF PF AF ZF and the fixed bit


def test_task_switched_flag_is_not_our_business_but_nm_is(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set(cr0=guest.cr0 | 8, cr4=guest.cr4 | 0x200)
    guest.run("nop\n fld1")
    assert guest.vector == NM and guest.stack()[0] == CODE + 1


def test_gdt_that_vanishes(make_guest: Make) -> None:
    """The descriptor of the handler's segment is read at delivery: page fault, double fault, shutdown."""
    guest = make_guest("long")
    guest.set_pte(GDT, 0)
    assert guest.run("ud2") == 4
    assert guest.cr2 >> 12 == GDT >> 12 and guest.read(IDT, 2) == HANDLERS
