"""Port 61h, the NMI status and control register: gate of counter 2, speaker, refresh, OUT2.

Source: PIIX3 datasheet, 290550, section 2.5.5 "NMI registers", NMISC.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U8, ByteDevice

TIMER2_GATE = 0x01
SPEAKER = 0x02
REFRESH = 0x10
OUT2 = 0x20
#: gate, speaker, PCI SERR# enable, IOCHK# enable; the status bits are read-only
WRITABLE = 0x0F

#: counter 1 counts 18 pulses a refresh, 15.1 us, on every PC
REFRESH_TICKS = 18


class Timer(Protocol):
    """What of the 8254 is wired here."""

    def tick(self) -> int: ...

    def output(self, channel: int) -> bool: ...

    def set_gate(self, channel: int, level: bool) -> None: ...


class Port61Record(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "port61"
    control: U8


class Port61(ByteDevice):
    """NMISC. No source of SERR# or IOCHK# exists, so bits 7 and 6 read 0."""

    kind = "port61"
    ranges = {
        "main": RegisterMap(Register("NMISC", 0, write=Access.POSTED, doc="PIIX3 2.5.5")),
    }

    def __init__(self, timer: Timer) -> None:
        self._timer = timer
        self._control = 0
        timer.set_gate(2, False)

    @property
    def speaker(self) -> bool:
        """The speaker's data enable."""
        return bool(self._control & SPEAKER)

    def read_byte(self, offset: int, range_name: str) -> int:
        if offset:
            return 0xFF
        refresh = REFRESH if self._timer.tick() // REFRESH_TICKS & 1 else 0
        return self._control | refresh | (OUT2 if self._timer.output(2) else 0)

    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        if offset == 0:
            self._control = value & WRITABLE
            self._timer.set_gate(2, bool(value & TIMER2_GATE))

    def reset(self, hard: bool = True) -> None:
        self.write_byte(0, 0, "main")

    def save(self) -> Port61Record:
        return Port61Record(control=self._control)

    def load(self, record: Record) -> None:
        """The gate's level is part of the timer's own record."""
        assert isinstance(record, Port61Record)
        self._control = record.control & WRITABLE
