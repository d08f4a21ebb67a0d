"""HPET: a 64-bit main counter at 100 MHz and three timers, in a 1 KiB memory range.

Source: IA-PC HPET specification 1.0a, October 2004; section 2.3 is the register map.

The main counter is a `time` register, read without a round trip. What it counts to be exact is
((ns - offset) mod 2^64) / 10, so it wraps after 584 years instead of 5,845.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar

import msgspec

from coordinator.contract.clock import Clock, Timer
from coordinator.contract.device import Device, Pin
from coordinator.contract.registers import Access, Register, RegisterMap, TimeSource
from coordinator.contract.state import Record
from devhost.chips.common import U32, NoPin

TIMERS = 3
NS_PER_TICK = 10
PERIOD_FS = NS_PER_TICK * 1_000_000
MASK_64 = (1 << 64) - 1
MASK_32 = (1 << 32) - 1

# 2.3.2 to 2.3.8, byte offsets
CAPABILITIES, CONFIGURATION, STATUS, MAIN_COUNTER = 0x000, 0x010, 0x020, 0x0F0
TIMER_BASE, TIMER_STRIDE = 0x100, 0x20
TIMER_CONFIGURATION, TIMER_COMPARATOR, TIMER_FSB = 0x00, 0x08, 0x10
RANGE_SIZE = 0x400

REVISION = 0x01
COUNTER_64 = 1 << 13
LEGACY_CAPABLE = 1 << 15
VENDOR = 0x8086
CAPABILITY_BITS = (
    PERIOD_FS << 32 | VENDOR << 16 | LEGACY_CAPABLE | COUNTER_64 | (TIMERS - 1) << 8 | REVISION
)

# general configuration, 2.3.5
ENABLE, LEGACY = 0x01, 0x02
# timer configuration, 2.3.8.1
LEVEL, INT_ENABLE, PERIODIC, PERIODIC_CAPABLE, SIZE_64, VALUE_SET, MODE_32 = 2, 4, 8, 16, 32, 64, 256
ROUTE_SHIFT, ROUTE_MASK = 9, 0x1F
WRITABLE = LEVEL | INT_ENABLE | PERIODIC | MODE_32 | ROUTE_MASK << ROUTE_SHIFT

#: IOAPIC pins that no PCI or ISA interrupt of this board uses
DEFAULT_ROUTES = 0x00F0_0000

#: Interrupts of one timer closer than this become one: no guest takes 50,000 a second.
MIN_PERIOD_TICKS = 20_000 // NS_PER_TICK
#: farther matches are not waited for: 36 years
FARTHEST_TICKS = 1 << 56

_U64 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}$")]


class HpetTimerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``comparator`` and ``period`` in hexadecimal: 64 bits unsigned do not fit the records' integers."""

    configuration: U32
    comparator: _U64
    period: _U64
    seen: _U64
    status: bool
    level: bool
    deadline: int | None


