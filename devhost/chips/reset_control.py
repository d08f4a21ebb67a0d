"""Reset control register, port CF9h - a byte inside the dword of PCI's CONFADD, told apart by width.

Source: PIIX3 datasheet, 290550, section 2.5.7 "Reset control register" (RC).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U8, ByteDevice

HARD = 0x02
RESET_CPU = 0x04
WRITABLE = HARD | RESET_CPU


class ResetControlRecord(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "reset_control"
    value: U8


class ResetControl(ByteDevice):
    """``reset(hard)`` is called when bit 2 goes from 0 to 1: hard is PCIRST#, soft is INIT."""

    kind = "reset_control"
    ranges = {
        "main": RegisterMap(Register("RC", 0, read=Access.SHADOW, doc="PIIX3 2.5.7")),
    }

    def __init__(self, reset_machine: Callable[[bool], None]) -> None:
        self._reset_machine = reset_machine
        self._value = 0

    def peek(self, offset: int, range_name: str = "main") -> int:
        return self._value

    def read_byte(self, offset: int, range_name: str) -> int:
        return 0xFF if offset else self._value

    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        if offset:
            return
        rising = value & ~self._value
        self._value = value & WRITABLE
        if rising & RESET_CPU:
            self._reset_machine(bool(value & HARD))

    def reset(self, hard: bool = True) -> None:
        self._value = 0

    def save(self) -> ResetControlRecord:
        return ResetControlRecord(value=self._value)

    def load(self, record: Record) -> None:
        assert isinstance(record, ResetControlRecord)
        self._value = record.value & WRITABLE
