"""Port 92h: the fast A20 gate and fast CPU reset.

Source: PIIX3 datasheet, 290550, section 2.5.5.3 "Port 92 register".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from coordinator.contract.device import Pin
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U8, ByteDevice

FAST_INIT = 0x01
FAST_A20 = 0x02
WRITABLE = FAST_INIT | FAST_A20


class Port92Record(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "port92"
    value: U8


class Port92(ByteDevice):
    """``a20`` is ALT_A20: the board ORs it with the keyboard controller's. ``init`` resets the CPU,
    on the transition of bit 0 from 0 to 1."""

    kind = "port92"
    ranges = {
        "main": RegisterMap(Register("PORT92", 0, read=Access.SHADOW, doc="PIIX3 2.5.5.3")),
    }

    def __init__(self, a20: Pin, init: Callable[[], None]) -> None:
        self._a20 = a20
        self._init = init
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
        self._a20.set(bool(value & FAST_A20))
        if rising & FAST_INIT:
            self._init()

    def reset(self, hard: bool = True) -> None:
        self._value = 0
        self._a20.set(False)

    def save(self) -> Port92Record:
        return Port92Record(value=self._value)

    def load(self, record: Record) -> None:
        assert isinstance(record, Port92Record)
        self._value = record.value & WRITABLE
        self._a20.set(bool(self._value & FAST_A20))
