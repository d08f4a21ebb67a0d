"""What there is to cover: each row of the opcode table in each operand size, prefix and register or memory
form it has.

Every row is here but those with `nodiff=`, whose reason says why user mode on a host cannot show it; they
are the business of the tests that are guests. `nodiff=denied` rows are in: user mode must be refused them,
which is compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from vcpu import optable

MODES = (64, 32, 16)
STRINGS = set("MOVS CMPS STOS LODS SCAS INS OUTS".split())
STACK = set("PUSH POP PUSHF POPF CALL RET ENTER LEAVE PUSHA POPA RETF IRET CALLF".split())
# Rows whose handlers look at the operand size though no operand shows it
SIZED = set("PUSHF POPF ENTER LEAVE PUSHA POPA RETF IRET".split())
FAR = set("CALLF JMPF LES LDS LSS LFS LGS".split())
# Bytes of operands that only have the letter M
STATE_BYTES = {
    "fxsave": 512,
    "fxrstor": 512,
    "xsave": 576,
    "xrstor": 576,
    "xsaveopt": 576,
    "fldenv": 28,
    "fnstenv": 28,
    "frstor": 108,
    "fnsave": 108,
}
WIDTHS = {"b": 1, "w": 2, "d": 4, "q": 8, "x": 16, "t": 10, "dq": 16}
PREFIXES = {
    "lock": b"\xf0",
    "rep": b"\xf3",
    "repne": b"\xf2",
    "fs": b"\x64",
    "gs": b"\x65",
    "lock refused": b"\xf0",
}

DE, DB, BP, OF, BR, UD, SS, GP, PF, MF, AC, XM = 0, 1, 3, 4, 5, 6, 12, 13, 14, 16, 17, 19
FAULTS = {"de": DE, "db": DB, "bp": BP, "of": OF, "br": BR, "ud": UD, "gp": GP}
# Rows with a memory operand that none of their cases may fault on: no access, or one whose faults are the
# CPU's choice
NO_ACCESS = set("LEA NOP PREFETCH PREFETCHW UD0 UD1 maskmovq maskmovdqu".split())
# `fault=` of rows that user mode does not see on any CPU, or only with segments that Linux does not have
UNSEEN = {
    *((name, "ud") for name in "LAR LSL VERR VERW ARPL RDFSBASE RDGSBASE WRFSBASE WRGSBASE".split()),
    *((name, "gp") for name in ("PUSHF", "POPF")),
}


@dataclass(frozen=True)
class Shape:
    """A row in one of its forms. bits: of the mode; size: operand size, 0 where there is none; form: r, m
    or nothing; prefix: one of PREFIXES, "a" (the other address size) or nothing."""

    row: optable.Row
    bits: int
    size: int
    form: str
    prefix: str = ""

    @cached_property
    def key(self) -> str:
        words = (
            f"{self.bits}-bit",
            f"operand {self.size}" if self.size else "",
            {"r": "register", "m": "memory"}.get(self.form, ""),
            "address size" if self.prefix == "a" else self.prefix,
        )
        return f"{self.row.key}: {' '.join(word for word in words if word)}"

    @cached_property
    def refused(self) -> bool:
        """Always a fault: LOCK where there is none, or a row that is denied to user mode."""
        return self.prefix == "lock refused" or self.row.values.get("nodiff") == "denied"

    @cached_property
    def width(self) -> int:
        """Bytes of the memory operand."""
        row, size = self.row, max(self.size, 8) // 8
        if row.mnemonic in FAR:
            return size + 2
        if row.mnemonic == "BOUND":
            return 2 * size
        for operand in row.operands:
            if operand.kind in "EMQWOXY":
                if operand.size in WIDTHS:
                    return WIDTHS[operand.size]
                return size if operand.size else STATE_BYTES.get(row.mnemonic, 1)
        return size

    @cached_property
    def accesses(self) -> bool:
        """There is memory it can fault on."""
        row = self.row
        return (
            (
                self.form == "m"
                or row.mnemonic in STRINGS | STACK | {"XLAT"}
                or any(o.kind == "O" for o in row.operands)
            )
            and row.mnemonic not in NO_ACCESS
            and not self.refused
        )

    @cached_property
    def ends(self) -> frozenset[int]:
        """Vectors with which a case without a fault of memory or operands ends: one of them must come up."""
        if self.prefix == "lock refused":
            return frozenset({UD})
        if self.refused:
            return frozenset({GP, UD})
        if self.bits == 32 and self.size == 16 and "jump" in self.row.words and self.row.mnemonic[:2] != "UD":
            return frozenset({BP, PF})  # the target has 16 bits, where nothing is
        return frozenset(
            {"UD0": {UD}, "UD1": {UD}, "UD2": {UD}, "INT1": {DB}, "INT": {GP}, "INTO": {BP, OF}}.get(
                self.row.mnemonic, {BP}
            )
        )

    @cached_property
    def faults(self) -> frozenset[int]:
        """Vectors that the row must show besides."""
        row = self.row
        named = {
            FAULTS[name]
            for name in row.values.get("fault", "").split(",")
            if name in FAULTS and (row.mnemonic, name) not in UNSEEN
        }
        return frozenset(set() if self.refused else named | ({PF} if self.accesses else set()))


def _sizes(row: optable.Row, bits: int) -> tuple[int, ...]:
    sizes = row.sizes(bits)
    if row.mnemonic in SIZED:
        sizes = (16, 64) if bits == 64 and "d64" in row.words else (16, 32, 64) if bits == 64 else (16, 32)
    elif row.mnemonic in FAR:
        sizes = (16, 32)  # with REX.W Intel's CPUs have a 64-bit offset, AMD's have not
    elif any(o.size == "y" for o in row.operands):
        return (32, 64) if bits == 64 else (32,)
    if row.prefix == "np":
        return tuple(s for s in sizes if s in (0, 8) or s == 64 or s == (16 if bits == 16 else 32))
    if row.prefix == "66":
        return tuple(s for s in sizes if s in (0, 8, 64) or s == (32 if bits == 16 else 16))
    return sizes


def _prefixes(row: optable.Row, bits: int, form: str) -> Iterator[str]:
    yield ""
    source = (
        {o.kind for o in row.operands} & {"X", "O"}
        or row.mnemonic == "XLAT"
        or row.mnemonic.startswith("maskmov")
    )
    if form == "m" or source or row.mnemonic in STRINGS:
        yield "a"
    if bits == 64 and (form == "m" or source):
        yield from ("fs", "gs")
    if "lock" in row.words and form == "m":
        yield "lock"
    if "rep" in row.words:
        yield "rep"
    if "repz" in row.words:
        yield from ("rep", "repne")


def shapes_of(row: optable.Row, bits: int) -> Iterator[Shape]:
    """All shapes of a row in a mode where it is valid."""
    if row.values.get("nodiff") == "denied":
        yield Shape(row, bits, _sizes(row, bits)[-1], row.forms()[0])
        return
    for form in row.forms():
        for size in _sizes(row, bits):
            for prefix in _prefixes(row, bits, form):
                yield Shape(row, bits, size, form, prefix)
        if row.source == "integer.tab" and ("lock" not in row.words or form != "m"):
            yield Shape(row, bits, _sizes(row, bits)[0], form, "lock refused")


def shapes(modes: tuple[int, ...] = MODES) -> list[Shape]:
    return [
        shape
        for bits in modes
        for row in optable.load()
        if row.valid(bits) and (bits == 64 or row.w != 1) and row.values.get("nodiff", "denied") == "denied"
        for shape in shapes_of(row, bits)
    ]


def left_out() -> dict[str, list[str]]:
    """Reason -> keys of the rows that no host can be asked about."""
    reasons: dict[str, list[str]] = {}
    for row in optable.load():
        reason = row.values.get("nodiff", "denied")
        if reason != "denied":
            reasons.setdefault(reason, []).append(row.key)
    return reasons
