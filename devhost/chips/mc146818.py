"""MC146818A real-time clock with 128 bytes of CMOS RAM, behind ports 70h and 71h.

Sources:
  MC146818A  Motorola datasheet, ADI856R2 (the registers' bits by name, table 3 for the rates)
  PIIX3      Intel 82371SB datasheet, 290550, section 2.5.6 "RTC registers", NMI enable in port 70h

Time is a pure function of the wall clock that is handed in; the periodic interrupt counts guest
time. Timers run only while an interrupt is enabled and its flag is clear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar

from msgspec import Meta

from coordinator.contract.clock import NS_PER_S, Clock
from coordinator.contract.device import Pin
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips import rtc_time
from devhost.chips.common import U8, ByteDevice
from devhost.chips.rtc_time import REG_A, REG_B, REG_C, REG_CENTURY, REG_D, REG_HOURS_ALARM

# register A
UIP = 0x80
DIVIDER_RESET = 0x60  # 11x: the divider chain is held in reset
RATE = 0x0F
# register B
SET, PIE, AIE, UIE, SQWE = 0x80, 0x40, 0x20, 0x10, 0x08
# register C
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
# register D
VRT = 0x80

NMI_DISABLE = 0x80

#: "Update cycle": UIP rises 244 us before an update that takes 1984 us with a 32.768 kHz time base
UIP_NS = (244 + 1984) * 1000
#: "Divider": the first update is half a second after the divider chain leaves reset
DIVIDER_START_NS = NS_PER_S // 2

#: CMOS RAM of a machine that nobody set up: the divider runs, 1,024 Hz, 24 hours, BCD
DEFAULT_A = 0x26
DEFAULT_B = 0x02

_TIME_REGISTERS = frozenset((*range(0, 10, 2), 6, 7, 9, REG_CENTURY))

#: Times in records are (s, ns): a clock set to the year 9999 does not fit 64 bits of ns.
SplitTime = tuple[int, Annotated[int, Meta(ge=0, lt=NS_PER_S)]]


def _split(ns: int) -> SplitTime:
    return divmod(ns, NS_PER_S)


def _join(time: SplitTime) -> int:
    return time[0] * NS_PER_S + time[1]


class Mc146818Record(Record, frozen=True, kw_only=True):
    """``offset`` is RTC time less wall time; ``flags_at`` and ``flags_tick`` say up to when
    register C's flags are worked out (RTC time, periodic ticks)."""

    kind: ClassVar[str] = "mc146818"
    index: U8
    nmi_disabled: bool
    cmos: Annotated[bytes, Meta(min_length=128, max_length=128)]
    offset: SplitTime
    weekday_shift: Annotated[int, Meta(ge=0, le=6)]
    stopped_at: SplitTime | None
    flags: U8
    flags_at: SplitTime
    flags_tick: int


