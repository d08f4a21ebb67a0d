"""16550A against the PC16550D datasheet (National, TL/C/8652)."""

from __future__ import annotations

import pytest

from coordinator.contract.clock import ManualClock
from coordinator.contract.device import ListPin
from coordinator.contract.registers import Access
from coordinator.contract.state import pack, unpack
from devhost.chips.ns16550 import Ns16550, Ns16550Record

RBR, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)


class Line:
    """A terminal that types ``typed`` as room allows."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.rooms = 0

    def output(self, data: bytes) -> None:
        self.text += data

    def room_made(self) -> None:
        self.rooms += 1


class Bench:
    def __init__(self, fifo: bool = True) -> None:
        self.clock = ManualClock()
        self.irq = ListPin()
        self.line = Line()
        self.uart = Ns16550(self.clock, self.irq, self.line)
        self.put(LCR, 0x83)
        self.put(RBR, 12)  # 9,600 baud
        self.put(IER, 0)
        self.put(LCR, 0x03)
        self.put(MCR, 0x0B)
        if fifo:
            self.put(IIR, 0x81)  # trigger 8

    def put(self, offset: int, value: int) -> None:
        self.uart.write(offset, 1, value)

    def get(self, offset: int) -> int:
        return self.uart.read(offset, 1)


#: a character of 10 bits at 9,600 baud
CHARACTER_NS = 10 * 1_000_000_000 // 9600


def test_reset_values() -> None:
    """Section 8.0, table III: IER, FCR, LCR, MCR 0, IIR 01h, LSR 60h; MSR bits 3-0 low."""
    uart = Ns16550(ManualClock(), ListPin(), Line())
    assert [uart.read(offset, 1) for offset in (IER, IIR, LCR, MCR, LSR)] == [0, 0x01, 0, 0, 0x60]
    assert uart.read(MSR, 1) == 0xB0  # CTS, DSR, DCD from the terminal


def test_transmit() -> None:
    bench = Bench()
    for byte in b"hello":
        assert bench.get(LSR) & 0x60 == 0x60
        bench.put(RBR, byte)
    bench.uart.write_string(RBR, 1, b" world")
    assert bench.line.text == b"hello world"


def test_divisor_latch() -> None:
    """8.3: DLAB = 1 gives offsets 0 and 1 to the divisor latches; IER is untouched."""
    bench = Bench()
    bench.put(IER, 0x05)
    bench.put(LCR, 0x83)
    bench.put(RBR, 0x34)
    bench.put(IER, 0x12)
    assert bench.get(RBR) == 0x34 and bench.get(IER) == 0x12
    bench.put(LCR, 0x03)
    assert bench.get(IER) == 0x05
    assert bench.line.text == b""


def test_unused_bits_read_zero() -> None:
    """8.7, 8.8: bits 7-4 of IER and 7-5 of MCR are 0. 8.10: the scratchpad holds anything."""
    bench = Bench()
    for offset, value, expected in ((IER, 0xF0, 0), (MCR, 0xE0, 0), (SCR, 0xA5, 0xA5)):
        bench.put(offset, value)
        assert bench.get(offset) == expected


def test_thre_interrupt() -> None:
    """Table IV, third priority: reset by reading IIR if it is the source, or by writing THR."""
    bench = Bench()
    bench.put(IER, 0x02)
    assert bench.irq.level
    assert bench.get(IIR) == 0xC2
    assert not bench.irq.level and bench.get(IIR) == 0xC1
    bench.put(RBR, 0x41)  # empty again at once
    assert bench.irq.level and bench.irq.pulses == 2
    bench.put(RBR, 0x42)
    assert bench.irq.pulses == 2
    assert bench.get(IIR) == 0xC2
    bench.put(IER, 0x00)
    assert not bench.irq.level


def test_thre_interrupt_is_raised_again_by_enabling_it() -> None:
    """8.7: enabling the interrupt while THR is empty raises it, each time (drivers probe for it)."""
    bench = Bench()
    for _ in range(2):
        bench.put(IER, 0x02)
        assert bench.get(IIR) & 0x0F == 0x02
        assert bench.get(IIR) & 0x0F == 0x01
        bench.put(IER, 0x00)
    bench.put(IER, 0x02)
    bench.put(IER, 0x00)
    assert not bench.irq.level
    bench.put(IER, 0x02)
    assert bench.irq.level


def test_iir_read_of_another_source_keeps_thre() -> None:
    bench = Bench(fifo=False)
    bench.put(IER, 0x03)
    bench.uart.receive(b"x")
    assert bench.get(IIR) == 0x04
    bench.get(RBR)
    assert bench.get(IIR) == 0x02


def test_receive_without_fifo() -> None:
    bench = Bench(fifo=False)
    assert bench.uart.room() == 1
    bench.put(IER, 0x01)
    assert bench.uart.receive(b"ab") == 1
    assert bench.uart.room() == 0 and bench.irq.level
    assert bench.get(LSR) == 0x61 and bench.get(IIR) == 0x04
    rooms = bench.line.rooms
    assert bench.get(RBR) == 0x61
    assert bench.line.rooms == rooms + 1
    assert not bench.irq.level and bench.get(LSR) == 0x60


@pytest.mark.parametrize(("fcr", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_fifo_trigger_levels(fcr: int, level: int) -> None:
    """8.5, bits 7-6: 1, 4, 8, 14 bytes. The interrupt goes when the FIFO drops below."""
    bench = Bench()
    bench.put(IIR, fcr)
    bench.put(IER, 0x01)
    assert bench.uart.room() == 16
    bench.uart.receive(b"z" * (level - 1))
    assert not bench.irq.level
    bench.uart.receive(b"z")
    assert bench.irq.level and bench.get(IIR) == 0xC4
    bench.get(RBR)
    assert not bench.irq.level


def test_character_timeout() -> None:
    """8.11.4: four character times after the last arrival or read, cleared by reading a character."""
    bench = Bench()
    bench.put(IER, 0x01)
    bench.uart.receive(b"ab")
    bench.clock.advance(4 * CHARACTER_NS - 100)
    assert not bench.irq.level
    bench.clock.advance(200)
    assert bench.irq.level and bench.get(IIR) == 0xCC
    assert bench.get(RBR) == ord("a")
    assert not bench.irq.level
    bench.clock.advance(3 * CHARACTER_NS)
    bench.uart.receive(b"c")
    bench.clock.advance(4 * CHARACTER_NS - 100)
    assert not bench.irq.level
    bench.clock.advance(200)
    assert bench.get(IIR) == 0xCC
    assert [bench.get(RBR), bench.get(RBR)] == [ord("b"), ord("c")]
    bench.clock.advance(10 * CHARACTER_NS)
    assert not bench.irq.level


def test_fifo_flow_and_clear() -> None:
    bench = Bench()
    assert bench.uart.receive(bytes(range(20))) == 16
    assert bench.uart.room() == 0
    assert [bench.get(RBR) for _ in range(3)] == [0, 1, 2]
    assert bench.uart.room() == 3
    bench.put(IIR, 0x83)  # receiver FIFO reset
    assert bench.uart.room() == 16 and bench.get(LSR) == 0x60
    bench.uart.receive(b"q")
    bench.put(IIR, 0x00)  # changing bit 0 clears too
    assert bench.get(LSR) == 0x60 and bench.get(IIR) == 0x01


def test_break_and_line_status_interrupt() -> None:
    """8.4 bit 4, table IV highest priority. Quirk: the character's read clears the bits, not LSR's."""
    bench = Bench()
    bench.put(IER, 0x05)
    bench.uart.receive_break()
    assert bench.get(LSR) == 0xF1 and bench.get(IIR) == 0xC6 and bench.irq.level
    assert bench.get(RBR) == 0
    assert bench.get(LSR) == 0x60 and not bench.irq.level


def test_loopback() -> None:
    """8.8, bit 4: outputs looped to inputs (RTS-CTS, DTR-DSR, OUT1-RI, OUT2-DCD), data to the receiver."""
    bench = Bench()
    bench.put(IER, 0x0D)
    bench.put(MCR, 0x1A)  # OUT2, RTS
    assert bench.get(MSR) == 0x92  # DCD, CTS; DSR has changed
    bench.put(MCR, 0x14)
    bench.get(MSR)
    bench.put(MCR, 0x10)
    assert bench.get(MSR) == 0x04  # trailing edge of RI
    bench.put(RBR, 0x55)
    assert bench.line.text == b"" and bench.get(LSR) == 0x61 and bench.get(RBR) == 0x55
    assert bench.uart.room() == 0
    assert not bench.irq.level
    for _ in range(17):
        bench.put(RBR, 0x11)
    assert bench.get(LSR) & 0x02  # overrun
    bench.put(MCR, 0x0B)
    assert bench.irq.level
    assert bench.uart.room() == 0 and bench.get(RBR) == 0x11 and bench.uart.room() == 1


def test_modem_status_interrupt() -> None:
    """Table IV, fourth priority: reset by reading MSR."""
    bench = Bench()
    bench.put(IER, 0x08)
    bench.put(MCR, 0x10)
    bench.put(MCR, 0x0B)
    assert bench.irq.level and bench.get(IIR) == 0xC0
    assert bench.get(MSR) == 0xBB
    assert not bench.irq.level and bench.get(MSR) == 0xB0


def test_out2_gates_the_interrupt() -> None:
    bench = Bench()
    bench.put(MCR, 0x03)
    bench.put(IER, 0x02)
    assert not bench.irq.level
    bench.put(MCR, 0x0B)
    assert bench.irq.level


def test_status_polling_costs_no_round_trip_while_characters_are_posted() -> None:
    """Baselines: 23,200 reads and 23,700 writes in a boot. LSR shares no hazard with THR."""
    registers = Ns16550.ranges["main"]
    thr, lsr = registers.at(RBR), registers.at(LSR)
    assert thr is not None and lsr is not None
    assert thr.write is Access.POSTED and thr.hazard is None
    assert lsr.read is Access.SHADOW


def test_pause_holds_the_terminal() -> None:
    bench = Bench()
    bench.uart.pause()
    assert bench.uart.paused() and bench.uart.room() == 0 and bench.uart.receive(b"x") == 0
    rooms = bench.line.rooms
    bench.uart.resume()
    assert bench.line.rooms == rooms + 1 and bench.uart.room() == 16


def test_save_and_load() -> None:
    bench = Bench()
    bench.put(IER, 0x07)
    bench.uart.receive(b"abc")
    bench.uart.receive_break()
    bench.get(RBR)
    copy = Bench()
    copy.uart.load(unpack(pack(bench.uart.save()), Ns16550Record))
    assert copy.irq.level == bench.irq.level
    for each in (bench, copy):
        each.clock.advance(5 * CHARACTER_NS)
    for offset in (IIR, LSR, RBR, IIR, RBR, LSR, IIR, RBR, IIR, IIR, MSR, LCR, MCR):
        assert copy.get(offset) == bench.get(offset)
        assert copy.irq.level == bench.irq.level


def test_guest_reset() -> None:
    bench = Bench()
    bench.put(IER, 0x0F)
    bench.uart.receive(b"abc")
    bench.uart.reset()
    assert not bench.irq.level and bench.get(LSR) == 0x60 and bench.get(LCR) == 0
