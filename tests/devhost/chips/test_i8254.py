"""8254 against the datasheet (Intel 231164-005): counts and levels at each CLK pulse."""

from __future__ import annotations

import pytest

from coordinator.contract.clock import ManualClock
from coordinator.contract.device import ListPin
from coordinator.contract.state import pack, unpack
from devhost.chips.i8254 import I8254, PIT_HZ, I8254Record, tick_time
from devhost.chips.port61 import Port61, Port61Record

CONTROL = 3


class Bench:
    """A timer whose clock moves in whole CLK pulses."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.irq0 = ListPin()
        self.pit = I8254(self.clock, self.irq0)
        self.at = 0

    def pulse(self, count: int = 1) -> None:
        self.at += count
        self.clock.advance(tick_time(self.at) - self.clock.now())

    def program(self, channel: int, mode: int, count: int, bcd: bool = False) -> None:
        """RW = 3: least significant byte first, then most significant."""
        self.pit.write(CONTROL, 1, channel << 6 | 0x30 | mode << 1 | bcd)
        self.pit.write(channel, 1, count & 0xFF)
        self.pit.write(channel, 1, count >> 8)

    def count(self, channel: int) -> int:
        """Counter latch command, then two reads."""
        self.pit.write(CONTROL, 1, channel << 6)
        return self.pit.read(channel, 1) | self.pit.read(channel, 1) << 8

    def status(self, channel: int) -> int:
        self.pit.write(CONTROL, 1, 0xE0 | 2 << channel)
        return self.pit.read(channel, 1)

    def trace(self, channel: int, pulses: int) -> list[tuple[int, int]]:
        """(counting element, OUT) after each pulse."""
        seen = []
        for _ in range(pulses):
            self.pulse()
            seen.append((self.count(channel), int(self.pit.output(channel))))
        return seen


def test_mode_0_interrupt_on_terminal_count() -> None:
    """"OUT does not go high until N + 1 CLK pulses after" the write; figure 15, LSB = 4."""
    bench = Bench()
    bench.program(2, 0, 4)
    assert not bench.pit.output(2)
    assert bench.trace(2, 7) == [(4, 0), (3, 0), (2, 0), (1, 0), (0, 1), (0xFFFF, 1), (0xFFFE, 1)]


def test_mode_0_gate_disables_counting() -> None:
    bench = Bench()
    bench.program(2, 0, 3)
    bench.pulse()
    bench.pit.set_gate(2, False)
    assert bench.trace(2, 2) == [(3, 0), (3, 0)]
    bench.pit.set_gate(2, True)
    assert bench.trace(2, 3) == [(2, 0), (1, 0), (0, 1)]


def test_mode_0_count_written_while_gate_is_low() -> None:
    """It is loaded by the next pulse; "when GATE goes high, OUT will go high N CLK pulses later"."""
    bench = Bench()
    bench.pit.set_gate(2, False)
    bench.program(2, 0, 2)
    assert bench.trace(2, 2) == [(2, 0), (2, 0)]
    bench.pit.set_gate(2, True)
    assert bench.trace(2, 2) == [(1, 0), (0, 1)]


def test_mode_0_first_byte_sets_out_low() -> None:
    bench = Bench()
    bench.program(2, 0, 1)
    bench.pulse(3)
    assert bench.pit.output(2)
    bench.pit.write(2, 1, 5)
    bench.pulse(20)
    assert not bench.pit.output(2)
    bench.pit.write(2, 1, 0)
    bench.pulse(6)
    assert bench.pit.output(2)


def test_mode_1_one_shot() -> None:
    """Figure 16: OUT goes low on the CLK following a trigger, N pulses long, and is retriggerable."""
    bench = Bench()
    bench.pit.set_gate(2, False)
    bench.program(2, 1, 3)
    bench.pulse(5)
    assert bench.pit.output(2)
    bench.pit.set_gate(2, True)
    assert bench.pit.output(2)
    assert bench.trace(2, 4) == [(3, 0), (2, 0), (1, 0), (0, 1)]
    bench.pit.set_gate(2, False)
    bench.pit.set_gate(2, True)
    assert bench.trace(2, 2) == [(3, 0), (2, 0)]
    bench.pit.set_gate(2, False)
    bench.pit.set_gate(2, True)
    assert bench.trace(2, 4) == [(3, 0), (2, 0), (1, 0), (0, 1)]


def test_mode_2_rate_generator() -> None:
    """Figure 17, LSB = 3: 3 2 1 3 2 1, OUT low for one CLK at 1."""
    bench = Bench()
    bench.program(2, 2, 3)
    assert bench.trace(2, 6) == [(3, 1), (2, 1), (1, 0), (3, 1), (2, 1), (1, 0)]


def test_mode_2_gate_and_new_count() -> None:
    """Figure 17: a low gate holds, a trigger reloads; a new count waits for the end of the cycle."""
    bench = Bench()
    bench.program(2, 2, 3)
    bench.pulse(2)
    bench.pit.set_gate(2, False)
    assert bench.trace(2, 2) == [(2, 1), (2, 1)]
    bench.pit.set_gate(2, True)
    assert bench.trace(2, 1) == [(3, 1)]
    bench.pit.write(2, 1, 5)
    bench.pit.write(2, 1, 0)
    assert bench.status(2) & 0x40  # null count
    assert bench.trace(2, 3) == [(2, 1), (1, 0), (5, 1)]
    assert not bench.status(2) & 0x40


def test_mode_3_even_and_odd_counts() -> None:
    """"Mode 3 is implemented as follows": by two from N, or from N - 1 with one more pulse while high."""
    bench = Bench()
    bench.program(2, 3, 4)
    assert bench.trace(2, 8) == [(4, 1), (2, 1), (4, 0), (2, 0)] * 2
    bench = Bench()
    bench.program(2, 3, 5)
    assert bench.trace(2, 10) == [(4, 1), (2, 1), (0, 1), (4, 0), (2, 0)] * 2


def test_mode_3_new_count_at_the_end_of_the_half_cycle() -> None:
    bench = Bench()
    bench.program(2, 3, 8)
    bench.pulse(2)
    bench.pit.write(2, 1, 4)
    bench.pit.write(2, 1, 0)
    assert [out for _, out in bench.trace(2, 9)] == [1, 1, 0, 0, 1, 1, 0, 0, 1]


def test_mode_4_software_triggered_strobe() -> None:
    """Figure 19, LSB = 3: OUT does not strobe low until N + 1 CLK pulses after the count is written."""
    bench = Bench()
    bench.program(2, 4, 3)
    assert bench.trace(2, 6) == [(3, 1), (2, 1), (1, 1), (0, 0), (0xFFFF, 1), (0xFFFE, 1)]


def test_mode_5_hardware_triggered_strobe() -> None:
    """Figure 20: the trigger reloads; OUT strobes low N + 1 pulses after any trigger."""
    bench = Bench()
    bench.pit.set_gate(2, False)
    bench.program(2, 5, 3)
    bench.pulse(4)
    assert bench.pit.output(2)
    bench.pit.set_gate(2, True)
    bench.pit.set_gate(2, False)  # has no effect
    assert [out for _, out in bench.trace(2, 5)] == [1, 1, 1, 0, 1]


@pytest.mark.parametrize(("bcd", "period"), [(False, 65536), (True, 10000)])
def test_count_0_is_the_largest(bcd: bool, period: int) -> None:
    """"Minimum and maximum initial counts": 0 is equivalent to 2^16 binary and 10^4 BCD."""
    bench = Bench()
    bench.program(0, 2, 0, bcd)
    bench.pulse(period)
    assert bench.irq0.pulses == 1  # rose with the control word
    bench.pulse()
    assert bench.irq0.pulses == 2


def test_bcd_counts_in_four_decades() -> None:
    bench = Bench()
    bench.program(2, 0, 0x1000, bcd=True)
    assert [count for count, _ in bench.trace(2, 3)] == [0x1000, 0x0999, 0x0998]


def test_periodic_interrupt_rate() -> None:
    """Mode 2 with the PC's full count: 18.2 Hz, so 182 interrupts in 10 s."""
    bench = Bench()
    bench.program(0, 2, 0)
    before = bench.irq0.pulses
    bench.clock.advance(10_000_000_000)
    assert bench.irq0.pulses - before == 10 * PIT_HZ // 65536 == 182


