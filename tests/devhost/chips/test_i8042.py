"""Keyboard controller, keyboard and mouse against IBM's PS/2 Hardware Interface Technical Reference
(84F9735) and Microsoft's Keyboard Scan Code Specification."""

from __future__ import annotations

import pytest

from coordinator.contract.clock import ManualClock
from coordinator.contract.device import ListPin
from coordinator.contract.state import pack, unpack
from devhost.chips.i8042 import I8042, I8042Record
from devhost.chips.keycodes import MAKE_CODES, QCODES

MS = 1_000_000


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.irq1, self.irq12, self.a20 = ListPin(), ListPin(), ListPin()
        self.resets = 0
        self.kbc = I8042(self.clock, self.irq1, self.irq12, self.a20, self._reset)

    def _reset(self) -> None:
        self.resets += 1

    def command(self, *values: int) -> None:
        """A command at 64h, then its bytes at 60h."""
        self.kbc.write(0, 1, values[0], "command")
        for value in values[1:]:
            self.kbc.write(0, 1, value, "data")

    def keyboard(self, *values: int) -> list[int]:
        for value in values:
            self.kbc.write(0, 1, value, "data")
        return self.drain()

    def mouse(self, *values: int) -> list[int]:
        out = []
        for value in values:
            self.command(0xD4, value)
            out += self.drain()
        return out

    @property
    def status(self) -> int:
        return self.kbc.read(0, 1, "command")

    def drain(self) -> list[int]:
        out = []
        while self.status & 1:
            out.append(self.kbc.read(0, 1, "data"))
        return out

    def press(self, qcode: str) -> list[int]:
        self.kbc.key_event(qcode, True)
        codes = self.drain()
        self.kbc.key_event(qcode, False)
        return codes + self.drain()


def test_self_test_sets_the_system_flag() -> None:
    """Command AAh: 55h when no error; status bit 2 becomes 1."""
    bench = Bench()
    assert not bench.status & 4
    bench.command(0xAA)
    assert bench.status & 1 and bench.drain() == [0x55]
    assert bench.status & 4


def test_interface_tests_and_password() -> None:
    """ABh and A9h: 00 = no error; A4h: F1h = no password."""
    bench = Bench()
    for command, reply in ((0xAB, 0x00), (0xA9, 0x00), (0xA4, 0xF1)):
        bench.command(command)
        assert bench.drain() == [reply]


def test_command_byte_and_interfaces() -> None:
    """20h, 60h; A7h/A8h set and clear bit 5, ADh/AEh bit 4."""
    bench = Bench()
    bench.command(0x60, 0x47)
    bench.command(0x20)
    assert bench.drain() == [0x47]
    for command, byte in ((0xAD, 0x57), (0xA7, 0x77), (0xAE, 0x67), (0xA8, 0x47)):
        bench.command(command)
        bench.command(0x20)
        assert bench.drain() == [byte]


def test_status_says_command_or_data() -> None:
    """Status bit 3: the last write was to 64h."""
    bench = Bench()
    bench.command(0xAE)
    assert bench.status & 8
    bench.keyboard(0xF4)
    assert not bench.status & 8


def test_a20_and_reset_lines() -> None:
    """D1h: output port bit 1 is A20, bit 0 low is reset; FEh pulses bit 0; DDh and DFh are A20 too."""
    bench = Bench()
    bench.command(0xD1, 0xDD)
    assert not bench.a20.level
    bench.command(0xD1, 0xDF)
    assert bench.a20.level
    bench.command(0xDD)
    assert not bench.a20.level
    bench.command(0xD0)
    assert bench.drain()[0] & 3 == 1
    bench.command(0xDF)
    assert bench.a20.level
    bench.command(0xFF)  # no bit is pulsed
    assert bench.resets == 0
    bench.command(0xFE)
    assert bench.resets == 1
    bench.command(0xD1, 0xDE)
    assert bench.resets == 2


def test_interrupts_follow_the_output_buffer() -> None:
    """Command byte bits 0 and 1; IRQ falls with the read of port 60h, one edge a byte."""
    bench = Bench()
    bench.kbc.key_event("up", True)  # E0 48 in set 1
    assert bench.irq1.level and bench.status & 0x21 == 0x01
    assert bench.kbc.read(0, 1, "data") == 0xE0
    assert bench.irq1.level and bench.irq1.pulses == 2
    assert bench.kbc.read(0, 1, "data") == 0x48
    assert not bench.irq1.level
    bench.command(0x60, 0x42)
    bench.kbc.key_event("a", True)
    assert not bench.irq1.level
    bench.command(0x60, 0x43)
    assert bench.irq1.level


