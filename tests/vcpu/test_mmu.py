"""Paging: SDM vol. 3 chapter 4. Error codes: figure 4-12 (P 1, W/R 2, U/S 4, RSVD 8, I/D 10h)."""

from collections.abc import Callable

import pytest

from tests.vcpu.guest import (
    AC,
    AC_,
    AM,
    CODE,
    DATA,
    GP,
    NXE,
    PAE,
    PCIDE,
    PF,
    PG,
    PGE,
    PSE,
    SCRATCH,
    SMAP,
    SMEP,
    SS_,
    TABLES,
    WP,
    Guest,
)

Make = Callable[..., Guest]
PAGED = ("legacy", "pae", "long")
P, W, U, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
NX = 1 << 63


def read_at(address: int) -> str:
    return f"mov eax, [{address:#x}]"


def write_at(address: int) -> str:
    return f"mov dword ptr [{address:#x}], 0x12345678"


def assert_fault(guest: Guest, error: int, address: int) -> None:
    assert guest.vector == PF
    assert (guest.stack()[0], guest.cr2) == (error, address)
    assert guest.stack()[1] == CODE


@pytest.mark.parametrize("mode", PAGED)
@pytest.mark.parametrize(
    ("cpl", "entry", "access", "error"),
    [
        (0, 0, read_at, 0),
        (0, 0, write_at, 2),
        (3, 0, read_at, 4),
        (3, 0, write_at, 6),
        (0, P | U, write_at, 3),
        (3, P | U, write_at, 7),
        (3, P | W, read_at, 5),
        (3, P | W, write_at, 7),
        (3, P | W | U, write_at, None),
        (0, P | W, write_at, None),
        (0, P, read_at, None),
    ],
)
def test_rights_of_a_page(
    make_guest: Make, mode: str, cpl: int, entry: int, access: Callable[[int], str], error: int | None
) -> None:
    guest = make_guest(mode, cpl)
    guest.set_pte(DATA, DATA | entry if entry else 0)
    guest.run(access(DATA + 0x123))
    if error is None:
        assert guest.done
    else:
        assert_fault(guest, error, DATA + 0x123)


@pytest.mark.parametrize("mode", PAGED)
def test_rights_are_those_of_all_levels(make_guest: Make, mode: str) -> None:
    """U and W of the upper levels count as well (section 4.6); the PDPTEs of PAE have none."""
    guest = make_guest(mode)
    guest.put(guest.directory() + guest.entry_bytes, TABLES + 0x4000 | P | U, guest.entry_bytes)
    linear = (1 << (22 if mode == "legacy" else 21)) + DATA
    guest.run(write_at(linear))
    assert_fault(guest, 3, linear)