def test_square_wave_interrupts_once_a_period() -> None:
    bench = Bench()
    bench.program(0, 3, 11932)
    before = bench.irq0.pulses
    bench.clock.advance(1_000_000_000)
    assert bench.irq0.pulses - before == PIT_HZ // 11932 == 99


def test_one_shot_interrupt_then_silence() -> None:
    bench = Bench()
    bench.program(0, 0, 1000)
    assert not bench.irq0.level
    bench.pulse(1000)
    assert not bench.irq0.level
    bench.pulse()
    assert bench.irq0.level
    bench.clock.advance(1_000_000_000)
    assert bench.irq0.changes == [True]
    bench.pit.write(0, 1, 10)
    bench.pit.write(0, 1, 0)
    assert not bench.irq0.level  # a new count sets OUT low
    bench.pulse(100_000)


def test_a_late_host_makes_one_edge() -> None:
    """Edges that were missed while the host slept are not made up for."""
    bench = Bench()
    bench.program(0, 2, 100)
    before = bench.irq0.pulses
    bench.clock._now += 1_000_000_000
    bench.clock.advance(0)
    assert bench.irq0.pulses == before + 1


def test_tiny_count_does_not_flood() -> None:
    bench = Bench()
    bench.program(0, 2, 2)
    bench.clock.advance(1_000_000)
    assert 20 <= bench.irq0.pulses <= 50