def test_mouse_bytes_raise_irq12_and_aux_obf() -> None:
    bench = Bench()
    bench.command(0xD4, 0xF4)
    assert bench.irq12.level and not bench.irq1.level and bench.status & 0x21 == 0x21
    assert bench.drain() == [0xFA]
    assert not bench.irq12.level


def test_loop_back_through_the_buffers() -> None:
    """D2h: as if from the keyboard; D3h: as if from the auxiliary device."""
    bench = Bench()
    bench.command(0xD2, 0xA5)
    assert bench.status & 0x21 == 0x01 and bench.irq1.level and bench.drain() == [0xA5]
    bench.command(0xD3, 0x5A)
    assert bench.status & 0x21 == 0x21 and bench.irq12.level and bench.drain() == [0x5A]


def test_disabled_keyboard_holds_its_bytes() -> None:
    bench = Bench()
    bench.command(0xAD)
    bench.kbc.key_event("a", True)
    assert not bench.status & 1
    bench.command(0xAE)
    assert bench.drain() == [0x1E]


#: scan code set 1 of the 101-key keyboard, in the order of the codes (Microsoft, table "Scan codes")
SET_1 = """
esc 1 2 3 4 5 6 7 8 9 0 minus equal backspace tab q w e r t y u i o p bracket_left bracket_right ret ctrl
a s d f g h j k l semicolon apostrophe grave_accent shift backslash z x c v b n m comma dot slash shift_r
kp_multiply alt spc caps_lock f1 f2 f3 f4 f5 f6 f7 f8 f9 f10 num_lock scroll_lock kp_7 kp_8 kp_9 kp_subtract
kp_4 kp_5 kp_6 kp_add kp_1 kp_2 kp_3 kp_0 kp_decimal
""".split()
#: the rest of set 1, by code
SET_1_MORE = {
    "hiragana": 0x77, "less": 0x56, "f11": 0x57, "f12": 0x58, "f13": 0x64, "f20": 0x6B,
    "f23": 0x6E, "f24": 0x76,
    "kp_equals": 0x59, "katakanahiragana": 0x70, "ro": 0x73, "henkan": 0x79, "muhenkan": 0x7B, "yen": 0x7D,
    "kp_comma": 0x7E,
}  # fmt: skip
#: E0h before the code
SET_1_EXTENDED = {
    "kp_enter": 0x1C, "ctrl_r": 0x1D, "kp_divide": 0x35, "alt_r": 0x38, "home": 0x47, "up": 0x48,
    "pgup": 0x49, "left": 0x4B, "right": 0x4D, "end": 0x4F, "down": 0x50, "pgdn": 0x51,
    "insert": 0x52, "delete": 0x53,
    "meta_l": 0x5B, "meta_r": 0x5C, "compose": 0x5D, "power": 0x5E, "sleep": 0x5F, "wake": 0x63,
    "audionext": 0x19, "audioprev": 0x10, "audiostop": 0x24, "stop": 0x68,
    "audioplay": 0x22, "audiomute": 0x20,
    "volumeup": 0x30, "volumedown": 0x2E, "mediaselect": 0x6D, "mail": 0x6C, "calculator": 0x21,
    "computer": 0x6B, "ac_home": 0x32, "ac_back": 0x6A, "ac_forward": 0x69, "ac_refresh": 0x67,
    "ac_bookmarks": 0x66,
}  # fmt: skip


def test_translated_codes() -> None:
    bench = Bench()
    singles = {name: code for code, name in enumerate(SET_1, 1)} | SET_1_MORE
    for name, code in singles.items():
        assert bench.press(name) == [code, code | 0x80], name
    for name, code in SET_1_EXTENDED.items():
        assert bench.press(name) == [0xE0, code, 0xE0, code | 0x80], name
    same_keys = {"asterisk", "menu", "print", "sysrq", "pause"}
    rest = {f"f{n}" for n in range(14, 23)} - {"f20"}
    assert set(MAKE_CODES) == set(singles) | set(SET_1_EXTENDED) | same_keys | rest


