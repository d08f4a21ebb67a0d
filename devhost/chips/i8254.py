"""8254 interval timer: counter 0 makes IRQ0, counter 1 was DRAM refresh, counter 2 is behind port 61h.

Source: Intel 8254 datasheet, 231164-005. CLK is 14.31818 MHz / 12.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import Meta

from coordinator.contract.clock import NS_PER_S, Clock
from coordinator.contract.device import Pin
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import ByteDevice
from devhost.chips.i8254_channel import Channel, ChannelState

PIT_HZ = 1_193_182

CONTROL_PORT = 3
# control word, "Control word format"; SC = 3 is the read-back command
READ_BACK_NO_COUNT = 0x20
READ_BACK_NO_STATUS = 0x10

#: Edges of OUT0 closer than this (20 us) become one: no guest takes 50,000 timer interrupts a second.
MIN_EDGE_TICKS = 24


def ticks(ns: int) -> int:
    """CLK pulses up to guest time ``ns``."""
    return ns * PIT_HZ // NS_PER_S


def tick_time(tick: int) -> int:
    """The first guest time, in ns, at which ``ticks`` gives ``tick``."""
    return -(-tick * NS_PER_S // PIT_HZ)


class I8254Record(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "i8254"
    channels: Annotated[tuple[ChannelState, ...], Meta(min_length=3, max_length=3)]
    deadline: int | None


class I8254(ByteDevice):
    """``irq0`` is OUT of counter 0. Its falling edges are drawn only in modes 0 and 1, where the
    level stays low for a while that matters; elsewhere each rising edge comes as low, then high."""

    kind = "i8254"
    ranges = {
        "main": RegisterMap(  # ports 40h to 43h
            Register("COUNTER0", 0, write=Access.POSTED, doc='8254, "Write operations", "Read operations"'),
            Register("COUNTER1", 1, write=Access.POSTED),
            Register("COUNTER2", 2, write=Access.POSTED),
            Register("CONTROL", CONTROL_PORT, read=Access.SHADOW, write=Access.POSTED, doc="not readable"),
        )
    }

    def __init__(self, clock: Clock, irq0: Pin) -> None:
        self._clock = clock
        self._irq0 = irq0
        self._timer = clock.timer(self._rise)
        self.channels = (Channel(), Channel(), Channel())

    # ---- board side ------------------------------------------------------------------------------
    def tick(self) -> int:
        """CLK pulses since power-on."""
        return ticks(self._clock.now())

    def output(self, channel: int) -> bool:
        """Level of OUT now."""
        return self.channels[channel].output(self.tick())

    def set_gate(self, channel: int, level: bool) -> None:
        self.channels[channel].set_gate(level, self.tick())

    # ---- OUT0 ------------------------------------------------------------------------------------
    def _drive(self, tick: int) -> None:
        """Set IRQ0 to what counter 0 says at a tick, that of the write, so that no rise after it is passed
        over; and wait for the next."""
        channel = self.channels[0]
        self._irq0.set(channel.output(tick) if channel.mode in (0, 1) else True)
        self._arm(channel, tick)

    def _arm(self, channel: Channel, tick: int) -> None:
        if channel.mode in (2, 3) and channel.period < MIN_EDGE_TICKS:
            tick += MIN_EDGE_TICKS
        rise = channel.next_rise(tick)
        if rise is None:
            self._timer.cancel()
        else:
            self._timer.arm(tick_time(rise))

    def _rise(self) -> None:
        self._irq0.set(False)
        self._irq0.set(True)
        self._arm(self.channels[0], self.tick())

    # ---- the bus ---------------------------------------------------------------------------------
    def peek(self, offset: int, range_name: str = "main") -> int:
        return 0xFF

    def read_byte(self, offset: int, range_name: str) -> int:
        if offset >= CONTROL_PORT:  # "Read operations summary": no operation (3-state)
            return 0xFF
        return self.channels[offset].read(self.tick())

    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        if offset < CONTROL_PORT:
            tick = self.tick()
            self.channels[offset].write(value, tick)
            if offset == 0:
                self._drive(tick)
        elif offset == CONTROL_PORT:
            self._control(value)

    def _control(self, word: int) -> None:
        select, tick = word >> 6, self.tick()
        if select == 3:
            for number, channel in enumerate(self.channels):
                if not word & 2 << number:
                    continue
                if not word & READ_BACK_NO_COUNT:
                    channel.latch_count(tick)
                if not word & READ_BACK_NO_STATUS:
                    channel.latch_status(tick)
        elif word & 0x30 == 0:
            self.channels[select].latch_count(tick)
        else:
            self.channels[select].control(word)
            if select == 0:
                self._drive(tick)

    # ---- state -----------------------------------------------------------------------------------
    def reset(self, hard: bool = True) -> None:
        """The 8254 has no reset pin; what firmware finds is as at power-on: OUT low, nothing counts."""
        gates = [channel.gate for channel in self.channels]
        self.channels = (Channel(), Channel(), Channel())
        for channel, gate in zip(self.channels, gates, strict=True):
            channel.gate = gate
        self._drive(self.tick())

    def save(self) -> I8254Record:
        return I8254Record(
            channels=tuple(channel.save() for channel in self.channels), deadline=self._timer.deadline
        )

    def load(self, record: Record) -> None:
        assert isinstance(record, I8254Record)
        for channel, state in zip(self.channels, record.channels, strict=True):
            channel.load(state)
        channel = self.channels[0]
        # a rise that is due but has not been drawn is still to come
        low = channel.mode in (0, 1) and (record.deadline is not None or not channel.output(self.tick()))
        self._irq0.set(not low)
        self._timer.cancel()
        if record.deadline is not None:
            self._timer.arm(record.deadline)