class HpetRecord(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "hpet"
    configuration: U32
    offset_ns: _U64
    frozen: _U64
    timers: Annotated[tuple[HpetTimerState, ...], msgspec.Meta(min_length=TIMERS, max_length=TIMERS)]


class _Comparator:
    """One timer."""

    def __init__(self, wait: Timer) -> None:
        self.wait = wait
        self.reset()

    def reset(self) -> None:
        self.wait.cancel()
        self.configuration = 0
        #: 2.3.8.2: the reset value is all ones
        self.comparator = MASK_64
        self.period = 0
        #: main counter up to which matches are worked out
        self.seen = 0
        #: Tn_INT_STS
        self.status = False
        #: of its output
        self.level = False

    def configure(self, value: int, routes: int) -> None:
        """A write of the configuration; a route that the timer does not have is not taken (2.3.8.1)."""
        if not routes >> (value >> ROUTE_SHIFT & ROUTE_MASK) & 1:
            value = value & ~(ROUTE_MASK << ROUTE_SHIFT) | self.route << ROUTE_SHIFT
        self.configuration = value & (WRITABLE | VALUE_SET)
        if not value & LEVEL:
            self.status = False
        self.comparator &= self.mask

    @property
    def mask(self) -> int:
        return MASK_32 if self.configuration & MODE_32 else MASK_64

    @property
    def periodic(self) -> bool:
        return bool(self.configuration & PERIODIC) and self.period & self.mask != 0

    @property
    def route(self) -> int:
        return self.configuration >> ROUTE_SHIFT & ROUTE_MASK

    def advance(self, counter: int) -> None:
        """Periodic: the comparator moves on by the period at each match (2.3.9.2.2)."""
        ahead = (self.comparator - self.seen) & self.mask or self.mask + 1
        passed = counter - self.seen & MASK_64
        self.seen = counter
        if self.periodic and passed >= ahead:
            period = self.period & self.mask
            self.comparator = self.comparator + ((passed - ahead) // period + 1) * period & self.mask

    def ticks_to_match(self, counter: int) -> int:
        """Ticks until the counter equals the comparator next; it does not now."""
        return (self.comparator - counter) & self.mask or self.mask + 1


def _registers() -> RegisterMap:
    def constant(name: str, offset: int, doc: str) -> Register:
        return Register(name, offset, 8, (4, 8), read=Access.SHADOW, write=Access.POSTED, doc=doc)

    timers = []
    for n in range(TIMERS):
        base = TIMER_BASE + n * TIMER_STRIDE
        timers += [
            Register(f"T{n}_CONF", base, 8, (4, 8), read=Access.SHADOW, doc="HPET 2.3.8.1"),
            Register(f"T{n}_COMP", base + TIMER_COMPARATOR, 8, (4, 8), doc="HPET 2.3.8.2"),
            constant(f"T{n}_FSB", base + TIMER_FSB, "HPET 2.3.8.3, not capable"),
        ]
    return RegisterMap(
        constant("GCAP_ID", CAPABILITIES, "HPET 2.3.4"),
        Register("GEN_CONF", CONFIGURATION, 8, (4, 8), read=Access.SHADOW, doc="HPET 2.3.5"),
        Register("GINTR_STA", STATUS, 8, (4, 8), doc="HPET 2.3.6"),
        Register(
            "MAIN_CNT", MAIN_COUNTER, 8, (4, 8), read=Access.TIME, time_source="counter", doc="HPET 2.3.7"
        ),
        *timers,
        size=RANGE_SIZE,
    )


class Hpet(Device):
    """``pins`` are IOAPIC inputs by number; ``routes`` (a bit a pin) says which are offered. With legacy
    replacement timer 0 drives ``irq0``, timer 1 ``irq8``, and ``legacy`` is high, which cuts off 8254
    and RTC (see `LegacyRoute`)."""

    kind = "hpet"
    ranges = {"main": _registers()}
    time_sources = {"counter": TimeSource(mul=1, div=NS_PER_TICK, mask=MASK_64)}

    def __init__(
        self,
        clock: Clock,
        irq0: Pin,
        irq8: Pin,
        legacy: Pin,
        pins: Mapping[int, Pin],
        routes: int = DEFAULT_ROUTES,
    ) -> None:
        self._clock = clock
        self._legacy_pins = (irq0, irq8)
        self._legacy = legacy
        self._pins = pins
        self._routes = routes
        self._nowhere = NoPin()
        self.timers = tuple(_Comparator(clock.timer(self._callback(n))) for n in range(TIMERS))
        self.configuration = 0
        #: running: guest ns (mod 2^64) at which the counter was 0; halted: its value
        self._offset_ns = 0
        self._frozen = 0

    def _callback(self, number: int) -> Callable[[], None]:
        return lambda: self._match(number)

    # ---- the main counter ------------------------------------------------------------------------
    @property
    def enabled(self) -> bool:
        return bool(self.configuration & ENABLE)

    def counter(self) -> int:
        """The value that the time source gives."""
        if not self.enabled:
            return self._frozen
        return (self._clock.now() - self._offset_ns & MASK_64) // NS_PER_TICK

    def time_state(self, source: str) -> tuple[bool, int, int]:
        return self.enabled, self._offset_ns, self._frozen

    # ---- timers ----------------------------------------------------------------------------------
    def _advance(self) -> None:
        counter = self.counter()
        for timer in self.timers:
            timer.advance(counter)

    def _pin(self, number: int) -> Pin:
        """Where a timer's interrupt goes (2.3.8.1, "Tn_INT_ROUTE_CNF"; 2.3.5, LEG_RT_CNF)."""
        if self.configuration & LEGACY and number < len(self._legacy_pins):
            return self._legacy_pins[number]
        return self._pins.get(self.timers[number].route, self._nowhere)

    def _drive(self, number: int, level: bool) -> None:
        self.timers[number].level = level
        self._pin(number).set(level)

    def _match(self, number: int) -> None:
        """The main counter has reached the comparator. An edge is low, then high until disabled."""
        timer = self.timers[number]
        if timer.configuration & LEVEL:
            timer.status = True
        else:
            self._drive(number, False)
        self._drive(number, True)
        self._wait(timer)

    def _wait(self, timer: _Comparator) -> None:
        """Arm for the next match if it would interrupt; one whose level is asserted need not be seen.
        A match that is due stays due, whatever the guest writes in the meantime."""
        now, due = self._clock.now(), timer.wait.deadline
        wanted = self.enabled and timer.configuration & INT_ENABLE and not timer.status
        if wanted and due is not None and due <= now:
            return
        timer.wait.cancel()
        if not wanted:
            return
        counter = self.counter()
        timer.advance(counter)
        ticks = timer.ticks_to_match(counter)
        if timer.periodic and timer.period & timer.mask < MIN_PERIOD_TICKS:
            ticks += MIN_PERIOD_TICKS
        if ticks < FARTHEST_TICKS:
            into_tick = (now - self._offset_ns & MASK_64) % NS_PER_TICK
            timer.wait.arm(now - into_tick + ticks * NS_PER_TICK)

    def _update(self) -> None:
        """After the guest has changed something: pins to their levels, and wait anew."""
        for number, timer in enumerate(self.timers):
            if timer.configuration & LEVEL or not timer.configuration & INT_ENABLE or not self.enabled:
                self._drive(number, timer.status and bool(timer.configuration & INT_ENABLE))
            self._wait(timer)

    # ---- the bus ---------------------------------------------------------------------------------
    def peek(self, offset: int, range_name: str = "main") -> int:
        """A whole register, without side effects (the comparators move on in `read`)."""
        if offset == CAPABILITIES:
            return CAPABILITY_BITS
        if offset == CONFIGURATION:
            return self.configuration
        if offset == MAIN_COUNTER:
            return self.counter()
        number, register = divmod(offset - TIMER_BASE, TIMER_STRIDE)
        if offset == STATUS:
            return sum(timer.status << n for n, timer in enumerate(self.timers))
        if not 0 <= number < TIMERS:
            return 0
        timer = self.timers[number]
        if register == TIMER_CONFIGURATION:
            return self._routes << 32 | timer.configuration | PERIODIC_CAPABLE | SIZE_64
        return timer.comparator if register == TIMER_COMPARATOR else 0

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        """2.3.1: 32-bit or 64-bit accesses that do not cross a register."""
        self._advance()
        value = self.peek(offset & ~7) >> 8 * (offset & 7)
        return value & (1 << 8 * width) - 1

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        if width < 4 or offset & width - 1 or offset >= RANGE_SIZE:
            return  # "software must not" (2.3.1)
        self._advance()
        base, shift = offset & ~7, 8 * (offset & 4)
        mask = (1 << 8 * width) - 1 << shift
        self._write(base, value << shift & mask, mask)
        self._update()

    def _write(self, offset: int, value: int, mask: int) -> None:
        """``mask`` covers the bytes of the register that the guest writes."""
        if offset == CONFIGURATION:
            self._configure(self.configuration & ~mask | value & (ENABLE | LEGACY))
        elif offset == STATUS:
            for n, timer in enumerate(self.timers):
                if value >> n & 1:
                    timer.status = False
        elif offset == MAIN_COUNTER:
            self._set_counter(self.counter() & ~mask | value)
        number, register = divmod(offset - TIMER_BASE, TIMER_STRIDE)
        if not 0 <= number < TIMERS:
            return
        timer = self.timers[number]
        if register == TIMER_CONFIGURATION and mask & MASK_32:
            self._drive(number, False)
            timer.configure(value, self._routes)
        elif register == TIMER_COMPARATOR:
            self._set_comparator(timer, value, mask)

    def _configure(self, value: int) -> None:
        if (value ^ self.configuration) & LEGACY:
            for number in range(len(self._legacy_pins)):
                self._drive(number, False)
        counter, switched = self.counter(), (value ^ self.configuration) & ENABLE
        self.configuration = value
        if switched:
            self._set_counter(counter)
        self._legacy.set(bool(value & LEGACY))

    def _set_counter(self, value: int) -> None:
        if self.enabled:
            self._offset_ns = self._clock.now() - value * NS_PER_TICK & MASK_64
        else:
            self._frozen = value
        for timer in self.timers:
            timer.seen = self.counter()

    def _set_comparator(self, timer: _Comparator, value: int, mask: int) -> None:
        """2.3.8.2. In periodic mode a write sets the period, and the comparator only after
        VAL_SET_CNF, which each write clears."""
        if not timer.configuration & PERIODIC or timer.configuration & VALUE_SET:
            timer.comparator = (timer.comparator & ~mask | value) & timer.mask
        if timer.configuration & PERIODIC:
            timer.period = (timer.period & ~mask | value) & timer.mask
        timer.configuration &= ~VALUE_SET

    # ---- state -----------------------------------------------------------------------------------
    def reset(self, hard: bool = True) -> None:
        for number, timer in enumerate(self.timers):
            self._drive(number, False)
            timer.reset()
        self.configuration = self._offset_ns = self._frozen = 0
        self._legacy.set(False)

    def save(self) -> HpetRecord:
        return HpetRecord(
            configuration=self.configuration,
            offset_ns=f"{self._offset_ns:016x}",
            frozen=f"{self._frozen:016x}",
            timers=tuple(
                HpetTimerState(
                    configuration=timer.configuration,
                    comparator=f"{timer.comparator:016x}",
                    period=f"{timer.period:016x}",
                    seen=f"{timer.seen:016x}",
                    status=timer.status,
                    level=timer.level,
                    deadline=timer.wait.deadline,
                )
                for timer in self.timers
            ),
        )

    def load(self, record: Record) -> None:
        assert isinstance(record, HpetRecord)
        self.configuration = record.configuration & (ENABLE | LEGACY)
        self._offset_ns, self._frozen = int(record.offset_ns, 16), int(record.frozen, 16)
        self._legacy.set(bool(self.configuration & LEGACY))
        for number, (timer, state) in enumerate(zip(self.timers, record.timers, strict=True)):
            timer.configuration = state.configuration & (WRITABLE | VALUE_SET)
            timer.comparator, timer.period = int(state.comparator, 16), int(state.period, 16)
            timer.seen = int(state.seen, 16)
            timer.status = state.status
            timer.wait.cancel()
            if state.deadline is not None:
                timer.wait.arm(state.deadline)
            self._drive(number, state.level)
