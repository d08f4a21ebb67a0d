"""Mode switches and segment loads: SDM vol. 3 sections 9.8, 9.9 and chapter 3."""

from collections.abc import Callable

import pytest

from tests.vcpu.guest import (
    CODE32,
    CODE64,
    DATA,
    DATA16,
    DATA32,
    FREE,
    GDT,
    GP,
    LDT_SELECTOR,
    LMA,
    LME,
    NP,
    PAE,
    PE,
    PG,
    SS_,
    TABLES,
    TSS_SELECTOR,
    UD,
    USER_CODE32,
    USER_DATA,
    ZF,
    Guest,
    descriptor,
)

Make = Callable[..., Guest]


def test_real_to_protected_to_long_and_back(make_guest: Make) -> None:
    """Each mode leaves a mark in memory; the way down goes by compatibility mode (section 9.8.5.4)."""
    guest = make_guest("real")
    guest.mode = "long"
    guest._tables()
    guest.put(0x7000, 0xFFF | GDT << 16, 6)
    guest.put(DATA, 0)
    guest.run(
        f"""
        .code16
        lgdt [0x7000]
        mov eax, cr0
        or al, 1
        mov cr0, eax
        mov byte ptr [{DATA}], 0x16       # protected mode, still 16-bit code
        .byte 0x66, 0xea                  # jmp far CODE32:in32
        .long in32
        .word {CODE32}
    in32: .code32
        mov eax, {DATA32}
        mov ds, eax
        mov ss, eax
        mov esp, 0x7f00
        mov byte ptr [{DATA + 1}], 0x32
        mov eax, cr4
        or eax, {PAE}
        mov cr4, eax
        mov eax, {TABLES}
        mov cr3, eax
        mov ecx, 0xc0000080
        rdmsr
        or eax, {LME}
        wrmsr
        mov eax, cr0
        or eax, {PG}
        mov cr0, eax                      # compatibility mode now
        mov byte ptr [{DATA + 2}], 0x33
        .byte 0xea
        .long in64
        .word {CODE64}
    in64: .code64
        mov rax, 0x123456789abcdef0
        mov [{DATA + 8}], rax
        rdmsr
        mov [{DATA + 16}], eax            # EFER with LMA
        push {CODE32}
        push offset back32
        retfq
    back32: .code32
        mov eax, cr0
        and eax, {~PG & 0xFFFFFFFF}
        mov cr0, eax
        rdmsr
        mov [{DATA + 20}], eax            # LMA gone, LME still there
        .byte 0xea
        .long back16
        .word 0x20                        # 16-bit code segment
    back16: .code16
        mov eax, {DATA16}
        mov ds, eax
        mov ss, eax
        mov eax, cr0
        and al, 0xfe
        mov cr0, eax
        .byte 0xea
        .word real, 0
    real:
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov byte ptr [{DATA + 3}], 0x61
        mov ax, 0xffff
        mov es, ax
        mov bx, es:[0x20]                 # FFFF0h + 20h: A20 is on, so 100010h
    """,
        bits=16,
    )
    assert guest.done, hex(guest.rip)
    assert guest.read(DATA, 4) == 0x61333216
    assert guest.read(DATA + 8) == 0x123456789ABCDEF0
    assert guest.read(DATA + 16, 4) & (LME | LMA) == LME | LMA
    assert guest.read(DATA + 20, 4) & (LME | LMA) == LME
    assert guest.cr0 & (PE | PG) == 0


def test_unreal_mode_keeps_the_limit(make_guest: Make) -> None:
    guest = make_guest("real")
    guest.arch.seg[3].limit = 0xFFFFFFFF
    guest.changed()
    guest.put(0x123458, 0x55AA55AA, 4)
    guest.run("xor ax, ax\n mov ds, ax\n mov ebx, 0x123458\n mov ecx, [ebx]")
    assert guest.done and guest.rcx == 0x55AA55AA


def test_limit_of_real_mode(make_guest: Make) -> None:
    guest = make_guest("real")
    guest.run("mov ebx, 0xffff\n mov ax, [ebx]")
    assert guest.vector == GP and guest.stack()[0] == 0x8006


