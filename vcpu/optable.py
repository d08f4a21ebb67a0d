"""The opcode table: parser of vcpu/core/optable/*.tab and generator of the C decode tables.

One row an encoding, `#` starts a comment, columns separated by `|`:

    encoding | mnemonic | operands | attributes

encoding    [np|66|f3|f2] [0f|0f38|0f3a] OPCODE [/r | /0../7] [mod=3|mod=m] [rm=N] [w0|w1]
            OPCODE is hex; `b8+r`: register in the low three bits; `70+cc`: condition in the low four (the row
            stands for sixteen). No prefix word: 66 is the operand size, F2/F3 are ignored or REP.
operands    SDM vol. 2 appendix A.2 letters, destination first, each optionally with `rw:`, `w:` or `r:`
            (default: rw for the first, r for the others). Besides: Ibs = byte sign-extended to the operand
            size, Zb Zv = register in the opcode, STi ST0 = x87, fixed registers AL AX eAX rAX CL DX 1.
attributes  fn=NAME       handler family; default: mnemonic in lower case. C function op_NAME...
            forms=...     which functions the family has, below; default: one for all
            lock          LOCK is allowed (memory forms)
            rep repz      REP / REPE and REPNE mean something
            i64 / o64     invalid in / only valid in 64-bit mode
            d64 f64       operand size 64 by default / always, in 64-bit mode
            cpl0          #GP(0) unless CPL is 0: the decoder sees to it, the handler need not
            end           the block ends behind it: mode, mapping or interrupts may have changed
            jump          the handler sets rip itself: the block ends, nothing follows
            pure          register form (LEA: any form) cannot fault; touches nothing but registers and flags
            maybe         writes its flags only when the count is not 0
            aux=N         constant for the handler in uop.aux
            mod=oszapc    flags written (letters o s z a p c, d i); undef= left undefined; use= read
            cpuid=NAME    feature it belongs to
            host          runs as a host instruction: uop.aux is its ordinal among the host rows, host_rows[];
                          fn is op_host unless given; unaligned, x87, nowait, control, as=: sse.tab, x87.tab
            fault=de,gp   faults beyond those of memory operands
            nodiff=WHY    not compared with a host in user mode; `denied`: only that user mode is refused it

Handlers. `void op_NAME(struct cpu *c, const struct uop *u)`, with suffixes by `forms`:

    (none)        op_NAME                one function: looks at uop_size(u), uop_mem(u), u->mode itself
    size          op_NAME_8 _16 _32 _64  operand size (8: rows with Eb/Gb; else 16, 32, 64 as v)
    rm            op_NAME_r, op_NAME_m   register or memory operand
    fast          ..._f                  memory operand in 64-bit mode, 64-bit address, no segment base:
                                         ea64(); may fall back to the _m function; needs rm
    nf            ..._r_nf               register form that need not write flags; needs rm
    lock (attribute) with rm: ..._l      memory form with LOCK prefix

in this order: op_NAME_<size>_<r|m|f|l>[_nf]. `+cc` rows: op_NAME_<cc>_..., cc one of CONDITIONS.

Enumerate rows for tests with load(): each Row has encoding fields, operands (kind, size, access), attributes
and the flag sets; Row.sizes(), Row.forms() and Row.valid() give what to cover. Conditions are already
expanded. Row.key is unique and stable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

TABLES = Path(__file__).resolve().parent / "core" / "optable"
CONDITIONS = ("o", "no", "b", "nb", "z", "nz", "be", "nbe", "s", "ns", "p", "np", "l", "nl", "le", "nle")
#: what each pair of conditions looks at (SDM vol. 1 appendix B)
CONDITION_FLAGS = ("o", "c", "z", "cz", "s", "p", "so", "zso")
MAPS = {"": 0, "0f": 1, "0f38": 2, "0f3a": 3}
PREFIXES = ("np", "66", "f3", "f2")
FLAG_BITS = {"c": 0, "p": 2, "a": 4, "z": 6, "s": 7, "i": 9, "d": 10, "o": 11}
FLAG_ATTRIBUTES = ("mod", "undef", "use")
VALUE_ATTRIBUTES = {"fn", "forms", "aux", "as", "cpuid", "fault", "nodiff", *FLAG_ATTRIBUTES}
WORD_ATTRIBUTES = {
    "lock",
    "rep",
    "repz",
    "i64",
    "o64",
    "d64",
    "f64",
    "cpl0",
    "end",
    "jump",
    "host",
    "unaligned",
    "x87",
    "nowait",
    "control",
    "pure",
    "maybe",
}
FORMS = {"size", "rm", "fast", "nf"}
FIXED = {
    "AL",
    "AH",
    "AX",
    "CL",
    "DX",
    "EAX",
    "ECX",
    "EDX",
    "eAX",
    "rAX",
    "rBX",
    "rCX",
    "rDX",
    "1",
    "ST0",
    "STi",
    "XMM0",
    "F",
    "ES",
    "CS",
    "SS",
    "DS",
    "FS",
    "GS",
}
OPERAND = re.compile(r"(?:(rw|w|r):)?(\w+)$")
LETTERS = "ACDEFGIJMNOPQRSUVWXYZ"

# Immediates, enum imm_kind in decode.h
IMMEDIATES = {
    "Ib": "IMM_B",
    "Ibs": "IMM_BS",
    "Iw": "IMM_W",
    "Iz": "IMM_Z",
    "Iv": "IMM_V",
    "Jb": "IMM_JB",
    "Jz": "IMM_JZ",
    "Ob": "IMM_O",
    "Ov": "IMM_O",
    "Ap": "IMM_AP",
}


class TableError(Exception):
    """A row that cannot be understood; says file, line and why."""


@dataclass(frozen=True)
class Operand:
    """kind: SDM addressing letter, or "fixed"; size: SDM type letters (b w v ...), or the register's name."""

    kind: str
    size: str
    access: str

    @property
    def text(self) -> str:
        return self.size if self.kind == "fixed" else self.kind + self.size


