"""PS/2 mouse with three buttons, and a wheel once the host has knocked (IntelliMouse).

Sources: IBM PS/2 Hardware Interface Technical Reference, 84F9735, "Mouse"; Microsoft IntelliMouse
protocol: the sample rates 200, 100, 80 in a row turn the device ID to 3 and packets to four bytes.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from devhost.chips.common import U8
from devhost.chips.ps2 import ACK, BAT_OK, RESEND, Ps2Device

# "Commands"
SCALING_1_1 = 0xE6
SCALING_2_1 = 0xE7
SET_RESOLUTION = 0xE8
STATUS_REQUEST = 0xE9
STREAM_MODE = 0xEA
READ_DATA = 0xEB
WRAP_OFF = 0xEC
WRAP_ON = 0xEE
REMOTE_MODE = 0xF0
READ_ID = 0xF2
SET_RATE = 0xF3
ENABLE = 0xF4
DISABLE = 0xF5
SET_DEFAULT = 0xF6
RESET = 0xFF

#: bits of ``buttons``, as in byte 1 of a packet
LEFT, RIGHT, MIDDLE = 1, 2, 4

DEFAULT_RATE = 100
DEFAULT_RESOLUTION = 2  # 4 counts a mm
WHEEL_KNOCK = [200, 100, 80]
WHEEL_ID = 3

#: "Scaling 2:1": in stream mode only
SCALED = (0, 1, 1, 3, 6, 9)


class MouseState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    answers: bytes
    data: bytes
    last: U8
    expect: U8
    enabled: bool
    remote: bool
    wrap: bool
    scaling: bool
    resolution: U8
    rate: U8
    knock: tuple[U8, ...]
    device_id: U8
    buttons: U8
    sent_buttons: U8
    moved: Annotated[tuple[int, ...], msgspec.Meta(min_length=3, max_length=3)]


class Mouse(Ps2Device):
    """``event`` is its ball, wheel and buttons. A packet is made when the one before has gone out,
    so movement adds up while the host is slow."""

    def __init__(self) -> None:
        super().__init__()
        self.wrap = False
        self.buttons = 0
        self._defaults()
        self.remote = False
        self.device_id = 0
        self.knock: list[int] = []

    def _defaults(self) -> None:
        self.enabled = self.remote = self.scaling = False
        self.resolution, self.rate = DEFAULT_RESOLUTION, DEFAULT_RATE
        self._forget()

    def _forget(self) -> None:
        """Movement counters are cleared with each mode change."""
        self.data.clear()
        self.moved = [0, 0, 0]
        self.sent_buttons = self.buttons

    # ---- the hand --------------------------------------------------------------------------------
    def event(self, dx: int, dy: int, dz: int, buttons: int) -> None:
        """Counts to the right, down and of the wheel towards the user; ``buttons`` of LEFT, RIGHT, MIDDLE."""
        self.buttons = buttons & (LEFT | RIGHT | MIDDLE)
        if self.enabled or self.remote:
            for axis, delta in enumerate((dx, -dy, dz)):
                self.moved[axis] = max(-0xFFFF, min(0xFFFF, self.moved[axis] + delta))
        self._report()
        self.on_data()

    def _report(self) -> None:
        """Stream mode: a packet, if there is something new and the last one has gone."""
        if not self.enabled or self.remote or self.wrap or self.data or self.expect:
            return
        if self.buttons != self.sent_buttons or any(self.moved):
            self.data += self._packet(self.scaling)

    def take(self) -> int | None:
        byte = super().take()
        self._report()
        return byte

    def _packet(self, scaled: bool) -> bytes:
        """"Data report": overflow never happens, what is over 255 stays for the next packet."""
        x, y = (max(-255, min(255, delta)) for delta in self.moved[:2])
        z = max(-8, min(7, self.moved[2])) if self.device_id == WHEEL_ID else self.moved[2]
        self.moved = [self.moved[0] - x, self.moved[1] - y, self.moved[2] - z]
        self.sent_buttons = self.buttons
        if scaled:
            x, y = _scale(x), _scale(y)
        first = 0x08 | self.buttons | (0x10 if x < 0 else 0) | (0x20 if y < 0 else 0)
        packet = bytes([first, x & 0xFF, y & 0xFF])
        return packet + bytes([z & 0xFF]) if self.device_id == WHEEL_ID else packet

    # ---- commands --------------------------------------------------------------------------------
    def write(self, value: int) -> None:
        if self.wrap and value not in (RESET, WRAP_OFF):  # "wrap mode": everything else is echoed
            self.answer(value)
            self.on_data()
        else:
            super().write(value)

    def command(self, value: int) -> None:
        if value in (SET_RESOLUTION, SET_RATE):
            self.expect = value
        elif value in (SCALING_1_1, SCALING_2_1):
            self.scaling = value == SCALING_2_1
        elif value in (STREAM_MODE, REMOTE_MODE):
            self.remote = value == REMOTE_MODE
            self._forget()
        elif value in (WRAP_ON, WRAP_OFF):
            self.wrap = value == WRAP_ON
            self._forget()
        elif value in (ENABLE, DISABLE):
            self.enabled = value == ENABLE
            self._forget()
        elif value in (SET_DEFAULT, RESET):
            self._defaults()
            if value == RESET:
                self.power_on()
                self.answer(ACK, BAT_OK, self.device_id)
                return
        elif value == STATUS_REQUEST:
            self.answer(ACK, self._status(), self.resolution, self.rate)
            return
        elif value == READ_DATA:
            self.answer(ACK, *self._packet(scaled=False))
            return
        elif value == READ_ID:
            self.answer(ACK, self.device_id)
            return
        elif value == RESEND:
            self.answer(self.last)
            return
        else:
            self.answer(RESEND)
            return
        self.answer(ACK)

    def _status(self) -> int:
        """"Status request", byte 1."""
        left, right, middle = self.buttons & LEFT, self.buttons & RIGHT, self.buttons & MIDDLE
        return (
            self.remote << 6
            | self.enabled << 5
            | self.scaling << 4
            | (4 if left else 0)
            | (2 if middle else 0)
            | (1 if right else 0)
        )

    def parameter(self, command: int, value: int) -> bool:
        if command == SET_RESOLUTION:
            if value > 3:
                self.answer(RESEND)
                return True
            self.resolution = value
        else:
            self.rate = value
            self.knock = [*self.knock[-2:], value]
            if self.knock == WHEEL_KNOCK:
                self.device_id = WHEEL_ID
        self.answer(ACK)
        return True

    def power_on(self) -> None:
        self.clear()
        self._defaults()
        self.wrap = False
        self.device_id = 0
        self.knock = []

    # ---- state -----------------------------------------------------------------------------------
    def save(self) -> MouseState:
        return MouseState(
            answers=bytes(self.answers),
            data=bytes(self.data),
            last=self.last,
            expect=self.expect,
            enabled=self.enabled,
            remote=self.remote,
            wrap=self.wrap,
            scaling=self.scaling,
            resolution=self.resolution,
            rate=self.rate,
            knock=tuple(self.knock),
            device_id=self.device_id,
            buttons=self.buttons,
            sent_buttons=self.sent_buttons,
            moved=tuple(self.moved),
        )

    def load(self, state: MouseState) -> None:
        self.answers = bytearray(state.answers)
        self.data = bytearray(state.data)
        self.last, self.expect = state.last, state.expect
        self.enabled, self.remote, self.wrap = state.enabled, state.remote, state.wrap
        self.scaling, self.resolution, self.rate = state.scaling, state.resolution, state.rate
        self.knock, self.device_id = list(state.knock), state.device_id
        self.buttons, self.sent_buttons = state.buttons, state.sent_buttons
        self.moved = list(state.moved)


def _scale(delta: int) -> int:
    size = abs(delta)
    scaled = SCALED[size] if size < len(SCALED) else min(2 * size, 255)
    return -scaled if delta < 0 else scaled
