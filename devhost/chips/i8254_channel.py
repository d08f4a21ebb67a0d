"""One counter of the 8254 as a pure function of its CLK ticks: nothing happens between accesses.

Source: Intel 8254 datasheet, 231164-005, "Mode definitions" and "Operation common to all modes".
``tick`` is the number of CLK pulses since power-on. A count written at tick t is loaded by the next
pulse, so the counting element holds N at tick t + 1 and N - k at t + 1 + k.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated

import msgspec

from devhost.chips.common import U8

#: no tick ever reaches it
NEVER = 1 << 62

RW_LSB = 1
RW_MSB = 2
RW_BOTH = 3

_Count = Annotated[int, msgspec.Meta(ge=1, le=0x10000)]
_Word = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]


class ChannelState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a counter; the fields are those of `Channel`."""

    mode_bits: Annotated[int, msgspec.Meta(ge=0, le=7)]
    rw: Annotated[int, msgspec.Meta(ge=1, le=3)]
    bcd: bool
    count: _Count
    written: bool
    running: bool
    start: int
    period: _Count
    next_at: int
    next_start: int
    next_period: _Count
    gate: bool
    held: int | None
    null_until: int
    low_byte: U8 | None
    high_next: bool
    latched: _Word | None
    latched_status: U8 | None


_STATE = attrgetter(*ChannelState.__struct_fields__)


def _decode(value: int, bcd: bool) -> int:
    """A count as written -> CLK pulses; 0 is 2^16 or 10^4 ("Minimum and maximum initial counts")."""
    if bcd:
        digits = (value & 15) + 10 * (value >> 4 & 15) + 100 * (value >> 8 & 15) + 1000 * (value >> 12)
        return digits or 10_000
    return value or 0x10000


def _encode(count: int, bcd: bool) -> int:
    """The counting element as it reads."""
    if not bcd:
        return count & 0xFFFF
    count %= 10_000
    return count // 1000 << 12 | count // 100 % 10 << 8 | count // 10 % 10 << 4 | count % 10