@pytest.mark.parametrize(
    ("segment", "selector", "vector", "error"),
    [
        ("ds", 0, None, 0),
        ("ds", 3, None, 0),
        ("ss", 0, GP, 0),
        ("ds", DATA32, None, 0),
        ("ds", FREE + 0xF00, GP, FREE + 0xF00),  # behind the limit
        ("ds", FREE | 3, GP, FREE),
        ("ds", FREE, None, 0),  # DPL 0 data with RPL 3
        ("ds", FREE + 8, GP, FREE + 8),  # execute-only code
        ("ds", FREE + 16, NP, FREE + 16),
        ("ss", FREE + 16, SS_, FREE + 16),  # not present
        ("ss", FREE + 24, GP, FREE + 24),  # read-only data as a stack
        ("ds", FREE + 24, None, 0),
        ("ss", USER_DATA, GP, USER_DATA & ~3),  # RPL is not CPL
        ("ss", FREE + 32, GP, FREE + 32),  # DPL is not CPL
        ("ds", TSS_SELECTOR, GP, TSS_SELECTOR),
        ("ds", LDT_SELECTOR | 4, GP, LDT_SELECTOR | 4),  # no LDT
        ("ds", FREE + 40, None, 0),
        ("ds", FREE + 43, None, 0),  # conforming code: at any RPL
    ],
)
def test_loading_a_segment_register(
    make_guest: Make, segment: str, selector: int, vector: int | None, error: int
) -> None:
    """SDM vol. 2, MOV: exceptions of protected mode; vol. 3 section 5.5 to 5.7."""
    guest = make_guest("legacy")
    for i, attr in enumerate((0xC092, 0xC098, 0xC012, 0xC090, 0xC0F2, 0xC09E)):
        guest.set_descriptor(FREE + 8 * i, descriptor(0x100 * i, 0xFFFFF, attr))
    guest.run(f"mov eax, {selector}\n mov {segment}, eax")
    assert guest.vector == vector
    if vector is not None:
        assert guest.stack()[:2] == [error, 0x8005]
    elif selector & ~3:
        assert guest.read(GDT + (selector & 0xFFF8) + 5, 1) & 1, "accessed"
        assert getattr(guest, segment) == selector


