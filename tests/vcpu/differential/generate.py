"""Cases from the opcode table: which shapes a row has, and random instances of a shape."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.vcpu.differential import values
from tests.vcpu.differential.sides import (
    CODE_LINEAR,
    CODE_SIZE,
    DATA_LINEAR,
    DATA_SIZE,
    LDT_CODE16,
    LDT_DATA,
    READONLY,
    USER32,
    USER64,
    USER_DATA,
)
from vcpu import optable

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
STRINGS = {"MOVS", "CMPS", "STOS", "LODS", "SCAS", "INS", "OUTS"}
STACK = {"PUSH", "POP", "PUSHF", "POPF", "CALL", "RET", "ENTER", "LEAVE", "PUSHA", "POPA"}
STATUS = 0x8D5
FS_BASE, GS_BASE = DATA_LINEAR + 0x100, DATA_LINEAR - 0x40
# Prefixes that a shape can be about
LEGACY = {"lock": b"\xf0", "rep": b"\xf3", "repne": b"\xf2", "a": b"\x67", "fs": b"\x64", "gs": b"\x65", "unlockable": b"\xf0"}
WIDTHS = {"b": 1, "w": 2, "d": 4, "q": 8, "x": 16, "t": 10, "dq": 16}
STATE_SIZES = {"fxsave": 512, "fxrstor": 512, "xsave": 576, "xrstor": 576, "xsaveopt": 576, "fldenv": 28, "fnstenv": 28,
               "frstor": 108, "fnsave": 108}
MASK64 = values.MASK64


@dataclass(frozen=True)
class Shape:
    """A row in one of its forms. bits: of the mode; size: operand size, 0 where there is none; form: r, m or nothing."""

    row: optable.Row
    bits: int
    size: int
    form: str
    prefix: str = ""

    @property
    def key(self) -> str:
        words = [f"{self.bits}-bit", f"operand {self.size}" if self.size else "", {"r": "register", "m": "memory"}.get(self.form, ""),
                 self.prefix]
        return f"{self.row.key}: {' '.join(word for word in words if word)}"


@dataclass
class Instance:
    """A shape with everything filled in."""

    shape: Shape
    code: bytes = b""
    code_at: int = 0x800
    gpr: list[int] = field(default_factory=list)
    rflags: int = 0x202
    patches: list[tuple[int, bytes]] = field(default_factory=list)   # linear address, bytes
    ds: int = USER_DATA
    target: int | None = None
    immediate: int = 0
    fx: bytes = b""
    undefined: int = 0

    @property
    def cs(self) -> int:
        return {64: USER64, 32: USER32, 16: LDT_CODE16}[self.shape.bits]


def _sizes(row: optable.Row, bits: int) -> tuple[int, ...]:
    sizes = row.sizes(bits)
    if sizes == (0,) and row.mnemonic in STACK:
        sizes = (16, 64) if bits == 64 else (16, 32)
    if any(o.size == "y" for o in row.operands):
        return (32, 64) if bits == 64 else (32,)
    if row.prefix == "np":
        return tuple(s for s in sizes if s in (0, 8) or s == 64 or s == (16 if bits == 16 else 32))
    if row.prefix == "66":
        return tuple(s for s in sizes if s in (0, 8, 64) or s == (32 if bits == 16 else 16))
    return sizes


def shapes_of(row: optable.Row, bits: int) -> Iterator[Shape]:
    """All shapes of a row in a mode where it is valid."""
    strings = row.mnemonic in STRINGS or row.mnemonic == "XLAT"
    for size in _sizes(row, bits):
        for form in row.forms():
            prefixes = [""]
            if form == "m" or strings or any(o.kind == "O" for o in row.operands):
                prefixes.append("a")
                if bits == 64 and "Y" not in {o.kind for o in row.operands[:1]}:
                    prefixes += ["fs", "gs"]
            if "lock" in row.words and form == "m":
                prefixes.append("lock")
            if "rep" in row.words:
                prefixes.append("rep")
            if "repz" in row.words:
                prefixes += ["rep", "repne"]
            for prefix in prefixes:
                yield Shape(row, bits, size, form, prefix)
            if row.source == "integer.tab" and size == _sizes(row, bits)[0] and ("lock" not in row.words or form != "m"):
                yield Shape(row, bits, size, form, "unlockable")


def shapes(bits: int) -> list[Shape]:
    return [shape for row in optable.load() if row.valid(bits) and "nodiff" not in row.values for shape in shapes_of(row, bits)]


def pick_target(rnd: random.Random, width: int, lock: bool, bits: int = 64) -> int:
    """Linear address of a memory operand: mostly in order, sometimes across pages, read-only, not there, not canonical."""
    kind = rnd.randrange(23 if bits != 64 else 24)
    middle = DATA_LINEAR + 0x400 + rnd.randrange(0x600)
    if kind < 10 or lock and kind < 18:
        return middle & ~15 if lock or kind < 6 else middle & -max(width, 1)
    if kind < 16:
        return middle
    if lock:
        return DATA_LINEAR + (READONLY + 64 if kind < 22 else DATA_SIZE)
    if kind < 18:
        return DATA_LINEAR + 0x1000 - rnd.randrange(width + 1)
    if kind == 18:
        return DATA_LINEAR + READONLY - rnd.randrange(width + 1)
    if kind == 19:
        return DATA_LINEAR + READONLY + 0x1000 - rnd.randrange(width + 1)
    if kind == 20:
        return DATA_LINEAR + READONLY + rnd.randrange(0x800)
    if kind == 21:
        return DATA_LINEAR + DATA_SIZE - rnd.randrange(width + 1)
    if kind == 22:
        return DATA_LINEAR - rnd.randrange(1, 9)
    return rnd.choice((0x8000000000000000, 0x800000000000 - rnd.randrange(9), 0xFFFF7FFFFFFFFFFF, DATA_LINEAR + (1 << 32))) \
        if rnd.random() < 0.5 else DATA_LINEAR


class Encoder:
    """Builds one instance."""

    def __init__(self, shape: Shape, rnd: random.Random) -> None:
        self.shape, self.row, self.rnd = shape, shape.row, rnd
        self.fixed, self.few = False, list(range(16))
        # outside 64-bit mode the upper halves are nobody's business, SDM vol. 1 section 3.4.1.1
        self.mask = MASK64 if shape.bits == 64 else 0xFFFFFFFF
        self.gpr = [values.integer(rnd) & self.mask for _ in range(16)]
        self.stack = DATA_LINEAR + 0xC00 + rnd.choice((0, 0, 0, 8, 2, 4, 1, 7, 0x3E8, -0x400, 0x3FF))
        self.gpr[RSP] = self.stack
        self.instance = Instance(shape, gpr=self.gpr, rflags=0x202 | rnd.getrandbits(12) & STATUS | (rnd.random() < 0.05) << 10)
        # The manuals leave open whether FXSAVE and its like raise #AC or #GP
        if rnd.random() < 0.02 and self.row.mnemonic not in STATE_SIZES:
            self.instance.rflags |= 1 << 18
        # Counts above the operand size: the result is undefined (SDM vol. 2, SHLD and SHRD)
        self.double_shift = shape.size == 16 and self.row.mnemonic in ("SHLD", "SHRD")
        self.asz = {64: 64, 32: 32, 16: 16}[shape.bits]
        if shape.prefix == "a" or shape.bits != 64 and rnd.random() < 0.1:
            self.asz = {64: 32, 32: 16, 16: 32}[shape.bits]
        # 16-bit addresses reach data through segments with a base
        careful = shape.row.source != "integer.tab"
        if shape.bits != 64 and rnd.random() < (0.2 if self.asz == 32 else 1 if careful else 0.85):
            self.instance.ds = LDT_DATA

    def register(self, last: int) -> int:
        return self.rnd.choice(self.few) % last

    def width(self) -> int:
        """Bytes of the memory operand, as far as it matters for where it lies."""
        for o in self.row.operands:
            if o.kind in "EMQWOXY" and not (o.kind in "XY" and o.size == ""):
                if o.size in WIDTHS:
                    return WIDTHS[o.size]
                if o.size == "":
                    return STATE_SIZES.get(self.row.mnemonic, 1)
                return max(self.shape.size, 8) // 8
        return max(self.shape.size, 8) // 8

    def base_linear(self, segment: str) -> int:
        if segment == "fs":
            return FS_BASE
        if segment == "gs":
            return GS_BASE
        return DATA_LINEAR if segment == "ds" and self.instance.ds == LDT_DATA else 0

    def offset(self, target: int, segment: str = "ds") -> int:
        return target - self.base_linear(segment) & MASK64

    def set_address(self, register: int, value: int) -> None:
        """A register as an address of the address size; what lies above is random."""
        mask = (1 << self.asz) - 1
        self.gpr[register] = value & mask | self.gpr[register] & ~mask & MASK64

    def memory(self, reg: int, target: int) -> tuple[bytes, int, bool]:
        """ModRM, SIB, displacement for the operand at target; REX bits; whether the displacement is RIP-relative."""
        rnd, asz = self.rnd, self.asz
        segment = self.shape.prefix if self.shape.prefix in ("fs", "gs") else "ds"
        if asz == 16:
            return self._memory16(reg, self.offset(target)), 0, False
        offset = self.offset(target, segment)
        kind = rnd.randrange(2) if self.fixed else rnd.randrange(10)
        last = 16 if self.shape.bits == 64 else 8
        if kind == 0 and segment == "ds":           # RIP-relative, or an absolute displacement
            return bytes([reg << 3 | 5]) + struct.pack("<I", offset & 0xFFFFFFFF), 0, self.shape.bits == 64
        if kind == 1:                               # absolute, by SIB without base and index
            return bytes([reg << 3 | 4, 0x25]) + struct.pack("<I", offset & 0xFFFFFFFF), 0, False
        base = rnd.randrange(last)
        mod = rnd.choice((0, 1, 1, 2))
        if segment == "ds" and self.instance.ds == LDT_DATA and base in (RSP, RBP):
            base = RBX                              # their default segment is SS
        if base == RSP and self.row.mnemonic in STACK | {"XCHG"}:
            base = RSI
        if self.row.mnemonic in STATE_SIZES and base in (RAX, RDX):
            base = RSI                              # EDX:EAX are the mask
        index = rnd.randrange(last) if kind < 6 or base & 7 == 4 else None
        scale = rnd.randrange(4)
        if base & 7 == 5 and mod == 0:
            mod = 1
        disp = 0 if mod == 0 else rnd.randrange(-128, 128) if mod == 1 else rnd.choice((rnd.randrange(-0x1000, 0x1000), rnd.getrandbits(31)))
        if index == 4:
            index = None if base & 7 != 4 else 4
        indexed = index is not None
        amount = 0
        if indexed and index != 4:
            if index == base:
                scale = 0
                index = (base + 1) % last if (base + 1) % last != 4 else (base + 2) % last
            if rnd.random() < 0.7 and index not in (RAX, RDX):
                self.set_address(index, rnd.randrange(64))  # type: ignore[arg-type]
            amount = self.gpr[index] << scale               # type: ignore[index]
        if base == RSP:
            disp = max(min(disp, 127), -128)
            if not indexed:
                index, indexed = 4, True
            mod = mod or 0
        self.set_address(base, offset - amount - disp)
        tail = b"" if mod == 0 else struct.pack("<b", disp) if mod == 1 else struct.pack("<i", disp)
        if indexed or base & 7 == 4:
            number = 4 if index is None else index
            sib = scale << 6 | (number & 7) << 3 | base & 7
            return bytes([mod << 6 | reg << 3 | 4, sib]) + tail, base >> 3 | number >> 3 << 1, False
        return bytes([mod << 6 | reg << 3 | base & 7]) + tail, base >> 3, False

    def _memory16(self, reg: int, offset: int) -> bytes:
        """16-bit addressing, SDM vol. 2 table 2-1; only forms whose default segment is DS reach data."""
        rnd = self.rnd
        rm, mod = rnd.choice((0, 1, 4, 5, 6, 7, 7)), rnd.randrange(3)
        if rm == 6 and mod:
            mod = 0
        if rm == 6:
            return bytes([reg << 3 | 6]) + struct.pack("<H", offset & 0xFFFF)
        disp = 0 if mod == 0 else rnd.randrange(-128, 128)
        first, second = ((RBX, RSI), (RBX, RDI), (0, 0), (0, 0), (RSI, None), (RDI, None), (0, 0), (RBX, None))[rm]
        self.set_address(first, offset - disp - (0 if second is None else self.gpr[second]))
        return bytes([mod << 6 | reg << 3 | rm]) + (b"" if mod == 0 else struct.pack("<b", disp) if mod == 1
                                                    else struct.pack("<h", disp))

    def code_target(self, length: int, reach: int) -> int:
        """A place in the code pages to branch to, as an offset from them; not into the instruction itself."""
        while True:
            at = self.instance.code_at + length + self.rnd.randrange(0 if self.fixed else -reach, reach)
            if 0x10 <= at < CODE_SIZE - 0x10 and not self.instance.code_at <= at < self.instance.code_at + length:
                return at

    def code_base(self) -> int:
        return 0 if self.shape.bits == 16 else CODE_LINEAR

    def immediate(self, kind: str, length: int) -> bytes:
        """The bytes of an immediate; length: of the instruction up to it."""
        rnd, size = self.rnd, self.shape.size
        wide = 2 if size == 16 else 4
        if kind in ("Ib", "Ibs"):
            value = rnd.choice((rnd.randrange(256), rnd.randrange(70), values.integer(rnd) & 0xFF))
            return bytes([value & ~0x10 if self.double_shift else value])
        if kind == "Iw":
            return struct.pack("<H", rnd.choice((0, 8, 16, rnd.randrange(256), rnd.getrandbits(16)))
                               if self.row.mnemonic in STACK else rnd.getrandbits(16))
        if kind == "Iz":
            return values.integer(rnd).to_bytes(8, "little")[:wide]
        if kind == "Iv":
            return values.integer(rnd).to_bytes(8, "little")[:max(size, 8) // 8]
        if kind == "Jb":
            return struct.pack("<b", self.code_target(length + 1, 100) - self.instance.code_at - length - 1)
        if kind == "Jz":
            wide = 4 if self.shape.bits == 64 else 2 if size == 16 else 4
            return struct.pack("<i", self.code_target(length + wide, 0x600) - self.instance.code_at - length - wide)[:wide]
        if kind in ("Ob", "Ov"):
            assert self.instance.target is not None
            segment = self.shape.prefix if self.shape.prefix in ("fs", "gs") else "ds"
            return self.offset(self.instance.target, segment).to_bytes(8, "little")[:self.asz // 8]
        raise KeyError(kind)

    def build(self) -> Instance:
        shape, row, rnd, instance = self.shape, self.row, self.rnd, self.instance
        if rnd.random() < 0.1 and not self.fixed:
            instance.code_at = rnd.choice((0x1000, CODE_SIZE)) - rnd.randrange(1, 9)
        width = self.width()
        lock = shape.prefix == "lock" or row.mnemonic == "XCHG"
        target = DATA_LINEAR + 0x400 + 4 * rnd.randrange(8) if self.fixed else pick_target(rnd, width, lock, shape.bits)
        if row.source in ("sse.tab", "x87.tab"):
            instance.fx = values.fx_image(rnd, row.source == "x87.tab" or "x87" in row.words)
        # The hosts seen look at numeric exceptions before the operand of an x87 store, and store eight bytes of ten
        # before they find that the rest faults; ours is the other, also permitted order
        if row.source == "x87.tab" and row.operands and row.operands[0].access != "r" and (
                width == 10 or instance.fx[0] & 0x3F != 0x3F):
            target = min(max(target, DATA_LINEAR), DATA_LINEAR + 0x1000)
            instance.rflags &= ~(1 << 18)
        if row.mnemonic in STATE_SIZES and target >> 47 == 0:
            target = min(target, DATA_LINEAR + (1 << 32))
        instance.target = target
        prefixes = [LEGACY[shape.prefix]] if shape.prefix not in ("", "a") else []
        if self.asz != shape.bits:
            prefixes.append(b"\x67")
        if row.prefix not in ("66", "np") and shape.size in (16, 32) and shape.size != (16 if shape.bits == 16 else 32) and shape.bits != 64:
            prefixes.append(b"\x66")
        if shape.bits == 64 and shape.size == 16 and row.prefix != "66":
            prefixes.append(b"\x66")
        rnd.shuffle(prefixes)
        head = b"".join(prefixes) + (b"" if row.prefix in ("", "np") else bytes([int(row.prefix, 16)]))
        rex = 8 if shape.bits == 64 and (row.w == 1 or shape.size == 64 and not row.words & {"d64", "f64"}) else 0
        last = 16 if shape.bits == 64 else 8
        kinds = {o.kind for o in row.operands}
        opcode, tail, relative = row.opcode, b"", False
        reg = rm = 0
        if row.plus:
            rm = self.register(last)
            rex |= rm >> 3
            opcode += rm & 7
        if row.modrm:
            if row.ext is not None:
                reg = row.ext
            else:
                reg = self.register(8 if kinds & {"P"} else last)
                rex |= reg >> 3 << 2
            if shape.form == "r":
                rm = row.rm if row.rm is not None else self.register(8 if kinds & {"Q", "N"} or any(o.text == "STi" for o in row.operands) else last)
                rex |= rm >> 3
                tail = bytes([0xC0 | (reg & 7) << 3 | rm & 7])
        if shape.bits == 64 and rnd.random() < 0.08:
            rex |= 0x40
        self.special(reg, rm, width)
        target = instance.target
        if row.modrm and shape.form == "m":
            tail, bits, relative = self.memory(reg & 7, target)
            rex |= bits
        escape = (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map]
        code = head + (bytes([0x40 | rex & 15]) if rex else b"") + escape + bytes([opcode]) + tail
        for operand in row.operands:
            if operand.text in optable.IMMEDIATES:
                data = self.immediate(operand.text, len(code))
                instance.immediate = int.from_bytes(data, "little")
                code += data
        if relative:                              # counts from the end of the instruction
            at = code.rindex(tail) + 1
            if tail[0] & 7 == 5:
                value = self.offset(target) - (CODE_LINEAR + instance.code_at + len(code)) & 0xFFFFFFFF
                code = code[:at] + struct.pack("<I", value) + code[at + 4:]
        instance.code = code
        instance.gpr = [value & self.mask for value in self.gpr]
        return instance

    def patch(self, linear: int, data: bytes) -> None:
        """Bytes in the data pages, as far as they lie in pages that can be written."""
        at = linear - DATA_LINEAR
        for start, end in ((0, READONLY), (READONLY + 0x1000, DATA_SIZE)):
            low, high = max(at, start), min(at + len(data), end)
            if low < high:
                self.instance.patches.append((low, data[low - at:high - at]))

    def special(self, reg: int, rm: int, width: int) -> None:
        """Registers and memory that make the row do something interesting."""
        row, rnd, gpr, shape = self.row, self.rnd, self.gpr, self.shape
        target, name = self.instance.target, row.mnemonic
        assert target is not None
        size = shape.size or 32
        operand = values.integer(rnd).to_bytes(8, "little") + values.integer(rnd).to_bytes(8, "little")
        if row.source == "sse.tab":
            operand = values.vector(rnd)
            if name in STATE_SIZES:
                operand = self.state_area()
        elif row.source == "x87.tab":
            operand = self.real(width)
        if name in ("DIV", "IDIV") and rnd.random() < 0.8:
            gpr[RDX] = rnd.choice((0, 1, MASK64, rnd.randrange(1000), gpr[RDX]))
            if size == 8:
                gpr[RAX] = rnd.getrandbits(rnd.choice((8, 12, 16)))
        if name == "CMPXCHG" and rnd.random() < 0.6:
            if shape.form == "r":
                gpr[rm] = gpr[RAX] if size > 8 else gpr[rm]
            else:
                operand = gpr[RAX].to_bytes(8, "little") * 2
        if name == "CMPXCHG8B" and rnd.random() < 0.6:
            operand = struct.pack("<II", gpr[RAX] & 0xFFFFFFFF, gpr[RDX] & 0xFFFFFFFF) * 2
        if name == "CMPXCHG16B":
            operand = struct.pack("<QQ", gpr[RAX], gpr[RDX] ^ (rnd.random() < 0.4))
        if any(o.text == "CL" for o in row.operands):
            gpr[RCX] = gpr[RCX] & ~0xFF | rnd.choice((0, 1, rnd.randrange(70), rnd.randrange(256))) & (~0x10 if self.double_shift else ~0)
        if name in ("BT", "BTS", "BTR", "BTC") and row.operands[1].kind == "G" and shape.form == "m":
            gpr[reg] = rnd.randrange(-4000, 4000) & MASK64 if rnd.random() < 0.9 else gpr[reg]
        if name in STRINGS:
            self.strings(width)
        elif name == "XLAT":
            segment = shape.prefix if shape.prefix in ("fs", "gs") else "ds"
            self.set_address(RBX, self.offset(target, segment) - rnd.randrange(256))
        elif name in ("maskmovq", "maskmovdqu"):
            # whether bytes that are masked out fault is the implementation's choice (SDM vol. 2, MASKMOVQ)
            self.set_address(RDI, self.offset(DATA_LINEAR + 0x400 + rnd.randrange(0x800)))
        elif name in ("LOOP", "LOOPE", "LOOPNE", "JCXZ"):
            self.set_address(RCX, rnd.choice((0, 1, 2, values.integer(rnd))))
        elif name in ("BSF", "BSR") and rnd.random() < 0.2:
            operand = bytes(16)
            if shape.form == "r":
                gpr[rm] = rnd.choice((0, gpr[rm] & ~((1 << size) - 1)))
        if name in STACK and rnd.random() < 0.12:
            gpr[RSP] = pick_target(rnd, 8, False, shape.bits) + rnd.choice((0, 4, 8)) & MASK64
        if name in ("CALL", "JMP") and row.operands[0].kind == "E":
            place = self.code_base() + self.code_target(16, 0x700)
            if rnd.random() < 0.1:
                place = rnd.choice((0x800000000000, DATA_LINEAR + 0x500, MASK64, 1 << 63, 0xFFFF800000000000))
            operand = struct.pack("<QQ", place & MASK64, 0)
            if shape.form == "r":
                gpr[rm] = place & MASK64
        if name == "RET":
            place = self.code_base() + self.code_target(16, 0x700)
            if rnd.random() < 0.1:
                place = rnd.choice((0x800000000000, DATA_LINEAR + 0x500, MASK64))
            self.patch(gpr[RSP], struct.pack("<Q", place))
        elif name == "POPF":
            self.patch(gpr[RSP], struct.pack("<Q", rnd.getrandbits(64) & ~0x204000))
        elif name == "LEAVE":
            gpr[RBP] = rnd.choice((self.stack + 16, pick_target(rnd, 8, False, shape.bits)))
        elif name == "ENTER":
            gpr[RBP] = self.stack + rnd.choice((0, 40, 0x200))
        if row.modrm and shape.form == "m" or any(o.kind == "O" for o in row.operands):
            self.patch(target, operand[:max(width, 1)])

    def real(self, width: int) -> bytes:
        """A memory operand of x87: reals, integers or decimals."""
        rnd, name = self.rnd, self.row.mnemonic
        if name == "fbld":
            return values.packed_bcd(rnd)
        if width == 10:
            return values.extended(rnd)
        if name == "fldcw":
            return struct.pack("<H", rnd.choice((0x37F, 0x37F, rnd.getrandbits(16))))
        if "i" in name[1:3]:
            return values.integer(rnd).to_bytes(8, "little")
        return struct.pack("<I", values.single(rnd)) if width == 4 else struct.pack("<Q", values.double(rnd))

    def state_area(self) -> bytes:
        """What FXRSTOR and XRSTOR find; the masks in EDX:EAX name x87 and SSE alone, for the host has more."""
        rnd = self.rnd
        self.gpr[RAX], self.gpr[RDX] = rnd.randrange(4), 0
        header = struct.pack("<QQ48x", rnd.choice((0, 1, 2, 3, 3, 3, 1 << 62)), rnd.random() < 0.02)
        return values.fx_image(rnd, True)[:512] + header

    def strings(self, width: int) -> None:
        rnd, gpr, shape = self.rnd, self.gpr, self.shape
        segment = shape.prefix if shape.prefix in ("fs", "gs") else "ds"
        source = pick_target(rnd, width, False, shape.bits)
        destination = rnd.choice((pick_target(rnd, width, False, shape.bits), source + rnd.randrange(-20, 20)))
        self.instance.target = destination
        self.set_address(RSI, self.offset(source, segment))
        self.set_address(RDI, self.offset(destination))
        self.set_address(RCX, rnd.choice((0, 1, 2, 3, 8, rnd.randrange(64), rnd.randrange(600), 0x10000)))
        if rnd.random() < 0.3:
            self.instance.rflags ^= 0x400
        kind = rnd.randrange(3)
        if kind == 0:                              # equal for a while
            run = rnd.randbytes(width) * rnd.randrange(1, 9)
            self.patch(source, run)
            self.patch(destination, run)
            gpr[RAX] = int.from_bytes((run * 8)[:8], "little")
        elif kind == 1:
            self.patch(destination, gpr[RAX].to_bytes(8, "little")[:width])


USES = {"o": 0x800, "b": 1, "z": 0x40, "be": 0x41, "s": 0x80, "p": 4, "l": 0x880, "le": 0x8C0}


def uses(row: optable.Row) -> int:
    """Flags that a row reads."""
    if row.condition is not None:
        return USES[list(USES)[row.condition >> 1]]
    return row.flags("use")


def sequence(choices: list[Shape], rnd: random.Random) -> Instance:
    """Several instructions that hand flags and registers on: register forms, and memory at fixed addresses."""
    total = Instance(choices[0], rflags=0x202 | rnd.getrandbits(12) & STATUS)
    total.gpr = [values.integer(rnd) for _ in range(16)]
    total.gpr[RSP] = DATA_LINEAR + 0xC00
    undefined, skipped, at = 0, 0, total.code_at
    few = rnd.sample(range(16), 3)
    for _ in range(rnd.randrange(2, 8)):
        shape = rnd.choice(choices)
        if uses(shape.row) & (undefined | skipped):
            continue
        encoder = Encoder(shape, rnd)
        encoder.few = few
        encoder.fixed = True
        encoder.instance.code_at = at
        instance = encoder.build()
        if "jump" in shape.row.words:
            skipped |= undefined
        if "maybe" not in shape.row.words:
            undefined &= ~shape.row.flags("mod")
        undefined |= shape.row.flags("undef")
        if shape.row.mnemonic in ("ROL", "ROR", "RCL", "RCR", "SHL", "SAL", "SHR", "SAR", "SHLD", "SHRD"):
            undefined |= 0x800 if shape.row.operands[-1].text == "1" else 0x801
            if shape.row.operands[-1].text == "1":
                undefined &= ~0x801
        total.code += instance.code
        at += len(instance.code)
        total.patches = instance.patches
    total.undefined = undefined | skipped
    return total
