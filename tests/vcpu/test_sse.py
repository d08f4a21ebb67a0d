"""MMX, SSE to SSE4.2, AES and PCLMULQDQ against the host's CPU executing the same instruction."""

import random
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.vcpu.guest import CODE, DATA, GP, NM, PAE, PF, SCRATCH, UD, Guest
from tests.vcpu.host_rows import OSFXSR, OSXMMEXCPT, Pair, Row, check_row, encode, random_state, rows

Make = Callable[..., Guest]
MODES = ("real", "protected", "legacy", "pae", "long", "compat")
XM = 19
EM, TS = 4, 8


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


ROWS = rows("sse.tab", "fxsave", "fxrstor", "xsave", "xrstor", "xsaveopt")

SEQUENCE = [row for row in [*ROWS, *rows("x87.tab", "fnstenv", "fldenv", "frstor", "fnsave")]
            if not row.mnemonic.startswith("maskmov") and row.mnemonic != "ldmxcsr"]


@pytest.mark.parametrize("unmask", (False, True), ids=("masked", "unmasked"))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_like_the_host(pair: Pair, row: Row, unmask: bool) -> None:
    check_row(pair, row, 6, unmask)


@pytest.fixture(scope="module")
def pair32() -> Iterator[Pair]:
    pair = Pair("compat")
    yield pair
    pair.close()


def check_random_run(pair: Pair, seed: int, bits: int) -> None:
    rnd = random.Random(f"{seed} {bits}")
    table = rnd.choice(("sse.tab", "x87.tab", ""))
    few = [row for row in SEQUENCE if table in ("", row.source)]
    cases = []
    for _ in range(rnd.randrange(2, 30)):
        row = rnd.choice(few)
        disp = rnd.choice((0, 16, 32, 48, 64, 80)) + (rnd.choice((3, 4088)) if rnd.random() < 0.04 else 0)
        cases.append(encode(row, rnd.choice(row.forms()), rnd, 3, disp, bits))
    pair.check_run(cases, random_state(rnd, seed % 3 == 0), rnd)


@pytest.mark.parametrize("seed", range(300))
def test_instructions_in_a_row(pair: Pair, seed: int) -> None:
    """They share a stub, which keeps XMM registers in the host's, and which a fault leaves in the middle."""
    check_random_run(pair, seed, 64)


@pytest.mark.parametrize("seed", range(150))
def test_32_bit_instructions_in_a_row(pair32: Pair, seed: int) -> None:
    check_random_run(pair32, seed, 32)


def enable(guest: Guest, cr4: int = OSFXSR | OSXMMEXCPT, cr0: int = 0) -> None:
    guest.set(cr4=guest.cr4 | cr4, cr0=guest.cr0 | cr0)


def xmm(guest: Guest, index: int) -> bytes:
    return bytes(guest.arch.vec[index].b[0:16])


def set_xmm(guest: Guest, index: int, value: bytes) -> None:
    for i, byte in enumerate(value):
        guest.arch.vec[index].b[i] = byte


# SDM vol. 3 table 13-1 (SSE) and section 12.1 (MMX): instruction, CR4.OSFXSR, CR0.EM and TS -> exception
@pytest.mark.parametrize(("instruction", "cr4", "cr0", "vector"), [
    ("addps xmm0, xmm1", OSFXSR, 0, None),
    ("addps xmm0, xmm1", 0, 0, UD),
    ("addps xmm0, xmm1", OSFXSR, EM, UD),
    ("addps xmm0, xmm1", OSFXSR, TS, NM),
    ("addps xmm0, xmm1", 0, TS, UD),
    ("addps xmm0, [0xa000]", OSFXSR, TS, NM),
    ("paddb mm0, mm1", 0, 0, None),
    ("paddb mm0, mm1", 0, EM, UD),
    ("paddb mm0, mm1", 0, TS, NM),
    ("emms", 0, TS, NM),
    ("ldmxcsr [0xa000]", 0, 0, UD),
    ("stmxcsr [0xa000]", OSFXSR, TS, NM),
    ("stmxcsr [0xa000]", OSFXSR, EM, UD),
    ("fxsave [0xa000]", 0, 0, None),
    ("fxsave [0xa000]", 0, TS, NM),
    ("fxrstor [0xa000]", 0, EM, UD),
    ("maskmovdqu xmm0, xmm1", OSFXSR, TS, NM),
    ("maskmovq mm0, mm1", 0, EM, UD),
])
def test_gates(make_guest: Make, instruction: str, cr4: int, cr0: int, vector: int | None) -> None:
    guest = make_guest("long")
    guest.set(cr4=PAE | cr4, cr0=guest.cr0 | cr0, rdi=SCRATCH)
    guest.run(instruction)
    assert guest.vector == vector and (vector is not None or guest.done)