def test_print_screen_and_pause() -> None:
    """Set 1: E0 2A E0 37 and E0 B7 E0 AA; with Alt 54; pause E1 1D 45 E1 9D C5, and no break code."""
    bench = Bench()
    assert bench.press("print") == [0xE0, 0x2A, 0xE0, 0x37, 0xE0, 0xB7, 0xE0, 0xAA]
    assert bench.press("pause") == [0xE1, 0x1D, 0x45, 0xE1, 0x9D, 0xC5]
    bench.kbc.key_event("alt", True)
    bench.drain()
    assert bench.press("print") == [0x54, 0xD4]


def test_untranslated_set_2_and_set_1() -> None:
    bench = Bench()
    bench.command(0x60, 0x03)
    assert bench.press("a") == [0x1C, 0xF0, 0x1C]
    assert bench.press("delete") == [0xE0, 0x71, 0xE0, 0xF0, 0x71]
    assert bench.keyboard(0xF0, 0x01) == [0xFA, 0xFA]
    assert bench.press("delete") == [0xE0, 0x53, 0xE0, 0xD3]
    assert bench.keyboard(0xF0, 0x00) == [0xFA, 0xFA, 0x01]
    assert bench.keyboard(0xF0, 0x03) == [0xFA, 0xFE]  # quirk: no set 3


def test_keys_without_a_code_are_known_and_silent() -> None:
    bench = Bench()
    assert "unmapped" in QCODES and "lang1" in QCODES
    assert bench.press("unmapped") == []


def test_keyboard_commands() -> None:
    """Reset: ACK, AAh. Read ID: ACK, AB 83 (41h translated). Echo: EE. Invalid: resend."""
    bench = Bench()
    assert bench.keyboard(0xFF) == [0xFA, 0xAA]
    assert bench.keyboard(0xF2) == [0xFA, 0xAB, 0x41]
    bench.command(0x60, 0x03)
    assert bench.keyboard(0xF2) == [0xFA, 0xAB, 0x83]
    assert bench.keyboard(0xFE) == [0x83]
    assert bench.keyboard(0xEE) == [0xEE]
    assert bench.keyboard(0x00) == [0xFE]
    assert bench.keyboard(0xED, 0x05) == [0xFA, 0xFA]
    assert bench.kbc.keyboard.leds == 5
    assert bench.keyboard(0xED, 0xF4) == [0xFA, 0xFA]  # a command instead of the option byte
    assert bench.kbc.keyboard.leds == 5


def test_default_disable_stops_scanning() -> None:
    bench = Bench()
    assert bench.keyboard(0xF5) == [0xFA]
    assert bench.press("a") == []
    assert bench.keyboard(0xF4) == [0xFA]
    assert bench.press("a") == [0x1E, 0x9E]


def test_typematic() -> None:
    """Default 500 ms, then 10.9 characters a second +- 20 %; F3h: 00 = 250 ms and 30 a second."""
    bench = Bench()
    bench.kbc.key_event("a", True)
    assert bench.drain() == [0x1E]
    bench.clock.advance(499 * MS)
    assert bench.drain() == []
    bench.clock.advance(2 * MS)
    assert bench.drain() == [0x1E]
    repeats = 0
    for _ in range(1000):
        bench.clock.advance(MS)
        repeats += len(bench.drain())
    assert 9 <= repeats <= 13
    bench.kbc.key_event("a", False)
    assert bench.drain() == [0x9E]
    bench.clock.advance(2000 * MS)
    assert bench.drain() == []
    bench.keyboard(0xF3, 0x00)
    bench.kbc.key_event("b", True)
    bench.clock.advance(251 * MS)
    assert bench.drain() == [0x30, 0x30]
    bench.clock.advance(34 * MS)
    assert bench.drain() == [0x30]


def test_overrun() -> None:
    """"Keyboard buffer": 16 bytes, then the overrun code (00 in set 2)."""
    bench = Bench()
    bench.command(0x60, 0x13)
    for _ in range(40):
        bench.kbc.key_event("a", True)
    bench.command(0xAE)
    assert bench.drain() == [0x1C] * 16 + [0x00]


def test_mouse_reset_and_ids() -> None:
    """FFh: ACK, AAh, 00. IntelliMouse: rates 200, 100, 80 make the ID 3."""
    bench = Bench()
    assert bench.mouse(0xFF) == [0xFA, 0xAA, 0x00]
    assert bench.mouse(0xF2) == [0xFA, 0x00]
    assert bench.mouse(0xF3, 200, 0xF3, 100, 0xF3, 80) == [0xFA] * 6
    assert bench.mouse(0xF2) == [0xFA, 0x03]
    assert bench.mouse(0xFF, 0xF2) == [0xFA, 0xAA, 0x00, 0xFA, 0x00]