class Mc146818(ByteDevice):
    """``wall`` gives the civil time that the clock shows, as ns since 1970 (for ``-rtc
    base=localtime`` it has the zone's offset in it). ``irq`` is IRQ8. ``cmos`` presets RAM bytes."""

    kind = "mc146818"
    ranges = {
        "main": RegisterMap(  # ports 70h, 71h
            Register("INDEX", 0, read=Access.SHADOW, write=Access.POSTED, doc="PIIX3 2.5.6.1, write-only"),
            Register("DATA", 1, doc="MC146818A"),
        )
    }

    def __init__(
        self, clock: Clock, wall: Callable[[], int], irq: Pin, cmos: Mapping[int, int] | None = None
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._irq = irq
        self._timer = clock.timer(self._on_timer)
        self.index = 0
        self.nmi_disabled = False
        self.cmos = bytearray(128)
        self.cmos[REG_A], self.cmos[REG_B], self.cmos[REG_D] = DEFAULT_A, DEFAULT_B, VRT
        for address, value in (cmos or {}).items():
            self.cmos[address] = value
        self._offset = 0
        self._weekday_shift = 0
        #: RTC time at which the clock stands, while SET or the divider reset holds it
        self._stopped_at: int | None = None
        self._flags = 0
        self._flags_at = self._now()
        self._flags_tick = self._periodic_tick()

    # ---- time ------------------------------------------------------------------------------------
    def _now(self) -> int:
        """RTC time in ns; it stands while ``_stopped_at`` says so."""
        return self._stopped_at if self._stopped_at is not None else self._wall() + self._offset

    def _held(self) -> bool:
        """SET inhibits updates; the divider reset stops the clock."""
        return bool(self.cmos[REG_B] & SET) or self.cmos[REG_A] & DIVIDER_RESET == DIVIDER_RESET

    def _rate_hz(self) -> int:
        """Table 3, 32.768 kHz time base: rates 1 and 2 repeat 256 and 128 Hz; 0 is none."""
        rate = self.cmos[REG_A] & RATE
        return 0 if rate == 0 else 32768 >> (rate + 6 if rate < 3 else rate - 1)

    def _periodic_tick(self) -> int:
        return self._clock.now() * self._rate_hz() // NS_PER_S

    def _show_time(self) -> None:
        """Put the time into the registers."""
        shown = rtc_time.encode(self._now() // NS_PER_S, self.cmos[REG_B], self._weekday_shift)
        for address, value in shown.items():
            self.cmos[address] = value

    def _take_time(self) -> None:
        """Make the registers the time. The fraction of the second is the divider's and stays."""
        seconds, self._weekday_shift = rtc_time.decode(self.cmos)
        now = self._now()
        target = seconds * NS_PER_S + now % NS_PER_S
        self._offset += target - now
        self._flags_at = target

    # ---- interrupts ------------------------------------------------------------------------------
    def _update_flags(self) -> None:
        """Set the flags of all that has happened since last time."""
        tick = self._periodic_tick()
        if tick > self._flags_tick:
            self._flags |= PF
        self._flags_tick = tick
        if self._stopped_at is None:
            second, now = self._flags_at // NS_PER_S, self._now()
            if now // NS_PER_S > second:
                self._flags |= UF
                alarm = rtc_time.next_alarm(second, self.cmos)
                if alarm is not None and alarm <= now // NS_PER_S:
                    self._flags |= AF
            self._flags_at = now

    def _update_irq(self) -> None:
        """IRQF = PF.PIE + AF.AIE + UF.UIE; wait for the next event that could set it."""
        self._update_flags()
        enabled = self.cmos[REG_B] & (PIE | AIE | UIE)
        self._irq.set(bool(self._flags & enabled))
        waits = []
        wanted = enabled & ~self._flags
        if wanted & PIE and (hz := self._rate_hz()):
            waits.append(-(-(self._flags_tick + 1) * NS_PER_S // hz) - self._clock.now())
        if self._stopped_at is None:
            now = self._now()
            if wanted & UIE:
                waits.append((now // NS_PER_S + 1) * NS_PER_S - now)
            if wanted & AIE and (alarm := rtc_time.next_alarm(now // NS_PER_S, self.cmos)) is not None:
                waits.append(alarm * NS_PER_S - now)
        if waits:
            self._timer.arm(self._clock.now() + min(waits))
        else:
            self._timer.cancel()

    def _on_timer(self) -> None:
        self._update_irq()

    # ---- the bus ---------------------------------------------------------------------------------
    def peek(self, offset: int, range_name: str = "main") -> int:
        """Port 70h is write-only."""
        return 0xFF

    def read_byte(self, offset: int, range_name: str) -> int:
        return self._read_cmos(self.index) if offset == 1 else 0xFF

    def _read_cmos(self, address: int) -> int:
        if address in _TIME_REGISTERS and self._stopped_at is None:
            self._show_time()
        elif address == REG_A:
            return self.cmos[REG_A] & ~UIP | (UIP if self._updating() else 0)
        elif address == REG_C:
            return self._read_c()
        return self.cmos[address]

    def _updating(self) -> bool:
        """An update ends with the second; SET clears UIP."""
        return self._stopped_at is None and self._now() % NS_PER_S >= NS_PER_S - UIP_NS

    def _read_c(self) -> int:
        """"Register C": all flags are cleared by the read."""
        self._update_flags()
        flags = self._flags
        if flags & self.cmos[REG_B] & (PF | AF | UF):
            flags |= IRQF
        self._flags = 0
        self._irq.set(False)  # an edge is between this and an event that has come since
        self._update_irq()
        return flags

    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        if offset == 0:
            self.index = value & 0x7F
            self.nmi_disabled = bool(value & NMI_DISABLE)
        elif offset == 1:
            self._write_cmos(self.index, value)

    def _write_cmos(self, address: int, value: int) -> None:
        if address in (REG_C, REG_D):
            return
        self._update_flags()
        if address in (REG_A, REG_B):
            self._write_control(address, value)
        elif address in _TIME_REGISTERS:
            if self._stopped_at is None:
                self._show_time()
                self.cmos[address] = value
                self._take_time()
                self._update_irq()
            else:
                self.cmos[address] = value
        else:
            self.cmos[address] = value
            if address <= REG_HOURS_ALARM:
                self._update_irq()

    def _write_control(self, address: int, value: int) -> None:
        was_reset = self.cmos[REG_A] & DIVIDER_RESET == DIVIDER_RESET
        if self._stopped_at is None:
            self._show_time()
        if address == REG_A:
            self.cmos[REG_A] = value & ~UIP
        else:
            if value & SET:  # "the UIE bit is cleared by the SET bit going high"
                value &= ~UIE
            self.cmos[REG_B] = value
        if self._held():
            if self._stopped_at is None:
                self._stopped_at = self._now()
        elif self._stopped_at is not None:
            self._start(was_reset)
        self._flags_tick = self._periodic_tick()
        self._update_irq()

    def _start(self, was_reset: bool) -> None:
        """Go on with the time in the registers. Under SET alone the divider chain has run on."""
        seconds, self._weekday_shift = rtc_time.decode(self.cmos)
        if was_reset:
            fraction = NS_PER_S - DIVIDER_START_NS
        else:
            fraction = (self._wall() + self._offset) % NS_PER_S
        self._stopped_at = None
        self._offset = seconds * NS_PER_S + fraction - self._wall()
        self._flags_at = self._now()

    # ---- state -----------------------------------------------------------------------------------
    def reset(self, hard: bool = True) -> None:
        """"RESET": PIE, AIE, UIE, SQWE and all flags are cleared; time and RAM are not."""
        self.index = 0
        self.nmi_disabled = False
        self.cmos[REG_B] &= ~(PIE | AIE | UIE | SQWE)
        self._update_flags()
        self._flags = 0
        self._update_irq()

    def resume(self) -> None:
        """The wall clock may have gone on while guest time stood."""
        self._update_irq()

    def save(self) -> Mc146818Record:
        self._update_flags()
        return Mc146818Record(
            index=self.index,
            nmi_disabled=self.nmi_disabled,
            cmos=bytes(self.cmos),
            offset=_split(self._offset),
            weekday_shift=self._weekday_shift,
            stopped_at=None if self._stopped_at is None else _split(self._stopped_at),
            flags=self._flags,
            flags_at=_split(self._flags_at),
            flags_tick=self._flags_tick,
        )

    def load(self, record: Record) -> None:
        assert isinstance(record, Mc146818Record)
        self.index = record.index & 0x7F
        self.nmi_disabled = record.nmi_disabled
        self.cmos = bytearray(record.cmos)
        self._offset = _join(record.offset)
        self._weekday_shift = record.weekday_shift
        self._stopped_at = None if record.stopped_at is None else _join(record.stopped_at)
        self._flags = record.flags
        self._flags_at = _join(record.flags_at)
        self._flags_tick = record.flags_tick
        self._update_irq()
