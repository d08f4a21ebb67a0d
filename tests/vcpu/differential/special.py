"""What single mnemonics need to do something interesting, and what they leave undefined."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.vcpu.differential import values
from tests.vcpu.differential.machine import (
    CODE_LINEAR,
    DATA_LINEAR,
    DATA_SIZE,
    LDT_CODE16,
    LDT_DATA,
    USER32,
    USER64,
    USER_DATA,
)
from tests.vcpu.differential.shapes import STACK, STATE_BYTES, STRINGS
from vcpu import optable

if TYPE_CHECKING:
    from tests.vcpu.differential.encode import Encoder, Instance

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
MASK64 = values.MASK64
CF, OF, AC = 1, 0x800, 1 << 18
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")
SHIFTS = {"ROL", "ROR", "RCL", "RCR", "SHL", "SAL", "SHR", "SAR", "SHLD", "SHRD"}
# Not to be laid across the end of the code pages: whether UD0 fetches a ModRM byte first differs between
# makers
NEAR_END = {"UD0", "UD1", "UD2", "INT", "INT3"}
# Mode and operand size of far rows whose fault is a selector's; else it is the stack's
SELECTOR_FAULTS = {(64, 0), (64, 32), (16, 0), (16, 16), (16, 32)}
CODE_SELECTORS = {64: USER64, 32: USER32, 16: LDT_CODE16}
# Loaded or examined: null, user segments, kernel segments, beyond the table, an empty LDT slot. No null one
# with an RPL: the way out of an exception makes 0 of it.
SELECTORS = (
    0,
    0,
    USER_DATA,
    USER_DATA,
    LDT_DATA,
    LDT_DATA,
    USER32,
    USER64,
    LDT_CODE16,
    USER_DATA & ~3,
    0x10,
    0x18 | 3,
    0xFFF8,
    0x17,
)


def flow(row: optable.Row, undefined: int) -> int:
    """Undefined flags behind a row, from those in front of it, whatever its operands are."""
    if "maybe" not in row.words:
        undefined &= ~row.flags("mod")
    undefined |= row.flags("undef")
    if row.mnemonic in SHIFTS:
        undefined = undefined & ~(CF | OF) if row.operands[-1].text == "1" else undefined | CF | OF
    return undefined


def undefined_flags(instance: Instance) -> int:
    """Flags that one instruction leaves undefined: the table's undef=, and what depends on a shift count.

    SDM vol. 2, SAL/SAR/SHL/SHR, RCL/RCR/ROL/ROR, SHLD, SHRD, "flags affected"; APM vol. 3 has the same. OF
    is defined for counts of 1 only, CF of SHL and SHR for counts below the operand size only; count 0
    leaves all flags alone."""
    row, size = instance.shape.row, instance.shape.size
    if row.mnemonic not in SHIFTS:
        return row.flags("undef")
    last = row.operands[-1].text
    count = 1 if last == "1" else instance.gpr[RCX] if last == "CL" else instance.immediate
    count &= 63 if size == 64 else 31
    if count == 0:
        return 0
    return (
        row.flags("undef")
        | (OF if count != 1 else 0)
        | (CF if count >= size and row.mnemonic in ("SHL", "SAL", "SHR") else 0)
    )


def _count_mask(e: Encoder) -> int:
    """SHLD and SHRD with counts above the operand size have an undefined result (SDM vol. 2)."""
    return ~0x10 if e.shape.size == 16 and e.row.mnemonic in ("SHLD", "SHRD") else ~0


def byte_immediate(e: Encoder) -> int:
    rnd = e.rnd
    value = rnd.choice((rnd.randrange(256), rnd.randrange(70), values.integer(rnd) & 0xFF))
    if e.row.mnemonic == "INT":  # 3 and 4 user mode may have, 80h is a system call of Linux
        value = 3 if value == 0x80 or rnd.random() < 0.2 and not e.aim else 0x40 | value & 0x3F
    elif e.row.mnemonic == "AAM" and rnd.random() < 0.2:
        value = 0
    return value & _count_mask(e) & 0xFF


def register(e: Encoder, reg: int) -> int:
    """ModRM.reg where it names a segment, control or debug register."""
    kinds = {operand.kind for operand in e.row.operands}
    if "S" in kinds:
        return e.rnd.choice((0, 2, 3, 4, 5) if e.aim == "plain" or e.rnd.random() < 0.9 else (1, 6, 7))
    if "C" in kinds:
        return e.rnd.choice((0, 2, 3, 4))
    return e.rnd.randrange(4) if "D" in kinds else reg


def selector(e: Encoder) -> int:
    return USER_DATA if e.aim == "plain" else e.rnd.choice((0x10, 0x1B, 0x17) if e.aim else SELECTORS)


def far_target(e: Encoder) -> tuple[int, int]:
    """Selector and offset of a far branch; offsets of 16 bits only lead somewhere in the segment with a
    base."""
    bits = 16 if e.shape.size == 16 else e.rnd.choice((64, 32, 16) if not e.aim else (e.shape.bits,))
    target = CODE_SELECTORS[bits]
    if e.aim == "fault" and e.gpr[RSP] == e.stack or e.rnd.random() < 0.2 and not e.aim:
        target = selector(e)
    return target, e.code_target(16, 0x700) + (0 if target == LDT_CODE16 else CODE_LINEAR)


# ---- preparations: registers, memory operand, stack ----


def _divide(e: Encoder, reg: int, rm: int) -> None:
    rnd, gpr, size = e.rnd, e.gpr, e.shape.size
    if e.aim == "plain":  # quotients that fit
        gpr[RDX], gpr[RAX] = 0, rnd.randrange(100)
        e.operand = struct.pack("<QQ", rnd.randrange(1, 100), 0)
        if e.shape.form == "r":
            gpr[rm] = rnd.randrange(1, 100)
        return
    if e.aim == "fault" or rnd.random() < 0.8:
        gpr[RDX] = rnd.choice((0, 1, MASK64, rnd.randrange(1000), gpr[RDX]))
        if size == 8:
            gpr[RAX] = rnd.getrandbits(rnd.choice((8, 12, 16)))
    if e.aim == "fault" and e.shape.form == "r":
        gpr[rm] = 0


def _compare_exchange(e: Encoder, reg: int, rm: int) -> None:
    if e.rnd.random() < 0.6:
        if e.shape.form == "m":
            e.operand = e.gpr[RAX].to_bytes(8, "little") * 2
        elif e.shape.size > 8:
            e.gpr[rm] = e.gpr[RAX]


def _compare_exchange8(e: Encoder, reg: int, rm: int) -> None:
    e.operand = struct.pack(
        "<II", e.gpr[RAX] & 0xFFFFFFFF, (e.gpr[RDX] & 0xFFFFFFFF) ^ (e.rnd.random() < 0.4)
    )


def _compare_exchange16(e: Encoder, reg: int, rm: int) -> None:
    e.operand = struct.pack("<QQ", e.gpr[RAX], e.gpr[RDX] ^ (e.rnd.random() < 0.4))


def _bit_string(e: Encoder, reg: int, rm: int) -> None:
    if e.row.operands[1].kind == "G" and e.shape.form == "m":
        e.gpr[reg] = e.rnd.randrange(64) if e.aim == "plain" else e.rnd.randrange(-4000, 4000) & MASK64


def _bit_scan(e: Encoder, reg: int, rm: int) -> None:
    """A source of 0 leaves the destination alone; its upper half, with 32 bits, is not the same on all
    CPUs."""
    if e.rnd.random() < 0.2:
        e.operand = bytes(16)
        if e.shape.form == "r":
            e.gpr[rm] &= ~((1 << e.shape.size) - 1)
    if e.shape.size == 32:
        e.gpr[reg] &= 0xFFFFFFFF


def _bound(e: Encoder, reg: int, rm: int) -> None:
    e.gpr[reg] = e.rnd.randrange(100)
    low, high = (0, 200) if e.aim == "plain" else (e.rnd.randrange(-10, 60), e.rnd.randrange(0, 120))
    e.operand = struct.pack("<hh" if e.shape.size == 16 else "<ii", low, high)


def _strings(e: Encoder, reg: int, rm: int) -> None:
    from tests.vcpu.differential.encode import pick_target  # noqa: PLC0415  it needs this module

    rnd, width = e.rnd, e.shape.width
    source = pick_target(rnd, e.shape, e.aim)
    destination = pick_target(rnd, e.shape, e.aim)
    if not e.aim and rnd.random() < 0.4:  # overlapping
        destination = source + rnd.randrange(-20, 20)
    e.set_address(RSI, e.offset(source))
    e.set_address(RDI, e.offset(destination, "ds"))
    counts = (0, 1, 2, 3, 8, rnd.randrange(64), rnd.randrange(600), 0x10000)
    e.set_address(RCX, rnd.choice(counts[1:5] if e.aim else counts))
    if rnd.random() < 0.3 and not e.aim:
        e.instance.rflags ^= 0x400
    kind = rnd.randrange(3)
    if kind == 0:  # equal for a while
        run = rnd.randbytes(width) * rnd.randrange(1, 9)
        e.patch(source, run)
        e.patch(destination, run)
        e.gpr[RAX] = int.from_bytes((run * 8)[:8], "little")
    elif kind == 1:
        e.patch(destination, e.gpr[RAX].to_bytes(8, "little")[:width])


def _translate(e: Encoder, reg: int, rm: int) -> None:
    e.set_address(RBX, e.offset(e.instance.target) - (0 if e.aim else e.rnd.randrange(256)))


def _masked_move(e: Encoder, reg: int, rm: int) -> None:
    """Never at the edge: whether bytes that are masked out fault is the implementation's choice (SDM vol.
    2, MASKMOVQ)."""
    e.instance.target = DATA_LINEAR + 0x400 + e.rnd.randrange(0x800)
    e.set_address(RDI, e.offset(e.instance.target))


def _loop(e: Encoder, reg: int, rm: int) -> None:
    e.set_address(RCX, e.rnd.choice((0, 1, 2, values.integer(e.rnd))))


def _indirect(e: Encoder, reg: int, rm: int) -> None:
    place = e.code_address()
    if e.rnd.random() < 0.1 and not e.aim and e.gpr[RSP] == e.stack:
        place = e.rnd.choice((0x800000000000, DATA_LINEAR + 0x500, MASK64, 1 << 63, 0xFFFF800000000000))
    e.operand = struct.pack("<QQ", place, 0)
    if e.shape.form == "r":
        e.gpr[rm] = place


def _far_indirect(e: Encoder, reg: int, rm: int) -> None:
    target, offset = far_target(e)
    e.operand = offset.to_bytes(8, "little")[: e.shape.size // 8] + struct.pack("<H", target)


def _load_far(e: Encoder, reg: int, rm: int) -> None:
    e.operand = values.integer(e.rnd).to_bytes(8, "little")[: e.shape.size // 8] + struct.pack(
        "<H", selector(e)
    )


def _return(e: Encoder, reg: int, rm: int) -> None:
    place = e.code_address()
    if e.rnd.random() < 0.1 and not e.aim:
        place = e.rnd.choice((0x800000000000, DATA_LINEAR + 0x500, MASK64))
    e.patch(e.gpr[RSP], struct.pack("<Q", place))


def _items(e: Encoder, *items: int) -> bytes:
    return b"".join((item & MASK64).to_bytes(8, "little")[: e.shape.size // 8] for item in items)


def _far_return(e: Encoder, reg: int, rm: int) -> None:
    target, offset = far_target(e)
    e.patch(e.gpr[RSP], _items(e, offset, target))


def _interrupt_return(e: Encoder, reg: int, rm: int) -> None:
    target, offset = far_target(e)
    # Neither VM, NT, ID nor TF. AC with a stack that is not aligned looks to Linux like a split lock,
    # without end.
    flags = e.rnd.getrandbits(32) & ~(0x224100 | (0x40000 if e.gpr[RSP] & 7 else 0)) | 2
    stack = USER_DATA if e.aim or e.rnd.random() < 0.9 else e.rnd.choice(SELECTORS)
    e.patch(e.gpr[RSP], _items(e, offset, target, flags, e.stack + 0x80, stack))


def _pop_flags(e: Encoder, reg: int, rm: int) -> None:
    e.patch(e.gpr[RSP], struct.pack("<Q", e.rnd.getrandbits(64)))


def _push_segment(e: Encoder, reg: int, rm: int) -> None:
    """Intel's CPUs write two bytes of a wider item, others all (SDM vol. 2, PUSH)."""
    if e.row.operands[0].text in SEGMENTS:
        e.patch(e.gpr[RSP] - 8, bytes(8))