def test_mouse_status() -> None:
    """E9h: byte 1 mode bits and buttons, resolution, rate; defaults 4 counts/mm (02) and 100 (64h)."""
    bench = Bench()
    assert bench.mouse(0xE9) == [0xFA, 0x00, 0x02, 0x64]
    bench.mouse(0xE8, 0x03, 0xF3, 40, 0xE7, 0xF4)
    bench.kbc.mouse_event(0, 0, 0, 1)
    bench.drain()
    assert bench.mouse(0xE9) == [0xFA, 0x34, 0x03, 40]


def test_mouse_packets() -> None:
    """Data report: byte 1 = Y sign, X sign, 1, M, R, L; Y counts upwards."""
    bench = Bench()
    bench.kbc.mouse_event(5, 5, 0, 0)
    assert bench.drain() == []  # disabled
    bench.mouse(0xF4)
    bench.kbc.mouse_event(5, 3, 0, 1)
    assert bench.drain() == [0x29, 0x05, 0xFD]
    bench.kbc.mouse_event(-1, -1, 0, 6)
    assert bench.drain() == [0x1E, 0xFF, 0x01]
    bench.kbc.mouse_event(0, 0, 0, 6)
    assert bench.drain() == []


def test_movement_adds_up_while_the_host_is_slow() -> None:
    bench = Bench()
    bench.mouse(0xF4)
    for _ in range(30):
        bench.kbc.mouse_event(10, 0, 0, 0)
    assert bench.drain() == [0x08, 10, 0, 0x08, 255, 0, 0x08, 35, 0]


def test_wheel_packets() -> None:
    bench = Bench()
    bench.mouse(0xF3, 200, 0xF3, 100, 0xF3, 80, 0xF4)
    bench.kbc.mouse_event(0, 0, -1, 0)
    assert bench.drain() == [0x08, 0, 0, 0xFF]


def test_scaling_remote_and_wrap() -> None:
    """"Scaling 2:1": 0 1 1 3 6 9, then doubled; remote mode reports on EBh only; wrap echoes."""
    bench = Bench()
    bench.mouse(0xE7, 0xF4)
    for delta, scaled in ((1, 1), (2, 1), (3, 3), (4, 6), (5, 9), (6, 12)):
        bench.kbc.mouse_event(delta, 0, 0, 0)
        assert bench.drain() == [0x08, scaled, 0]
    bench.mouse(0xF0)
    bench.kbc.mouse_event(4, 0, 0, 0)
    assert bench.drain() == []
    assert bench.mouse(0xEB) == [0xFA, 0x08, 4, 0]
    assert bench.mouse(0xEE, 0x55, 0xF4, 0xEC) == [0xFA, 0x55, 0xF4, 0xFA]


def test_pause_holds_keys() -> None:
    bench = Bench()
    bench.kbc.pause()
    bench.kbc.key_event("a", True)
    assert not bench.status & 1 and bench.kbc.paused()
    bench.kbc.resume()
    assert bench.drain() == [0x1E]


@pytest.mark.parametrize("taken", range(8))
def test_save_and_load_in_mid_sequence(taken: int) -> None:
    bench = Bench()
    bench.mouse(0xF4)
    bench.keyboard(0xED)
    bench.kbc.key_event("print", True)
    bench.kbc.mouse_event(1, 2, 0, 1)
    bench.kbc.mouse_event(1, 2, 0, 0)
    for _ in range(taken):
        bench.kbc.read(0, 1, "data")
    bench.command(0x60)
    copy = Bench()
    copy.kbc.load(unpack(pack(bench.kbc.save()), I8042Record))
    for each in (bench, copy):
        each.kbc.write(0, 1, 0x43, "data")
    assert (copy.irq1.level, copy.irq12.level, copy.a20.level) == (
        bench.irq1.level, bench.irq12.level, True
    )  # fmt: skip
    assert copy.status == bench.status
    for each in (bench, copy):
        each.clock.advance(600 * MS)
    assert copy.drain() == bench.drain()
    assert copy.keyboard(0x02) == bench.keyboard(0x02) == [0xFA]
