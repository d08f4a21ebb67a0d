"""PS/2 keyboard with 102 keys: scan code sets 1 and 2, LEDs, typematic.

Source: IBM PS/2 Hardware Interface Technical Reference, 84F9735, "Keyboard (101- and 102-key)".
Set 3 is refused with RESEND.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from coordinator.contract.clock import Clock
from devhost.chips.common import U8
from devhost.chips.keycodes import MAKE_CODES, NO_BREAK, break_code, to_set_1
from devhost.chips.ps2 import ACK, BAT_OK, RESEND, Ps2Device

# "Commands from the system"
SET_LEDS = 0xED
ECHO = 0xEE
SCAN_SET = 0xF0
READ_ID = 0xF2
SET_RATE = 0xF3
ENABLE = 0xF4
DEFAULT_DISABLE = 0xF5
SET_DEFAULT = 0xF6
SET_ALL_KEYS = range(0xF7, 0xFB)
SET_KEY_TYPE = range(0xFB, 0xFE)
RESET = 0xFF

#: "Read ID": the 101/102-key keyboard
KEYBOARD_ID = (0xAB, 0x83)
#: "Keyboard buffer": 16 bytes; the one after is the overrun code
BUFFER = 16
OVERRUN = {1: 0xFF, 2: 0x00}
#: "Set typematic rate/delay": 500 ms, 10.9 characters a second
DEFAULT_RATE = 0x2B

_ALT = ("alt", "alt_r")
_PRINT_WITH_ALT = bytes.fromhex("84")
_PRINT_PLAIN = bytes.fromhex("e07c")


class KeyboardState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    answers: bytes
    data: bytes
    last: U8
    expect: U8
    scanning: bool
    leds: U8
    rate: U8
    scan_set: Annotated[int, msgspec.Meta(ge=1, le=2)]
    held: tuple[str, ...]
    repeating: str | None
    deadline: int | None


class Keyboard(Ps2Device):
    """``key_event`` is its keys; the rest is its wire."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._timer = clock.timer(self._repeat)
        self.scanning = True
        self.leds = 0
        self.rate = DEFAULT_RATE
        self.scan_set = 2
        #: keys that are down, in the order in which they were pressed
        self.held: list[str] = []
        self.repeating: str | None = None

    # ---- keys ------------------------------------------------------------------------------------
    def key_event(self, qcode: str, down: bool) -> None:
        """A key goes down or up; names of `keycodes.QCODES`. A key without a code does nothing."""
        if qcode not in MAKE_CODES:
            return
        if down:
            if qcode not in self.held:
                self.held.append(qcode)
            self._send(self._make(qcode))
            self._start_typematic(qcode)
        elif qcode in self.held:
            codes = b"" if qcode in NO_BREAK else break_code(self._make(qcode))
            self.held.remove(qcode)
            self._send(codes)
            if qcode == self.repeating:
                self._stop_typematic()

    def _make(self, qcode: str) -> bytes:
        """Print screen has a code of its own with Alt, and no shift around it with Shift or Ctrl."""
        if qcode in ("print", "sysrq"):
            if any(key in self.held for key in _ALT):
                return _PRINT_WITH_ALT
            if any(key in self.held for key in ("shift", "shift_r", "ctrl", "ctrl_r")):
                return _PRINT_PLAIN
        return MAKE_CODES[qcode]

    def _send(self, codes: bytes) -> None:
        if not self.scanning or not codes:
            return
        if self.scan_set == 1:
            codes = to_set_1(codes)
        if len(self.data) + len(codes) <= BUFFER:
            self.data += codes
        elif self.data[-1] != OVERRUN[self.scan_set]:
            self.data.append(OVERRUN[self.scan_set])
        self.on_data()

    def _start_typematic(self, qcode: str) -> None:
        self._stop_typematic()
        if qcode not in NO_BREAK:
            self.repeating = qcode
            delay_ns = ((self.rate >> 5 & 3) + 1) * 250_000_000
            self._timer.arm(self._clock.now() + delay_ns)

    def _stop_typematic(self) -> None:
        self.repeating = None
        self._timer.cancel()

    def _repeat(self) -> None:
        if self.repeating is None:
            return
        self._send(self._make(self.repeating))
        # period = (8 + A) * 2^B * 0.00417 s, A in bits 2-0, B in bits 4-3
        period_ns = (8 + (self.rate & 7)) * (1 << (self.rate >> 3 & 3)) * 4_170_000
        self._timer.arm(self._clock.now() + period_ns)

    # ---- commands --------------------------------------------------------------------------------
    def command(self, value: int) -> None:
        if value in (SET_LEDS, SCAN_SET, SET_RATE):
            self.expect = value
            self.answer(ACK)
        elif value == ECHO:
            self.answer(ECHO)
        elif value == READ_ID:
            self.answer(ACK, *KEYBOARD_ID)
        elif value in (ENABLE, DEFAULT_DISABLE, SET_DEFAULT):
            self.data.clear()
            self._stop_typematic()
            if value != ENABLE:
                self._defaults()
            if value != SET_DEFAULT:
                self.scanning = value == ENABLE
            self.answer(ACK)
        elif value in SET_ALL_KEYS or value in SET_KEY_TYPE:  # they mean something in set 3 only
            self.expect = value if value in SET_KEY_TYPE else 0
            self.answer(ACK)
        elif value == RESEND:
            self.answer(self.last)
        elif value == RESET:
            self.power_on()
            self.answer(ACK, BAT_OK)
        else:
            self.answer(RESEND)

    def parameter(self, command: int, value: int) -> bool:
        if command == SCAN_SET and value <= 3:
            self._select_set(value)
            return True
        if value & 0x80:
            return False
        if command == SET_LEDS:
            self.leds = value & 7
        elif command == SET_RATE:
            self.rate = value
        elif command in SET_KEY_TYPE:
            self.expect = command
        else:
            return False
        self.answer(ACK)
        return True

    def _select_set(self, number: int) -> None:
        if number == 0:
            self.answer(ACK, self.scan_set)
        elif number == 3:
            self.answer(RESEND)
        else:
            self.data.clear()
            self.scan_set = number
            self.answer(ACK)

    def _defaults(self) -> None:
        self.rate = DEFAULT_RATE
        self.scan_set = 2

    def power_on(self) -> None:
        """What the basic assurance test leaves; keys that are held stay held."""
        self.clear()
        self._stop_typematic()
        self._defaults()
        self.leds = 0
        self.scanning = True

    # ---- state -----------------------------------------------------------------------------------
    def save(self) -> KeyboardState:
        return KeyboardState(
            answers=bytes(self.answers),
            data=bytes(self.data),
            last=self.last,
            expect=self.expect,
            scanning=self.scanning,
            leds=self.leds,
            rate=self.rate,
            scan_set=self.scan_set,
            held=tuple(self.held),
            repeating=self.repeating,
            deadline=self._timer.deadline,
        )

    def load(self, state: KeyboardState) -> None:
        self.answers = bytearray(state.answers)
        self.data = bytearray(state.data)
        self.last, self.expect = state.last, state.expect
        self.scanning, self.leds, self.rate = state.scanning, state.leds, state.rate
        self.scan_set = state.scan_set
        self.held = [key for key in state.held if key in MAKE_CODES]
        self.repeating = state.repeating if state.repeating in MAKE_CODES else None
        self._timer.cancel()
        if state.deadline is not None:
            self._timer.arm(state.deadline)
