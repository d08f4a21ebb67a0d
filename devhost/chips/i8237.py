"""The two 8237 DMA controllers and their page registers, as far as a machine without ISA DMA needs them.

Sources: Intel 8237A datasheet, 231466-005, "Register description" and "Software commands"; PIIX3
datasheet, 290550, section 2.5.1. Nothing requests DMA here, so addresses and counts stand still.
Port 80h, the first of the page registers, takes power-on codes and is written to pass time.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U8, U16, ByteDevice

# register numbers, "Software command codes"
STATUS_COMMAND, REQUEST, SINGLE_MASK, MODE, CLEAR_POINTER, MASTER_CLEAR, CLEAR_MASK, ALL_MASK = range(8, 16)

_Words = Annotated[tuple[U16, ...], msgspec.Meta(min_length=8, max_length=8)]
_Modes = Annotated[tuple[U8, ...], msgspec.Meta(min_length=4, max_length=4)]


class DmaControllerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``base`` and ``current`` are address and count of channel 0, of channel 1, and so on."""

    base: _Words
    current: _Words
    modes: _Modes
    command: U8
    mask: Annotated[int, msgspec.Meta(ge=0, le=15)]
    high_next: bool


class I8237Record(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "i8237"
    first: DmaControllerState
    second: DmaControllerState
    pages: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class DmaController:
    """One 8237."""

    def __init__(self) -> None:
        self.base = [0] * 8
        self.current = [0] * 8
        self.modes = [0] * 4
        self.master_clear()

    def master_clear(self) -> None:
        """"Master clear": command, status, request, temporary and pointer are cleared, all masks set."""
        self.command = 0
        self.mask = 0x0F
        self.high_next = False

    def read(self, register: int) -> int:
        if register < 8:
            value = self.current[register] >> (8 if self.high_next else 0) & 0xFF
            self.high_next = not self.high_next
            return value
        if register == ALL_MASK:
            return self.mask | 0xF0
        # status: no terminal count, no request; temporary register
        return 0 if register in (STATUS_COMMAND, MASTER_CLEAR) else 0xFF

    def write(self, register: int, value: int) -> None:
        if register < 8:
            old = self.base[register]
            new = old & 0x00FF | value << 8 if self.high_next else old & 0xFF00 | value
            self.base[register] = self.current[register] = new
            self.high_next = not self.high_next
        elif register == STATUS_COMMAND:
            self.command = value
        elif register == SINGLE_MASK:
            bit = 1 << (value & 3)
            self.mask = self.mask | bit if value & 4 else self.mask & ~bit
        elif register == MODE:
            self.modes[value & 3] = value
        elif register == CLEAR_POINTER:
            self.high_next = False
        elif register == MASTER_CLEAR:
            self.master_clear()
        elif register == CLEAR_MASK:
            self.mask = 0
        elif register == ALL_MASK:
            self.mask = value & 0x0F

    def save(self) -> DmaControllerState:
        return DmaControllerState(
            base=tuple(self.base),
            current=tuple(self.current),
            modes=tuple(self.modes),
            command=self.command,
            mask=self.mask,
            high_next=self.high_next,
        )

    def load(self, state: DmaControllerState) -> None:
        self.base, self.current, self.modes = list(state.base), list(state.current), list(state.modes)
        self.command, self.mask, self.high_next = state.command, state.mask, state.high_next


class I8237(ByteDevice):
    """Ranges: ``first`` 00h to 0Fh, ``second`` C0h to DFh (each register twice), ``pages`` 80h to 8Fh."""

    kind = "i8237"
    ranges = {
        "first": RegisterMap(Register("DMA1", 0, 16, write=Access.POSTED, doc="8237A")),
        "second": RegisterMap(Register("DMA2", 0, 32, write=Access.POSTED, doc="8237A")),
        "pages": RegisterMap(
            Register("POST", 0, read=Access.SHADOW, write=Access.POSTED, hazard="post", doc="port 80h"),
            Register("PAGES", 1, 15, write=Access.POSTED, doc="PIIX3 2.5.1.9"),
        ),
    }

    def __init__(self) -> None:
        self.first, self.second = DmaController(), DmaController()
        self.pages = bytearray(16)

    def peek(self, offset: int, range_name: str = "main") -> int:
        """The last power-on code."""
        return self.pages[0]

    def read_byte(self, offset: int, range_name: str) -> int:
        if offset >= self.ranges[range_name].size:
            return 0xFF
        if range_name == "pages":
            return self.pages[offset]
        return self.first.read(offset) if range_name == "first" else self.second.read(offset >> 1)

    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        if offset >= self.ranges[range_name].size:
            return
        if range_name == "pages":
            self.pages[offset] = value
        elif range_name == "first":
            self.first.write(offset, value)
        else:
            self.second.write(offset >> 1, value)

    def reset(self, hard: bool = True) -> None:
        """RESET is a master clear."""
        self.first.master_clear()
        self.second.master_clear()

    def save(self) -> I8237Record:
        return I8237Record(first=self.first.save(), second=self.second.save(), pages=bytes(self.pages))

    def load(self, record: Record) -> None:
        assert isinstance(record, I8237Record)
        self.first.load(record.first)
        self.second.load(record.second)
        self.pages = bytearray(record.pages)
