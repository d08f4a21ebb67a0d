"""Flags that an instance leaves undefined: the table's undef=, and what depends on a shift count.

SDM vol. 2, "SAL/SAR/SHL/SHR", "RCL/RCR/ROL/ROR", "SHLD", "SHRD", flags affected; APM vol. 3 has the same. OF is
defined for counts of 1 only, CF of SHL and SHR for counts below the operand size only; count 0 leaves all flags alone.
"""

from __future__ import annotations

from tests.vcpu.differential.generate import Instance

CF, AF, OF = 1, 0x10, 0x800
SHIFTS = {"ROL", "ROR", "RCL", "RCR", "SHL", "SAL", "SHR", "SAR", "SHLD", "SHRD"}


def count(instance: Instance) -> int | None:
    """Of a shift or rotate, masked; None for other instructions."""
    row = instance.shape.row
    if row.mnemonic not in SHIFTS:
        return None
    last = row.operands[-1].text
    raw = 1 if last == "1" else instance.gpr[1] if last == "CL" else instance.immediate
    return raw & (63 if instance.shape.size == 64 else 31)


def flags(instance: Instance) -> int:
    row, amount = instance.shape.row, count(instance)
    if amount is None:
        return row.flags("undef")
    if amount == 0:
        return 0
    mask = row.flags("undef")
    if amount != 1:
        mask |= OF
    if amount >= instance.shape.size and row.mnemonic in ("SHL", "SAL", "SHR"):
        mask |= CF
    return mask
