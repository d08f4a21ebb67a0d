"""16550A UART whose line is a terminal that is always ready.

Source: National Semiconductor PC16550D datasheet, TL/C/8652, section 8. A character leaves the
transmitter at once, so THRE and TEMT are always set and the transmit FIFO is always empty.

What a guest asks most often is made cheap: THR is POSTED and LSR a SHADOW that no transmitted
character can change. The groups of posted writes that do change shadows (hazards):

* ``control``  IER, LCR and MCR among themselves (DLAB gives offset 1 another meaning)
* ``fifo``     FCR may empty the receive FIFO, which changes LSR
* ``scratch``  SCR

The price: reading LSR cannot clear its error bits; reading the character they belong to does.
"""

from __future__ import annotations

from collections import deque
from typing import Annotated, ClassVar, Protocol

from msgspec import Meta

from coordinator.contract.clock import NS_PER_S, Clock
from coordinator.contract.device import Pin
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U8, U16, ByteDevice

FIFO_SIZE = 16
CLOCK_HZ = 1_843_200

# offsets
RBR_THR_DLL, IER_DLM, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

# IER, 8.7
IER_RDA, IER_THRE, IER_RLS, IER_MS = 1, 2, 4, 8
# IIR, 8.6, table IV, in order of priority
IIR_NONE, IIR_RLS, IIR_RDA, IIR_TIMEOUT, IIR_THRE, IIR_MS = 0x01, 0x06, 0x04, 0x0C, 0x02, 0x00
IIR_FIFOS = 0xC0
# FCR, 8.5
FCR_ENABLE, FCR_CLEAR_RX = 1, 2
TRIGGER = (1, 4, 8, 14)
# LCR, 8.2
LCR_DLAB = 0x80
# MCR, 8.8
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 16
# LSR, 8.4
LSR_DR, LSR_OE, LSR_BI, LSR_THRE, LSR_TEMT, LSR_FIFO_ERROR = 0x01, 0x02, 0x10, 0x20, 0x40, 0x80
LSR_ERRORS = 0x1E
# MSR, 8.9
MSR_TERI, MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x04, 0x10, 0x20, 0x40, 0x80
#: the terminal holds clear to send, data set ready and carrier
TERMINAL_LINES = MSR_CTS | MSR_DSR | MSR_DCD


class Terminal(Protocol):
    """The host's end of the line."""

    def output(self, data: bytes) -> None:
        """The guest has sent ``data``; collect it, a call may bring a single byte."""
        ...

    def room_made(self) -> None:
        """`Ns16550.room` is above 0 again."""
        ...


class Ns16550Record(Record, frozen=True, kw_only=True):
    """``received`` and ``errors`` are the receive FIFO: characters and their LSR bits."""

    kind: ClassVar[str] = "ns16550"
    ier: U8
    fcr: U8
    lcr: U8
    mcr: U8
    scr: U8
    lines: U8
    delta: U8
    divisor: U16
    received: Annotated[bytes, Meta(max_length=FIFO_SIZE)]
    errors: Annotated[bytes, Meta(max_length=FIFO_SIZE)]
    overrun: bool
    thre_pending: bool
    timed_out: bool
    deadline: int | None


