"""Key names as QMP's ``send-key`` knows them (QKeyCode) and the codes that a PS/2 keyboard sends.

Sources: "Keyboard Scan Code Specification", Microsoft, revision 1.3a (set 1 and set 2, consumer keys);
IBM PS/2 Hardware Interface Technical Reference, 84F9735, "Keyboards", scan code set 2. The translation
of set 2 into set 1 is that of the 8042 in the AT and PS/2 keyboard controller, same book.
"""

from __future__ import annotations

EXTENDED = 0xE0
BREAK = 0xF0

_SET_2 = """
esc 76  1 16  2 1e  3 26  4 25  5 2e  6 36  7 3d  8 3e  9 46  0 45  minus 4e  equal 55  backspace 66
tab 0d  q 15  w 1d  e 24  r 2d  t 2c  y 35  u 3c  i 43  o 44  p 4d  bracket_left 54  bracket_right 5b
ret 5a  ctrl 14  a 1c  s 1b  d 23  f 2b  g 34  h 33  j 3b  k 42  l 4b  semicolon 4c  apostrophe 52
grave_accent 0e  shift 12  backslash 5d  z 1a  x 22  c 21  v 2a  b 32  n 31  m 3a  comma 41  dot 49
slash 4a  shift_r 59  asterisk 7c  alt 11  spc 29  caps_lock 58
f1 05  f2 06  f3 04  f4 0c  f5 03  f6 0b  f7 83  f8 0a  f9 01  f10 09  f11 78  f12 07
f13 08  f14 10  f15 18  f16 20  f17 28  f18 30  f19 38  f20 40  f21 48  f22 50  f23 57  f24 5f
num_lock 77  scroll_lock 7e
kp_7 6c  kp_8 75  kp_9 7d  kp_subtract 7b  kp_4 6b  kp_5 73  kp_6 74  kp_add 79  kp_1 69  kp_2 72
kp_3 7a  kp_0 70  kp_decimal 71  kp_multiply 7c  kp_divide e04a  kp_enter e05a  kp_equals 0f  kp_comma 6d
less 61  ro 51  yen 6a  hiragana 62  katakanahiragana 13  henkan 64  muhenkan 67
ctrl_r e014  alt_r e011  meta_l e01f  meta_r e027  compose e02f  menu e02f
insert e070  delete e071  home e06c  end e069  pgup e07d  pgdn e07a
up e075  down e072  left e06b  right e074
stop e028  sysrq e012e07c  print e012e07c  pause e11477e1f014f077
power e037  sleep e03f  wake e05e
audionext e04d  audioprev e015  audiostop e03b  audioplay e034  audiomute e023
volumeup e032  volumedown e021  mediaselect e050  mail e048  calculator e02b  computer e040
ac_home e03a  ac_back e038  ac_forward e030  ac_refresh e020  ac_bookmarks e018
"""

_words = _SET_2.split()
#: make codes in set 2, with their E0h and E1h prefixes
MAKE_CODES = {name: bytes.fromhex(code) for name, code in zip(_words[::2], _words[1::2], strict=True)}

#: all names: those without a code stand for keys that no PC keyboard has
QCODES = frozenset(MAKE_CODES) | frozenset(
    "unmapped again props undo front copy open paste find cut lf help lang1 lang2".split()
)

#: keys that say nothing when they are released, and do not repeat
NO_BREAK = frozenset(("pause",))


def break_code(make: bytes) -> bytes:
    """The release of a key in set 2: F0h before the last byte of each code, codes in reverse order
    (print screen: E0 F0 7C E0 F0 12)."""
    codes, prefix = [], b""
    for byte in make:
        if byte == EXTENDED:
            prefix = bytes([EXTENDED])
        else:
            codes.append(prefix + bytes([BREAK, byte]))
            prefix = b""
    return b"".join(reversed(codes))


#: 8042: code of set 2 -> code of set 1. From 85h on each stands for itself.
TRANSLATION = (
    bytes.fromhex(
        "ff 43 41 3f 3d 3b 3c 58 64 44 42 40 3e 0f 29 59"
        "65 38 2a 70 1d 10 02 5a 66 71 2c 1f 1e 11 03 5b"
        "67 2e 2d 20 12 05 04 5c 68 39 2f 21 14 13 06 5d"
        "69 31 30 23 22 15 07 5e 6a 72 32 24 16 08 09 5f"
        "6b 33 25 17 18 0b 0a 60 6c 34 35 26 27 19 0c 61"
        "6d 73 28 74 1a 0d 62 6e 3a 36 1c 1b 75 2b 63 76"
        "55 56 77 78 79 7a 0e 7b 7c 4f 7d 4b 47 7e 7f 6f"
        "52 53 50 4c 4d 48 01 45 57 4e 51 4a 37 49 46 54"
        "80 81 82 41 54"
    )
    + bytes(range(0x85, 0x100))
)


def to_set_1(codes: bytes) -> bytes:
    """A sequence of set 2 as a keyboard in set 1 sends it: the break bit instead of F0h."""
    out, high = bytearray(), 0
    for byte in codes:
        if byte == BREAK:
            high = 0x80
        else:
            out.append(TRANSLATION[byte] | high)
            high = 0
    return bytes(out)