def _pop_segment(e: Encoder, reg: int, rm: int) -> None:
    if e.row.operands[0].text in SEGMENTS:
        e.patch(e.gpr[RSP], struct.pack("<Q", selector(e)))


def _frame(e: Encoder, reg: int, rm: int) -> None:
    from tests.vcpu.differential.encode import pick_target  # noqa: PLC0415

    if e.row.mnemonic == "ENTER":
        e.instance.rflags &= ~AC  # it competes with the fault at the final stack pointer
        e.gpr[RBP] = e.stack + e.rnd.choice((0, 40, 0x200))
    else:
        e.gpr[RBP] = e.rnd.choice((e.stack + 16, pick_target(e.rnd, e.shape))) if not e.aim else e.gpr[RSP]


def _selector_operand(e: Encoder, reg: int, rm: int) -> None:
    chosen = selector(e)
    e.operand = struct.pack("<Q", chosen)
    if e.shape.form == "r":
        e.gpr[rm] = e.gpr[rm] & ~0xFFFF | chosen


def _adjust_rpl(e: Encoder, reg: int, rm: int) -> None:
    e.operand = struct.pack("<Q", e.rnd.getrandbits(16))


def _state_area(e: Encoder, reg: int, rm: int) -> None:
    """What FXRSTOR and XRSTOR find. The mask in EDX:EAX names x87 and SSE alone, for the host has more."""
    rnd = e.rnd
    if e.row.source == "x87.tab":
        e.operand = (
            values.fx_image(rnd, True)[:24] + b"".join(values.extended(rnd) for _ in range(8)) + bytes(4)
        )
        return
    e.gpr[RAX], e.gpr[RDX] = rnd.randrange(4), 0
    header = struct.pack(
        "<QQ48x",
        rnd.choice((0, 1, 2, 3, 3, 3) if e.aim else (0, 1, 2, 3, 3, 3, 1 << 62)),
        rnd.random() < 0.02 and not e.aim,
    )
    e.operand = values.fx_image(rnd, True, e.aim == "plain") + header


