"""Ports that take characters for the host: E9h of Bochs, 402h of SeaBIOS.

Both read as E9h, by which firmware finds them (Bochs user manual, "port_e9_hack").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import ByteDevice

READBACK = 0xE9


class DebugPortRecord(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "debug_port"


class DebugPort(ByteDevice):
    """``output`` gets the bytes as they come; the host side collects them."""

    kind = "debug_port"
    ranges = {
        "main": RegisterMap(Register("DEBUG", 0, read=Access.SHADOW, write=Access.POSTED)),
    }

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self._output = output

    def peek(self, offset: int, range_name: str = "main") -> int:
        return READBACK

    def read_byte(self, offset: int, range_name: str) -> int:
        return 0xFF if offset else READBACK

    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        if offset == 0:
            self._output(bytes((value,)))

    def write_string(self, offset: int, width: int, data: bytes, range_name: str = "main") -> None:
        if offset == 0 and width == 1:
            self._output(bytes(data))
        else:
            super().write_string(offset, width, data, range_name)

    def reset(self, hard: bool = True) -> None:
        pass

    def save(self) -> DebugPortRecord:
        return DebugPortRecord()

    def load(self, record: Record) -> None:
        assert isinstance(record, DebugPortRecord)
