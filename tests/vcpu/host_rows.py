"""Rows of the opcode table that run on host stubs: encodings, random states, and both CPUs side by side."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tests.vcpu import native
from tests.vcpu.guest import CODE, CODE32, CODE64, TABLES, Guest
from vcpu import optable
from vcpu._core import ffi, lib

WINDOW = 0x7000_0000               # linear address of memory that guest and host both have
WINDOW_GPA, WINDOW_SIZE = 2 << 20, 2 << 20
WINDOW_TABLE = 0x60000
LAST = WINDOW + WINDOW_SIZE - 128
FCW, FSW, FTW, MXCSR, ST, XMM = 0, 2, 4, 24, 32, 160
CONTROL = (("cw", FCW, 2), ("sw", FSW, 2), ("tag_valid", FTW, 1), ("mxcsr", MXCSR, 4))
STATUS = 0x8D5
OSFXSR, OSXMMEXCPT = 0x200, 0x400
Row = optable.Row


def rows(table: str, *skip: str) -> list[Row]:
    return [row for row in optable.load() if row.source == table and row.mnemonic not in skip]


@dataclass
class Case:
    """An instruction; base and index are the registers of its memory operand, with the displacement."""

    code: bytes
    base: int | None = None
    index: int | None = None
    scale: int = 0
    disp: int = 0


def _memory(rnd: random.Random) -> tuple[bytes, int, Case]:
    """(ModRM without reg, SIB, displacement), REX bits, and the case without code."""
    base = rnd.choice([r for r in range(16) if r != 4])
    indexed = base & 7 == 4 or rnd.random() < 0.3
    index = rnd.choice([r for r in range(16) if r not in (4, base)]) if indexed else None
    mod = rnd.choice((0, 1, 2)) if base & 7 != 5 else rnd.choice((1, 2))
    disp = 0 if mod == 0 else rnd.choice((0, 3, 16, -16, 64)) if mod == 1 else rnd.choice((0, 5, 256, -4096))
    scale = rnd.randrange(4)
    tail = b"" if mod == 0 else struct.pack("<b" if mod == 1 else "<i", disp)
    if index is None:
        return bytes([mod << 6 | base & 7]) + tail, base >> 3, Case(b"", base, None, 0, disp)
    sib = scale << 6 | (index & 7) << 3 | base & 7
    return bytes([mod << 6 | 4, sib]) + tail, base >> 3 | index >> 3 << 1, Case(b"", base, index, scale, disp)


def encode(row: Row, form: str, rnd: random.Random, base: int | None = None, disp: int = 0,
           bits: int = 64) -> Case:
    """A random encoding of a row for 64-bit mode or (with a base only) 32-bit code; RSP is no operand. With a
    base (RBX, RSI or RDI), the memory operand is [base + disp], and no other operand is that register."""
    kinds = {operand.kind for operand in row.operands}
    count = 16 if bits == 64 else 8
    choices = [r for r in range(count) if r not in (4, base)]
    reg = row.ext if row.ext is not None else rnd.choice(choices if "G" in kinds else range(count))
    case, tail, rex = Case(b""), b"", reg >> 3 << 2
    if form == "m":
        tail, bits, case = _memory(rnd)
        if base is not None:
            tail, bits = bytes([0x80 | base]) + struct.pack("<i", disp), 0
        rex |= bits
        tail = bytes([tail[0] | (reg & 7) << 3]) + tail[1:]
    elif row.modrm:
        rm = row.rm if row.rm is not None else rnd.choice(choices if kinds & {"E", "R"} else range(count))
        rex |= rm >> 3
        tail = bytes([0xC0 | (reg & 7) << 3 | rm & 7])
    if bits == 64 and any(o.size == "y" or o.text == "EAX" for o in row.operands) and rnd.random() < 0.5:
        rex |= 8
    prefix = b"" if row.prefix in ("", "np") else bytes([int(row.prefix, 16)])
    escape = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map]
    value = rnd.choice((0, 1, 2, 3, 4, 5, 8, 15, 16, rnd.randrange(256)))
    immediate = bytes([value]) if row.immediate() else b""
    head = bytes([0x40 | rex]) if rex or bits == 64 and rnd.random() < 0.1 else b""
    case.code = prefix + head + escape + bytes([row.opcode]) + tail + immediate
    return case


def _double(rnd: random.Random) -> int:
    sign = rnd.getrandbits(1) << 63
    return sign | rnd.choice((0, 0x7FF << 52, 0x7FF8000000000001, 0x7FF0000000000001, rnd.getrandbits(51),
                              struct.unpack("<Q", struct.pack("<d", rnd.randrange(1000)))[0],
                              (1003 + rnd.randrange(40)) << 52 | rnd.getrandbits(52), rnd.getrandbits(63)))


def _single(rnd: random.Random) -> int:
    sign = rnd.getrandbits(1) << 31
    return sign | rnd.choice((0, 0xFF << 23, 0x7FC00001, 0x7F800001, rnd.getrandbits(22),
                              (107 + rnd.randrange(40)) << 23 | rnd.getrandbits(23), rnd.getrandbits(31)))


def vector(rnd: random.Random) -> bytes:
    """16 bytes as numbers of some kind, or as a string with a terminator."""
    kind = rnd.randrange(4)
    if kind == 0:
        return struct.pack("<2Q", _double(rnd), _double(rnd))
    if kind == 1:
        return struct.pack("<4I", *(_single(rnd) for _ in range(4)))
    return rnd.randbytes(16) if kind == 2 else bytes(rnd.choice(b"abcd\0") for _ in range(16))


def extended(rnd: random.Random) -> bytes:
    """16 bytes with an 80-bit value, encodings that nothing produces (SDM vol. 1 table 4-3) included."""
    exponent, mantissa = rnd.choice((
        (0, 0), (0x7FFF, 1 << 63), (0x7FFF, 3 << 62), (0x7FFF, 1 << 63 | 5), (0, rnd.getrandbits(61)),
        (rnd.getrandbits(15), rnd.getrandbits(64)), (0x3FFF + rnd.randrange(8), 1 << 63),
        *(((0x3FFF - 30 + rnd.randrange(60)), 1 << 63 | rnd.getrandbits(63)) for _ in range(5))))
    return struct.pack("<QH6x", mantissa, exponent | rnd.getrandbits(1) << 15)


def random_state(rnd: random.Random, unmask: bool) -> native.State:
    """unmask: some exceptions of x87 and SSE are unmasked; none of x87 is pending but by chance."""
    state = native.State([rnd.choice((rnd.getrandbits(64), rnd.randrange(40))) for _ in range(16)],
                         0x202 | rnd.getrandbits(12) & STATUS)
    for i in range(16):
        state.fx[XMM + 16 * i:XMM + 16 * i + 16] = vector(rnd)
    for i in range(8):
        state.fx[ST + 16 * i:ST + 16 * i + 16] = extended(rnd)
    unmasked = rnd.getrandbits(6) if unmask else 0
    flags = rnd.getrandbits(6) if not unmask or rnd.random() < 0.3 else 0
    state.set_word(FCW, 2, (0x7F & ~unmasked) | rnd.getrandbits(2) << 10 | rnd.choice((0, 0x200, 0x300)))
    state.set_word(FSW, 2, rnd.getrandbits(16) & 0x7F00 | flags)
    state.set_word(FTW, 1, rnd.choice((0xFF, rnd.getrandbits(8))))
    unmasked = rnd.getrandbits(6) << 7 if unmask else 0
    state.set_word(MXCSR, 4, (rnd.choice((0x1F80, 0x1F80 | rnd.getrandbits(16) & 0xE07F))) & ~unmasked)
    return state


class Pair:
    """A guest in 64-bit mode (or "compat": 32-bit code) and the host, with a window of the same contents at
    the same linear address."""

    def __init__(self, mode: str = "long") -> None:
        self.guest = Guest(mode)
        self.code_segment = CODE64 if mode == "long" else CODE32
        self.host = native.window(WINDOW, WINDOW_SIZE)
        self.guest.put(TABLES + 0x1000 + 8 * (WINDOW >> 30 & 511), WINDOW_TABLE | 7)
        self.guest.put(WINDOW_TABLE + 8 * (WINDOW >> 21 & 511), WINDOW_GPA | 0x87)
        self.guest.set(cr4=self.guest.cr4 | OSFXSR | OSXMMEXCPT)

    def close(self) -> None:
        self.guest.close()

    def _enter(self, state: native.State) -> None:
        arch = self.guest.arch
        arch.gpr[0:16] = state.gpr
        arch.rflags = state.rflags & ~0x200
        fpu = arch.fpu
        for name, offset, size in CONTROL:
            setattr(fpu, name, state.word(offset, size))
        fpu.fip = fpu.fdp = fpu.fop = fpu.fcs = fpu.fds = 0
        for i in range(8):
            ffi.memmove(fpu.fpr[fpu.sw + (i << 11) >> 11 & 7], state.fx[ST + 16 * i:ST + 16 * i + 16], 16)
        for i in range(16):
            ffi.memmove(arch.vec[i].b, state.fx[XMM + 16 * i:XMM + 16 * i + 16], 16)

    def _leave(self) -> native.State:
        arch = self.guest.arch
        state = native.State(list(arch.gpr), arch.rflags | 0x200)
        fpu = arch.fpu
        for name, offset, size in CONTROL:
            state.set_word(offset, size, getattr(fpu, name))
        for i in range(8):
            state.fx[ST + 16 * i:ST + 16 * i + 10] = bytes(fpu.fpr[fpu.sw + (i << 11) >> 11 & 7][0:10])
        for i in range(16):
            state.fx[XMM + 16 * i:XMM + 16 * i + 16] = bytes(arch.vec[i].b[0:16])
        return state

    def run_guest(self, state: native.State, code: bytes) -> tuple[native.State, int]:
        """(state behind the instruction, 0), or (state, vector)."""
        guest = self.guest
        guest.load_segment("cs", self.code_segment)
        guest.write(CODE, code + b"\xeb\xfe")
        self._enter(state)
        guest.arch.gpr[4] = 0x1F800
        guest.arch.rip = CODE
        guest.changed()
        lib.core_run(guest.cpu, 50)
        after = self._leave()
        after.gpr[4] = state.gpr[4]
        if guest.rip == CODE + len(code):
            return after, 0
        vector = guest.vector
        assert vector is not None, f"rip {guest.rip:#x}"
        return after, vector

    def check(self, row: Row, case: Case, state: native.State, target: int, rnd: random.Random) -> int:
        """Runs the case, with its memory operand at target, on both; compares; returns the exception or 0."""
        if case.base is not None:
            index = 0
            if case.index is not None:
                index = state.gpr[case.index] << case.scale
            state.gpr[case.base] = target - index - case.disp & (1 << 64) - 1
        if "maskmov" in row.mnemonic:
            target = min(target, LAST)  # whether masked bytes fault is the implementation's choice
            state.gpr[7] = target
        first = max(target & ~15, WINDOW + 64) - 64
        size = min(256, WINDOW + WINDOW_SIZE - first)
        memory = b"".join(vector(rnd) for _ in range(size // 16))
        self.host.write(first, memory)
        self.guest.write(WINDOW_GPA + first - WINDOW, memory)
        expected, trap = native.run(state, case.code)
        got, fault = self.run_guest(state, case.code)
        what = f"{row.key} [{case.code.hex(' ')}] operand at {target:#x}"
        assert fault == trap, what
        stored = self.guest.segment.dma_read(WINDOW_GPA + first - WINDOW, size)
        assert stored == self.host.read(first, size), what
        ignore = row.flags("undef") | ~STATUS
        if trap:
            expected = state
        assert [hex(v) for v in got.gpr] == [hex(v) for v in expected.gpr], what
        if trap:
            assert got.fx[XMM:XMM + 256] == expected.fx[XMM:XMM + 256], what
            return trap
        assert got.rflags & ~ignore == expected.rflags & ~ignore, what
        for name, offset, n in CONTROL:
            assert hex(got.word(offset, n)) == hex(expected.word(offset, n)), f"{name}: {what}"
        for i in range(24):
            n = 10 if i < 8 else 16
            at = ST + 16 * i
            assert got.fx[at:at + n] == expected.fx[at:at + n], f"{'ST' if i < 8 else 'XMM'}{i & 7}: {what}"
        return 0


    def check_run(self, cases: list[Case], state: native.State, rnd: random.Random) -> int:
        """Instructions that follow one another, with memory operands [RBX + disp] in the window's third page;
        returns the exception. Where one faults, those before it have been executed and nothing else."""
        state.gpr[3] = WINDOW + 8192
        memory = b"".join(vector(rnd) for _ in range(768))
        self.host.write(WINDOW + 4096, memory)
        self.guest.write(WINDOW_GPA + 4096, memory)
        code = b"".join(case.code for case in cases)
        what = " ".join(f"[{case.code.hex()}]" for case in cases)
        got, fault = self.run_guest(state, code)
        done = code
        if fault:
            stack = self.guest.stack()
            done = code[:stack[1 if fault in (13, 14, 17) else 0] - CODE]
        if fault:
            assert native.run(state, code)[1] == fault, what
            self.host.write(WINDOW + 4096, memory)
        expected, trap = native.run(state, done)
        assert trap == 0, what
        stored = self.guest.segment.dma_read(WINDOW_GPA + 4096, 12288)
        assert stored == self.host.read(WINDOW + 4096, 12288), what
        assert [hex(v) for v in got.gpr] == [hex(v) for v in expected.gpr], what
        assert got.fx[XMM:] == expected.fx[XMM:], what
        assert got.rflags & STATUS == expected.rflags & STATUS, what
        if not fault:
            assert got.fx[:4] == expected.fx[:4] and got.word(MXCSR, 4) == expected.word(MXCSR, 4), what
            for at in range(ST, XMM, 16):
                assert got.fx[at:at + 10] == expected.fx[at:at + 10], what
        return fault


def targets(rnd: random.Random, n: int) -> Iterator[int]:
    """Operand addresses: aligned, not aligned, across two pages, over the window's end."""
    for _ in range(n):
        aligned = WINDOW + 8192 + rnd.randrange(64) * 16
        yield rnd.choice((aligned, aligned, aligned, aligned + rnd.randrange(1, 16),
                          WINDOW + 12288 - rnd.randrange(1, 16), WINDOW + WINDOW_SIZE - rnd.randrange(1, 16)))


def check_row(pair: Pair, row: Row, cases: int, unmask: bool) -> None:
    """Random cases of all forms of a row, the same at each run."""
    rnd = random.Random(f"{row.key}{unmask}")
    for form in row.forms():
        for target in targets(rnd, cases):
            # The hosts seen look at numeric exceptions before the operand of an x87 store, and store eight
            # bytes of ten before the rest faults; here that fault comes first and nothing is stored.
            if row.source == "x87.tab" and (unmask or any(operand.size == "t" for operand in row.operands)):
                target = min(target, LAST)
            pair.check(row, encode(row, form, rnd), random_state(rnd, unmask), target, rnd)
