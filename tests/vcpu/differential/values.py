"""Operand values worth trying, by kind: corners first, the rest at random."""

from __future__ import annotations

import random
import struct

MASK64 = (1 << 64) - 1
STATUS = 0x8D5  # the status flags in RFLAGS
CORNERS = tuple(
    value & MASK64
    for bits in (8, 16, 32, 64)
    for value in (
        0,
        1,
        2,
        -1,
        -2,
        (1 << bits - 1) - 1,
        1 << bits - 1,
        -(1 << bits - 1),
        (1 << bits) - 1,
        0x5555555555555555 >> (64 - bits),
    )
)


def integer(rnd: random.Random) -> int:
    """64 bits: a corner, a single bit, a run of bits, a small number, or random of some width."""
    kind = rnd.randrange(8)
    if kind < 2:
        return rnd.choice(CORNERS)
    if kind == 2:
        return 1 << rnd.randrange(64)
    if kind == 3:
        return (1 << rnd.randrange(65)) - 1 ^ (1 << rnd.randrange(65)) - 1
    if kind == 4:
        return rnd.randrange(-40, 40) & MASK64
    return rnd.getrandbits(rnd.choice((8, 16, 32, 64, 64, 64)))


def single(rnd: random.Random) -> int:
    """32 bits as a float: zero, infinity, quiet and signalling NaN, denormal, whole number, near 1,
    anything."""
    sign = rnd.getrandbits(1) << 31
    kind = rnd.randrange(10)
    if kind == 0:
        return sign | rnd.choice(
            (0, 0x7F800000, 0x7FC00001, 0x7F800001, 0x7F7FFFFF, 0x00800000, 0x3F800000, 0x4F000000)
        )
    if kind == 1:
        return sign | rnd.getrandbits(23)
    if kind < 4:
        return int.from_bytes(
            struct.pack("<f", rnd.choice((-1, 1)) * rnd.choice((rnd.randrange(20), rnd.randrange(1 << 24)))),
            "little",
        )
    if kind < 8:
        return sign | (rnd.randrange(107, 150) << 23) | rnd.getrandbits(23)
    return rnd.getrandbits(32)


def double(rnd: random.Random) -> int:
    """64 bits as a double, likewise."""
    sign = rnd.getrandbits(1) << 63
    kind = rnd.randrange(10)
    if kind == 0:
        return sign | rnd.choice(
            (
                0,
                0x7FF << 52,
                0x7FF8000000000001,
                0x7FF0000000000001,
                0x7FEFFFFFFFFFFFFF,
                1 << 52,
                0x3FF << 52,
                0x41E << 52,
                0x43E << 52,
                0x3810000000000000,
            )
        )
    if kind == 1:
        return sign | rnd.getrandbits(52)
    if kind < 4:
        return int.from_bytes(
            struct.pack("<d", rnd.choice((-1, 1)) * rnd.choice((rnd.randrange(20), rnd.randrange(1 << 33)))),
            "little",
        )
    if kind < 8:
        return sign | (rnd.randrange(1003, 1060) << 52) | rnd.getrandbits(52)
    return rnd.getrandbits(64)


def extended(rnd: random.Random) -> bytes:
    """Ten bytes as an 80-bit real, encodings that no operation produces (SDM vol. 1 table 4-3) included."""
    sign = rnd.getrandbits(1) << 15
    kind = rnd.randrange(12)
    if kind == 0:
        exponent, fraction = rnd.choice(
            (
                (0, 0),
                (0x7FFF, 1 << 63),
                (0x7FFF, 3 << 62),
                (0x7FFF, 1 << 63 | 5),
                (0x3FFF, 1 << 63),
                (0x7FFE, MASK64),
                (1, 1 << 63),
                (0x7FFF, 0),
                (0x7FFF, 5),
                (0x4000, 5),
            )
        )
    elif kind == 1:
        exponent, fraction = 0, rnd.getrandbits(rnd.randrange(1, 65))
    elif kind < 4:
        number = rnd.choice((rnd.randrange(1, 20), rnd.randrange(1, 1 << 31), rnd.getrandbits(63) | 1))
        exponent, fraction = 0x3FFF + number.bit_length() - 1, number << 64 - number.bit_length()
    elif kind < 10:
        exponent, fraction = 0x3FFF + rnd.randrange(-30, 30), 1 << 63 | rnd.getrandbits(63)
    elif kind == 10:
        exponent, fraction = (
            rnd.choice((rnd.randrange(100), 0x7FFE - rnd.randrange(100))),
            1 << 63 | rnd.getrandbits(63),
        )
    else:
        exponent, fraction = rnd.getrandbits(15), rnd.getrandbits(64)
    return struct.pack("<QH", fraction, exponent | sign)