def test_a_gate_that_was_open_closes_again(make_guest: Make) -> None:
    """The test is made once a block; what changes CR0 ends the block."""
    guest = make_guest("long")
    enable(guest)
    guest.run("""addps xmm0, xmm1
        addps xmm0, xmm2
        mov rax, cr0
        or rax, 8
        mov cr0, rax
    second: addps xmm0, xmm1""")
    assert guest.vector == NM and guest.stack()[0] == guest.labels["second"]


@pytest.mark.parametrize(("mxcsr", "cr4", "vector"), [
    (0x1F80, OSXMMEXCPT, None), (0x1D80, OSXMMEXCPT, XM), (0x1D80, 0, UD)])
def test_unmasked_division_by_zero(make_guest: Make, mxcsr: int, cr4: int, vector: int | None) -> None:
    guest = make_guest("long")
    enable(guest, OSFXSR | cr4)
    set_xmm(guest, 0, struct.pack("<2d", 1.0, 2.0))
    set_xmm(guest, 1, bytes(16))
    guest.put(DATA, mxcsr, 4)
    guest.run("ldmxcsr [0xa000]\ndivide: divpd xmm0, xmm1")
    assert guest.vector == vector
    assert guest.arch.fpu.mxcsr == mxcsr | 4  # ZE
    if vector:
        assert guest.stack()[0] == guest.labels["divide"]
        assert xmm(guest, 0) == struct.pack("<2d", 1.0, 2.0)
    else:
        assert xmm(guest, 0) == struct.pack("<2d", float("inf"), float("inf"))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(make_guest: Make, mode: str) -> None:
    guest = make_guest(mode)
    enable(guest)
    guest.write(DATA, struct.pack("<4I", 1, 2, 3, 4))
    b = {"real": "bx"}.get(mode, "ebx")
    guest.set(rbx=DATA - 8)
    guest.run(f"""movdqu xmm1, [{b} + 8]
        paddd xmm1, [{b} + 8]
        movdqa [0xc010], xmm1
        pshufd xmm2, xmm1, 0x1b
        movd eax, xmm2
        movq [0xc029], xmm2""")
    assert guest.done
    assert guest.read(SCRATCH + 0x10, 16) == int.from_bytes(struct.pack("<4I", 2, 4, 6, 8), "little")
    assert guest.rax == 8 and guest.read(SCRATCH + 0x29, 8) == 6 << 32 | 8


def test_legacy_segments(make_guest: Make) -> None:
    """Base and limit of a segment outside 64-bit mode: SDM vol. 3 section 5.3."""
    guest = make_guest("protected")
    enable(guest)
    guest.arch.seg[0].base, guest.arch.seg[0].limit = DATA, 0x1F
    guest.write(DATA + 0x10, bytes(range(16)))
    guest.run("movaps xmm3, es:[0x10]\nlast: movups xmm3, es:[0x11]")
    assert xmm(guest, 3) == bytes(range(16))
    assert guest.vector == GP and guest.stack()[:2] == [0, guest.labels["last"]]


def test_flat_segments_end_at_4_gib(make_guest: Make) -> None:
    guest = make_guest("protected")
    enable(guest)
    guest.set(rbx=0x1_0000_0000 - 8)
    guest.run("movsd xmm1, [ebx - 0x10]\nlast: movups xmm1, [ebx]")
    assert guest.vector == GP and guest.stack()[:2] == [0, guest.labels["last"]]
    guest.set(rbx=0xFFFFFFF0, rip=CODE)  # and effective addresses wrap
    guest.write(DATA, bytes(range(16)))
    guest.run("movups xmm2, [ebx + 0xa010]")
    assert guest.done and xmm(guest, 2) == bytes(range(16))