@pytest.mark.parametrize("mode", PAGED)
def test_supervisor_writes_read_only_pages_without_wp(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    guest.set(cr0=guest.cr0 & ~WP)
    guest.set_pte(DATA, DATA | P)
    guest.run(write_at(DATA))
    assert guest.done and guest.read(DATA, 4) == 0x12345678
    assert guest.get_pte(DATA) == DATA | P | A | D


@pytest.mark.parametrize("mode", PAGED)
def test_accessed_and_dirty(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    guest.set_pte(DATA, DATA | P | W)
    guest.set_pte(SCRATCH, SCRATCH | P | W)
    guest.segment.dirty[:] = 0
    guest.run(f"{read_at(DATA)}\n {read_at(SCRATCH)}\n {write_at(SCRATCH)}")
    assert guest.done
    assert guest.get_pte(DATA) == DATA | P | W | A
    assert guest.get_pte(SCRATCH) == SCRATCH | P | W | A | D
    assert guest.read(guest.directory(), 4) & (A | D) == A
    dirty = guest.segment.dirty
    assert dirty[SCRATCH >> 12] and dirty[guest.pte(DATA) >> 12] and not dirty[DATA >> 12]


@pytest.mark.parametrize("mode", PAGED)
def test_a_fault_sets_neither_accessed_nor_dirty_at_the_leaf(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    guest.set_pte(DATA, DATA | P)
    guest.run(write_at(DATA))
    assert_fault(guest, 3, DATA)
    assert guest.get_pte(DATA) & D == 0


@pytest.mark.parametrize(("mode", "bit"), [("pae", 40), ("pae", 52), ("pae", 62), ("long", 40), ("long", 51)])
def test_reserved_bits(make_guest: Make, mode: str, bit: int) -> None:
    """Above MAXPHYADDR 40; bits 62-52 are free in 4-level paging only (tables 4-11 and 4-19)."""
    guest = make_guest(mode)
    guest.set_pte(DATA, DATA | P | W | U | 1 << bit)
    guest.run(read_at(DATA))
    assert_fault(guest, 9, DATA)


def test_bits_52_to_62_are_ignored_in_long_mode(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set_pte(DATA, DATA | P | W | 0x7FF << 52)
    guest.run(read_at(DATA))
    assert guest.done


@pytest.mark.parametrize("mode", ["pae", "long"])
def test_nx_without_nxe_is_reserved(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    guest.set(efer=guest.efer & ~NXE)
    guest.set_pte(DATA, DATA | P | W | U | NX)
    guest.run(read_at(DATA))
    assert_fault(guest, 9, DATA)


@pytest.mark.parametrize("mode", ["pae", "long"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_execution_of_an_nx_page(make_guest: Make, mode: str, cpl: int) -> None:
    guest = make_guest(mode, cpl)
    guest.set_pte(DATA, DATA | P | W | U | NX)
    guest.write(DATA + 0x10, b"\xeb\xfe")
    guest.run(f"mov ebx, {DATA + 0x10:#x}\n jmp {'rbx' if mode == 'long' else 'ebx'}")
    assert guest.vector == PF
    assert guest.cr2 == guest.stack()[1] == DATA + 0x10
    assert guest.stack()[0] == 0x11 | (4 if cpl else 0)


def test_fetch_from_a_page_that_is_not_there(make_guest: Make) -> None:
    """I/D is only reported with NX or SMEP (section 4.7): 32-bit paging without SMEP has neither."""
    for mode, error in (("legacy", 4), ("pae", 0x14)):
        guest = make_guest(mode, 3)
        guest.set_pte(DATA, 0)
        guest.run(f"mov ebx, {DATA:#x}\n jmp ebx")
        assert (guest.vector, guest.stack()[:2]) == (PF, [error, DATA])


@pytest.mark.parametrize("mode", PAGED)
def test_smep(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    guest.write(DATA, b"\xeb\xfe")
    guest.set_pte(CODE, CODE | P | W)
    for page in range(0x4000, 0x6000, 0x1000):
        guest.set_pte(page, page | P | W)
    guest.set(cr4=guest.cr4 | SMEP)
    guest.run(f"mov ebx, {DATA:#x}\n jmp {'rbx' if mode == 'long' else 'ebx'}")
    assert (guest.vector, guest.stack()[0], guest.cr2) == (PF, 0x11, DATA)


@pytest.mark.parametrize("mode", PAGED)
@pytest.mark.parametrize(("flag", "error"), [(0, 1), (AC, None)])
def test_smap(make_guest: Make, mode: str, flag: int, error: int | None) -> None:
    """Supervisor data accesses to user pages need RFLAGS.AC (section 4.6.1)."""
    guest = make_guest(mode)
    for page in (*range(0x1000, 0x9000, 0x1000), *range(0x18000, 0x21000, 0x1000)):
        guest.set_pte(page, page | P | W)
    guest.set(cr4=guest.cr4 | SMAP, rflags=2 | flag)
    guest.run(read_at(DATA))
    if error is None:
        assert guest.done
    else:
        assert (guest.vector, guest.stack()[0], guest.cr2) == (PF, error, DATA)


def test_smap_guards_implicit_accesses_whatever_ac_says(make_guest: Make) -> None:
    """The GDT on a user page: loading a segment register is an implicit supervisor access."""
    guest = make_guest("long")
    for page in (*range(0x2000, 0x9000, 0x1000), *range(0x18000, 0x21000, 0x1000)):
        guest.set_pte(page, page | P | W)
    guest.set(cr4=guest.cr4 | SMAP, rflags=2 | AC)
    guest.run("mov eax, 0x10\n mov ds, eax")
    assert guest.cr2 & ~0xFFF == 0x1000
    assert guest.activity == 3  # the handler's code segment is in that page too: triple fault


@pytest.mark.parametrize("mode", PAGED)
def test_large_pages(make_guest: Make, mode: str) -> None:
    """4 MiB with 32-bit paging, 2 MiB otherwise; the rest of RAM is mapped by one entry."""
    guest = make_guest(mode)
    size = 22 if mode == "legacy" else 21
    index = 1
    guest.put(
        guest.directory() + index * guest.entry_bytes,
        P | W | PS | (0x200000 if mode != "legacy" else 0),
        guest.entry_bytes,
    )
    linear = (index << size) + 0x5678
    guest.run(f"mov eax, [{linear:#x}]\n mov dword ptr [{linear:#x}], 0xabcd1234")
    assert guest.done
    assert guest.read(0x205678 if mode != "legacy" else 0x5678, 4) == 0xABCD1234
    entry = guest.read(guest.directory() + index * guest.entry_bytes, guest.entry_bytes)
    assert entry & (A | D) == A | D


@pytest.mark.parametrize("mode", PAGED)
def test_reserved_bits_of_large_pages(make_guest: Make, mode: str) -> None:
    """Bits 20-13 of a 2 MiB entry; bit 21 of a 4 MiB entry of 40 bits (tables 4-4, 4-9, 4-18)."""
    guest = make_guest(mode)
    bad = 1 << 21 if mode == "legacy" else 1 << 13
    guest.put(guest.directory() + guest.entry_bytes, P | W | PS | bad, guest.entry_bytes)
    linear = 1 << (22 if mode == "legacy" else 21)
    guest.run(read_at(linear))
    assert_fault(guest, 9, linear)


def test_pse36_puts_bits_13_to_20_above_4_gib(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.put(TABLES + 4, P | W | PS | 1 << 13, 4)  # 4 GiB: nobody there, all ones
    guest.run("mov eax, [0x400000]")
    assert guest.done and guest.rax == 0xFFFFFFFF


def test_ps_is_ignored_without_cr4_pse(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.set(cr4=0)
    guest.put(TABLES, (TABLES + 0x4000) | P | W | U | PS, 4)
    guest.run(read_at(DATA))
    assert guest.done


def test_ps_in_a_pdpte_or_pml4e_is_reserved(make_guest: Make) -> None:
    """The model has no 1 GiB pages."""
    for level in (0, 1):
        guest = make_guest("long")
        entry = TABLES + 0x1000 * level + 8
        guest.put(entry, P | W | U | PS)
        linear = 1 << (39 if level == 0 else 30)
        guest.run(f"mov rbx, {linear:#x}\n mov eax, [rbx]")
        assert guest.vector == PF and guest.stack()[0] == 9 and guest.cr2 == linear


@pytest.mark.parametrize("mode", PAGED)
def test_a_stale_translation_goes_with_invlpg_and_cr3(make_guest: Make, mode: str) -> None:
    for flush in (
        f"invlpg [{DATA:#x}]",
        "mov rax, cr3\n mov cr3, rax" if mode == "long" else "mov eax, cr3\n mov cr3, eax",
    ):
        guest = make_guest(mode)
        guest.put(DATA, 0x11111111, 4)
        guest.put(SCRATCH, 0x22222222, 4)
        entry = guest.pte(DATA)
        guest.run(
            f"mov ecx, [{DATA:#x}]\n mov dword ptr [{entry:#x}], {SCRATCH | 7:#x}\n {flush}\n"
            f"mov edx, [{DATA:#x}]"
        )
        assert guest.done and (guest.rcx, guest.rdx) == (0x11111111, 0x22222222)


@pytest.mark.parametrize("mode", PAGED)
@pytest.mark.parametrize("flush", ["invlpg [{0}]", "mov {0}, cr3\n mov cr3, {0}\n mov {0}, {1}"])
def test_code_is_found_where_the_page_is_now(make_guest: Make, mode: str, flush: str) -> None:
    """The same linear address leads to other code after INVLPG or a write of CR3."""
    guest = make_guest(mode)
    guest.set(cr4=guest.cr4 | PGE)
    guest.set_pte(CODE, CODE | 7 | G)
    guest.write(DATA, bytes.fromhex("ffc1c3"))  # inc ecx; ret
    guest.write(SCRATCH, bytes.fromhex("ffc2c3"))  # inc edx; ret
    target, entry = ("rbx", "rdi") if mode == "long" else ("ebx", "edi")
    guest.run(
        f"mov {target}, {DATA:#x}\n mov {entry}, {guest.pte(DATA):#x}\n call {target}\n call {target}\n"
        f"mov dword ptr [{entry}], {SCRATCH | 7:#x}\n {flush.format(target, DATA)}\n"
        f"call {target}\n call {target}"
    )
    assert guest.done and (guest.rcx, guest.rdx) == (2, 2)


def test_invlpg_drops_all_of_a_large_page(make_guest: Make) -> None:
    """Section 4.10.4.1: every translation of the page, also those for other 4 KiB of it."""
    guest = make_guest("long")
    guest.put(guest.directory() + 8, P | W | PS)
    guest.put(0x9000, 0x11111111, 4)
    guest.put(0x209000, 0x22222222, 4)
    guest.run(
        f"mov ecx, [0x209000]\n mov dword ptr [{guest.directory() + 8:#x}], {0x200000 | P | W | PS:#x}\n"
        "invlpg [0x200000]\n mov edx, [0x209000]"
    )
    assert (guest.rcx, guest.rdx) == (0x11111111, 0x22222222)


def test_global_pages_survive_cr3_and_not_cr4(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set(cr4=guest.cr4 | PGE)
    guest.put(DATA, 0x11111111, 4)
    guest.put(SCRATCH, 0x22222222, 4)
    guest.set_pte(DATA, DATA | 7 | G)
    entry = guest.pte(DATA)
    guest.run(f"""
        mov ecx, [{DATA:#x}]
        mov dword ptr [{entry:#x}], {SCRATCH | 7 | G:#x}
        mov rax, cr3
        mov cr3, rax
        mov edx, [{DATA:#x}]      # may still be the old one: section 4.10.2.4; here it is
        mov rax, cr4
        xor rax, {PGE:#x}
        mov cr4, rax
        mov ebx, [{DATA:#x}]
    """)
    assert guest.done and (guest.rcx, guest.rdx, guest.rbx) == (0x11111111, 0x11111111, 0x22222222)


def test_invpcid(make_guest: Make) -> None:
    """Type 2 drops everything; a type above 3 and a non-canonical address are #GP(0)."""
    guest = make_guest("long")
    entry = guest.pte(DATA)
    guest.put(SCRATCH, 0x22222222, 4)
    guest.put(0xB000, 0)
    guest.put(0xB008, DATA)
    for kind in range(4):
        guest = make_guest("long")
        guest.put(SCRATCH, 0x22222222, 4)
        guest.put(0xB008, DATA)
        guest.run(
            f"mov ecx, [{DATA:#x}]\n mov dword ptr [{entry:#x}], {SCRATCH | 7:#x}\n mov ebx, {kind}\n"
            f"invpcid rbx, [0xb000]\n mov edx, [{DATA:#x}]"
        )
        assert guest.done and guest.rdx == 0x22222222, kind
    for kind, address in ((4, 0), (0, 1 << 47)):
        guest = make_guest("long")
        guest.put(0xB008, address)
        guest.run(f"mov ebx, {kind}\n invpcid rbx, [0xb000]")
        assert guest.vector == GP and guest.stack()[0] == 0


def test_pcide_needs_long_mode_and_pcid_0(make_guest: Make) -> None:
    """SDM vol. 2, MOV CR4."""
    guest = make_guest("long")
    guest.run(
        f"mov rax, cr4\n or eax, {PCIDE:#x}\n mov cr4, rax\n"
        f"mov rax, {TABLES | 5 | 1 << 63:#x}\n mov cr3, rax\n"
        "mov rbx, cr3"
    )
    assert guest.done and guest.rbx == TABLES | 5
    guest = make_guest("pae")
    guest.run(f"mov eax, cr4\n or eax, {PCIDE:#x}\n mov cr4, eax")
    assert guest.vector == GP


@pytest.mark.parametrize("mode", PAGED)
def test_a_write_across_pages_is_all_or_nothing(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    guest.set_pte(DATA + 0x1000, 0)
    guest.run(write_at(DATA + 0xFFE))
    assert_fault(guest, 2, DATA + 0x1000)
    assert guest.read(DATA + 0xFFE, 2) == 0


def test_accesses_across_pages_that_are_not_neighbours(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.set_pte(DATA + 0x1000, SCRATCH | 7)
    guest.run(f"mov dword ptr [{DATA + 0xFFE:#x}], 0x44332211\n mov ecx, [{DATA + 0xFFE:#x}]")
    assert guest.rcx == 0x44332211
    assert (guest.read(DATA + 0xFFE, 2), guest.read(SCRATCH, 2)) == (0x2211, 0x4433)


@pytest.mark.parametrize(
    ("code", "vector"),
    [
        ("mov eax, [rbx]", GP),
        ("mov eax, [rbp]", SS_),
        ("push rax", SS_),
        ("mov eax, ds:[rbp]", SS_),
        ("pop rax", SS_),
    ],
)
def test_non_canonical_addresses(make_guest: Make, code: str, vector: int) -> None:
    """#GP(0), or #SS(0) where the stack segment is meant. A DS prefix means nothing in 64-bit mode."""
    guest = make_guest("long")
    guest.set_gate(vector, 0x18, 0x4000 + vector * 16, 0xE, extra=1)
    guest.set(rbx=1 << 47, rbp=1 << 47, rsp=1 << 48)
    guest.run(code)
    assert (guest.vector, guest.stack()[:2]) == (vector, [0, CODE])


def test_alignment_check(make_guest: Make) -> None:
    """#AC(0) at CPL 3 with CR0.AM and RFLAGS.AC only (vol. 3 section 6.15)."""
    for cpl, am, flag, expected in (
        (3, AM, AC, True),
        (0, AM, AC, False),
        (3, 0, AC, False),
        (3, AM, 0, False),
    ):
        guest = make_guest("long", cpl)
        guest.set(cr0=guest.cr0 | am, rflags=2 | flag)
        guest.run(f"mov eax, [{DATA + 4:#x}]\n mov eax, [{DATA + 1:#x}]")
        assert (guest.vector == AC_) == expected
        if expected:
            assert guest.stack()[:2] == [0, CODE + 7]


def test_pdptes_are_loaded_and_checked_with_cr3(make_guest: Make) -> None:
    """Reserved bits 1, 2, 5-8 of a present PDPTE: #GP(0) at MOV CR3 (section 4.4.1)."""
    guest = make_guest("pae")
    guest.put(TABLES + 0x800, (TABLES + 0x1000) | 3)
    guest.run(f"mov eax, {TABLES + 0x800:#x}\n mov cr3, eax")
    assert guest.vector == GP and guest.stack()[0] == 0 and guest.cr3 == TABLES
    guest = make_guest("pae")
    guest.put(TABLES + 0x800, (TABLES + 0x1000) | 1)
    guest.put(TABLES, 0)  # the old one: what is in memory counts only when CR3 is loaded
    guest.run(f"mov ecx, [{DATA:#x}]\n mov eax, {TABLES + 0x800:#x}\n mov cr3, eax\n mov ecx, [{SCRATCH:#x}]")
    assert guest.done


@pytest.mark.parametrize("mode", ["legacy", "pae"])
def test_turning_paging_off_and_on(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    guest.set_pte(DATA, SCRATCH | 7)
    guest.put(DATA, 1, 4)
    guest.put(SCRATCH, 2, 4)
    guest.run(
        f"mov esi, [{DATA:#x}]\n mov eax, cr0\n and eax, {~PG & 0xFFFFFFFF:#x}\n"
        f"mov cr0, eax\n mov edi, [{DATA:#x}]\n"
        f"or eax, {PG:#x}\n mov cr0, eax\n mov ebx, [{DATA:#x}]"
    )
    assert guest.done and (guest.rsi, guest.rdi, guest.rbx) == (2, 1, 2)


def test_nobody_home(make_guest: Make) -> None:
    """Physical addresses that nobody claims read as ones, and take writes."""
    guest = make_guest("long")
    guest.set_pte(DATA, 0x80000000 | P | W)
    guest.run(f"mov eax, [{DATA:#x}]\n {write_at(DATA)}\n movzx ecx, word ptr [{DATA + 2:#x}]")
    assert guest.done and (guest.rax, guest.rcx) == (0xFFFFFFFF, 0xFFFF)


def test_walk_for_the_debugger_changes_nothing(make_guest: Make) -> None:
    from vcpu._core import lib

    for mode in PAGED:
        guest = make_guest(mode)
        guest.set_pte(DATA, SCRATCH | P)
        assert lib.core_translate(guest.cpu, DATA + 0x123) == SCRATCH + 0x123
        assert guest.get_pte(DATA) == SCRATCH | P
        guest.set_pte(DATA, 0)
        assert lib.core_translate(guest.cpu, DATA) == lib.SEG_NO_OFFSET


def test_large_pages_of_pae_do_not_need_pse(make_guest: Make) -> None:
    """CR4.PSE is no condition for PAE's large pages."""
    guest = make_guest("pae")
    assert not guest.cr4 & PSE and guest.cr4 & PAE
    guest.put(guest.directory() + 8, P | W | PS)
    guest.run("mov eax, [0x200000]")
    assert guest.done