def test_read_back_latches_status_and_count() -> None:
    """"Read-back command": status is read first, then the count; latched values wait to be read."""
    bench = Bench()
    bench.program(1, 2, 0x1234)
    bench.pulse()
    bench.pit.write(CONTROL, 1, 0xC4)  # count and status of counter 1
    bench.pulse(4)
    bench.pit.write(CONTROL, 1, 0xC4)  # ignored
    # OUT = 1, null count = 0, RW = 3, mode = 2, binary
    assert [bench.pit.read(1, 1) for _ in range(3)] == [0xB4, 0x34, 0x12]


def test_status_shows_null_count_and_the_mode_as_written() -> None:
    """Figure 12: null count is set by the control word and by a new count, cleared when it is loaded."""
    bench = Bench()
    bench.pit.write(CONTROL, 1, 0x8E)  # RW = 0 is a latch command: nothing happens
    bench.pit.write(CONTROL, 1, 0x9E)  # counter 2, RW = 1, mode bits 111
    assert bench.status(2) == 0xDE
    bench.pit.write(2, 1, 9)
    assert bench.status(2) == 0xDE
    bench.pulse()
    assert bench.status(2) == 0x9E


def test_read_write_formats() -> None:
    bench = Bench()
    bench.pit.write(CONTROL, 1, 0x90)  # LSB only
    bench.pit.write(2, 1, 0x42)
    bench.pulse()
    assert bench.pit.read(2, 1) == 0x42 and bench.pit.read(2, 1) == 0x42
    bench.pit.write(CONTROL, 1, 0xA0)  # MSB only
    bench.pit.write(2, 1, 0x42)
    bench.pulse()
    assert bench.pit.read(2, 1) == 0x42
    assert bench.count(2) & 0xFF == 0x42


def test_channel_3_does_not_exist() -> None:
    """Hardware case 10, CVE-2015-3214: reads of port 43h, read-back and latch of "channel 3"."""
    bench = Bench()
    assert bench.pit.read(3, 1) == 0xFF
    for word in range(0xC0, 0x100):
        bench.pit.write(CONTROL, 1, word)
        for offset in range(4):
            bench.pit.read(offset, 1)
    assert bench.pit.read(3, 1) == 0xFF
    assert bench.pit.read(2, 2) >> 8 == 0xFF


def test_port_61() -> None:
    """PIIX3 2.5.5: bit 0 is the gate of counter 2, bit 5 its OUT, bit 4 toggles with refresh; 7, 6 are 0."""
    bench = Bench()
    port = Port61(bench.pit)
    bench.program(2, 0, 10)
    bench.pulse(100)
    assert port.read(0, 1) & 0x20 == 0  # gate low: does not count
    port.write(0, 1, 0xFD)
    assert port.read(0, 1) & ~0x10 == 0x0D
    bench.pulse(11)
    assert port.read(0, 1) & 0x20
    port.write(0, 1, 0x02)
    assert port.speaker
    seen = set()
    for _ in range(4):
        bench.pulse(18)
        seen.add(port.read(0, 1) & 0x10)
    assert seen == {0, 0x10}
    other = Port61(Bench().pit)
    other.load(unpack(pack(port.save()), Port61Record))
    assert other.read(0, 1) & 0x0F == 2


@pytest.mark.parametrize("mode", range(6))
def test_save_and_load_go_on_alike(mode: int) -> None:
    """At each pulse of a cycle: counts, OUT, edges and a half-read latch are those of the original."""
    for after in range(12):
        bench = Bench()
        bench.pit.set_gate(2, False)
        for channel in (0, 2):
            bench.program(channel, mode, 7)
        bench.pit.set_gate(2, True)
        bench.pulse(after)
        bench.pit.write(CONTROL, 1, 0xC8)
        bench.pit.read(2, 1)
        copy = Bench()
        copy.pulse(after)
        copy.pit.load(unpack(pack(bench.pit.save()), I8254Record))
        assert copy.irq0.level == bench.irq0.level
        before = bench.irq0.pulses - copy.irq0.pulses
        assert copy.pit.read(2, 1) == bench.pit.read(2, 1)
        bench.pit.write(0, 1, 5)
        copy.pit.write(0, 1, 5)
        assert copy.trace(2, 20) == bench.trace(2, 20)
        assert bench.irq0.pulses - copy.irq0.pulses == before


def test_an_edge_for_a_count_that_ends_while_it_is_written() -> None:
    """Mode 0, "a new count": OUT goes low with the write and high when the count ends; the edge comes even
    where the host is slower than the count."""
    bench = Bench()
    bench.pit.write(CONTROL, 1, 0x10)  # channel 0, LSB only, mode 0
    bench.pit.write(0, 1, 3)
    bench.pulse(5)
    assert bench.irq0.level and bench.irq0.pulses == 1
    now = bench.clock.now

    def slow() -> int:
        """Each look at the clock takes longer than the count."""
        bench.clock._now += tick_time(10)
        return now()

    bench.clock.now = slow  # type: ignore[method-assign]
    bench.pit.write(0, 1, 3)
    bench.clock.advance(tick_time(10))
    assert bench.irq0.level and bench.irq0.pulses == 2
