"""FXSAVE and XSAVE areas: SDM vol. 1 section 10.5, chapter 13; vol. 2 for the order of the checks."""

from collections.abc import Callable

import pytest

from tests.vcpu.guest import DATA, GP, NM, PF, SCRATCH, UD, Guest

Make = Callable[..., Guest]
OSFXSR, OSXSAVE, TS = 0x200, 0x40000, 8
X87, SSE = 1, 2
BV, COMPACT = 512, 520             # header fields
FILL = 0xEE


def prepare(guest: Guest, xcr0: int = X87 | SSE) -> None:
    """XMM registers 1, 2...; scratch memory filled."""
    guest.arch.xcr0 = xcr0
    for i in range(16):
        guest.arch.vec[i].q[0], guest.arch.vec[i].q[1] = i + 1, 0x100 + i
    guest.write(SCRATCH, bytes([FILL]) * 1024)
    guest.set(cr4=guest.cr4 | OSFXSR | OSXSAVE)


USE = "fninit\nfldpi\n"


def filled(size: int) -> int:
    return int.from_bytes(bytes([FILL]) * size, "little")


@pytest.mark.parametrize(("mode", "registers"), [("long", 16), ("legacy", 8), ("real", 8)])
def test_fxsave(make_guest: Make, mode: str, registers: int) -> None:
    guest = make_guest(mode)
    prepare(guest)
    guest.run(USE + "fxsave [0xc000]")
    assert guest.done
    assert [guest.read(SCRATCH + at, n) for at, n in ((0, 2), (2, 2), (4, 1), (24, 4), (28, 4))] == [
        0x37F, 0x3800, 0x80, 0x1F80, 0xFFFF]
    assert guest.read(SCRATCH + 32, 10) == 0x4000C90FDAA22168C235  # pi, in stack order
    for i in range(16):
        value = guest.read(SCRATCH + 160 + 16 * i, 16)
        assert value == (0x100 + i << 64 | i + 1 if i < registers else filled(16))
    assert guest.read(SCRATCH + 416, 96) == filled(96)  # software's own


def test_fxsave_pointers(make_guest: Make) -> None:
    """64-bit offsets with REX.W, 32-bit offset and selector without."""
    guest = make_guest("long")
    prepare(guest)
    guest.set(rbx=DATA)
    guest.run("fninit\nfld1\nadd: fadd dword ptr [rbx]\nfxsave [0xc000]\nfxsave64 [0xc200]")
    assert guest.done
    for area in (SCRATCH, SCRATCH + 0x200):
        pointers = guest.read(area + 6, 2), guest.read(area + 8), guest.read(area + 16)
        assert pointers == (0x003, guest.labels["add"], DATA)


def test_fxrstor_gives_back_what_fxsave_took(make_guest: Make) -> None:
    guest = make_guest("long")
    prepare(guest)
    guest.run(USE + """fxsave64 [0xc000]
        fninit
        pxor xmm0, xmm0
        pxor xmm15, xmm15
        mov dword ptr [0xc018], 0x1fa0
        fxrstor64 [0xc000]
        fxsave64 [0xc200]""")
    assert guest.done
    assert guest.read(SCRATCH, 416) == guest.read(SCRATCH + 0x200, 416)
    assert guest.arch.vec[15].q[0] == 16 and guest.arch.fpu.mxcsr == 0x1FA0


