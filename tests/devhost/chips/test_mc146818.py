"""MC146818A against the Motorola datasheet (ADI856R2)."""

from __future__ import annotations

import calendar

import pytest

from coordinator.contract.clock import NS_PER_S, ManualClock
from coordinator.contract.device import ListPin
from coordinator.contract.state import pack, unpack
from devhost.chips import cmos
from devhost.chips.mc146818 import Mc146818, Mc146818Record

MS = 1_000_000
#: Tuesday 24 November 2026, 21:58:57
START = calendar.timegm((2026, 11, 24, 21, 58, 57))


class Bench:
    def __init__(self, start: int = START, presets: dict[int, int] | None = None) -> None:
        self.clock = ManualClock()
        self.irq = ListPin()
        self.rtc = Mc146818(self.clock, lambda: start * NS_PER_S + self.clock.now(), self.irq, presets)

    def get(self, address: int) -> int:
        self.rtc.write(0, 1, address)
        return self.rtc.read(1, 1)

    def put(self, address: int, value: int) -> None:
        self.rtc.write(0, 1, address)
        self.rtc.write(1, 1, value)

    def time(self) -> list[int]:
        """seconds, minutes, hours, weekday, day, month, year, century"""
        return [self.get(address) for address in (0, 2, 4, 6, 7, 8, 9, 0x32)]


def test_time_in_bcd_and_binary() -> None:
    """Table 2: BCD and binary data modes; the day of week counts from Sunday = 1."""
    bench = Bench()
    assert bench.time() == [0x57, 0x58, 0x21, 3, 0x24, 0x11, 0x26, 0x20]
    bench.put(0x0B, 0x06)
    assert bench.time() == [57, 58, 21, 3, 24, 11, 26, 20]


def test_12_hour_mode() -> None:
    """Table 2: hours 81h to 92h are PM."""
    bench = Bench()
    bench.put(0x0B, 0x00)
    assert bench.get(4) == 0x89
    noon, midnight = calendar.timegm((2026, 1, 1, 12, 0, 0)), calendar.timegm((2026, 1, 1, 0, 0, 0))
    for start, register in ((noon, 0x92), (midnight, 0x12), (noon - 1, 0x11), (noon + 3600, 0x81)):
        bench = Bench(start)
        bench.put(0x0B, 0x00)
        assert bench.get(4) == register


def test_time_goes_on() -> None:
    bench = Bench()
    bench.clock.advance(2 * 3600 * NS_PER_S + 3 * NS_PER_S)
    assert bench.time() == [0x00, 0x59, 0x23, 3, 0x24, 0x11, 0x26, 0x20]
    bench.clock.advance(60 * NS_PER_S)
    assert bench.time() == [0x00, 0x00, 0x00, 4, 0x25, 0x11, 0x26, 0x20]


def test_setting_the_time_with_set() -> None:
    """Register B, SET: 1 aborts updates so that the program may initialize the bytes."""
    bench = Bench()
    bench.put(0x0B, 0x82)
    bench.clock.advance(5 * NS_PER_S)
    assert bench.get(0) == 0x57
    end_of_february = {0: 0x59, 2: 0x59, 4: 0x23, 6: 5, 7: 0x28, 8: 0x02, 9: 0x24, 0x32: 0x20}
    for address, value in end_of_february.items():
        bench.put(address, value)
    bench.put(0x0B, 0x02)
    bench.clock.advance(NS_PER_S)
    assert bench.time() == [0x00, 0x00, 0x00, 6, 0x29, 0x02, 0x24, 0x20]  # 2024 is a leap year


def test_set_clears_uie() -> None:
    bench = Bench()
    bench.put(0x0B, 0x12)
    bench.put(0x0B, 0x92)
    assert bench.get(0x0B) == 0x82


def test_divider_reset_starts_half_a_second_before_an_update() -> None:
    """"Divider control": the first update cycle begins one half second after the reset is removed."""
    bench = Bench()
    bench.clock.advance(123 * MS)
    bench.put(0x0A, 0x66)
    bench.clock.advance(10 * NS_PER_S)
    assert bench.get(0) == 0x57
    bench.put(0x0A, 0x26)
    bench.clock.advance(499 * MS)
    assert bench.get(0) == 0x57
    bench.clock.advance(2 * MS)
    assert bench.get(0) == 0x58