def packed_bcd(rnd: random.Random) -> bytes:
    """Ten bytes for FBLD: 18 decimal digits and a sign."""
    digits = bytes(rnd.randrange(10) << 4 | rnd.randrange(10) for _ in range(9))
    return digits + bytes([rnd.choice((0, 0x80))])


def vector(rnd: random.Random) -> bytes:
    """16 bytes as numbers of one kind, or as a string with terminators."""
    kind = rnd.randrange(6)
    if kind < 2:
        return struct.pack("<2Q", double(rnd), double(rnd))
    if kind < 4:
        return struct.pack("<4I", single(rnd), single(rnd), single(rnd), single(rnd))
    if kind == 4:
        return struct.pack("<2Q", integer(rnd), integer(rnd))
    return bytes(rnd.choices(b"abcd\0\x80\xff", k=16))


def real(rnd: random.Random, mnemonic: str, width: int) -> bytes:
    """A memory operand of x87: decimals, control words, integers, reals."""
    if mnemonic == "fbld":
        return packed_bcd(rnd)
    if width == 10:
        return extended(rnd)
    if mnemonic == "fldcw":
        return struct.pack("<H", rnd.choice((0x37F, 0x37F, rnd.getrandbits(16))))
    if mnemonic.startswith("fi"):
        return integer(rnd).to_bytes(8, "little")
    return struct.pack("<I", single(rnd)) if width == 4 else struct.pack("<Q", double(rnd))


def fx_image(rnd: random.Random, x87: bool, masked: bool = False) -> bytes:
    """An FXSAVE image with numbers in all registers. Sometimes exceptions are unmasked, and one of x87
    pending, unless `masked`."""
    mask = 0x3F if masked or rnd.random() < 0.7 else rnd.getrandbits(6)
    control = 0x40 | mask | rnd.getrandbits(2) << 10 | rnd.choice((0, 0x200, 0x300, 0x300))
    pending = (
        0
        if masked
        else rnd.getrandbits(6) & mask
        if rnd.random() < 0.3
        else rnd.getrandbits(6)
        if rnd.random() < 0.03
        else 0
    )
    status = rnd.getrandbits(15) & 0x7F00 | pending | (0x8080 if pending & ~mask else 0)
    tags = 0xFF if rnd.random() < 0.6 else rnd.getrandbits(8)
    kind = rnd.randrange(10)
    mxcsr = (
        0x1F80
        if kind < 3
        else 0x1F80 | rnd.getrandbits(16) & 0xE07F
        if kind < 8 or masked
        else rnd.getrandbits(16) & 0xFFBF
    )
    if not x87:
        control, status, tags = 0x37F, rnd.getrandbits(3) << 11, rnd.choice((0, 0xFF))
    head = struct.pack("<HHBxHQQII", control, status, tags, 0, 0, 0, mxcsr, 0xFFFF)
    stack = b"".join(extended(rnd) + bytes(6) for _ in range(8))
    return head + stack + b"".join(vector(rnd) for _ in range(16)) + bytes(96)


# All masked, registers zero: for instructions that have nothing to do with it
PLAIN_FX = struct.pack("<H22xI", 0x37F, 0x1F80) + bytes(484)