@dataclass(frozen=True)
class Row:
    source: str
    prefix: str
    map: int
    opcode: int
    plus: str  # "", "r" (register in the opcode)
    modrm: bool
    ext: int | None  # /0../7
    mod: str  # "", "3", "m"
    rm: int | None
    w: int | None
    mnemonic: str
    operands: tuple[Operand, ...]
    fn: str
    handler_forms: frozenset[str]
    words: frozenset[str]
    values: dict[str, str] = field(hash=False, compare=False)
    condition: int | None = None

    @property
    def key(self) -> str:
        parts = [
            self.prefix,
            ("", "0f", "0f38", "0f3a")[self.map],
            f"{self.opcode:02x}" + ("+r" if self.plus else ""),
        ]
        if self.modrm:
            parts.append("/r" if self.ext is None else f"/{self.ext}")
        parts += [
            f"mod={self.mod}" if self.mod else "",
            "" if self.rm is None else f"rm={self.rm}",
            "" if self.w is None else f"w{self.w}",
            self.mnemonic,
            ",".join(o.text for o in self.operands),
        ]
        parts += [word for word in ("i64", "o64") if word in self.words]
        return " ".join(part for part in parts if part)

    def flags(self, attribute: str) -> int:
        """Mask of RFLAGS bits: attribute is mod, undef or use."""
        return sum(1 << FLAG_BITS[letter] for letter in self.values.get(attribute, ""))

    def immediate(self) -> str | None:
        """SDM text of the (first) immediate, or None."""
        return next((o.text for o in self.operands if o.text in IMMEDIATES), None)

    @property
    def byte(self) -> bool:
        """An operation on bytes: its operand size does not depend on prefixes."""
        return (
            any(o.kind in "EGZXYO" and o.size == "b" for o in self.operands[:1])
            or (bool(self.operands) and self.operands[0].text == "AL")
            or (
                bool(self.operands)
                and self.operands[0].text == "DX"
                and self.operands[-1].text in ("AL", "Xb")
            )
        )

    @property
    def sized(self) -> bool:
        """The operand-size prefix and REX.W choose among 16, 32 and 64 bits."""
        return "size" in self.handler_forms or any(
            o.size in ("v", "z", "y") or o.text in ("rAX", "eAX") for o in self.operands
        )

    def sizes(self, bits: int = 64) -> tuple[int, ...]:
        """Operand sizes in bits that the row has in a mode of so many bits; (0,): it has no such notion."""
        if self.byte:
            return (8,)
        if not self.sized:
            return (0,)
        if bits != 64:
            return (16, 32)
        if "f64" in self.words:
            return (64,)
        if "d64" in self.words:
            return (16, 64)
        return {None: (16, 32, 64), 0: (16, 32), 1: (64,)}[self.w]

    def forms(self) -> tuple[str, ...]:
        """ "r" register, "m" memory, "" no ModRM operand."""
        if not self.modrm:
            return ("",)
        kinds = {o.kind for o in self.operands}
        if self.mod == "m" or "M" in kinds:
            return ("m",)
        if self.mod == "3" or kinds & {"R", "N", "U"}:
            return ("r",)
        return ("r", "m")

    def valid(self, bits: int) -> bool:
        """Exists in a mode of so many bits (16, 32, 64)."""
        return ("i64" not in self.words) if bits == 64 else ("o64" not in self.words)