class Channel:
    """A counter. ``gate`` is its GATE input."""

    def __init__(self) -> None:
        #: M2-M0 as written
        self.mode_bits = 0
        self.rw = RW_BOTH
        self.bcd = False
        #: the count register, decoded
        self.count = 0x10000
        #: a count has been written since the control word
        self.written = False
        #: the counting element has been loaded (or will be with tick ``start``)
        self.running = False
        self.start = 0
        self.period = 0x10000
        #: modes 2 and 3: at ``next_at`` a new count takes over, counting from ``next_start``
        self.next_at = NEVER
        self.next_start = 0
        self.next_period = 0x10000
        self.gate = True
        #: elapsed ticks at which a low gate holds the counter
        self.held: int | None = None
        #: "null count" is set before this tick
        self.null_until = NEVER
        self.low_byte: int | None = None
        self.high_next = False
        self.latched: int | None = None
        self.latched_status: int | None = None

    @property
    def mode(self) -> int:
        """0 to 5: modes 2 and 3 have a don't-care bit."""
        return self.mode_bits & 3 if self.mode_bits >= 6 else self.mode_bits

    # ---- time ------------------------------------------------------------------------------------
    def _settle(self, tick: int) -> None:
        """Let a new count take over."""
        if tick >= self.next_at:
            self.start, self.period, self.next_at = self.next_start, self.next_period, NEVER

    def _elapsed(self, tick: int) -> int:
        self._settle(tick)
        return self.held if self.held is not None else tick - self.start

    def output(self, tick: int) -> bool:
        """Level of OUT."""
        mode = self.mode
        if not self.running:
            return mode != 0
        elapsed = self._elapsed(tick)
        if mode == 0:
            return elapsed >= self.period
        if elapsed < 0:
            return True
        if mode == 1:
            return elapsed >= self.period
        if mode in (4, 5):
            return elapsed != self.period
        if not self.gate or self.period == 1:
            return True
        if mode == 2:
            return elapsed % self.period != self.period - 1
        return elapsed % self.period < self._high_half(self.period)

    @staticmethod
    def _high_half(period: int) -> int:
        """Mode 3: OUT is high for (N + 1) / 2 counts when N is odd, for N / 2 when it is even."""
        return (period + 1) // 2

    def element(self, tick: int) -> int:
        """The counting element as it reads, binary or BCD."""
        if not self.running:
            return _encode(self.count, self.bcd)
        elapsed = max(0, self._elapsed(tick))
        if self.mode == 2:
            value = self.period - elapsed % self.period
        elif self.mode == 3:
            half, step = self._high_half(self.period), elapsed % self.period
            value = (self.period & ~1) - 2 * (step - half if step >= half else step)
        else:
            value = self.period - elapsed
        return _encode(value, self.bcd)

    def next_rise(self, tick: int) -> int | None:
        """The first tick after ``tick`` at which OUT rises, or None if nothing makes it rise."""
        if not self.running or self.held is not None:
            return None
        elapsed = max(0, self._elapsed(tick))
        if self.mode in (0, 1):
            return self.start + self.period if elapsed < self.period else None
        if self.mode in (4, 5):
            return self.start + self.period + 1 if elapsed <= self.period else None
        if self.period == 1 and self.next_at == NEVER:
            return None
        rise = self.start + (elapsed // self.period + 1) * self.period
        return rise if rise <= self.next_at else self.next_start + self.next_period

    # ---- programming -----------------------------------------------------------------------------
    def control(self, word: int) -> None:
        """A control word; counting stops until a count is written ("Programming the 8254")."""
        self.rw = word >> 4 & 3
        self.mode_bits = word >> 1 & 7
        self.bcd = bool(word & 1)
        self.written = self.running = self.high_next = False
        self.low_byte = self.latched = self.latched_status = self.held = None
        self.next_at = self.null_until = NEVER

    def write(self, value: int, tick: int) -> None:
        if self.rw == RW_LSB:
            self._load(value, tick)
        elif self.rw == RW_MSB:
            self._load(value << 8, tick)
        elif self.low_byte is None:
            self.low_byte = value
            if self.mode == 0:  # mode 0, "writing the first byte disables counting. OUT is set low"
                self.running = False
        else:
            low, self.low_byte = self.low_byte, None
            self._load(value << 8 | low, tick)

    def _load(self, value: int, tick: int) -> None:
        self.count = _decode(value, self.bcd)
        self.written = True
        if self.mode in (1, 5):  # loaded by the trigger
            self.null_until = NEVER
        elif self.mode in (2, 3) and self.running:
            self._load_later(tick)
        else:
            self._restart(tick)

    def _restart(self, tick: int) -> None:
        self.start = self.null_until = tick + 1
        self.period = self.count
        self.next_at = NEVER
        self.running = True
        self.held = None if self.gate or self.mode in (1, 5) else 0

    def _load_later(self, tick: int) -> None:
        """Modes 2 and 3: at the end of the cycle, or half-cycle; or by the trigger if that is first."""
        elapsed = self._elapsed(tick)
        if self.held is not None:
            self.null_until = NEVER
        elif elapsed < 0:
            self.period = self.count
        else:
            cycle = self.start + elapsed // self.period * self.period
            half = self._high_half(self.period)
            if self.mode == 3 and elapsed % self.period < half and self.period > 1:
                self.next_at = cycle + half
                self.next_start = self.next_at - self._high_half(self.count)
            else:
                self.next_at = self.next_start = cycle + self.period
            self.next_period = self.count
            self.null_until = self.next_at

    def set_gate(self, level: bool, tick: int) -> None:
        """"Gate pin operations summary": a level for modes 0 and 4, a trigger for 1 and 5, both for 2, 3."""
        if level == self.gate:
            return
        if not level:
            if self.running and self.mode not in (1, 5):
                self.held = max(0, self._elapsed(tick))
            self.gate = False
            return
        self.gate = True
        if self.mode in (0, 4):
            if self.held is not None:
                self.start, self.held = tick - self.held, None
        elif self.written:
            self._restart(tick)

    # ---- reading ---------------------------------------------------------------------------------
    def latch_count(self, tick: int) -> None:
        """Counter latch command: ignored while an earlier one has not been read."""
        if self.latched is None:
            self.latched = self.element(tick)

    def latch_status(self, tick: int) -> None:
        """Read-back command, status: OUT, null count, and the control word as it was written."""
        if self.latched_status is None:
            null = tick < self.null_until
            self.latched_status = (
                self.output(tick) << 7 | null << 6 | self.rw << 4 | self.mode_bits << 1 | self.bcd
            )

    def read(self, tick: int) -> int:
        """The status if latched, else the latched or living count, a byte at a time."""
        if self.latched_status is not None:
            status, self.latched_status = self.latched_status, None
            return status
        value = self.latched if self.latched is not None else self.element(tick)
        last = self.rw != RW_BOTH or self.high_next
        high = self.rw == RW_MSB or self.high_next
        self.high_next = not last
        if last:
            self.latched = None
        return value >> 8 if high else value & 0xFF

    # ---- state -----------------------------------------------------------------------------------
    def save(self) -> ChannelState:
        return ChannelState(*_STATE(self))

    def load(self, state: ChannelState) -> None:
        for name in ChannelState.__struct_fields__:
            setattr(self, name, getattr(state, name))