def test_base_of_fs_and_32_bit_addresses(make_guest: Make) -> None:
    guest = make_guest("long")
    enable(guest)
    guest.arch.seg[4].base = DATA
    guest.write(DATA + 0x40, bytes(range(32)))
    guest.set(rbx=0xFFFFFFFF_00000010, rcx=4)
    guest.run("""movaps xmm0, fs:[ecx * 8 + 0x20]
        movups xmm1, fs:[ebx + 0x38]
        movaps xmm2, [rip + data]
        jmp end_of_code
        .balign 16
    data: .ascii "0123456789abcdef"
    """)
    assert guest.done
    assert (xmm(guest, 0), xmm(guest, 1)) == (bytes(range(16)), bytes(range(8, 24)))
    assert xmm(guest, 2) == b"0123456789abcdef"


@pytest.mark.parametrize("source", ["movups xmm0, [rbx]", "movups [rbx], xmm0", "paddd xmm0, [rbx]"])
def test_not_canonical(make_guest: Make, source: str) -> None:
    guest = make_guest("long")
    enable(guest)
    guest.set(rbx=0x8000_0000_0000_0000)
    guest.run(source)
    assert guest.vector == GP and guest.stack()[0] == 0


def test_page_fault_has_the_address_and_commits_nothing(make_guest: Make) -> None:
    """A store across two pages of which the second is read-only; CR2 is the first byte that faults."""
    guest = make_guest("long")
    enable(guest)
    guest.set_pte(DATA + 0x1000, DATA + 0x1000 | 5)
    set_xmm(guest, 0, b"x" * 16)
    guest.run(f"movups [{DATA + 0xFF8:#x}], xmm0")
    assert guest.vector == PF and guest.stack()[:2] == [3, CODE] and guest.cr2 == DATA + 0x1000
    assert guest.read(DATA + 0xFF8, 16) == 0


def test_store_into_the_code_that_follows(make_guest: Make) -> None:
    guest = make_guest("long")
    enable(guest)
    set_xmm(guest, 0, b"\xb0\x07" + b"\x90" * 14)  # mov al, 7
    guest.run("xor eax, eax\nmovups [rip + patch], xmm0\npatch: mov al, 1\n.skip 14, 0x90")
    assert guest.done and guest.rax == 7


def test_store_into_its_own_run(make_guest: Make) -> None:
    guest = make_guest("long")
    enable(guest)
    set_xmm(guest, 0, b"\x66\x0f\xef\xc9" + b"\x90" * 12)  # pxor xmm1, xmm1
    set_xmm(guest, 1, b"\x01" * 16)
    guest.run("""movups [rip + patch], xmm0
        movaps xmm2, xmm1
    patch: paddb xmm1, xmm1
        .skip 12, 0x90
        movaps xmm3, xmm1""")
    assert guest.done and xmm(guest, 2) == b"\x01" * 16
    assert xmm(guest, 3) == bytes(16)


def test_stubs_outnumber_their_memory(make_guest: Make) -> None:
    """More forms than the pool holds: SHUFPS with each immediate and all pairs of registers."""
    guest = make_guest("long")
    enable(guest)
    forms = [(d, s, i) for i in range(256) for d in range(16) for s in range(16)]
    base = 0x100000
    chunk = 4096
    for start in range(0, len(forms), chunk):
        code = b"".join(bytes([0x40 | d >> 3 << 2 | s >> 3, 0x0F, 0xC6, 0xC0 | (d & 7) << 3 | s & 7, i])
                        for d, s, i in forms[start:start + chunk])
        guest.write(base, code + b"\xeb\xfe")
        guest.set(rip=base)
        guest.resume(chunk + 2)
        assert guest.rip == base + len(code)


@pytest.mark.parametrize(("value", "vector"), [(0xFFFF, None), (0x10000, GP), (0x80001F80, GP)])
def test_reserved_bits_of_mxcsr(make_guest: Make, value: int, vector: int | None) -> None:
    guest = make_guest("long")
    enable(guest)
    guest.put(DATA, value, 4)
    guest.run("ldmxcsr [0xa000]\nstmxcsr [0xc002]")
    assert guest.vector == vector
    assert guest.read(SCRATCH + 2, 4) == (0 if vector else value)
