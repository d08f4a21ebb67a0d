"""Power management function of the PIIX4: its I/O block with the ACPI registers, and the SMI ports.

Sources:
  PIIX4  Intel 82371AB datasheet, 290562, section 7.2 "Power management I/O registers"
  ACPI   ACPI specification 1.0b, section 4.7 "ACPI hardware features"

There is no SMM, so ACPI is always enabled: SCI_EN reads 1 and the FADT names no SMI command port.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from coordinator.contract.clock import NS_PER_S, Clock
from coordinator.contract.device import Device, Pin
from coordinator.contract.registers import Access, Register, RegisterMap, TimeSource
from coordinator.contract.state import Record
from devhost.chips.common import U8, U16, Natural

PM_TIMER_HZ = 3_579_545
PM_TIMER_BITS = 24

# offsets in the I/O block, PIIX4 7.2
PM1_STATUS = 0x00
PM1_ENABLE = 0x02
PM1_CONTROL = 0x04
PM_TIMER = 0x08
GPE0_STATUS = 0x0C
GPE0_ENABLE = 0x0E
BLOCK_SIZE = 0x40

# PM1 status and enable, ACPI 4.7.3.1
TMR = 0x0001
BM_STS = 0x0010
GBL = 0x0020
PWRBTN = 0x0100
RTC = 0x0400
WAK_STS = 0x8000
ENABLE_BITS = TMR | GBL | PWRBTN | RTC
# PM1 control, ACPI 4.7.3.2; SLP_TYP is what the DSDT's \_S5 says
SCI_EN = 0x0001
SLP_TYP = 0x1C00
SLP_EN = 0x2000
CONTROL_BITS = 0x0002 | SLP_TYP  # BM_RLD and SLP_TYP; GBL_RLS and SLP_EN are write-only
S5_TYPE = 0
#: GPSTS and GPEN, PIIX4 7.2.5 and 7.2.6: thermal alarm 0, USB 8, GPI 9, ring 10, lid 11
GPE0_BITS = 0x0F01


class AcpiPmRecord(Record, frozen=True, kw_only=True):
    """``timer_half`` is how many times bit 23 of the timer had changed when TMR_STS was last looked at."""

    kind: ClassVar[str] = "acpi_pm"
    status: U16
    enable: U16
    control: U16
    gpe_status: U16
    gpe_enable: U16
    smi_command: U8
    smi_status: U8
    timer_half: Natural


class AcpiPm(Device):
    """``sci`` is the interrupt (IRQ9); ``power_off`` is called for SLP_EN with the type of S5."""

    kind = "acpi_pm"
    ranges = {
        "pm": RegisterMap(
            Register("PM1_STS", PM1_STATUS, 2, (1, 2), doc="PIIX4 7.2.1"),
            Register("PM1_EN", PM1_ENABLE, 2, (1, 2), read=Access.SHADOW, doc="PIIX4 7.2.2"),
            Register("PM1_CNT", PM1_CONTROL, 2, (1, 2), read=Access.SHADOW, doc="PIIX4 7.2.3"),
            Register(
                "PM_TMR",
                PM_TIMER,
                4,
                (1, 2, 4),
                read=Access.TIME,
                write=Access.POSTED,
                time_source="pm_timer",
                doc="PIIX4 7.2.4",
            ),
            Register("GPE0_STS", GPE0_STATUS, 2, (1, 2), doc="PIIX4 7.2.5"),
            Register("GPE0_EN", GPE0_ENABLE, 2, (1, 2), read=Access.SHADOW, doc="PIIX4 7.2.6"),
            size=BLOCK_SIZE,
        ),
        "smi": RegisterMap(  # ports B2h, B3h
            Register("APMC", 0, read=Access.SHADOW, doc="PIIX4 4.2.7.1"),
            Register("APMS", 1, read=Access.SHADOW, doc="PIIX4 4.2.7.2"),
        ),
    }
    time_sources = {
        "pm_timer": TimeSource(mul=PM_TIMER_HZ, div=NS_PER_S, mask=(1 << PM_TIMER_BITS) - 1),
    }

    def __init__(self, clock: Clock, sci: Pin, power_off: Callable[[], None]) -> None:
        self._clock = clock
        self._sci = sci
        self._power_off = power_off
        self._timer = clock.timer(self._update)
        self.smi = bytearray(2)
        self.status = self.enable = self.control = 0
        self.gpe_status = self.gpe_enable = 0
        self._timer_half = self._half()

    # ---- board side ------------------------------------------------------------------------------
    def press_power_button(self) -> None:
        """The button is pressed and let go: PWRBTN_STS (ACPI 4.7.2.2.1)."""
        self.status |= PWRBTN
        self._update()

    def raise_gpe(self, number: int) -> None:
        """General-purpose event ``number`` happens; bits that the chip lacks are ignored."""
        self.gpe_status |= 1 << number & GPE0_BITS
        self._update()

    # ---- PM timer --------------------------------------------------------------------------------
    def _ticks(self) -> int:
        return self._clock.now() * PM_TIMER_HZ // NS_PER_S

    def _half(self) -> int:
        """How many times bit 23 has changed since power-on."""
        return self._ticks() >> PM_TIMER_BITS - 1

    def time_state(self, source: str) -> tuple[bool, int, int]:
        """The timer runs from power-on, for ever."""
        return True, 0, 0

    # ---- events ----------------------------------------------------------------------------------
    def _catch_up(self) -> None:
        """TMR_STS: bit 23 has changed (ACPI 4.7.3.1.1)."""
        half = self._half()
        if half != self._timer_half:
            self.status |= TMR
            self._timer_half = half

    def _update(self) -> None:
        """SCI is a level: an enabled event has its status bit. The timer is waited for only if it matters."""
        self._catch_up()
        self._sci.set(bool(self.status & self.enable or self.gpe_status & self.gpe_enable))
        if self.enable & TMR and not self.status & TMR:
            ticks = self._timer_half + 1 << PM_TIMER_BITS - 1
            self._timer.arm(-(-ticks * NS_PER_S // PM_TIMER_HZ))
        else:
            self._timer.cancel()

    # ---- the bus ---------------------------------------------------------------------------------
    def _byte(self, offset: int) -> int:
        """A byte of the block. Registers of the PIIX4 that are not here read 0, as on the chip."""
        if offset >= BLOCK_SIZE:
            return 0xFF
        word = {
            PM1_STATUS: self.status,
            PM1_ENABLE: self.enable,
            PM1_CONTROL: self.control | SCI_EN,
            GPE0_STATUS: self.gpe_status,
            GPE0_ENABLE: self.gpe_enable,
        }.get(offset & ~1, 0)
        if PM_TIMER <= offset < PM_TIMER + 4:
            word = (self._ticks() & (1 << PM_TIMER_BITS) - 1) >> 8 * (offset & 2)
        return word >> 8 * (offset & 1) & 0xFF

    def peek(self, offset: int, range_name: str = "main") -> int:
        if range_name == "smi":
            return self.smi[offset]
        return self._byte(offset) | (0 if offset & 1 else self._byte(offset + 1) << 8)

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        if range_name == "smi":
            data = self.smi[offset : offset + width]
            return int.from_bytes(data + b"\xff" * (width - len(data)), "little")
        self._catch_up()
        return sum(self._byte(offset + i) << 8 * i for i in range(width))

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        for i in range(width):
            self._write_byte(offset + i, value >> 8 * i & 0xFF, range_name)
        self._update()
        control = range_name == "pm" and offset <= PM1_CONTROL + 1 < offset + width
        if control and value >> 8 * (PM1_CONTROL + 1 - offset) & SLP_EN >> 8:
            self._sleep()

    def _write_byte(self, offset: int, value: int, range_name: str) -> None:
        if range_name == "smi":
            if offset < 2:
                self.smi[offset] = value
            return
        shift = 8 * (offset & 1)
        keep, bits = 0xFF << (8 - shift), value << shift
        register = offset & ~1
        if register == PM1_STATUS:  # write 1 to clear
            self._catch_up()
            self.status &= ~bits
        elif register == PM1_ENABLE:
            self.enable = (self.enable & keep | bits) & ENABLE_BITS
        elif register == PM1_CONTROL:
            self.control = (self.control & keep | bits) & CONTROL_BITS
        elif register == GPE0_STATUS:
            self.gpe_status &= ~bits
        elif register == GPE0_ENABLE:
            self.gpe_enable = (self.gpe_enable & keep | bits) & GPE0_BITS

    def _sleep(self) -> None:
        """SLP_EN: soft-off is the only sleeping state that the DSDT offers; others are ignored."""
        if (self.control & SLP_TYP) >> 10 == S5_TYPE:
            self._power_off()

    # ---- state -----------------------------------------------------------------------------------
    def reset(self, hard: bool = True) -> None:
        self.status = self.enable = self.control = 0
        self.gpe_status = self.gpe_enable = 0
        self.smi = bytearray(2)
        self._timer_half = self._half()
        self._update()

    def save(self) -> AcpiPmRecord:
        self._catch_up()
        return AcpiPmRecord(
            status=self.status,
            enable=self.enable,
            control=self.control,
            gpe_status=self.gpe_status,
            gpe_enable=self.gpe_enable,
            smi_command=self.smi[0],
            smi_status=self.smi[1],
            timer_half=self._timer_half,
        )

    def load(self, record: Record) -> None:
        assert isinstance(record, AcpiPmRecord)
        self.status, self.enable, self.control = record.status, record.enable, record.control
        self.gpe_status, self.gpe_enable = record.gpe_status, record.gpe_enable
        self.smi = bytearray((record.smi_command, record.smi_status))
        self._timer_half = record.timer_half
        self._update()