def _base(e: Encoder, reg: int, rm: int) -> None:
    e.gpr[rm] = 1 << 63 | e.gpr[rm] >> 2 if e.aim == "fault" else e.gpr[rm] >> 17 if e.aim else e.gpr[rm]


def _control_word(e: Encoder, reg: int, rm: int) -> None:
    e.operand = struct.pack(
        "<I", 0x1F80 | e.rnd.getrandbits(16) & 0xE07F if e.aim else e.rnd.getrandbits(17) & 0x1FFBF
    )


PREPARE: dict[str, Callable[[Encoder, int, int], None]] = {
    "DIV": _divide,
    "IDIV": _divide,
    "CMPXCHG": _compare_exchange,
    "CMPXCHG8B": _compare_exchange8,
    "CMPXCHG16B": _compare_exchange16,
    "BSF": _bit_scan,
    "BSR": _bit_scan,
    "BOUND": _bound,
    "XLAT": _translate,
    "maskmovq": _masked_move,
    "maskmovdqu": _masked_move,
    "CALLF": _far_indirect,
    "JMPF": _far_indirect,
    "RET": _return,
    "RETF": _far_return,
    "IRET": _interrupt_return,
    "POPF": _pop_flags,
    "PUSH": _push_segment,
    "POP": _pop_segment,
    "ENTER": _frame,
    "LEAVE": _frame,
    "ARPL": _adjust_rpl,
    **dict.fromkeys(("BT", "BTS", "BTR", "BTC"), _bit_string),
    **dict.fromkeys(STRINGS, _strings),
    **dict.fromkeys(("LOOP", "LOOPE", "LOOPNE", "JCXZ"), _loop),
    **dict.fromkeys(("LES", "LDS", "LSS", "LFS", "LGS"), _load_far),
    **dict.fromkeys(("VERR", "VERW", "LAR", "LSL"), _selector_operand),
    **dict.fromkeys(STATE_BYTES, _state_area),
    "ldmxcsr": _control_word,
    **dict.fromkeys(("WRFSBASE", "WRGSBASE"), _base),
}


