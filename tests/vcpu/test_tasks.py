"""Call gates, far returns, hardware task switches, VM86: SDM vol. 3 sections 5.8, 7.3 and chapter 20."""

from collections.abc import Callable

import pytest

from tests.vcpu.guest import (
    CODE,
    CODE32,
    CODE64,
    DATA,
    DATA32,
    FREE,
    GDT,
    GP,
    HANDLERS,
    IF,
    IOPL3,
    NP,
    NT,
    PF,
    SCRATCH,
    STACK0,
    STACK3,
    TABLES,
    TS,
    TSS,
    TSS2,
    TSS16,
    TSS_SELECTOR,
    UD,
    USER_CODE32,
    USER_DATA,
    VM,
    Guest,
    descriptor,
    gate,
)

Make = Callable[..., Guest]
TARGET = 0x9000  # code that transfers lead to
CALL16, TASK, CALL32 = 0x4, 0x5, 0xC


def with_target(guest: Guest) -> Guest:
    guest.write(TARGET, b"\xeb\xfe")
    return guest


# ---- far JMP and CALL to code segments ----


@pytest.mark.parametrize(
    ("selector", "vector", "error"),
    [
        (0, GP, 0),
        (FREE, GP, FREE),
        (FREE + 1, GP, FREE),
        (FREE + 8, None, 0),
        (FREE + 11, None, 0),
        (FREE + 16, NP, FREE + 16),
        (DATA32, GP, DATA32),
        (FREE + 0xF00, GP, FREE + 0xF00),
        (USER_CODE32, GP, USER_CODE32 & ~3),
        (CODE32 | 1, GP, CODE32),
    ],
)
@pytest.mark.parametrize("instruction", ["jmp", "call"])
def test_direct_far_transfer(
    make_guest: Make, selector: int, vector: int | None, error: int, instruction: str
) -> None:
    guest = with_target(make_guest("legacy"))
    guest.set_descriptor(FREE, descriptor(0, 0xFFFFF, 0xC0FE))  # conforming, DPL 3: too low
    guest.set_descriptor(FREE + 8, descriptor(0, 0xFFFFF, 0xC09E))  # conforming, DPL 0
    guest.set_descriptor(FREE + 16, descriptor(0, 0xFFFFF, 0xC01A))
    guest.run(f".byte {0xEA if instruction == 'jmp' else 0x9A}\n .long {TARGET}\n .word {selector}")
    assert guest.vector == vector
    if vector is None:
        assert guest.rip == TARGET and guest.cs == selector & ~3
        if instruction == "call":
            assert guest.stack()[:2] == [CODE + 7, CODE32]
    else:
        assert guest.stack()[:2] == [error, CODE]


