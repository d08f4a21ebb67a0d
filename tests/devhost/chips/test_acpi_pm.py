"""ACPI registers of the PIIX4 against its datasheet (290562, 7.2) and ACPI 1.0b (4.7)."""

from __future__ import annotations

import pytest

from coordinator.contract.clock import ManualClock
from coordinator.contract.device import ListPin
from coordinator.contract.registers import Access
from coordinator.contract.state import pack, unpack
from devhost.chips.acpi_pm import AcpiPm, AcpiPmRecord

STS, EN, CNT, TMR, GPE_STS, GPE_EN = 0x00, 0x02, 0x04, 0x08, 0x0C, 0x0E
PWRBTN = 0x100


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.sci = ListPin()
        self.offs = 0
        self.pm = AcpiPm(self.clock, self.sci, self._off)

    def _off(self) -> None:
        self.offs += 1

    def put(self, offset: int, value: int, width: int = 2) -> None:
        self.pm.write(offset, width, value, "pm")

    def get(self, offset: int, width: int = 2) -> int:
        return self.pm.read(offset, width, "pm")


def test_sci_is_always_enabled() -> None:
    """Trap of the machine: without SMM nobody could answer an ACPI_ENABLE command."""
    bench = Bench()
    assert bench.get(CNT) == 1
    bench.put(CNT, 0)
    assert bench.get(CNT) & 1


def test_power_button() -> None:
    """ACPI 4.7.2.2.1, 4.7.3.1: status, enable, SCI; a 1 written clears."""
    bench = Bench()
    bench.pm.press_power_button()
    assert bench.get(STS) == PWRBTN and not bench.sci.level
    bench.put(EN, PWRBTN)
    assert bench.sci.level
    bench.put(STS, 0)
    assert bench.sci.level
    bench.put(STS, PWRBTN)
    assert not bench.sci.level and bench.get(STS) == 0


def test_byte_accesses() -> None:
    bench = Bench()
    bench.pm.press_power_button()
    bench.put(EN + 1, 0x01, 1)
    assert bench.get(EN) == PWRBTN and bench.get(EN + 1, 1) == 1 and bench.sci.level
    assert bench.get(STS, 4) == PWRBTN << 16 | PWRBTN
    bench.put(STS, 0xFF, 1)
    assert bench.get(STS) == PWRBTN
    bench.put(STS + 1, 0xFF, 1)
    assert bench.get(STS) == 0


def test_timer_rate_and_width() -> None:
    """ACPI 4.7.3.3: 3.579545 MHz; 24 bits, the upper 8 read 0."""
    bench = Bench()
    bench.clock.advance(1_000_000_000)
    assert bench.get(TMR, 4) == 3_579_545
    bench.clock.advance(4_000_000_000)
    assert bench.get(TMR, 4) == 5 * 3_579_545 - (1 << 24)
    shape = AcpiPm.time_sources["pm_timer"]
    running, offset, _ = bench.pm.time_state("pm_timer")
    computed = (bench.clock.now() - offset) * shape.mul // shape.div & shape.mask
    assert running and computed == bench.get(TMR, 4)
    assert bench.get(TMR, 4) == sum(bench.get(TMR + i, 1) << 8 * i for i in range(4))
    register = AcpiPm.ranges["pm"].at(TMR)
    assert register is not None and register.read is Access.TIME


def test_timer_status_when_bit_23_changes() -> None:
    """ACPI 4.7.3.1.1: TMR_STS is set when bit 23 changes, every 2.3435 s; with TMR_EN it is an SCI."""
    bench = Bench()
    half_ns = (1 << 23) * 1_000_000_000 // 3_579_545
    assert abs(half_ns - 2_343_500_000) < 100_000
    bench.clock.advance(half_ns - 10)
    assert bench.get(STS) == 0
    bench.clock.advance(20)
    assert bench.get(STS) == 1 and not bench.sci.level
    bench.put(STS, 1)
    bench.put(EN, 1)
    bench.clock.advance(half_ns - 20)
    assert not bench.sci.level
    bench.clock.advance(20)
    assert bench.sci.level and bench.get(STS) == 1
    bench.put(STS, 1)
    assert not bench.sci.level


@pytest.mark.parametrize(("value", "width", "offset", "offs"), [
    (0x2000, 2, CNT, 1),
    (0x2001, 2, CNT, 1),
    (0x20, 1, CNT + 1, 1),
    (0x2000, 4, CNT, 1),
    (0x2000_0000, 4, EN, 1),  # bits 31-16 are PM1_CNT
    (0x2000, 2, EN, 0),
    (0x0000, 2, CNT, 0),
    (0x2400, 2, CNT, 0),  # another sleeping state
])  # fmt: skip
def test_soft_off(value: int, width: int, offset: int, offs: int) -> None:
    """PIIX4 7.2.3: SLP_EN with SLP_TYP 000, "soft off"; SLP_EN reads 0."""
    bench = Bench()
    bench.put(offset, value, width)
    assert bench.offs == offs
    assert bench.get(CNT) & 0x2000 == 0


def test_sleep_type_reads_back() -> None:
    bench = Bench()
    bench.put(CNT, 0x1C02)
    assert bench.get(CNT) == 0x1C03


def test_general_purpose_events() -> None:
    """PIIX4 7.2.5, 7.2.6: GPSTS is cleared by 1, GPEN enables it to raise SCI."""
    bench = Bench()
    bench.pm.raise_gpe(11)
    assert bench.get(GPE_STS) == 0x0800 and not bench.sci.level
    bench.put(GPE_EN, 0xFFFF)
    assert bench.get(GPE_EN) == 0x0F01 and bench.sci.level
    bench.put(GPE_STS, 0x0800)
    assert not bench.sci.level


def test_smi_ports_hold_their_values() -> None:
    bench = Bench()
    bench.pm.write(0, 1, 0xF1, "smi")
    bench.pm.write(1, 1, 0x5A, "smi")
    assert bench.pm.read(0, 1, "smi") == 0xF1 and bench.pm.read(0, 2, "smi") == 0x5AF1


def test_what_is_not_there_reads_zero() -> None:
    bench = Bench()
    assert bench.get(0x14, 1) == 0 and bench.get(0x30, 4) == 0
    bench.put(0x30, 0xFFFF_FFFF, 4)
    assert bench.get(0x30, 4) == 0


def test_shadows_say_what_a_read_says() -> None:
    bench = Bench()
    bench.put(EN, 0x521)
    bench.put(CNT, 0x1802)
    for offset in (EN, CNT, GPE_EN):
        assert bench.pm.peek(offset, "pm") == bench.get(offset)
        assert bench.pm.peek(offset + 1, "pm") == bench.get(offset + 1, 1)


def test_save_and_load() -> None:
    bench = Bench()
    bench.put(EN, 0x101)
    bench.clock.advance(2_000_000_000)
    bench.put(CNT, 0x0402)
    copy = Bench()
    copy.clock.advance(2_000_000_000)
    copy.pm.load(unpack(pack(bench.pm.save()), AcpiPmRecord))
    for each in (bench, copy):
        each.clock.advance(400_000_000)
    assert bench.sci.level and copy.sci.level
    assert copy.get(STS) == bench.get(STS) and copy.get(CNT) == bench.get(CNT) == 0x0403
    bench.pm.reset()
    assert not bench.sci.level and bench.get(EN) == 0 and bench.get(STS) == 0 and bench.get(CNT) == 1
