"""Interrupt lines: from a chip's pin to the 8259 pair and to the IOAPIC.

A line may have several sources; it is high while any source is. ISA interrupt 0 arrives at IOAPIC
pin 2, the others at the pin of their number, as the MADT says.

What a pin does to the fabric is an effect: it is put off until the event's shadow registers are
stored (see Bus.defer), so that a handler on another CPU never sees a device older than its interrupt.
"""

from __future__ import annotations

from coordinator.contract.segment import Segment
from devhost.bus import Bus
from devhost.chips.i8259 import I8259

ISA_LINES = 16
TIMER_PIN = 2
#: sources of an IOAPIC pin, as the fabric counts them
SOURCE_ISA, SOURCE_DIRECT = 0, 1


class SourcePin:
    """One source's end of a line."""

    def __init__(self, lines: IrqLines, irq: int, source: int) -> None:
        self._lines, self._irq, self._bit = lines, irq, 1 << source

    def set(self, level: bool) -> None:
        self._lines.drive(self._irq, self._bit, level)


class IoapicPin:
    """A pin that goes to the IOAPIC alone."""

    def __init__(self, bus: Bus, pin: int) -> None:
        self._bus, self._pin = bus, pin
        self._segment: Segment = bus.segment
        self._level = False

    def set(self, level: bool) -> None:
        self._level = level
        self.show()

    def show(self) -> None:
        """Drive the level that it has."""
        self._bus.defer(self._segment.pin_set, self._pin, SOURCE_DIRECT, self._level)


class InterruptRequest:
    """INTR of the master 8259: LINT0 of every vCPU."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._segment: Segment = bus.segment
        self._level = False

    def set(self, level: bool) -> None:
        self._level = level
        self.show()

    def show(self) -> None:
        """Drive the level that it has."""
        self._bus.defer(self._segment.pic_intr, self._level)


class IrqLines:
    """The sixteen ISA lines. ``pic`` is set by wiring once it exists."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._segment = bus.segment
        self._levels = [0] * ISA_LINES
        self._sources = [0] * ISA_LINES
        self.pic: I8259 | None = None

    def pin(self, irq: int) -> SourcePin:
        """A new source of line ``irq``."""
        source = self._sources[irq]
        self._sources[irq] += 1
        return SourcePin(self, irq, source)

    def drive(self, irq: int, bit: int, level: bool) -> None:
        """A source (``bit``) drives the line."""
        before = self._levels[irq]
        after = before | bit if level else before & ~bit
        self._levels[irq] = after
        if bool(before) != bool(after):
            self._show(irq)

    def _show(self, irq: int) -> None:
        level = bool(self._levels[irq])
        if self.pic is not None:
            self.pic.set_input(irq, level)
            if self._bus.pic is not None:
                self._bus.touch(self._bus.pic)
        self._bus.defer(self._segment.pin_set, TIMER_PIN if irq == 0 else irq, SOURCE_ISA, level)

    def show(self) -> None:
        """Drive all lines as their sources do. After devices were loaded: guest time may have gone on since
        their
        records were made, so a level may have changed while it was loaded."""
        for irq in range(ISA_LINES):
            if self._sources[irq]:
                self._show(irq)
