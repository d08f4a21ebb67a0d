"""Disassembler over the opcode table, Intel syntax. It knows what the core knows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from vcpu.optable import CONDITIONS as TABLE_CONDITIONS
from vcpu.optable import Operand, Row, load

LONGEST = 15  # bytes, SDM vol. 2 section 2.3.11
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
SEGMENT_PREFIXES = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
WORDS = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
BYTES = ("al", "cl", "dl", "bl", "ah", "ch", "dh", "bh")
BYTES_REX = ("al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil")
MEMORY16 = (("bx", "si"), ("bx", "di"), ("bp", "si"), ("bp", "di"), ("si",), ("di",), ("bp",), ("bx",))
POINTERS = {1: "byte ", 2: "word ", 4: "dword ", 6: "fword ", 8: "qword ", 10: "tbyte ", 16: "xmmword "}
#: bytes of a memory operand by the table's size letters; v, z and y depend on prefixes
SIZES = {"b": 1, "w": 2, "d": 4, "q": 8, "t": 10, "x": 16, "dq": 16, "ps": 16, "pd": 16, "p": 6, "a": 8}
#: mnemonics that name the operand size (16, 32, 64 bits)
SIZED = {
    "CBW": ("cbw", "cwde", "cdqe"),
    "CWD": ("cwd", "cdq", "cqo"),
    "PUSHA": ("pushaw", "pushad", ""),
    "POPA": ("popaw", "popad", ""),
    "PUSHF": ("pushf", "pushfd", "pushfq"),
    "POPF": ("popf", "popfd", "popfq"),
    "IRET": ("iret", "iretd", "iretq"),
}
#: the usual names of the sixteen conditions
CONDITIONS = ("o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g")
STRINGS = {"MOVS", "CMPS", "STOS", "LODS", "SCAS", "INS", "OUTS"}


class _Short(Exception):
    """The bytes end within the instruction."""


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data[:LONGEST], 0

    def take(self, size: int, signed: bool = False) -> int:
        piece = self.data[self.at : self.at + size]
        if len(piece) < size:
            raise _Short
        self.at += size
        return int.from_bytes(piece, "little", signed=signed)


@dataclass
class _Prefixes:
    rex: int = 0
    segment: str = ""
    repeat: int = 0
    operand: bool = False
    address: bool = False
    lock: bool = False


@cache
def _rows() -> dict[tuple[int, int], list[Row]]:
    """By map and opcode, those that ask for more first."""
    table: dict[tuple[int, int], list[Row]] = {}
    for row in load():
        for opcode in range(row.opcode, row.opcode + (8 if row.plus else 1)):
            table.setdefault((row.map, opcode), []).append(row)
    for rows in table.values():
        rows.sort(
            key=lambda row: (row.rm is None, not row.mod, row.ext is None, not row.prefix, row.w is None)
        )
    return table


class _Instruction:
    """One instruction under way. text() after construction; ValueError: invalid."""

    def __init__(self, data: bytes, address: int, bits: int) -> None:
        self.bytes, self.address, self.bits = _Bytes(data), address, bits
        self.prefixes = self._take_prefixes()
        opcode, opcode_map = self.bytes.take(1), 0
        if opcode == 0x0F:
            opcode, opcode_map = self.bytes.take(1), 1
            if opcode in (0x38, 0x3A):
                opcode_map, opcode = (2 if opcode == 0x38 else 3), self.bytes.take(1)
        self.opcode, self.modrm = opcode, -1
        rows = _rows().get((opcode_map, opcode), [])
        if rows and rows[0].modrm:
            self.modrm = self.bytes.take(1)
        self.row = next((row for row in rows if self._fits(row)), None)
        if self.row is None:
            raise ValueError
        self.memory = self._take_memory() if self.modrm >= 0 and not self._register_form() else ""

    # ---- finding the row ----
    def _take_prefixes(self) -> _Prefixes:
        found = _Prefixes()
        while True:
            byte = self.bytes.take(1)
            rex = 0
            if byte in SEGMENT_PREFIXES:
                if self.bits != 64 or byte >= 0x64:
                    found.segment = SEGMENT_PREFIXES[byte]
            elif byte in (0xF2, 0xF3):
                found.repeat = byte
            elif byte in (0x66, 0x67, 0xF0):
                setattr(found, {0x66: "operand", 0x67: "address", 0xF0: "lock"}[byte], True)
            elif self.bits == 64 and byte & 0xF0 == 0x40:
                rex = byte
            else:
                self.bytes.at -= 1
                return found
            found.rex = rex

    def _register_form(self) -> bool:
        assert self.row is not None
        return self.modrm >= 0xC0 or any(o.kind in "CD" for o in self.row.operands)

    def _fits(self, row: Row) -> bool:
        p = self.prefixes
        wanted = {
            "": True,
            "np": not p.repeat and not p.operand,
            "66": p.operand and not p.repeat,
            "f3": p.repeat == 0xF3,
            "f2": p.repeat == 0xF2,
        }
        if not row.valid(self.bits) or not wanted[row.prefix] or row.w not in (None, p.rex >> 3 & 1):
            return False
        if not row.modrm:
            return True
        register = self.modrm >= 0xC0 or any(o.kind in "CD" for o in row.operands)
        return (
            row.ext in (None, self.modrm >> 3 & 7)
            and row.rm in (None, self.modrm & 7)
            and ("r" if register else "m") in row.forms()
        )

    # ---- sizes in bytes ----
    @property
    def size(self) -> int:
        assert self.row is not None
        if self.bits != 64:
            return 2 if (self.bits == 16) != self.prefixes.operand else 4
        if "f64" in self.row.words or self.prefixes.rex & 8:
            return 8
        return 2 if self.prefixes.operand else 8 if "d64" in self.row.words else 4

    @property
    def address_size(self) -> int:
        if self.bits == 64:
            return 4 if self.prefixes.address else 8
        return 2 if (self.bits == 16) != self.prefixes.address else 4

    def _operand_size(self, operand: Operand) -> int:
        letters = operand.size
        if letters == "v":
            return self.size
        if letters == "z":
            return min(self.size, 4)
        if letters == "y":
            return 8 if self.prefixes.rex & 8 else 4
        return SIZES.get(letters, 0)

    # ---- operands ----
    def _register(self, number: int, size: int) -> str:
        if size == 1:
            names = BYTES_REX if self.prefixes.rex else BYTES
            return names[number] if number < 8 else f"r{number}b"
        if number >= 8:
            return f"r{number}" + {2: "w", 4: "d", 8: ""}[size]
        return {2: "", 4: "e", 8: "r"}[size] + WORDS[number]

    def _reg(self) -> int:
        return self.modrm >> 3 & 7 | (self.prefixes.rex & 4) << 1

    def _rm(self) -> int:
        return self.modrm & 7 | (self.prefixes.rex & 1) << 3

    def _take_memory(self) -> str:
        """The bracketed part."""
        mod, rm, rex, size = self.modrm >> 6, self.modrm & 7, self.prefixes.rex, self.address_size
        parts: list[str] = []
        if size == 2:
            absolute = mod == 0 and rm == 6
            displacement = self.bytes.take(2) if absolute else self.bytes.take(mod, signed=True) if mod else 0
            return self._bracket([] if absolute else list(MEMORY16[rm]), displacement)
        base = rm
        if rm == 4:
            sib = self.bytes.take(1)
            base, index = sib & 7, sib >> 3 & 7 | (rex & 2) << 2
            if index != 4:
                scale = 1 << (sib >> 6)
                parts.append(self._register(index, size) + (f"*{scale}" if scale > 1 else ""))
        if mod == 0 and base == 5:
            displacement = self.bytes.take(4, signed=True)
            if rm == 5 and self.bits == 64:
                parts.append("rip" if size == 8 else "eip")
            elif not parts:
                displacement &= (1 << 8 * size) - 1
        else:
            parts.insert(0, self._register(base | (rex & 1) << 3, size))
            displacement = self.bytes.take({0: 0, 1: 1, 2: 4}[mod], signed=True) if mod else 0
        return self._bracket(parts, displacement)

    def _bracket(self, parts: list[str], displacement: int) -> str:
        text = " + ".join(parts)
        if not parts:
            text = f"{displacement:#x}"
        elif displacement:
            text += f" {'-' if displacement < 0 else '+'} {abs(displacement):#x}"
        return (self.prefixes.segment + ":" if self.prefixes.segment else "") + f"[{text}]"

    def _target(self, size: int) -> str:
        offset = self.bytes.take(size, signed=True)
        mask = (1 << (64 if self.bits == 64 else 8 * self.size)) - 1
        return f"{self.address + self.bytes.at + offset & mask:#x}"

    def _immediate(self, operand: Operand) -> str:
        if operand.size == "bs":
            value = self.bytes.take(1, signed=True)
            width = self.size
        else:
            width = self._operand_size(operand)
            value = self.bytes.take(width, signed=operand.size == "z")
            width = self.size if operand.size == "z" else width
        return f"{value & (1 << 8 * width) - 1:#x}"

    def _operand(self, operand: Operand) -> str:
        kind, size = operand.kind, self._operand_size(operand)
        if kind == "fixed":
            return self._fixed(operand.size)
        if kind in "EQWM" and self.memory:
            return (
                POINTERS.get(size, "") * (self.row is not None and self.row.mnemonic != "LEA") + self.memory
            )
        match kind:
            case "E" | "R":
                if (
                    self.bits == 64
                    and self.row is not None
                    and any(o.kind in "CD" for o in self.row.operands)
                ):
                    size = 8  # moves from and to control and debug registers
                return self._register(self._rm(), size or self.size)
            case "G":
                return self._register(self._reg(), size or self.size)
            case "Z":
                return self._register(self.opcode & 7 | (self.prefixes.rex & 1) << 3, size)
            case "V":
                return f"xmm{self._reg()}"
            case "W" | "U":
                return f"xmm{self._rm()}"
            case "P":
                return f"mm{self._reg() & 7}"
            case "Q" | "N":
                return f"mm{self._rm() & 7}"
            case "S":
                if self._reg() & 7 >= len(SEGMENTS):
                    raise ValueError
                return SEGMENTS[self._reg() & 7]
            case "C" | "D":
                return f"{kind.lower()}r{self._reg()}"
            case "I":
                return self._immediate(operand)
            case "J":
                return self._target(1 if operand.size == "b" else 2 if self.size == 2 else 4)
            case "O":
                segment = self.prefixes.segment + ":" if self.prefixes.segment else ""
                return f"{segment}[{self.bytes.take(self.address_size):#x}]"
            case "A":
                offset = self.bytes.take(min(self.size, 4))
                return f"{self.bytes.take(2):#x}:{offset:#x}"
            case _:
                return ""

    def _fixed(self, name: str) -> str:
        if name in ("rAX", "rBX", "rCX", "rDX", "eAX"):
            size = min(self.size, 4) if name == "eAX" else self.size
            return self._register("ACDB".index(name[1]), size)
        if name in ("ST0", "STi"):
            return "st(0)" if name == "ST0" else f"st({self.modrm & 7})"
        return "" if name == "F" else name.lower()

    def text(self) -> str:
        row = self.row
        assert row is not None
        if self.prefixes.lock and not (self.memory and "lock" in row.words):
            raise ValueError
        name = row.mnemonic.lower()
        if row.condition is not None:
            name = name.removesuffix(TABLE_CONDITIONS[row.condition]) + CONDITIONS[row.condition]
        size = 1 if row.byte else self.size
        operands = [text for text in map(self._operand, row.operands) if text]
        if row.mnemonic in STRINGS:
            name, operands = name + {1: "b", 2: "w", 4: "d", 8: "q"}[size], []
        elif row.mnemonic in SIZED:
            name, operands = SIZED[row.mnemonic][(2, 4, 8).index(size)], []
        elif row.mnemonic == "JCXZ":
            name = {2: "jcxz", 4: "jecxz", 8: "jrcxz"}[self.address_size]
        elif row.mnemonic == "XCHG" and row.plus and self.opcode & 7 | (self.prefixes.rex & 1) << 3 == 0:
            name, operands = "nop", []
        elif row.mnemonic == "XLAT":
            name, operands = "xlatb", []
        if self.prefixes.lock:
            name = "lock " + name
        if self.prefixes.repeat and "repz" in row.words:
            name = ("repne " if self.prefixes.repeat == 0xF2 else "repe ") + name
        elif self.prefixes.repeat and "rep" in row.words:
            name = "rep " + name
        return f"{name} {', '.join(operands)}".rstrip()


def disassemble(data: bytes, address: int, bits: int) -> Iterator[tuple[int, str]]:
    """(address, text) of each instruction in data; bits: 16, 32 or 64. What is no instruction becomes `db`, a
    byte at a time; an instruction that the data cuts off ends it."""
    at = 0
    while at < len(data):
        piece = data[at : at + LONGEST]
        try:
            instruction = _Instruction(piece, address + at, bits)
            text, length = instruction.text(), instruction.bytes.at
        except ValueError:
            text, length = f"db {data[at]:#04x}", 1
        except _Short:
            if len(piece) < LONGEST:
                return
            text, length = f"db {data[at]:#04x}", 1
        yield address + at, text
        at += length