class Ns16550(ByteDevice):
    """``irq`` is INTR, which a PC's serial card gates with OUT2."""

    kind = "ns16550"
    ranges = {
        "main": RegisterMap(
            Register("RBR/THR/DLL", 0, write=Access.POSTED, doc="8.1"),
            Register("IER/DLM", 1, read=Access.SHADOW, write=Access.POSTED, hazard="control", doc="8.7"),
            Register("IIR/FCR", 2, write=Access.POSTED, hazard="fifo", doc="8.5, 8.6"),
            Register("LCR", 3, read=Access.SHADOW, write=Access.POSTED, hazard="control", doc="8.2"),
            Register("MCR", 4, read=Access.SHADOW, write=Access.POSTED, hazard="control", doc="8.8"),
            Register("LSR", 5, read=Access.SHADOW, write=Access.POSTED, hazard="fifo", doc="8.4"),
            Register("MSR", 6, write=Access.POSTED, doc="8.9; the read clears the deltas"),
            Register("SCR", 7, read=Access.SHADOW, write=Access.POSTED, hazard="scratch", doc="8.10"),
        )
    }

    def __init__(self, clock: Clock, irq: Pin, terminal: Terminal) -> None:
        self._clock = clock
        self._irq = irq
        self._terminal = terminal
        self._timer = clock.timer(self._time_out)
        self._paused = False
        self._master_reset()

    def _master_reset(self) -> None:
        """Section 8.0, table III. SCR, the divisor and the FIFO's contents are undefined there."""
        self.ier = self.fcr = self.lcr = self.mcr = self.scr = 0
        self.divisor = 1
        self.received: deque[tuple[int, int]] = deque()
        self.overrun = False
        self.thre_pending = False
        self.timed_out = False
        self.lines = TERMINAL_LINES
        self.delta = 0

    # ---- host side -------------------------------------------------------------------------------
    def room(self) -> int:
        """How many characters `receive` would take now."""
        if self._paused or self.mcr & MCR_LOOP:
            return 0
        return self._depth() - len(self.received)

    def receive(self, data: bytes) -> int:
        """Characters from the terminal; returns how many were taken."""
        taken = data[: self.room()]
        for byte in taken:
            self._receive(byte, 0)
        return len(taken)

    def receive_break(self) -> None:
        """The line is held low for longer than a character: a zero with BI (8.4, bit 4)."""
        if self.room():
            self._receive(0, LSR_BI)

    def _depth(self) -> int:
        return FIFO_SIZE if self.fcr & FCR_ENABLE else 1

    def _receive(self, byte: int, errors: int) -> None:
        if len(self.received) < self._depth():
            self.received.append((byte, errors))
        else:
            self.overrun = True
            if not self.fcr & FCR_ENABLE:
                self.received[0] = (byte, errors)
        self.timed_out = False
        self._update()
        self._start_timeout()

    # ---- interrupts ------------------------------------------------------------------------------
    def _line_status(self) -> int:
        status = LSR_THRE | LSR_TEMT
        if self.received:
            status |= LSR_DR | self.received[0][1]
            if self.fcr & FCR_ENABLE and any(errors for _, errors in self.received):
                status |= LSR_FIFO_ERROR
        return status | LSR_OE if self.overrun else status

    def _interrupt(self) -> int:
        """The identification of the highest pending interrupt (8.6, table IV)."""
        ier = self.ier
        if ier & IER_RLS and self._line_status() & LSR_ERRORS:
            return IIR_RLS
        if ier & IER_RDA and self.received:
            if not self.fcr & FCR_ENABLE or len(self.received) >= TRIGGER[self.fcr >> 6]:
                return IIR_RDA
            if self.timed_out:
                return IIR_TIMEOUT
        if ier & IER_THRE and self.thre_pending:
            return IIR_THRE
        if ier & IER_MS and self.delta:
            return IIR_MS
        return IIR_NONE

    def _update(self) -> None:
        """INTR to the pin; in loopback OUT2 is forced inactive, which shuts the gate (8.8)."""
        gate = self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        self._irq.set(gate and self._interrupt() != IIR_NONE)

    def _start_timeout(self) -> None:
        """8.11.4: four character times without a character in or out, and at least one in the FIFO."""
        waits = bool(self.received) and self.fcr & FCR_ENABLE and self.ier & IER_RDA and not self.timed_out
        if not waits:
            self._timer.cancel()
            return
        bits = 1 + 5 + (self.lcr & 3) + bool(self.lcr & 8) + (2 if self.lcr & 4 else 1)
        character_ns = bits * 16 * (self.divisor or 0x10000) * NS_PER_S // CLOCK_HZ
        self._timer.arm(self._clock.now() + 4 * character_ns)

    def _time_out(self) -> None:
        self.timed_out = True
        self._update()

    # ---- the bus ---------------------------------------------------------------------------------
    def peek(self, offset: int, range_name: str = "main") -> int:
        if offset == IER_DLM:
            return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
        if offset == LCR:
            return self.lcr
        if offset == MCR:
            return self.mcr
        return self._line_status() if offset == LSR else self.scr

    def read_byte(self, offset: int, range_name: str) -> int:
        if offset > SCR:
            return 0xFF
        if offset == RBR_THR_DLL:
            return self.divisor & 0xFF if self.lcr & LCR_DLAB else self._read_character()
        if offset == IIR_FCR:
            return self._read_iir()
        if offset == MSR:
            value = self._modem_lines() | self.delta
            self.delta = 0
            self._update()
            return value
        return self.peek(offset)

    def _read_character(self) -> int:
        byte = self.received.popleft()[0] if self.received else 0
        self.overrun = self.timed_out = False
        self._update()
        self._start_timeout()
        if self.room():
            self._terminal.room_made()
        return byte

    def _read_iir(self) -> int:
        """The read resets the THRE interrupt if that is what it shows (table IV)."""
        value = self._interrupt()
        if value == IIR_THRE:
            self.thre_pending = False
            self._update()
        return value | (IIR_FIFOS if self.fcr & FCR_ENABLE else 0)

    def write_string(self, offset: int, width: int, data: bytes, range_name: str = "main") -> None:
        if offset == RBR_THR_DLL and width == 1 and not self.lcr & LCR_DLAB and not self.mcr & MCR_LOOP:
            self._transmit(data)
        else:
            super().write_string(offset, width, data, range_name)

    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        if offset == RBR_THR_DLL:
            if self.lcr & LCR_DLAB:
                self.divisor = self.divisor & 0xFF00 | value
            elif self.mcr & MCR_LOOP:
                self._transmit(b"")
                self._receive(value, 0)
            else:
                self._transmit(bytes((value,)))
        elif offset == IER_DLM:
            self._write_ier(value)
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self.lcr = value
        elif offset == MCR:
            self.mcr = value & 0x1F
            self._modem_change(self._modem_lines())
            self._update()
            if self.room():
                self._terminal.room_made()
        elif offset == SCR:
            self.scr = value

    def _transmit(self, data: bytes) -> None:
        """The character is gone at once: THRE's interrupt is reset and set again, which is one state."""
        if data:
            self._terminal.output(data)
        if not self.thre_pending:
            self.thre_pending = True
            self._update()

    def _write_ier(self, value: int) -> None:
        if self.lcr & LCR_DLAB:
            self.divisor = self.divisor & 0xFF | value << 8
            return
        rising = value & ~self.ier
        self.ier = value & 0x0F
        if rising & IER_THRE:  # THR is empty: enabling the interrupt raises it, each time (8.7)
            self.thre_pending = True
        if rising & IER_RDA:
            self._start_timeout()
        self._update()

    def _write_fcr(self, value: int) -> None:
        """8.5: a change of bit 0 clears the FIFOs; the other bits count only while it is 1."""
        if (value ^ self.fcr) & FCR_ENABLE or value & FCR_CLEAR_RX and value & FCR_ENABLE:
            self.received.clear()
            self.overrun = self.timed_out = False
            self._timer.cancel()
        self.fcr = value & 0xC1 if value & FCR_ENABLE else 0
        self._update()
        if self.room():
            self._terminal.room_made()

    # ---- modem lines -----------------------------------------------------------------------------
    def _modem_lines(self) -> int:
        """MSR bits 7-4. In loopback they are the MCR outputs (8.8, bit 4)."""
        if not self.mcr & MCR_LOOP:
            return TERMINAL_LINES
        return (
            (MSR_CTS if self.mcr & MCR_RTS else 0)
            | (MSR_DSR if self.mcr & MCR_DTR else 0)
            | (MSR_RI if self.mcr & MCR_OUT1 else 0)
            | (MSR_DCD if self.mcr & MCR_OUT2 else 0)
        )

    def _modem_change(self, lines: int) -> None:
        """8.9: deltas of CTS, DSR and DCD; of RI only the trailing edge."""
        changed = lines ^ self.lines
        self.delta |= changed >> 4 & ~MSR_TERI
        if changed & MSR_RI and not lines & MSR_RI:
            self.delta |= MSR_TERI
        self.lines = lines

    # ---- state -----------------------------------------------------------------------------------
    def reset(self, hard: bool = True) -> None:
        self._timer.cancel()
        self._master_reset()
        self._update()
        self._terminal.room_made()

    def pause(self) -> None:
        """The terminal keeps what it has: there is no room."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        if self.room():
            self._terminal.room_made()

    def save(self) -> Ns16550Record:
        return Ns16550Record(
            ier=self.ier,
            fcr=self.fcr,
            lcr=self.lcr,
            mcr=self.mcr,
            scr=self.scr,
            lines=self.lines,
            delta=self.delta,
            divisor=self.divisor,
            received=bytes(byte for byte, _ in self.received),
            errors=bytes(errors for _, errors in self.received),
            overrun=self.overrun,
            thre_pending=self.thre_pending,
            timed_out=self.timed_out,
            deadline=self._timer.deadline,
        )

    def load(self, record: Record) -> None:
        assert isinstance(record, Ns16550Record)
        self.ier, self.fcr, self.lcr, self.mcr = record.ier, record.fcr, record.lcr, record.mcr
        self.scr, self.divisor = record.scr, record.divisor
        self.lines, self.delta = record.lines, record.delta
        self.received = deque(zip(record.received, record.errors, strict=False))
        self.overrun = record.overrun
        self.thre_pending, self.timed_out = record.thre_pending, record.timed_out
        self._timer.cancel()
        if record.deadline is not None:
            self._timer.arm(record.deadline)
        self._update()