def test_a_target_behind_the_limit_is_gp_0(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.set_descriptor(FREE, descriptor(0, TARGET - 1, 0x409A))
    guest.run(f".byte 0xea\n .long {TARGET}\n .word {FREE}")
    assert guest.vector == GP and guest.stack()[:2] == [0, CODE]


def test_far_call_and_return_of_64_bit_mode(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.put(DATA, TARGET | CODE64 << 64, 10)
    guest.write(TARGET, b"\x48\xcb")  # retf with 64-bit operands
    guest.run(f"mov rbx, rsp\n rex.W call fword ptr [{DATA}]\n sub rbx, rsp")
    assert guest.done and guest.rbx == 0


# ---- call gates ----


def test_call_gate_to_an_inner_level_copies_parameters(make_guest: Make) -> None:
    guest = with_target(make_guest("legacy", 3))
    guest.set_descriptor(FREE, gate(CODE32, TARGET, CALL32, dpl=3, extra=2))
    guest.run(f"push 0x11\n push 0x22\n .byte 0x9a\n .long 0xdead\n .word {FREE | 3}")
    assert (guest.rip, guest.cpl, guest.ss, guest.cs) == (TARGET, 0, DATA32, CODE32)
    assert guest.stack()[:6] == [CODE + 11, USER_CODE32, 0x22, 0x11, STACK3 - 8, USER_DATA]
    assert guest.rsp == STACK0 - 24


def test_return_to_the_outer_level_releases_both_stacks(make_guest: Make) -> None:
    guest = make_guest("legacy", 3)
    guest.write(TARGET, b"\xca\x08\x00")  # retf 8
    guest.set_descriptor(FREE, gate(CODE32, TARGET, CALL32, dpl=3, extra=2))
    guest.run(f"push 0x11\n push 0x22\n .byte 0x9a\n .long 0\n .word {FREE | 3}")
    assert guest.done and guest.cpl == 3 and (guest.rsp, guest.ss) == (STACK3, USER_DATA)


def test_16_bit_call_gate(make_guest: Make) -> None:
    guest = with_target(make_guest("legacy", 3))
    guest.set_descriptor(FREE, gate(CODE32, TARGET | 0xABCD0000, CALL16, dpl=3))
    guest.run(f".byte 0x9a\n .long 0\n .word {FREE | 3}")
    assert guest.rip == TARGET and guest.stack(2)[:4] == [CODE + 7, USER_CODE32, STACK3 & 0xFFFF, USER_DATA]


@pytest.mark.parametrize(
    ("dpl", "rpl", "present", "code", "fault", "error"),
    [
        (2, 3, 1, CODE32, GP, FREE),
        (3, 3, 0, CODE32, NP, FREE),
        (3, 3, 1, 0, GP, 0),
        (3, 3, 1, DATA32, GP, DATA32),
    ],
)
def test_call_gate_checks(
    make_guest: Make, dpl: int, rpl: int, present: int, code: int, fault: int, error: int
) -> None:
    guest = make_guest("legacy", 3)
    guest.set_descriptor(FREE, gate(code, TARGET, CALL32, dpl=dpl, present=bool(present)))
    guest.run(f".byte 0x9a\n .long 0\n .word {FREE | rpl}")
    assert guest.vector == fault and guest.stack()[:2] == [error, CODE]


def test_jmp_through_a_gate_cannot_change_the_level(make_guest: Make) -> None:
    guest = make_guest("legacy", 3)
    guest.set_descriptor(FREE, gate(CODE32, TARGET, CALL32, dpl=3))
    guest.run(f".byte 0xea\n .long 0\n .word {FREE | 3}")
    assert guest.vector == GP and guest.stack()[0] == CODE32


def test_64_bit_call_gate(make_guest: Make) -> None:
    """SDM vol. 3 section 5.8.3.1: 16 bytes, no parameters, a null stack segment."""
    guest = with_target(make_guest("long", 3))
    guest.set_descriptor(FREE, gate(CODE64, TARGET, CALL32, dpl=3), 0)
    guest.put(DATA, FREE << 32 | 3 << 32, 6)
    guest.run(f"call fword ptr [{DATA}]")
    assert (guest.rip, guest.cpl, guest.ss) == (TARGET, 0, 0)
    assert guest.stack()[:4] == [CODE + 7, 0x43, STACK3, USER_DATA] and guest.rsp == STACK0 - 32
    guest = make_guest("long", 3)
    guest.set_descriptor(FREE, gate(CODE32, TARGET, CALL32, dpl=3), 0)
    guest.put(DATA, (FREE | 3) << 32, 6)
    guest.run(f"call fword ptr [{DATA}]")
    assert guest.vector == GP and guest.stack()[0] == CODE32  # not a 64-bit segment


# ---- task switch ----


def put_tss32(guest: Guest, at: int, **fields: int) -> None:
    """A TSS that runs flat code of ring 0 at TARGET, with changes."""
    offsets = {
        "link": 0,
        "cr3": 0x1C,
        "eip": 0x20,
        "eflags": 0x24,
        "eax": 0x28,
        "ecx": 0x2C,
        "edx": 0x30,
        "ebx": 0x34,
        "esp": 0x38,
        "ebp": 0x3C,
        "esi": 0x40,
        "edi": 0x44,
        "es": 0x48,
        "cs": 0x4C,
        "ss": 0x50,
        "ds": 0x54,
        "fs": 0x58,
        "gs": 0x5C,
        "ldt": 0x60,
        "trap": 0x64,
    }
    values = {
        "cr3": TABLES,
        "eip": TARGET,
        "eflags": 2,
        "esp": 0x7800,
        "cs": CODE32,
        "ss": DATA32,
        "ds": DATA32,
        "es": DATA32,
        "esp0": STACK0,
    } | fields
    guest.put(at + 4, STACK0, 4)
    guest.put(at + 8, DATA32, 4)
    for name, value in values.items():
        if name in offsets:
            guest.put(at + offsets[name], value, 4)


def task_guest(make_guest: Make, cpl: int = 0, **fields: int) -> Guest:
    guest = with_target(make_guest("legacy", cpl))
    guest.set_descriptor(FREE, descriptor(TSS2, 0x67, 0x89 | cpl << 5))
    put_tss32(guest, TSS2, **fields)
    return guest


def test_task_switch_by_jmp(make_guest: Make) -> None:
    guest = task_guest(make_guest, eax=0x1111, edi=0x2222, eflags=0x3202)
    guest.set(rflags=0x3246, dr7=0x455)
    guest.run(f"mov ebx, 0x3333\n .byte 0xea\n .long 0\n .word {FREE}")
    assert (guest.rip, guest.rax, guest.rdi, guest.rsp, guest.rflags) == (
        TARGET,
        0x1111,
        0x2222,
        0x7800,
        0x3202,
    )
    assert guest.arch.tr.selector == FREE and guest.cr0 & 8  # TS
    assert guest.dr(7) == 0x400
    assert guest.read(GDT + FREE + 5, 1) & 0xF == 0xB  # busy
    assert guest.read(GDT + TSS_SELECTOR + 5, 1) & 0xF == 0x9  # available again
    assert guest.read(TSS + 0x20, 4) == CODE + 12 and guest.read(TSS + 0x34, 4) == 0x3333
    assert guest.read(TSS + 0x4C, 2) == CODE32 and guest.read(TSS + 0x24, 4) == 0x3246


def test_task_switch_by_call_and_back_by_iret(make_guest: Make) -> None:
    guest = task_guest(make_guest)
    guest.write(TARGET, b"\x40\xcf")  # inc eax; iret
    guest.run(f"mov eax, 0x77\n .byte 0x9a\n .long 0\n .word {FREE}\n mov ecx, 0x88")
    assert guest.done and (guest.rax, guest.rcx) == (0x77, 0x88)
    assert guest.read(TSS2, 2) == TSS_SELECTOR and guest.read(TSS2 + 0x28, 4) == 1
    assert guest.read(TSS2 + 0x24, 4) & NT == 0 and guest.arch.tr.selector == TSS_SELECTOR
    assert guest.read(GDT + FREE + 5, 1) & 0xF == 0x9
    assert guest.read(GDT + TSS_SELECTOR + 5, 1) & 0xF == 0xB
    assert guest.read(TSS2 + 0x20, 4) == TARGET + 2


def test_task_gate_in_the_idt_takes_the_error_code(make_guest: Make) -> None:
    guest = task_guest(make_guest, 0)
    guest.set_gate(GP, FREE, 0, TASK)
    guest.run(f"nop\n mov eax, {FREE + 0xF00}\n mov ds, eax")
    assert guest.rip == TARGET and guest.rflags & NT
    assert guest.stack()[0] == FREE + 0xF00 and guest.rsp == 0x7800 - 4
    assert guest.read(TSS + 0x20, 4) == CODE + 6  # the instruction that faulted
    assert guest.read(TSS2, 2) == TSS_SELECTOR


def test_task_switch_to_ring_3_and_to_another_address_space(make_guest: Make) -> None:
    other = TABLES + 0x10000
    guest = task_guest(
        make_guest, cr3=other, cs=USER_CODE32, ss=USER_DATA, ds=USER_DATA, es=USER_DATA, esp=STACK3
    )
    guest.put(other, guest.read(TABLES, 4), 4)
    guest.run(f".byte 0xea\n .long 0\n .word {FREE}")
    assert (guest.rip, guest.cpl, guest.cr3) == (TARGET, 3, other)


@pytest.mark.parametrize(
    ("fields", "fault", "error"),
    [
        ({"cs": DATA32}, TS, DATA32),
        ({"ss": USER_DATA}, TS, USER_DATA & ~3),
        ({"ss": 0}, TS, 0),
        ({"ds": TSS_SELECTOR}, TS, TSS_SELECTOR),
        ({"ldt": FREE}, TS, FREE),
        ({"cs": FREE + 8}, NP, FREE + 8),
        ({"ss": FREE + 16}, 12, FREE + 16),
        ({"ds": FREE + 16}, NP, FREE + 16),
        ({"cs": 0}, TS, 0),
    ],
)
def test_faults_of_the_incoming_task(
    make_guest: Make, fields: dict[str, int], fault: int, error: int
) -> None:
    """Table 7-1: they are taken in the new task's context; the handler here is a task of its own."""
    guest = task_guest(make_guest, **fields)
    guest.set_descriptor(FREE + 8, descriptor(0, 0xFFFFF, 0xC01B))
    guest.set_descriptor(FREE + 16, descriptor(0, 0xFFFFF, 0xC013))
    guest.set_descriptor(FREE + 24, descriptor(0x3D00, 0x67, 0x89))
    put_tss32(guest, 0x3D00, eip=HANDLERS + fault * 16)
    guest.set_gate(fault, FREE + 24, 0, TASK)
    guest.run(f".byte 0xea\n .long 0\n .word {FREE}")
    assert guest.vector == fault and guest.stack()[0] == error
    assert guest.read(0x3D00, 2) == FREE  # the new task was the interrupted one
    assert guest.read(TSS2 + 0x20, 4) == TARGET


@pytest.mark.parametrize(("limit", "attr", "fault"), [(0x66, 0x89, TS), (0x67, 0x8B, GP), (0x67, 0x09, NP)])
def test_tss_checks(make_guest: Make, limit: int, attr: int, fault: int) -> None:
    guest = task_guest(make_guest)
    guest.set_descriptor(FREE, descriptor(TSS2, limit, attr))
    guest.run(f"nop\n .byte 0xea\n .long 0\n .word {FREE}")
    assert guest.vector == fault and guest.stack()[:2] == [FREE, CODE + 1]


def test_16_bit_task(make_guest: Make) -> None:
    guest = with_target(make_guest("legacy"))
    guest.set_descriptor(FREE, descriptor(TSS16, 0x2B, 0x81))
    for offset, value in (
        (0x0E, TARGET),
        (0x10, 2),
        (0x12, 0x1234),
        (0x1A, 0x7800),
        (0x22, DATA32),
        (0x24, CODE32),
        (0x26, DATA32),
        (0x28, DATA32),
    ):
        guest.put(TSS16 + offset, value, 2)
    guest.run(f".byte 0xea\n .long 0\n .word {FREE}")
    assert (guest.rip, guest.rax & 0xFFFF, guest.rsp & 0xFFFF, guest.ss) == (TARGET, 0x1234, 0x7800, DATA32)
    assert guest.read(GDT + FREE + 5, 1) & 0xF == 0x3


def test_trap_bit_of_the_tss(make_guest: Make) -> None:
    guest = task_guest(make_guest, trap=1)
    guest.run(f".byte 0xea\n .long 0\n .word {FREE}")
    assert guest.vector == 1 and guest.dr(6) == 0xFFFF8FF0 and guest.stack()[0] == TARGET


def test_no_task_switches_in_long_mode(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set_descriptor(FREE, descriptor(TSS2, 0x67, 0x89), 0)
    guest.put(DATA, FREE << 32, 6)
    guest.run(f"jmp fword ptr [{DATA}]")
    assert guest.vector == GP and guest.stack()[0] == FREE


# ---- VM86 ----


def vm86_guest(make_guest: Make, flags: int = 2) -> Guest:
    """In VM86 mode at TARGET = 0900:0000, stack 0700:0F00."""
    guest = make_guest("legacy")
    guest.write(TARGET, b"\xeb\xfe")
    frame = (0x4444, 0x3333, 0x2222, 0x1111, 0x700, 0xF00, VM | flags, TARGET >> 4, 0)
    guest.run("".join(f"push {item}\n" for item in frame) + "iret")
    return guest


def test_iret_to_vm86(make_guest: Make) -> None:
    guest = vm86_guest(make_guest, IOPL3 | IF | 2)
    assert (guest.rip, guest.cs, guest.cpl, guest.ss, guest.rsp) == (0, TARGET >> 4, 3, 0x700, 0xF00)
    assert (guest.es, guest.ds, guest.fs, guest.gs) == (0x1111, 0x2222, 0x3333, 0x4444)
    assert guest.rflags == VM | IOPL3 | IF | 2
    seg = guest.arch.seg[0]
    assert (seg.base, seg.limit) == (0x11110, 0xFFFF)


def test_interrupt_in_vm86_saves_the_data_segments(make_guest: Make) -> None:
    guest = vm86_guest(make_guest, IOPL3 | 2)
    guest.write(TARGET, b"\xcd\x80")
    guest.resume()
    assert guest.vector == 0x80 and guest.cpl == 0 and not guest.rflags & VM
    assert guest.stack() == [2, TARGET >> 4, VM | IOPL3 | 2, 0xF00, 0x700, 0x1111, 0x2222, 0x3333]
    assert guest.rsp == STACK0 - 36
    assert (guest.ds, guest.es, guest.fs, guest.gs) == (0, 0, 0, 0)


@pytest.mark.parametrize("code", ["cd80", "fa", "fb", "9c", "9d", "cf"])
def test_iopl_sensitive_instructions(make_guest: Make, code: str) -> None:
    """INT n, CLI, STI, PUSHF, POPF, IRET: #GP(0) with IOPL below 3 (section 20.2.7; no VME)."""
    guest = vm86_guest(make_guest)
    guest.write(TARGET, bytes.fromhex(code))
    guest.resume()
    assert guest.vector == GP and guest.stack()[:3] == [0, 0, TARGET >> 4]


@pytest.mark.parametrize(
    ("code", "vector"), [("cc", 3), ("f4", GP), ("0f20c0", GP), ("0f00d8", UD), ("0f01d0", UD), ("0f0b", UD)]
)
def test_other_instructions_in_vm86(make_guest: Make, code: str, vector: int) -> None:
    guest = vm86_guest(make_guest)
    guest.write(TARGET, bytes.fromhex(code))
    guest.resume()
    assert guest.vector == vector


def test_far_transfers_and_iret_in_vm86(make_guest: Make) -> None:
    guest = vm86_guest(make_guest, IOPL3 | 2)
    guest.write(TARGET, bytes.fromhex("6802 00 6800 08 6800 00 cf".replace(" ", "")))
    guest.write(CODE, bytes.fromhex("ea0000 000c".replace(" ", "")))  # jmp 0C00:0000
    guest.write(SCRATCH, b"\xeb\xfe")
    guest.resume()
    assert (guest.rip, guest.cs) == (0, SCRATCH >> 4) and guest.rflags & (VM | IOPL3) == VM | IOPL3
    assert guest.arch.seg[1].base == SCRATCH


def test_a_handler_of_vm86_must_be_in_ring_0(make_guest: Make) -> None:
    guest = vm86_guest(make_guest, IOPL3 | 2)
    guest.set_gate(0x80, USER_CODE32, HANDLERS, 0xE, dpl=3)
    guest.write(TARGET, b"\xcd\x80")
    guest.resume()
    assert guest.vector == GP and guest.stack()[0] == USER_CODE32 & ~3


def test_page_fault_in_vm86(make_guest: Make) -> None:
    guest = vm86_guest(make_guest)
    guest.write(TARGET, b"\xa1\x00\x00")  # mov ax, [0]
    guest.set_pte(0x22220, 0)
    guest.resume()
    assert guest.vector == PF and guest.cr2 == 0x22220 and guest.stack()[0] == 4