def prepare(e: Encoder, reg: int, rm: int) -> None:
    """Registers, stack and the memory operand before the addresses are set."""
    from tests.vcpu.differential.encode import pick_target  # noqa: PLC0415

    row, rnd, gpr = e.row, e.rnd, e.gpr
    if row.source == "x87.tab":
        e.operand = values.real(rnd, row.mnemonic, e.shape.width)
    elif row.source == "sse.tab":
        e.operand = values.vector(rnd)
    else:
        e.operand = struct.pack("<QQ", values.integer(rnd), values.integer(rnd))
    if any(operand.text == "CL" for operand in row.operands):
        count = rnd.choice((0, 1, rnd.randrange(70), rnd.randrange(256))) & _count_mask(e)
        gpr[RCX] = gpr[RCX] & ~0xFF | count
    if row.operands and row.operands[0].text in SEGMENTS:
        e.instance.rflags &= ~AC  # two bytes or all of the item: the CPU's choice
    if row.mnemonic in STACK and not e.sequence:
        # where a selector can be bad, a fault is that in some shapes and the stack's in others
        selectors = "gp" in row.values.get("fault", "") and (e.shape.bits, e.shape.size) in SELECTOR_FAULTS
        if e.aim == "fault" and not selectors:
            gpr[RSP] = DATA_LINEAR + rnd.choice((-0x100, DATA_SIZE + 0x100))
        elif not e.aim and rnd.random() < 0.12:
            place = pick_target(rnd, e.shape) + rnd.choice((0, 4, 8)) & MASK64
            if place >> 32 and row.mnemonic in ("CALLF", "RETF", "IRET"):
                place = (
                    DATA_LINEAR + DATA_SIZE
                )  # which half of RSP counts on the way out of 64-bit mode is unsaid
            gpr[RSP] = place
            e.instance.rflags &= ~AC  # faults that compete
            e.instance.target = DATA_LINEAR + 0x400
    if row.mnemonic in ("CALL", "JMP") and row.operands[0].kind == "E":
        _indirect(e, reg, rm)
    elif row.mnemonic in ("CALLF", "JMPF") and row.operands[0].text == "Ap":
        pass  # an immediate
    elif row.mnemonic == "MOV" and row.operands[0].kind == "S":
        _selector_operand(e, reg, rm)
    elif row.mnemonic in PREPARE:
        PREPARE[row.mnemonic](e, reg, rm)