def _operand(text: str, index: int) -> Operand:
    match = OPERAND.match(text)
    if not match:
        raise TableError(f"operand {text!r}")
    access = match[1] or ("rw" if index == 0 else "r")
    name = match[2]
    if name in FIXED:
        return Operand("fixed", name, access)
    if name[0] not in LETTERS:
        raise TableError(f"operand {text!r}: unknown letter")
    return Operand(name[0], name[1:], access)


def _parse(source: str, line: str) -> Iterator[Row]:
    columns = [column.strip() for column in line.split("|")]
    if len(columns) != 4:
        raise TableError("a row has four columns")
    words = columns[0].split()
    prefix = words.pop(0) if words[0] in PREFIXES and len(words) > 1 else ""
    opcode_map = MAPS[words.pop(0)] if words[0] in MAPS and len(words) > 1 else 0
    opcode, _, plus = words.pop(0).partition("+")
    modrm, ext, mod, rm, w = False, None, "", None, None
    for word in words:
        if word == "/r":
            modrm = True
        elif re.fullmatch(r"/[0-7]", word):
            modrm, ext = True, int(word[1])
        elif word in ("mod=3", "mod=m"):
            modrm, mod = True, word[4]
        elif re.fullmatch(r"rm=[0-7]", word):
            modrm, rm = True, int(word[3])
        elif word in ("w0", "w1"):
            w = int(word[1])
        else:
            raise TableError(f"encoding word {word!r}")
    operands = tuple(
        _operand(text, i) for i, text in enumerate(re.split(r"[,\s]+", columns[2]) if columns[2] else [])
    )
    attributes, values = set(), {}
    for word in columns[3].split():
        name, equals, value = word.partition("=")
        if equals and name in VALUE_ATTRIBUTES:
            values[name] = value
        elif not equals and name in WORD_ATTRIBUTES:
            attributes.add(name)
        else:
            raise TableError(f"attribute {word!r}")
    for name in FLAG_ATTRIBUTES:
        if set(values.get(name, "")) - set(FLAG_BITS):
            raise TableError(f"flags {values[name]!r}")
    forms = frozenset(values["forms"].split(",")) if "forms" in values else frozenset()
    if forms - FORMS or (forms & {"fast", "nf"} and "rm" not in forms):
        raise TableError(f"forms {values['forms']!r}")
    row = Row(
        source,
        prefix,
        opcode_map,
        int(opcode, 16),
        plus if plus == "r" else "",
        modrm,
        ext,
        mod,
        rm,
        w,
        columns[1],
        operands,
        values.get("fn", "host" if "host" in attributes else columns[1].lower()),
        forms,
        frozenset(attributes),
        values,
    )
    if plus == "cc":
        for cc, name in enumerate(CONDITIONS):
            yield replace(
                row,
                opcode=row.opcode + cc,
                condition=cc,
                mnemonic=re.sub("cc$", name.upper(), row.mnemonic),
                fn=f"{row.fn}_{name}",
                values=row.values | {"use": CONDITION_FLAGS[cc // 2]},
            )
    else:
        yield row


def parse(name: str, text: str) -> list[Row]:
    """Rows of one table; name is for error messages."""
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        try:
            rows += _parse(name, line)
        except (TableError, KeyError, ValueError, IndexError) as error:
            raise TableError(f"{name}:{number}: {error}: {line}") from None
    return rows


@cache
def load() -> tuple[Row, ...]:
    """All rows of all tables, in the order of file names and lines."""
    rows = [row for path in sorted(TABLES.glob("*.tab")) for row in parse(path.name, path.read_text())]
    seen: dict[str, Row] = {}
    for row in rows:
        if row.key in seen:
            raise TableError(f"{row.source}: row {row.key!r} is also in {seen[row.key].source}")
        seen[row.key] = row
    return tuple(rows)


# ---- C tables ----


def handlers(row: Row) -> dict[tuple[str, int], str]:
    """(form, log2 of operand bytes) -> C function. Forms: r m f l n(f)."""
    forms = row.handler_forms
    names: dict[tuple[str, int], str] = {}
    if "size" not in forms:
        sizes: Iterable[tuple[int, str]] = [(i, "") for i in range(4)]
    elif row.byte:
        sizes = [(0, "_8")]
    else:
        possible = {bits for mode in (32, 64) if row.valid(mode) for bits in row.sizes(mode)}
        sizes = [(i, f"_{8 << i}") for i in (1, 2, 3) if 8 << i in possible]
    for index, suffix in sizes:
        base = f"op_{row.fn}{suffix}"
        if "rm" not in forms:
            for form in "rmf" + ("l" if "lock" in row.words else ""):
                names[form, index] = base
            continue
        present = row.forms()
        if "r" in present or not row.modrm:
            names["r", index] = f"{base}_r"
            if "nf" in forms:
                names["n", index] = f"{base}_r_nf"
        if "m" in present:
            names["m", index] = f"{base}_m"
            names["f", index] = f"{base}_f" if "fast" in forms else f"{base}_m"
            if "lock" in row.words:
                names["l", index] = f"{base}_l"
    return names


def _rank(row: Row) -> tuple[int, ...]:
    """Rows that ask for more come first."""
    return (row.rm is None, not row.mod, row.ext is None, not row.prefix, row.w is None)


def _flag_words(row: Row, attribute: str) -> int:
    return row.flags(attribute) & 0xFFFF


def _host_row(row: Row) -> str:
    """struct host_row of host.h."""
    classes = (
        dict.fromkeys("PQN", "MMX")
        | dict.fromkeys("VWU", "XMM")
        | dict.fromkeys("GER", "GPR")
        | {"M": "NONE"}
    )
    accesses = {"r": "HOST_R", "w": "HOST_W", "rw": "HOST_R | HOST_W"}
    places = {"reg": ("HOST_NONE", "0"), "rm": ("HOST_NONE", "0")}
    size, bits = 0, ["HOSTF_MODRM"] if row.modrm else []
    for operand in row.operands:
        if operand.kind in classes:
            place = "reg" if operand.kind in "PVG" else "rm"
            places[place] = (f"HOST_{classes[operand.kind]}", accesses[operand.access])
            if operand.kind in "QWEM":
                size = {"b": 1, "w": 2, "d": 4, "y": 4, "q": 8, "t": 10, "x": 16}[operand.size]
            if operand.size == "y":
                bits += ["HOSTF_WIDE", "HOSTF_Y"] if place == "rm" else ["HOSTF_WIDE"]
        elif operand.text in ("XMM0", "ECX", "AX"):
            bits.append(f"HOSTF_{operand.text}_{operand.access.upper()}")
        elif operand.text == "EAX":
            bits += ["HOSTF_WIDE", "HOSTF_EAX_EDX"]
    x87 = row.map == 0 and 0xD8 <= row.opcode <= 0xDF
    kinds = {operand.kind for operand in row.operands}
    sse = kinds & {"V", "W", "U"} or row.opcode == 0xAE
    gate = "X87" if x87 else "WAIT" if row.map == 0 else "SSE" if sse else "MMX"
    conditions = {
        "HOSTF_IMM": row.immediate() is not None,
        "HOSTF_UNALIGNED": "unaligned" in row.words,
        "HOSTF_X87": "x87" in row.words and "nowait" not in row.words,
        "HOSTF_FLAGS": "mod" in row.values,
        "HOSTF_POINTERS": x87 and "control" not in row.words,
        "HOSTF_CONDITION": "use" in row.values,
    }
    bits = sorted(set(bits)) + [name for name, holds in conditions.items() if holds]
    prefix, opcode = row.prefix, row.opcode
    if "as" in row.values:
        prefix, _, text = row.values["as"].partition(".")
        opcode = int(text, 16)
    opcode_map = 1 if "as" in row.values else row.map
    fields = (
        0 if prefix in ("", "np") else int(prefix, 16),
        opcode_map,
        opcode,
        0xFF if row.ext is None else row.ext,
        0xFF if row.rm is None else row.rm,
        *places["reg"],
        *places["rm"],
        size,
        f"GATE_{gate}",
        " | ".join(bits) or "0",
    )
    return f"  {{{', '.join(map(str, fields))}}}, /* {row.key} */"


def generate() -> str:
    """C text: struct oprow oprows[], ophandlers[], opindex[4][256], host_rows[]; see decode.h."""
    rows = sorted(load(), key=lambda row: (row.map, row.opcode, _rank(row)))
    out = ['#include "decode.h"', '#include "host.h"']
    names = sorted({name for row in rows for name in handlers(row).values()})
    out += [f"void {name}(struct cpu *, const struct uop *);" for name in names]
    sets: dict[tuple[str, ...], int] = {}
    body, index = [], [[(0, 0)] * 256 for _ in range(4)]
    host = [row for row in load() if "host" in row.words]
    for number, row in enumerate(rows):
        table = handlers(row)
        key = tuple(table.get((form, size), "0") for form in "rmfln" for size in range(4))
        handler_set = sets.setdefault(key, len(sets))
        for opcode in range(row.opcode, row.opcode + (8 if row.plus else 1)):
            first, count = index[row.map][opcode]
            if count and first + count != number:
                raise TableError(f"{row.key}: rows of one opcode are not together (+r overlaps)")
            index[row.map][opcode] = (first if count else number, count + 1)
        immediates = [o.text for o in row.operands if o.text in IMMEDIATES]
        bits = [f"OPF_{word.upper()}" for word in sorted(row.words)]
        if row.modrm:
            bits.append("OPF_MODRM")
        host_row = "host" in row.words  # its stub numbers registers as the encoding does
        if not host_row and any(o.text == "Gb" for o in row.operands):
            bits.append("OPF_REG_BYTE")
        if not host_row and any(o.text in ("Eb", "Zb", "Rb") for o in row.operands):
            bits.append("OPF_RM_BYTE")
        if row.plus:
            bits.append("OPF_RM_OPCODE")
        if row.byte:
            bits.append("OPF_BYTE")
        if {o.kind for o in row.operands} & {"C", "D"}:
            bits.append("OPF_MOD3")
        mod = (
            "OPM_MEM"
            if row.forms() == ("m",)
            else "OPM_REG"
            if row.modrm and row.forms() == ("r",)
            else "OPM_ANY"
        )
        aux = (
            row.condition
            if row.condition is not None
            else host.index(row)
            if "host" in row.words
            else int(row.values.get("aux", "0"), 0)
        )
        second = IMMEDIATES[immediates[1]] if len(immediates) > 1 else "IMM_NONE"
        body.append(
            f"  {{{handler_set}, {aux}, {' | '.join(bits) or '0'}, "
            f"{_flag_words(row, 'mod') | _flag_words(row, 'undef'):#x}, {_flag_words(row, 'use'):#x}, "
            f"OPP_{(row.prefix or 'any').upper()}, "
            f"{0xFF if row.ext is None else row.ext}, {mod}, {0xFF if row.rm is None else row.rm}, "
            f"{2 if row.w is None else row.w}, {IMMEDIATES[immediates[0]] if immediates else 'IMM_NONE'}, "
            f"{second}}}, "
            f"/* {row.key} */"
        )
    out.append("const uop_fn ophandlers[][5][4] = {")
    for key in sets:
        out.append("  {" + ", ".join("{" + ", ".join(key[f * 4 : f * 4 + 4]) + "}" for f in range(5)) + "},")
    out += ["};", "const struct oprow oprows[] = {", *body, "};", "const struct opindex opindex[4][256] = {"]
    for opcode_map in index:
        out.append("  {" + ", ".join(f"{{{first}, {count}}}" for first, count in opcode_map) + "},")
    out += ["};", "const struct host_row host_rows[] = {"]
    out += [*map(_host_row, host), "};"]
    out.append("")
    return "\n".join(out)