@pytest.mark.parametrize(("source", "cr4", "cr0", "vector"), [
    ("fxsave [0xc008]", OSFXSR, 0, GP), ("fxrstor [0xc008]", OSFXSR, 0, GP),
    ("xsave [0xc020]", OSXSAVE, 0, GP), ("xrstor [0xc020]", OSXSAVE, 0, GP),
    ("xsaveopt [0xc010]", OSXSAVE, 0, GP),
    ("xsave [0xc000]", 0, 0, UD), ("xsave [0xc000]", OSXSAVE, TS, NM), ("xrstor [0xc000]", 0, TS, UD),
    ("xsave [0x1fff00]", OSXSAVE, 0, PF), ("fxsave [0x1fff00]", OSXSAVE, 0, PF),
    ("xrstor [0x1fff00]", OSXSAVE, 0, PF),
])
def test_refused(make_guest: Make, source: str, cr4: int, cr0: int, vector: int) -> None:
    guest = make_guest("long")
    prepare(guest)
    guest.write(SCRATCH, bytes(1024))
    guest.set(cr4=guest.cr4 & ~(OSFXSR | OSXSAVE) | cr4, cr0=guest.cr0 | cr0, rax=3)
    guest.run(source)
    assert guest.vector == vector
    assert guest.read(0x1FFF00, 256) == 0


@pytest.mark.parametrize(("at", "value"), [
    (24, 0x10000), (BV, 4), (BV, 1 << 63), (COMPACT, 1), (COMPACT, 1 << 63), (528, 1)])
def test_xrstor_checks_the_area(make_guest: Make, at: int, value: int) -> None:
    guest = make_guest("long")
    prepare(guest)
    guest.write(SCRATCH, bytes(1024))
    guest.put(SCRATCH + 24, 0x1F80, 4)
    guest.put(SCRATCH + at, value, 4 if at < 512 else 8)
    guest.set(rax=7)
    guest.run("xrstor [0xc000]")
    assert guest.vector == GP and guest.stack()[0] == 0
    assert guest.arch.vec[3].q[0] == 4


def test_xsave_writes_what_is_asked_for(make_guest: Make) -> None:
    """SSE alone: x87 region, software bytes and the rest of the header stay; MXCSR goes with SSE."""
    guest = make_guest("long")
    prepare(guest)
    guest.set(rax=SSE)
    guest.run(USE + "xsave [0xc000]")
    assert guest.done
    assert guest.read(SCRATCH, 24) == filled(24)
    assert guest.read(SCRATCH + 24, 4) == 0x1F80 and guest.read(SCRATCH + 160, 8) == 1
    assert guest.read(SCRATCH + BV) == filled(8) & ~SSE | SSE
    assert guest.read(SCRATCH + COMPACT) == filled(8)


@pytest.mark.parametrize(("source", "bits"), [("fninit", SSE), (USE, X87 | SSE)])
def test_xsaveopt_leaves_initial_state_out(make_guest: Make, source: str, bits: int) -> None:
    guest = make_guest("long")
    prepare(guest)
    guest.put(SCRATCH + BV, 0)
    guest.set(rax=3)
    guest.run(source + "\nxsaveopt [0xc000]")
    assert guest.done and guest.read(SCRATCH + BV) == bits
    assert (guest.read(SCRATCH, 2) == 0x37F) == bool(bits & X87)


def test_xrstor_initializes_what_the_header_lacks(make_guest: Make) -> None:
    guest = make_guest("long")
    prepare(guest)
    guest.write(SCRATCH, bytes(576))
    guest.put(SCRATCH + 24, 0x1F00, 4)
    guest.put(SCRATCH + BV, X87)
    guest.put(SCRATCH, 0x27F, 2)
    guest.put(SCRATCH + 4, 0xFF, 1)
    guest.set(rax=3)
    guest.run(USE + "xrstor [0xc000]")
    assert guest.done
    assert all(guest.arch.vec[i].q[0] == 0 for i in range(16))
    fpu = guest.arch.fpu
    assert (fpu.cw, fpu.tag_valid, fpu.mxcsr) == (0x27F, 0xFF, 0x1F00)


def test_xcr0_limits_what_is_saved(make_guest: Make) -> None:
    guest = make_guest("long")
    prepare(guest, xcr0=X87)
    guest.set(rax=0xFFFFFFFF, rdx=0xFFFFFFFF)
    guest.run(USE + "xsave64 [0xc000]")
    assert guest.done and guest.read(SCRATCH + 160) == filled(8) and guest.read(SCRATCH + 24) == filled(8)
    assert guest.read(SCRATCH + BV) & 3 == filled(8) & SSE | X87