def test_update_in_progress() -> None:
    """"Update cycle": UIP is set at least 244 us before, and for the 1984 us of the cycle; SET clears it."""
    bench = Bench()
    bench.clock.advance(NS_PER_S - (1984 + 244) * 1000 - 1)
    assert bench.get(0x0A) == 0x26
    bench.clock.advance(1)
    assert bench.get(0x0A) == 0xA6
    bench.clock.advance((1984 + 244) * 1000)
    assert bench.get(0x0A) == 0x26 and bench.get(0) == 0x58
    bench.clock.advance(NS_PER_S - 1 * MS)
    bench.put(0x0B, 0x82)
    assert bench.get(0x0A) == 0x26


@pytest.mark.parametrize(
    ("rate", "hz"),
    # table 3, 32.768 kHz time base
    [(1, 256), (2, 128), (3, 8192), (4, 4096), (6, 1024), (9, 128), (12, 16), (13, 8), (14, 4), (15, 2)],
)
def test_periodic_interrupt(rate: int, hz: int) -> None:
    bench = Bench()
    bench.put(0x0A, 0x20 | rate)
    bench.put(0x0B, 0x42)
    seen = 0
    for _ in range(hz):
        bench.clock.advance(-(-NS_PER_S // hz))
        if bench.irq.level:
            assert bench.get(0x0C) & 0xE0 == 0xC0  # UF beside it once a second
            seen += 1
        assert not bench.irq.level
    assert seen == hz


def test_periodic_flag_without_enable() -> None:
    """Register C: PF is set by the periodic signal whatever PIE is; IRQF only with PIE. Reading clears."""
    bench = Bench()
    bench.get(0x0C)
    bench.clock.advance(10 * MS)
    assert bench.get(0x0C) == 0x40
    assert bench.get(0x0C) == 0
    assert bench.irq.changes == []
    assert bench.clock.wheel.next_deadline() is None  # and no timer ran for it


def test_rate_0_is_none() -> None:
    bench = Bench()
    bench.put(0x0A, 0x20)
    bench.put(0x0B, 0x42)
    bench.get(0x0C)
    bench.clock.advance(NS_PER_S // 2)
    assert bench.get(0x0C) == 0


def test_update_ended_interrupt() -> None:
    bench = Bench()
    bench.put(0x0B, 0x12)
    bench.clock.advance(NS_PER_S - 1)
    assert not bench.irq.level
    bench.clock.advance(1)
    assert bench.irq.level
    assert bench.get(0x0C) & 0xB0 == 0x90
    assert not bench.irq.level
    bench.clock.advance(NS_PER_S)
    assert bench.irq.level


def test_alarm_interrupt_once_a_day() -> None:
    """"Alarm": three bytes that match; here 22:00:00 in BCD."""
    bench = Bench()
    for address, value in ((1, 0x00), (3, 0x00), (5, 0x22)):
        bench.put(address, value)
    bench.put(0x0B, 0x22)
    bench.clock.advance(62 * NS_PER_S)
    assert not bench.irq.level
    bench.clock.advance(NS_PER_S)
    assert bench.irq.level
    assert bench.get(0x0C) & 0xA0 == 0xA0
    bench.clock.advance(86399 * NS_PER_S)
    assert not bench.irq.level
    bench.clock.advance(NS_PER_S)
    assert bench.irq.level


def test_alarm_dont_care() -> None:
    """"Don't care" C0h to FFh: hours, an alarm each hour; all three, each second."""
    bench = Bench()
    for address, value in ((1, 0x30), (3, 0x59), (5, 0xFF)):
        bench.put(address, value)
    bench.put(0x0B, 0x22)
    hits = []
    for second in range(2 * 3600):
        bench.clock.advance(NS_PER_S)
        if bench.irq.level:
            bench.get(0x0C)
            hits.append(second + 1)
    assert hits == [33, 33 + 3600]
    for address in (1, 3, 5):
        bench.put(address, 0xC0)
    bench.get(0x0C)
    bench.clock.advance(NS_PER_S)
    assert bench.irq.level


def test_alarm_that_cannot_match() -> None:
    bench = Bench()
    bench.put(5, 0x7F)
    bench.put(0x0B, 0x22)
    bench.clock.advance(2 * 86400 * NS_PER_S)
    assert not bench.irq.level


def test_reset_keeps_time_and_ram() -> None:
    """"RESET": clears PIE, AIE, UIE, SQWE and the flags; no effect on clock, calendar, RAM."""
    bench = Bench()
    bench.put(0x40, 0xA5)
    bench.put(0x0B, 0x7A)
    bench.clock.advance(NS_PER_S)
    assert bench.irq.level
    bench.rtc.reset()
    assert not bench.irq.level
    assert bench.get(0x0B) == 0x02 and bench.get(0x0C) == 0
    assert bench.get(0x40) == 0xA5 and bench.get(0) == 0x58


def test_index_register() -> None:
    """PIIX3 2.5.6: port 70h is write-only, bit 7 disables NMI; registers C and D cannot be written."""
    bench = Bench()
    bench.rtc.write(0, 1, 0x8D)
    assert bench.rtc.nmi_disabled
    assert bench.rtc.read(0, 1) == 0xFF
    assert bench.rtc.read(1, 1) == 0x80  # VRT
    bench.rtc.write(1, 1, 0)
    assert bench.rtc.read(1, 1) == 0x80


def test_nonsense_times_are_carried() -> None:
    bench = Bench()
    bench.put(0x0B, 0x86)
    for address in (0, 2, 4, 6, 7, 8, 9, 0x32):
        bench.put(address, 0xFF)
    bench.put(0x0B, 0x06)
    bench.clock.advance(86400 * NS_PER_S)
    assert all(0 <= value <= 99 for value in bench.time())
    unpack(pack(bench.rtc.save()), Mc146818Record)


def test_save_and_load() -> None:
    bench = Bench()
    bench.put(0x0B, 0x82)
    bench.put(4, 0x03)
    bench.put(0x0B, 0x72)
    bench.put(1, 0xFF)
    bench.clock.advance(300 * MS)
    copy = Bench()
    copy.clock.advance(300 * MS)
    copy.rtc.load(unpack(pack(bench.rtc.save()), Mc146818Record))
    for _ in range(20):
        for each in (bench, copy):
            each.clock.advance(70 * MS)
        assert copy.irq.level == bench.irq.level
        assert copy.get(0x0C) == bench.get(0x0C)
        assert copy.time() == bench.time()


def test_cmos_contents() -> None:
    """512 MiB: 65,535 KiB extended at most in 17h and 30h; 496 MiB in units of 64 KiB in 34h."""
    presets = cmos.contents(512 << 20, 5 << 30, 2) | cmos.boot_flags("dc")
    bench = Bench(presets=presets)
    assert [bench.get(address) for address in (0x10, 0x12, 0x15, 0x16)] == [0, 0, 0x80, 0x02]
    assert [bench.get(address) for address in (0x17, 0x18, 0x30, 0x31)] == [0xFF] * 4
    assert bench.get(0x34) | bench.get(0x35) << 8 == 496 * 16
    assert bench.get(0x5B) | bench.get(0x5C) << 8 | bench.get(0x5D) << 16 == 5 << 14
    assert bench.get(0x5F) == 1
    assert bench.get(0x3D) == 0x23 and bench.get(0x38) == 0x01  # CD, then disk


def test_an_edge_between_a_read_of_c_and_a_tick_during_it() -> None:
    """"Register C": the read clears the flags, and IRQ goes high (inactive); a tick that comes while the chip
    is at work is another edge, however long that takes."""
    bench = Bench()
    bench.put(0x0B, 0x42)
    bench.clock.advance(MS)
    assert bench.irq.level and bench.irq.pulses == 1
    now = bench.clock.now

    def slow() -> int:
        """Each look at the clock takes a whole period."""
        bench.clock._now += NS_PER_S // 1024 + 1
        return now()

    bench.clock.now = slow  # type: ignore[method-assign]
    assert bench.get(0x0C) & 0xC0 == 0xC0
    assert bench.irq.level and bench.irq.pulses == 2
