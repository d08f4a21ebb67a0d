"""x87 against the host's FPU executing the same instruction."""

import struct
from collections.abc import Callable, Iterator

import pytest

from tests.vcpu.guest import AC, AC_, AM, CODE, DATA, MF, NM, PF, SCRATCH, Guest
from tests.vcpu.host_rows import Pair, Row, check_row, rows

Make = Callable[..., Guest]
MP, EM, TS = 2, 4, 8
ZE, ES, B = 4, 0x80, 0x8000
FCW_ZE = 0x37B                     # division by zero unmasked, everything else as after FNINIT


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


# The pointers that FNSTENV stores are those of the last instruction before it: a test of their own
ROWS = rows("x87.tab", "fnstenv")


@pytest.mark.parametrize("unmask", (False, True), ids=("masked", "unmasked"))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_like_the_host(pair: Pair, row: Row, unmask: bool) -> None:
    check_row(pair, row, 8, unmask)


def words(guest: Guest, address: int, count: int, size: int = 2) -> list[int]:
    return [guest.read(address + size * i, size) for i in range(count)]


@pytest.mark.parametrize(("instruction", "cr0", "vector"), [
    ("fld1", 0, None), ("fld1", EM, NM), ("fld1", TS, NM), ("fnstcw [0xc000]", EM, NM), ("fninit", TS, NM),
    ("fnstenv [0xc000]", TS, NM), ("fld qword ptr [0xc000]", TS, NM),
    ("fwait", TS, None), ("fwait", MP, None), ("fwait", MP | TS, NM), ("fwait", EM, None),
])
def test_gates(make_guest: Make, instruction: str, cr0: int, vector: int | None) -> None:
    """SDM vol. 3 table 2-2, and section 2.5 for FWAIT."""
    guest = make_guest("long")
    guest.set(cr0=guest.cr0 & ~(MP | EM | TS) | cr0)
    guest.run(instruction)
    assert guest.vector == vector and (vector is not None or guest.done)


DIVIDE = f"""fninit
    mov word ptr [0xa000], {FCW_ZE}
    fldcw [0xa000]
    fld1
    fldz
divide: fdivp st(1), st
"""


@pytest.mark.parametrize("instruction", [
    "fwait", "fld1", "fld qword ptr [0xc000]", "fld qword ptr [0x1fff000]", "fldcw [0xa000]",
    "paddb mm0, mm1", "emms", "fldenv [0xc000]", "frstor [0xc000]"])
def test_pending_exception_comes_with_the_next_to_wait(make_guest: Make, instruction: str) -> None:
    """SDM vol. 1 section 8.7: before anything else the instruction does, a fault of its operand included."""
    guest = make_guest("long")
    guest.run(DIVIDE + "fnstsw ax\nnext: " + instruction, budget=9)
    assert guest.vector == MF and guest.stack()[0] == guest.labels["next"]
    assert guest.rax & (ZE | ES | B) == ZE | ES | B
    assert guest.arch.fpu.fip == guest.labels["divide"]
    assert guest.arch.fpu.sw & (ZE | ES | B) == ZE | ES | B


@pytest.mark.parametrize("instruction", ["fnclex", "fninit", "fnsave [0xc000]"])
def test_what_does_not_wait_and_clears(make_guest: Make, instruction: str) -> None:
    guest = make_guest("long")
    guest.run(DIVIDE + instruction + "\nfnstsw [0xc100]\nfld1\nfwait")
    assert guest.done and guest.read(SCRATCH + 0x100, 2) & (ZE | ES | B) == 0


@pytest.mark.parametrize("instruction", [
    "fnstcw [0xc000]", "fnstsw [0xc000]", "fnstenv [0xc000]", "fxsave [0xc000]"])
def test_what_does_not_wait_and_keeps_the_exception(make_guest: Make, instruction: str) -> None:
    guest = make_guest("long")
    guest.run(DIVIDE + instruction)
    assert guest.done and guest.arch.fpu.sw & ZE


