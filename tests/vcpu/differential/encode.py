"""A random instance of a shape: the instruction's bytes, and registers and memory that lead it where it
should go."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

from tests.vcpu.differential import special, values
from tests.vcpu.differential.machine import (
    CODE_LINEAR,
    CODE_SIZE,
    DATA_LINEAR,
    DATA_SIZE,
    FS_BASE,
    GS_BASE,
    LDT_CODE16,
    LDT_DATA,
    READONLY,
    USER32,
    USER64,
    USER_DATA,
)
from tests.vcpu.differential.shapes import PREFIXES, STACK, STATE_BYTES, STRINGS, Shape
from vcpu import optable

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
MASK64 = values.MASK64
BEHIND = 0x800 + 100  # a sequence has less than 100 bytes
TF, AC = 1 << 8, 1 << 18
# The formulas of 16-bit addressing by ModRM.rm, SDM vol. 2 table 2-1; those with BP have SS for a default
FORMULAS16 = {0: (RBX, RSI), 1: (RBX, RDI), 4: (RSI, None), 5: (RDI, None), 7: (RBX, None)}


@dataclass
class Instance:
    """One case, as far as it differs from others."""

    shape: Shape
    code: bytes = b""
    code_at: int = 0x800  # from CODE_LINEAR
    gpr: list[int] = field(default_factory=list)
    rflags: int = 0x202
    patches: list[tuple[int, bytes]] = field(default_factory=list)  # from DATA_LINEAR
    data_segment: int = USER_DATA  # DS and ES
    stack_segment: int = USER_DATA
    target: int = 0  # linear address of the memory operand
    immediate: int = 0
    fx: bytes = b""
    undefined: int = 0  # flags that a sequence leaves undefined,
    undefined_midway: int = 0  # and those that are so anywhere in it

    @property
    def cs(self) -> int:
        return {64: USER64, 32: USER32, 16: LDT_CODE16}[self.shape.bits]

    @property
    def rip(self) -> int:
        return self.code_at + (0 if self.shape.bits == 16 else CODE_LINEAR)


def pick_target(rnd: random.Random, shape: Shape, aim: str = "") -> int:
    """Linear address of a memory operand: in order, across pages, read-only, not there, not canonical.
    aim: "plain" or "fault" where it must be the one or the other."""
    width = shape.width
    # LOCK across cache lines is slow on hosts, or trapped there
    lock = shape.prefix == "lock" or shape.row.mnemonic == "XCHG"
    middle = DATA_LINEAR + 0x400 + rnd.randrange(0x400)
    if aim == "plain":
        return middle & ~63
    kind = rnd.randrange(24) if aim != "fault" else rnd.choice((20, 21, 22))
    if kind < 12 or lock and kind < 18:
        return (
            middle & ~63
            if kind < 2
            else middle & ~15
            if lock or kind < 6
            else middle & -max(width & -width, 1)
        )
    if lock:
        return DATA_LINEAR + (READONLY + 64 if kind < 20 else DATA_SIZE)
    if kind < 16:
        return middle
    if kind < 20:
        edge = (0x1000, 0x1000, READONLY, READONLY + 0x1000)[kind - 16]
        return DATA_LINEAR + edge - rnd.randrange(width + 1)
    if kind == 20:
        return DATA_LINEAR + DATA_SIZE - (0 if aim else rnd.randrange(width + 1))
    if kind == 21:
        return DATA_LINEAR - (16 if aim else rnd.randrange(1, 9))
    if kind == 22 and not aim:
        return DATA_LINEAR + READONLY + rnd.randrange(0x800)
    if shape.bits != 64 or aim:
        return DATA_LINEAR + DATA_SIZE + 64
    if width >= 16:  # aligned: else, on the stack, it is #GP or #SS
        return 0xFFFF7FFFFFFFFFC0
    near = 0x800000000000 - (0 if shape.row.mnemonic in STATE_BYTES else rnd.randrange(9))
    return rnd.choice((0x8000000000000000, near, 0xFFFF7FFFFFFFFFFF, DATA_LINEAR + (1 << 32)))


class Encoder:
    """Builds one instance; special.py sees to what the mnemonic needs."""

    def __init__(
        self,
        shape: Shape,
        rnd: random.Random,
        aim: str = "",
        registers: list[int] | None = None,
        at: int = 0x800,
    ) -> None:
        """registers: the only ones to be encoded; then the instruction is one of a sequence, which starts
        at `at`."""
        self.shape, self.row, self.rnd, self.aim = shape, shape.row, rnd, aim
        self.sequence = registers is not None
        self.registers = list(range(16)) if registers is None else registers
        # outside 64-bit mode the upper halves are nobody's business, SDM vol. 1 section 3.4.1.1
        self.mask = MASK64 if shape.bits == 64 else 0xFFFFFFFF
        self.gpr = [values.integer(rnd) & self.mask for _ in range(16)]
        self.stack = (
            DATA_LINEAR
            + 0xC00
            + (0 if aim == "plain" else rnd.choice((0, 0, 0, 8, 2, 4, 1, 7, 0x3E8, -0x400, 0x3FF)))
        )
        self.gpr[RSP] = self.stack
        self.instance = Instance(
            shape,
            code_at=at,
            rflags=0x202 | rnd.getrandbits(12) & values.STATUS | (rnd.random() < 0.05) << 10,
        )
        # Single-step. What the flags are between iterations of REP, and whether RF is seen behind IRET, is
        # not said.
        unsaid = shape.prefix in ("rep", "repne") or self.row.mnemonic == "IRET"
        if not aim and not self.sequence and rnd.random() < 0.02 and not unsaid:
            self.instance.rflags |= TF
        self.address_size = shape.bits
        if shape.prefix == "a" or shape.bits != 64 and not self.sequence and rnd.random() < 0.1:
            self.address_size = {64: 32, 32: 16, 16: 32}[shape.bits]
        # 16-bit addresses reach the data pages only through segments with a base
        often = (
            (shape.bits == 16)
            if self.sequence
            else 0.2
            if self.address_size == 32
            else 1
            if aim or self.row.source != "integer.tab"
            else 0.85
        )
        if shape.bits != 64 and rnd.random() < often:
            self.instance.data_segment = LDT_DATA
            # 16-bit stack pointer; a far call counts with that of the mode it goes to
            if not self.sequence and aim != "fault" and self.row.mnemonic != "CALLF" and rnd.random() < 0.5:
                self.instance.stack_segment = LDT_DATA
        self.instance.target = self._target()
        self.reserved: set[int] = set()  # registers with a meaning of their own
        self.operand = b""  # what the memory operand holds

    def _target(self) -> int:
        rnd, shape, row, instance = self.rnd, self.shape, self.row, self.instance
        if row.source in ("sse.tab", "x87.tab"):
            instance.fx = values.fx_image(rnd, row.source == "x87.tab" or "x87" in row.words, bool(self.aim))
        if self.sequence:
            return DATA_LINEAR + 0x400 + 16 * rnd.randrange(4)
        target = pick_target(rnd, shape, self.aim)
        if (
            row.source == "x87.tab"
            and row.operands
            and row.operands[0].access != "r"
            and (shape.width == 10 or instance.fx[0] & 0x3F != 0x3F)
            and self.aim != "fault"
        ):
            # The hosts seen look at numeric exceptions before the operand of an x87 store, and store eight
            # bytes of ten before they find that the rest faults; ours is the other order, which the manuals
            # permit as well.
            return min(max(target, DATA_LINEAR), DATA_LINEAR + 0x1000)
        if row.mnemonic == "BOUND" and self.aim != "fault":
            return min(target, DATA_LINEAR + 0x1000)  # one bound may be compared before the other is read
        # Alignment checks only where no other fault competes; which of 16-byte operands are checked, and
        # whether FXSAVE and its like raise #AC or #GP, is left open by the manuals.
        if (
            not self.aim
            and rnd.random() < 0.03
            and shape.width < 16
            and row.mnemonic not in {*STATE_BYTES, "maskmovq", "maskmovdqu"}
        ):
            instance.rflags |= AC
            return DATA_LINEAR + 0x400 + rnd.randrange(64)
        return target

    # ---- addresses ----
    @property
    def segment(self) -> str:
        return self.shape.prefix if self.shape.prefix in ("fs", "gs") else "ds"

    def offset(self, linear: int, segment: str = "") -> int:
        """Of a linear address in the operand's segment."""
        bases = {
            "fs": FS_BASE,
            "gs": GS_BASE,
            "ds": DATA_LINEAR if self.instance.data_segment == LDT_DATA else 0,
        }
        return linear - bases[segment or self.segment] & MASK64

    def set_address(self, register: int, value: int) -> None:
        """A register as an address of the address size; what lies above is random."""
        mask = (1 << self.address_size) - 1
        self.gpr[register] = value & mask | self.gpr[register] & ~mask & MASK64

    def _memory(self, reg: int) -> tuple[bytes, int, bool]:
        """ModRM, SIB and displacement for the operand at the target; REX bits; whether it is RIP-relative."""
        rnd, shape = self.rnd, self.shape
        offset = self.offset(self.instance.target)
        if self.address_size == 16:
            return self._memory16(reg, offset), 0, False
        kind = rnd.randrange(2 if self.sequence else 10)
        if kind == 0 and self.segment == "ds":
            return bytes([reg << 3 | 5]) + struct.pack("<I", offset & 0xFFFFFFFF), 0, shape.bits == 64
        if kind < 2:  # SIB without base and index
            return bytes([reg << 3 | 4, 0x25]) + struct.pack("<I", offset & 0xFFFFFFFF), 0, False
        last = 16 if shape.bits == 64 else 8
        base, scale = rnd.randrange(last), rnd.randrange(4)
        if self._taken(base):
            base = RSI if RSI not in self.reserved else RDI
        mod = rnd.choice((1, 2) if base & 7 == 5 else (0, 1, 1, 2))
        disp = (
            0
            if mod == 0
            else rnd.randrange(-128, 128)
            if mod == 1
            else rnd.choice((rnd.randrange(-4096, 4096), rnd.getrandbits(31)))
        )
        index = None
        if kind < 6:
            index = rnd.choice([r for r in range(last) if r not in (RSP, base) and not self._taken(r)])
            if rnd.random() < 0.7:
                self.set_address(index, rnd.randrange(64))
        if base == RSP:
            disp = max(min(disp, 127), -128)  # the stack stays about where it was
        self.set_address(base, offset - disp - (0 if index is None else self.gpr[index] << scale))
        tail = b"" if mod == 0 else struct.pack("<b" if mod == 1 else "<i", disp)
        if index is None and base & 7 != 4:
            return bytes([mod << 6 | reg << 3 | base & 7]) + tail, base >> 3, False
        number = 4 if index is None else index
        return (
            bytes([mod << 6 | reg << 3 | 4, scale << 6 | (number & 7) << 3 | base & 7]) + tail,
            base >> 3 | number >> 3 << 1,
            False,
        )

    def _taken(self, register: int) -> bool:
        """Must not become part of an address: implied operands, and registers whose default segment has
        another base."""
        if register in self.reserved or self.row.mnemonic in STATE_BYTES and register in (RAX, RDX):
            return True
        if register == RSP and self.row.mnemonic in STACK:
            return True
        return register in (RSP, RBP) and self.instance.data_segment == LDT_DATA

    def _memory16(self, reg: int, offset: int) -> bytes:
        rnd = self.rnd
        formulas = [rm for rm, registers in FORMULAS16.items() if not self.reserved & set(registers)]
        rm, mod = rnd.choice((6, *formulas)) if not self.sequence else 6, rnd.randrange(3)
        if rm == 6:
            return bytes([reg << 3 | 6]) + struct.pack("<H", offset & 0xFFFF)
        disp = 0 if mod == 0 else rnd.randrange(-128, 128)
        first, second = FORMULAS16[rm]
        self.set_address(first, offset - disp - (0 if second is None else self.gpr[second]))
        return bytes([mod << 6 | reg << 3 | rm]) + (
            b"" if mod == 0 else struct.pack("<b" if mod == 1 else "<h", disp)
        )

    # ---- branch targets, immediates ----
    def code_target(self, length: int, reach: int) -> int:
        """A place in the code pages to branch to, counted from them: not in the instruction itself, in a
        sequence behind all of it."""
        begin = self.instance.code_at
        if self.sequence:
            return self.rnd.randrange(BEHIND, begin + length + reach)
        while True:
            at = begin + length + self.rnd.randrange(-reach, reach)
            if 0x10 <= at < CODE_SIZE - 0x10 and not begin <= at < begin + length:
                return at

    def code_address(self, reach: int = 0x700) -> int:
        """An instruction pointer to go to."""
        return self.code_target(16, reach) + (0 if self.shape.bits == 16 else CODE_LINEAR)

    def _immediate(self, kind: str, length: int) -> bytes:
        """length: bytes of the instruction up to it."""
        rnd, size = self.rnd, self.shape.size
        wide = 2 if size == 16 else 4
        if kind in ("Ib", "Ibs"):
            return bytes([special.byte_immediate(self)])
        if kind == "Iw":
            return struct.pack(
                "<H", rnd.choice((0, 8, 16, rnd.randrange(256), rnd.getrandbits(16) if not self.aim else 24))
            )
        if kind in ("Iz", "Iv"):
            return values.integer(rnd).to_bytes(8, "little")[: wide if kind == "Iz" else size // 8]
        if kind == "Jb":
            return struct.pack("<b", self.code_target(length + 1, 126) - self.instance.code_at - length - 1)
        if kind == "Jz":
            wide = 4 if self.shape.bits == 64 else wide
            return struct.pack(
                "<i", self.code_target(length + wide, 0x600) - self.instance.code_at - length - wide
            )[:wide]
        if kind == "Ap":
            selector, offset = special.far_target(self)
            return offset.to_bytes(8, "little")[:wide] + struct.pack("<H", selector)
        return self.offset(self.instance.target).to_bytes(8, "little")[: self.address_size // 8]

    # ---- the whole ----
    def _prefixes(self) -> bytes:
        shape, row, rnd = self.shape, self.row, self.rnd
        prefixes = [PREFIXES[shape.prefix]] if shape.prefix in PREFIXES else []
        if self.address_size != shape.bits:
            prefixes.append(b"\x67")
        default = 16 if shape.bits == 16 else 32
        fixed = row.prefix in ("66", "np") or any(operand.size == "y" for operand in row.operands)
        if not fixed and (
            shape.size == 16 if shape.bits == 64 else shape.size in (16, 32) and shape.size != default
        ):
            prefixes.append(b"\x66")
        if not self.aim and not self.sequence and row.source == "integer.tab" and rnd.random() < 0.04:
            prefixes += self._idle_prefixes()
        rnd.shuffle(prefixes)
        return b"".join(prefixes) + (b"" if row.prefix in ("", "np") else bytes([int(row.prefix, 16)]))

    def _idle_prefixes(self) -> list[bytes]:
        """Prefixes that change nothing, but that an instruction of more than 15 bytes is #GP(0)."""
        choices = (b"\x26", b"\x2e", b"\x36", b"\x3e") if self.shape.bits == 64 else (b"\x3e",)
        return self.rnd.choices(choices, k=self.rnd.choice((1, 2, 3, self.rnd.randrange(6, 15))))

    def _registers(self) -> tuple[int, int]:
        """ModRM.reg and the register in ModRM.rm or the opcode."""
        row, rnd = self.row, self.rnd
        kinds = {operand.kind for operand in row.operands}
        last = 16 if self.shape.bits == 64 else 8
        reg = row.ext if row.ext is not None else rnd.choice(self.registers) % (8 if "P" in kinds else last)
        small = kinds & {"Q", "N"} or any(operand.text == "STi" for operand in row.operands)
        rm = row.rm if row.rm is not None else rnd.choice(self.registers) % (8 if small else last)
        if row.mnemonic in ("DIV", "IDIV") and self.aim == "plain":
            rm = RBX  # no part of the dividend
            self.reserved = {RAX, RDX}
        elif row.mnemonic in ("BOUND", "BT", "BTS", "BTR", "BTC"):
            self.reserved = {reg}
        return special.register(self, reg), rm

    def build(self) -> Instance:
        shape, row, rnd, instance = self.shape, self.row, self.rnd, self.instance
        if (
            not self.sequence
            and self.aim != "plain"
            and rnd.random() < 0.1
            and row.mnemonic not in special.NEAR_END
        ):
            instance.code_at = rnd.choice((0x1000, CODE_SIZE)) - rnd.randrange(1, 9)
        head = self._prefixes()
        reg, rm = self._registers()
        rex = (
            8
            if shape.bits == 64 and (row.w == 1 or shape.size == 64 and not row.words & {"d64", "f64"})
            else 0
        )
        opcode, tail, relative = row.opcode, b"", False
        if row.plus:
            rex, opcode = rex | rm >> 3, opcode + (rm & 7)
        elif shape.form == "r":
            rex, tail = rex | rm >> 3, bytes([0xC0 | (reg & 7) << 3 | rm & 7])
        if row.modrm:
            rex |= reg >> 3 << 2
        if shape.bits == 64 and rnd.random() < 0.08:
            rex |= 0x40
        special.prepare(self, reg, rm)
        if shape.form == "m":
            tail, bits, relative = self._memory(reg & 7)
            rex |= bits
        if head and shape.bits == 64 and not self.aim and rnd.random() < 0.02:
            head = bytes([0x40 | rnd.randrange(16)]) + head  # REX counts only as the last prefix
        code = head + (bytes([0x40 | rex & 15]) if rex else b"")
        code += (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a")[row.map] + bytes([opcode])
        displacement = len(code) + 1
        code += tail
        for operand in row.operands:
            if operand.text in optable.IMMEDIATES:
                data = self._immediate(operand.text, len(code))
                instance.immediate = int.from_bytes(data, "little")
                code += data
        if relative:  # to the end of the instruction
            value = self.offset(instance.target) - (CODE_LINEAR + instance.code_at + len(code)) & 0xFFFFFFFF
            code = code[:displacement] + struct.pack("<I", value) + code[displacement + 4 :]
        if shape.form == "m" or any(operand.kind == "O" for operand in row.operands):
            self.patch(instance.target, self.operand[: shape.width])
        if instance.stack_segment == LDT_DATA:
            for register in (RSP, RBP) if row.mnemonic in ("ENTER", "LEAVE") else (RSP,):
                self.gpr[register] = (self.gpr[register] - DATA_LINEAR) & 0xFFFF | rnd.getrandbits(16) << 16
        instance.code = code
        instance.gpr = [value & self.mask for value in self.gpr]
        return instance

    def patch(self, linear: int, data: bytes) -> None:
        """Bytes in the data pages, as far as they lie in pages that can be written."""
        at = linear - DATA_LINEAR
        for start, end in ((0, READONLY), (READONLY + 0x1000, DATA_SIZE)):
            low, high = max(at, start), min(at + len(data), end)
            if low < high:
                self.instance.patches.append((low, data[low - at : high - at]))


# ---- sequences ----

USES = dict(
    zip(
        ("o", "b", "z", "be", "s", "p", "l", "le"), (0x800, 1, 0x40, 0x41, 0x80, 4, 0x880, 0x8C0), strict=True
    )
)
# What a sequence has no use for: it leaves the sequence, needs its own registers, or hangs on memory that
# others changed
ALONE = (
    STRINGS
    | STACK
    | set(STATE_BYTES) - {"fldenv", "frstor"}
    | set(
        "XLAT DIV IDIV AAM JMP LOOP LOOPE LOOPNE JCXZ BOUND STD CLD LES LDS CALLF JMPF INT3 INT INTO INT1 "
        "UD0 UD1 UD2 CLFLUSH maskmovq maskmovdqu".split()
    )
)


def uses(row: optable.Row) -> int:
    """Flags that a row reads."""
    return row.flags("use") if row.condition is None else list(USES.values())[row.condition >> 1]


def sequential(shape: Shape) -> bool:
    """Fit to be one of several."""
    row = shape.row
    bit_string = (
        row.mnemonic in ("BT", "BTS", "BTR", "BTC") and row.operands[1].kind == "G" and shape.form == "m"
    )
    return (
        shape.prefix == ""
        and row.mnemonic not in ALONE
        and row.source != "system.tab"
        and not bit_string
        and not shape.refused
    )


def sequence(choices: list[Shape], rnd: random.Random) -> Instance:
    """Two to eight instructions that hand on registers, flags and memory, sometimes as the body of a loop."""
    total = Instance(
        choices[0],
        rflags=0x202 | rnd.getrandbits(12) & values.STATUS,
        fx=values.fx_image(rnd, True, rnd.random() < 0.7),
    )
    total.gpr = [values.integer(rnd) for _ in range(16)]
    total.gpr[RSP] = DATA_LINEAR + 0xC00
    last = 16 if total.shape.bits == 64 else 8
    registers = rnd.sample([r for r in range(last) if r not in (RCX, RSP, RBP)], 3)  # 5 is CH, too
    used, counting = 0, False
    undefined, skipped = 0, 0  # flags: at this place, and where a branch may have left
    for _ in range(rnd.randrange(2, 9)):
        shape = rnd.choice(choices)
        if uses(shape.row) & (undefined | skipped) or len(total.code) > 80:
            continue
        instance = Encoder(shape, rnd, "", registers, total.code_at + len(total.code)).build()
        counting |= any(operand.text == "ECX" for operand in shape.row.operands)
        if "jump" in shape.row.words:
            skipped |= undefined
        undefined, used = special.flow(shape.row, undefined), used | uses(shape.row)
        total.code += instance.code
        total.patches, total.data_segment = instance.patches, instance.data_segment
        total.undefined_midway |= undefined
    if rnd.random() < 0.4 and not used & (undefined | skipped) and not counting:
        total.code += bytes([0xE2, (-len(total.code) - 2) & 0xFF])
        total.gpr[RCX] = rnd.randrange(1, 5)
    total.undefined = undefined | skipped
    if total.shape.bits != 64:
        total.gpr = [value & 0xFFFFFFFF for value in total.gpr]
    return total