def test_a_null_segment_faults_when_used(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.run(f"xor eax, eax\n mov es, eax\n mov eax, es:[{DATA}]")
    assert guest.vector == GP and guest.stack()[0] == 0
    guest = make_guest("long")
    guest.run(f"xor eax, eax\n mov es, eax\n mov eax, es:[{DATA}]\n mov ss, eax")
    assert guest.done


def test_limits_expand_up_and_down(make_guest: Make) -> None:
    """Section 5.3. A data segment that expands down is valid above its limit."""
    for attr, address, fits in (
        (0x4092, 0xFFC, True),
        (0x4092, 0xFFD, False),
        (0x4096, 0x1000, True),
        (0x4096, 0xFFF, False),
        (0x96, 0xFFFD, False),
        (0x96, 0xFFFC, True),
    ):
        guest = make_guest("legacy")
        guest.set_descriptor(FREE, descriptor(0, 0xFFF, attr))
        guest.run(f"mov eax, {FREE}\n mov ds, eax\n mov eax, [{address}]")
        assert guest.done == fits, (attr, address)
        assert fits or guest.stack()[0] == 0


def test_writes_to_code_and_read_only_data(make_guest: Make) -> None:
    for attr in (0xC09A, 0xC090):
        guest = make_guest("legacy")
        guest.set_descriptor(FREE, descriptor(0, 0xFFFFF, attr))
        guest.run(f"mov eax, {FREE}\n mov ds, eax\n mov ecx, [{DATA}]\n mov [{DATA}], ecx")
        assert guest.vector == GP and guest.stack()[0] == 0


def test_ldt(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.set_descriptor(LDT_SELECTOR, descriptor(0x6000, 0x17, 0x82))
    guest.put(0x6008, descriptor(DATA, 0xFF, 0x4092))
    guest.put(DATA + 4, 0xCAFEBABE, 4)
    guest.run(
        f"mov eax, {LDT_SELECTOR}\n lldt ax\n mov eax, 0xc\n mov ds, eax\n mov ecx, [4]\n"
        "sldt edx\n mov eax, 0x1c\n"
        "mov ds, eax"
    )
    assert guest.vector == GP and guest.stack()[0] == 0x1C  # behind the LDT's limit
    assert (guest.rcx, guest.rdx) == (0xCAFEBABE, LDT_SELECTOR)


@pytest.mark.parametrize(
    ("mode", "code", "vector", "error"),
    [
        ("legacy", "mov eax, 0x68\n lldt ax", GP, 0x68),
        ("legacy", "mov eax, 0x48\n ltr ax", GP, 0x48),  # no LDT; busy
        ("legacy", "xor eax, eax\n ltr ax", GP, 0),
        ("legacy", "xor eax, eax\n lldt ax", None, 0),
        ("real", "lldt ax", UD, None),
        ("real", "str ax", UD, None),
        ("real", "lar ax, bx", UD, None),
        ("real", "verr ax", UD, None),
    ],
)
def test_table_registers(
    make_guest: Make, mode: str, code: str, vector: int | None, error: int | None
) -> None:
    guest = make_guest(mode)
    guest.run(code)
    assert guest.vector == vector
    if error:
        assert guest.stack()[0] == error


def test_ltr_marks_the_tss_busy(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set_descriptor(FREE, descriptor(0x3000, 0x67, 0x89), 0xFFFF8000)
    guest.run(f"mov eax, {FREE}\n ltr ax\n str ecx")
    assert guest.done and guest.rcx == FREE
    assert guest.read(GDT + FREE + 5, 1) == 0x8B
    assert guest.arch.tr.base == 0xFFFF800000003000


def test_lar_lsl_verr_verw(make_guest: Make) -> None:
    guest = make_guest("legacy", 3)
    guest.set_descriptor(FREE, descriptor(0, 0x12345, 0xC0F2))  # user data, pages
    guest.set_descriptor(FREE + 8, descriptor(0, 0x777, 0x0098))  # execute-only code of ring 0
    guest.set_descriptor(FREE + 16, descriptor(0, 0x777, 0x00F8))  # ... of ring 3
    guest.run(f"""
        mov ebx, {FREE + 3}
        lar eax, ebx
        lsl ecx, ebx
        verr bx
        setz dl
        verw bx
        setz dh
        mov ebx, {FREE + 8}
        mov esi, -1
        lar esi, ebx                       # not visible: ZF = 0, unchanged
        setz bh
        mov ebp, {FREE + 16 + 3}
        verr bp
        setz bl
    """)
    assert guest.done
    assert guest.rax & ~0xF0000 == 0x00C0F200  # bits 19-16 are undefined (SDM vol. 2)
    assert guest.rcx == 0x12345FFF
    assert guest.rdx & 0xFFFF == 0x0101 and guest.rsi == 0xFFFFFFFF and guest.rbx & 0xFFFF == 0


def test_arpl(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.run("mov eax, 0x10\n mov ecx, 0x23\n arpl ax, cx\n mov edx, 0x13\n arpl dx, ax")
    assert guest.rax == 0x13 and guest.rdx == 0x13 and not guest.rflags & ZF


def test_lss_and_the_selectors_it_checks(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.put(DATA, 0x7F00 | DATA32 << 32, 6)
    guest.put(DATA + 8, 0x1234 | USER_CODE32 << 32, 6)
    guest.run(f"lss esp, [{DATA}]\n lss esp, [{DATA + 8}]")
    assert guest.vector == GP and guest.stack()[0] == USER_CODE32 & ~3
    assert guest.rsp == 0x7F00 - 16


def test_swapgs_and_the_base_instructions(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.run("mov eax, 1\n rdfsbase rbx")
    assert guest.vector == UD  # CR4.FSGSBASE is clear
    guest = make_guest("long")
    guest.set(cr4=guest.cr4 | 1 << 16)
    guest.arch.kernel_gs_base = DATA
    guest.put(DATA + 8, 0x77)
    guest.run(
        "mov rax, 0xffff800000000000\n wrgsbase rax\n swapgs\n mov rcx, gs:[8]\n rdgsbase rdx\n swapgs\n"
        "rdgsbase rsi\n wrfsbase eax\n rdfsbase rdi\n mov rax, 0x800000000000\n wrfsbase rax"
    )
    assert guest.vector == GP and guest.stack()[0] == 0  # not canonical
    assert (guest.rcx, guest.rdx, guest.rsi, guest.rdi) == (0x77, DATA, 0xFFFF800000000000, 0)


def test_sgdt_sidt_and_operand_size(make_guest: Make) -> None:
    """With 16-bit operands LGDT takes 24 bits of base (SDM vol. 2)."""
    guest = make_guest("legacy")
    guest.put(DATA, 0xABCD | 0x12345678 << 16, 6)
    guest.run(
        f"lidt [{DATA}]\n sidt [{DATA + 16}]\n .byte 0x66\n lidt [{DATA}]\n"
        f"sidt [{DATA + 32}]\n sgdt [{DATA + 48}]"
    )
    assert guest.done
    assert guest.read(DATA + 16, 6) == 0xABCD | 0x12345678 << 16
    assert guest.read(DATA + 32, 6) == 0xABCD | 0x345678 << 16
    assert guest.read(DATA + 48, 6) == 0xFFF | GDT << 16


def test_push_and_pop_of_segments(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.run(
        f"mov eax, {USER_DATA}\n mov es, eax\n push es\n pop ds\n push ds\n pop ecx\n"
        ".byte 0x66\n push es\n mov edx, esp"
    )
    assert (
        guest.done and guest.ds == USER_DATA and guest.rcx == USER_DATA and guest.rdx == 0x20000 - 0x800 - 2
    )


@pytest.mark.parametrize("mode", ["legacy", "long"])
def test_attributes_of_a_loaded_segment(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    guest.set_descriptor(FREE, descriptor(0x12345678, 0xFFFFF, 0xC0F2))
    guest.run(f"mov eax, {FREE + 3}\n mov fs, eax\n mov eax, 0\n mov gs, eax")
    seg = guest.arch.seg[4]
    assert (seg.base, seg.limit, seg.selector, seg.attr) == (0x12345678, 0xFFFFFFFF, FREE + 3, 0xC0F3)
    assert guest.arch.seg[5].base == 0