def test_unmasking_raises_what_was_flagged(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.run(f"""fninit
        fld1
        fldz
        fdivp st(1), st
        mov word ptr [0xa000], {FCW_ZE}
        fldcw [0xa000]
    next: fld1""")
    assert guest.vector == MF and guest.stack()[0] == guest.labels["next"]


def test_a_page_fault_leaves_the_stack_alone(make_guest: Make) -> None:
    """FSTP across two pages: the second cannot be written, so nothing is popped."""
    guest = make_guest("long")
    guest.set_pte(DATA + 0x1000, DATA + 0x1000 | 5)
    guest.run(f"fninit\nfld1\nfldpi\nstore: fstp tbyte ptr [{DATA + 0xFFA:#x}]")
    assert guest.vector == PF and guest.stack()[1] == guest.labels["store"] and guest.cr2 == DATA + 0x1000
    assert guest.arch.fpu.sw >> 11 & 7 == 6 and guest.read(DATA + 0xFFA, 6) == 0


OPERAND_SIZE = ".byte 0x66\n"


# FNSTENV, SDM vol. 1 figures 8-9 to 8-12, after FADD QWORD [BX]: opcode DC 07 or 03, FOP = 4xxh
@pytest.mark.parametrize(("mode", "prefix", "size", "real"), [
    ("real", "", 2, True), ("real", OPERAND_SIZE, 4, True), ("protected", "", 4, False),
    ("protected", OPERAND_SIZE, 2, False), ("long", "", 4, False), ("long", OPERAND_SIZE, 2, False)])
def test_environment(make_guest: Make, mode: str, prefix: str, size: int, real: bool) -> None:
    guest = make_guest(mode)
    guest.set(rbx=DATA)
    b, fop = {"real": ("bx", 0x407), "protected": ("ebx", 0x403)}.get(mode, ("rbx", 0x403))
    guest.run(f"""fninit
        fld1
    add: fadd qword ptr [{b}]
        {prefix} fnstenv [0xc000]""")
    assert guest.done
    add, mask = guest.labels["add"], (1 << 8 * size) - 1
    got = words(guest, SCRATCH, 7, size)
    assert [value & 0xFFFF for value in got[:3]] == [0x37F, 0x3800, 0x3FFF]
    cs, ds = (0, 0) if mode == "long" else (guest.cs, guest.ds)
    if real:  # linear addresses here are below 64 KiB
        assert [got[3] & 0xFFFF, got[4], got[5] & 0xFFFF, got[6]] == [add, fop, DATA, 0]
    else:
        selector = cs | fop << 16 if size == 4 else cs
        assert [got[3], got[4], got[5], got[6] & 0xFFFF] == [add, selector, DATA & mask, ds]


@pytest.mark.parametrize("prefix", ["", OPERAND_SIZE])
@pytest.mark.parametrize("mode", ["real", "legacy", "long"])
def test_save_and_restore(make_guest: Make, mode: str, prefix: str) -> None:
    guest = make_guest(mode)
    guest.run(f"""fninit
        fldpi
        fldln2
        fldl2e
        {prefix} fnsave [0xc000]
        fnstsw [0xc080]
        {prefix} frstor [0xc000]
        {prefix} fnsave [0xc100]""")
    size = 94 if (mode == "real") == (not prefix) else 108
    assert guest.done and guest.read(SCRATCH + 0x80, 2) == 0
    assert guest.read(SCRATCH, size) == guest.read(SCRATCH + 0x100, size)
    # FLDPI's constant, SDM vol. 2, rounded to nearest: third of the registers in stack order
    assert guest.read(SCRATCH + size - 80 + 20, 10) == 0x4000C90FDAA22168C235


def test_mmx_registers_are_the_x87_ones(make_guest: Make) -> None:
    """SDM vol. 1 section 9.5: exponent all ones, top 0, nothing empty; EMMS empties all."""
    guest = make_guest("long")
    guest.run("""fninit
        fld1
        mov rax, 0x1122334455667788
        movq mm3, rax
        fxsave [0xc000]
        emms""")
    assert guest.done
    assert guest.read(SCRATCH + 2, 2) >> 11 & 7 == 0 and guest.read(SCRATCH + 4, 1) == 0xFF
    assert guest.read(SCRATCH + 32 + 3 * 16, 10) == 0xFFFF_1122334455667788
    assert guest.arch.fpu.tag_valid == 0


def test_state_survives_between_runs(make_guest: Make) -> None:
    """Each core_run() takes the state from the segment and puts it back: registers, control word, top."""
    guest = make_guest("long")
    guest.run("fninit\nfldpi\nfld1\nfldz\nfadd st, st(2)\nfmulp st(1), st\nfstp qword ptr [0xc000]", budget=1)
    for _ in range(6):
        assert not guest.done
        guest.resume(budget=1)
    assert guest.done
    assert struct.pack("<Q", guest.read(SCRATCH)) == struct.pack("<d", 3.141592653589793)


@pytest.mark.parametrize(("instruction", "align"), [
    ("fld dword ptr [rbx]", 4), ("fst qword ptr [rbx]", 8), ("fstp tbyte ptr [rbx]", 8),
    ("fild word ptr [rbx]", 2), ("fld tbyte ptr [rbx]", 8), ("fldcw [rbx]", 2),
    ("fnstenv [rbx]", 4), ("fnsave [rbx]", 4),
    ("movsd xmm0, [rbx]", 8), ("movups xmm0, [rbx]", 1), ("movss [rbx], xmm0", 4)])
def test_alignment_check(make_guest: Make, instruction: str, align: int) -> None:
    """SDM vol. 3 table 6-7. Nothing has happened when it is raised: a store has not popped."""
    for offset in (1, 2, 4):
        guest = make_guest("long", 3)
        guest.set(cr0=guest.cr0 | AM, rflags=2 | AC, rbx=DATA + offset, cr4=guest.cr4 | 0x200)
        guest.arch.fpu.tag_valid, guest.arch.fpu.sw = 0xFF, 3 << 11
        guest.run(instruction)
        if offset % align:
            assert (guest.vector, guest.stack()[:2]) == (AC_, [0, CODE])
            assert guest.arch.fpu.sw == 3 << 11 and guest.arch.fpu.tag_valid == 0xFF
        else:
            assert guest.done
