"""HPET against the IA-PC HPET specification 1.0a (sections in the tests)."""

from __future__ import annotations

import pytest

from coordinator.contract.clock import ManualClock
from coordinator.contract.device import ListPin
from coordinator.contract.state import pack, unpack
from devhost.chips.hpet import Hpet, HpetRecord
from devhost.chips.legacy_route import LegacyRoute, LegacyRoutes

CONF, STATUS, COUNTER = 0x10, 0x20, 0xF0
ENABLE, LEGACY = 1, 2
LEVEL, INT, PERIODIC, VALUE_SET, MODE_32 = 2, 4, 8, 64, 256
NS = 10  # a tick of 100 MHz


def timer(number: int) -> int:
    return 0x100 + 0x20 * number


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.irq0, self.irq8, self.legacy = ListPin(), ListPin(), ListPin()
        self.pins = {number: ListPin() for number in range(24)}
        self.hpet = Hpet(self.clock, self.irq0, self.irq8, self.legacy, self.pins)

    def put(self, offset: int, value: int, width: int = 8) -> None:
        self.hpet.write(offset, width, value)

    def get(self, offset: int, width: int = 8) -> int:
        return self.hpet.read(offset, width)

    def ticks(self, count: int) -> None:
        self.clock.advance(count * NS)

    def source(self) -> int:
        """What a vCPU computes for the main counter, by the formula of the contract."""
        running, offset, frozen = self.hpet.time_state("counter")
        shape = self.hpet.time_sources["counter"]
        if not running:
            return frozen & shape.mask
        return ((self.clock.now() - offset) % 2**64) * shape.mul // shape.div & shape.mask


def test_capabilities() -> None:
    """2.3.4: revision 01, timers less one in 12:8, 64-bit counter, legacy capable, vendor, period in fs."""
    value = Bench().get(0)
    assert value & 0xFF == 0x01
    assert (value >> 8 & 0x1F) + 1 == 3
    assert value >> 13 & 1 and value >> 15 & 1
    period = value >> 32
    assert period == 10_000_000 and period <= 0x05F5E100  # 2.3.4: at most 100 ns


def test_counter_halted_and_running() -> None:
    """2.3.7: written only while halted; 2.3.5: ENABLE_CNF lets it run."""
    bench = Bench()
    bench.put(COUNTER, 0x1234)
    bench.ticks(50)
    assert bench.get(COUNTER) == bench.source() == 0x1234
    bench.put(CONF, ENABLE)
    bench.ticks(100)
    assert bench.get(COUNTER) == bench.source() == 0x1234 + 100
    bench.clock.advance(9)
    assert bench.get(COUNTER) == bench.source() == 0x1234 + 100
    bench.put(CONF, 0)
    bench.ticks(5)
    assert bench.get(COUNTER) == bench.source() == 0x1234 + 100


def test_counter_in_halves() -> None:
    """2.3.1: 32-bit accesses of either half."""
    bench = Bench()
    bench.put(COUNTER, 0xFFFF_FFFF, 4)
    bench.put(COUNTER + 4, 0x7, 4)
    bench.put(CONF, ENABLE, 4)
    bench.ticks(1)
    assert bench.get(COUNTER, 4) == 0 and bench.get(COUNTER + 4, 4) == 8
    assert bench.get(COUNTER) == bench.source() == 0x8_0000_0000


def test_timer_configuration() -> None:
    """2.3.8.1: capabilities; VAL_SET_CNF reads 0... and a route that does not exist is not taken."""
    bench = Bench()
    value = bench.get(timer(0))
    assert value & 0x30 == 0x30  # periodic capable, 64 bits
    assert value & 0x8000 == 0  # no FSB delivery
    assert value >> 32 == 0x00F0_0000
    bench.put(timer(0), INT | 20 << 9)
    assert bench.get(timer(0)) >> 9 & 0x1F == 20
    bench.put(timer(0), INT | 3 << 9)
    assert bench.get(timer(0)) >> 9 & 0x1F == 20
    assert bench.get(timer(0) + 8) == 0xFFFF_FFFF_FFFF_FFFF  # 2.3.8.2: reset value


def test_one_shot_edge() -> None:
    bench = Bench()
    bench.put(timer(1), INT | 21 << 9)
    bench.put(timer(1) + 8, 1000)
    bench.put(CONF, ENABLE)
    bench.ticks(999)
    assert bench.pins[21].pulses == 0
    bench.ticks(1)
    assert bench.pins[21].pulses == 1
    assert bench.get(STATUS) == 0  # 2.3.6: always 0 for edge triggered
    bench.ticks(100_000)
    assert bench.pins[21].pulses == 1
    bench.put(timer(1) + 8, bench.get(COUNTER) + 10)
    bench.ticks(10)
    assert bench.pins[21].pulses == 2


def test_one_shot_level() -> None:
    """2.3.6: the status bit holds the line until 1 is written to it."""
    bench = Bench()
    bench.put(timer(2), INT | LEVEL | 22 << 9)
    bench.put(timer(2) + 8, 10)
    bench.put(CONF, ENABLE)
    bench.ticks(10)
    assert bench.pins[22].level and bench.get(STATUS) == 4
    bench.put(STATUS, 3)
    assert bench.pins[22].level
    bench.put(STATUS, 4)
    assert not bench.pins[22].level and bench.get(STATUS) == 0


def test_periodic() -> None:
    """2.3.9.2.2: VAL_SET_CNF, then the comparator; each match adds the value last written."""
    bench = Bench()
    bench.put(timer(0), INT | PERIODIC | VALUE_SET | 20 << 9)
    bench.put(timer(0) + 8, 5000)  # accumulator
    bench.put(timer(0) + 8, 3000)  # period
    bench.put(CONF, ENABLE)
    assert bench.get(timer(0) + 8) == 5000
    bench.ticks(4999)
    assert bench.pins[20].pulses == 0
    bench.ticks(1)
    assert bench.pins[20].pulses == 1 and bench.get(timer(0) + 8) == 8000
    bench.ticks(3000 * 4)
    assert bench.pins[20].pulses == 5


def test_periodic_comparator_moves_without_interrupts() -> None:
    bench = Bench()
    bench.put(timer(0), PERIODIC | VALUE_SET)
    bench.put(timer(0) + 8, 3000)
    bench.put(CONF, ENABLE)
    bench.ticks(10_000)
    assert bench.get(timer(0) + 8) == 12_000
    assert bench.clock.wheel.next_deadline() is None


def test_32_bit_period_longer_than_half_the_range() -> None:
    bench = Bench()
    bench.put(timer(0), INT | PERIODIC | VALUE_SET | MODE_32 | 20 << 9)
    bench.put(timer(0) + 8, 0xC000_0000)
    bench.put(CONF, ENABLE)
    bench.ticks(100)
    assert bench.get(timer(0) + 8) == 0xC000_0000
    bench.ticks(0xC000_0000 - 101)
    assert bench.pins[20].pulses == 0
    bench.ticks(1)
    assert bench.pins[20].pulses == 1 and bench.get(timer(0) + 8) == 0x8000_0000
    bench.ticks(0xC000_0000)
    assert bench.pins[20].pulses == 2


def test_32_bit_mode_wraps() -> None:
    """2.3.8.1, Tn_32MODE_CNF: the timer compares 32 bits, so it matches each time they come round."""
    bench = Bench()
    bench.put(COUNTER, 0xFFFF_FFF0)
    bench.put(timer(1), INT | MODE_32 | 21 << 9)
    bench.put(timer(1) + 8, 0x10)
    bench.put(CONF, ENABLE)
    bench.ticks(0x20)
    assert bench.pins[21].pulses == 1
    bench.ticks(2**32)
    assert bench.pins[21].pulses == 2


def test_legacy_replacement() -> None:
    """2.3.5: timer 0 is IRQ0 in place of the 8254, timer 1 IRQ8 in place of the RTC; routes are ignored."""
    bench = Bench()
    bench.put(timer(0), INT | 20 << 9)
    bench.put(timer(1), INT | 21 << 9)
    bench.put(timer(0) + 8, 10)
    bench.put(timer(1) + 8, 20)
    bench.put(CONF, ENABLE | LEGACY)
    assert bench.legacy.level
    bench.ticks(20)
    assert (bench.irq0.pulses, bench.irq8.pulses) == (1, 1)
    assert bench.pins[20].pulses == bench.pins[21].pulses == 0
    bench.put(CONF, ENABLE)
    assert not bench.legacy.level and not bench.irq0.level


def test_legacy_route() -> None:
    irq = ListPin()
    route = LegacyRoute(irq)
    switch = LegacyRoutes(route)
    route.chip.set(True)
    route.hpet.set(False)
    assert irq.level
    switch.set(True)
    assert not irq.level
    route.chip.set(False)
    route.chip.set(True)
    assert irq.changes == [True, False]
    route.hpet.set(True)
    route.hpet.set(False)
    switch.set(False)
    assert irq.changes == [True, False, True, False, True]


def test_late_match_is_not_lost_when_the_guest_writes_first() -> None:
    bench = Bench()
    bench.put(timer(0), INT | 20 << 9)
    bench.put(timer(0) + 8, 100)
    bench.put(CONF, ENABLE)
    bench.clock._now += 200 * NS  # the host was late
    bench.put(timer(0) + 8, 500)
    bench.clock.advance(0)
    assert bench.pins[20].pulses == 1
    bench.ticks(300)
    assert bench.pins[20].pulses == 2


def test_tiny_period_does_not_flood() -> None:
    bench = Bench()
    bench.put(timer(0), INT | PERIODIC | VALUE_SET | 20 << 9)
    bench.put(timer(0) + 8, 1)
    bench.put(CONF, ENABLE)
    bench.clock.advance(1_000_000)
    assert 20 <= bench.pins[20].pulses <= 50


@pytest.mark.parametrize("mode", [0, LEVEL, PERIODIC, PERIODIC | LEVEL])
def test_save_and_load(mode: int) -> None:
    for moment in (0, 999, 1000, 1500, 3000):
        bench = Bench()
        bench.put(COUNTER, 2**63 + 5)
        bench.put(timer(0), INT | mode | VALUE_SET)
        bench.put(timer(0) + 8, 2**63 + 1005)
        bench.put(timer(0) + 8, 700)
        bench.put(CONF, ENABLE | LEGACY)
        bench.ticks(moment)
        copy = Bench()
        copy.clock.advance(bench.clock.now())
        copy.hpet.load(unpack(pack(bench.hpet.save()), HpetRecord))
        assert copy.irq0.level == bench.irq0.level and copy.legacy.level
        before = bench.irq0.pulses - copy.irq0.pulses
        for each in (bench, copy):
            each.ticks(2000)
            each.put(STATUS, 1)
            each.ticks(2000)
        assert bench.irq0.pulses - copy.irq0.pulses == before
        assert all(bench.get(offset) == copy.get(offset) for offset in range(0, 0x170, 8))


def test_reset() -> None:
    bench = Bench()
    bench.put(timer(0), INT)
    bench.put(timer(0) + 8, 10)
    bench.put(CONF, ENABLE | LEGACY)
    bench.ticks(10)
    bench.hpet.reset()
    assert not bench.legacy.level and not bench.irq0.level
    assert bench.get(COUNTER) == 0 and bench.get(CONF) == 0 and bench.get(timer(0)) & 0xFFFF == 0x30
