"""An assembler for the little AML that the DSDT needs.

Every function returns the encoded bytes of one term; terms nest by concatenation.
Source: ACPI Specification 6.4, chapter 20 (AML) and section 6.4 (resource data types).
"""

from __future__ import annotations

import struct

ZERO, ONE = b"\x00", b"\x01"
LOCAL0, ARG0 = b"\x60", b"\x68"
SYSTEM_IO, PCI_CONFIG = 1, 2
_EXT = b"\x5b"


def package_length(length: int) -> bytes:
    """PkgLength in front of ``length`` bytes; it counts itself (20.2.4)."""
    if length + 1 < 0x40:
        return bytes([length + 1])
    for extra in (1, 2, 3):
        total = length + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"AML package of {length} bytes")


def _packaged(opcode: bytes, body: bytes) -> bytes:
    return opcode + package_length(len(body)) + body


def name_string(path: str) -> bytes:
    """``\\_SB.PCI0`` (20.2.2)."""
    prefix = b""
    while path[:1] in ("\\", "^"):
        prefix, path = prefix + path[0].encode(), path[1:]
    if not path:
        return prefix + b"\x00"
    segments = [part.ljust(4, "_").encode() for part in path.split(".")]
    if len(segments) == 1:
        return prefix + segments[0]
    lead = b"\x2e" if len(segments) == 2 else b"\x2f" + bytes([len(segments)])
    return prefix + lead + b"".join(segments)


def integer(value: int) -> bytes:
    """The shortest constant (20.2.3)."""
    if value < 2:
        return bytes([value])
    for opcode, width in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * width:
            return bytes([opcode]) + value.to_bytes(width, "little")
    raise ValueError(f"AML integer {value:#x}")


def string(text: str) -> bytes:
    return b"\x0d" + text.encode() + b"\x00"


def eisa_id(text: str) -> bytes:
    """``PNP0A03`` as the compressed DWORD (19.3.4)."""
    letters = [ord(c) - 0x40 for c in text[:3]]
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return b"\x0c" + packed.to_bytes(4, "big")


def name(path: str, value: bytes) -> bytes:
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    return _packaged(b"\x10", name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    return _packaged(_EXT + b"\x82", name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    return _packaged(b"\x14", name_string(path) + bytes([arguments]) + b"".join(terms))


def package(*elements: bytes) -> bytes:
    return _packaged(b"\x12", bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return _packaged(b"\x11", integer(len(data)) + data)


def operation_region(path: str, space: int, offset: int, length: int) -> bytes:
    return _EXT + b"\x80" + name_string(path) + bytes([space]) + integer(offset) + integer(length)


def byte_fields(region: str, *fields: str) -> bytes:
    """Field(region, ByteAcc, NoLock, Preserve) of whole bytes."""
    body = b"".join(field.ljust(4, "_").encode() + b"\x08" for field in fields)
    return _packaged(_EXT + b"\x81", name_string(region) + b"\x01" + body)


def returns(value: bytes) -> bytes:
    return b"\xa4" + value


def store(source: bytes, target: bytes) -> bytes:
    return b"\x70" + source + target


def bit_and(a: bytes, b: bytes, target: bytes = ZERO) -> bytes:
    return b"\x7b" + a + b + target


def bit_or(a: bytes, b: bytes, target: bytes = ZERO) -> bytes:
    return b"\x7d" + a + b + target


def when(predicate: bytes, *terms: bytes) -> bytes:
    return _packaged(b"\xa0", predicate + b"".join(terms))


def dword_field(source: bytes, index: int, path: str) -> bytes:
    """CreateDWordField."""
    return b"\x8a" + source + integer(index) + name_string(path)


# ---- resource descriptors (6.4) ---------------------------------------------------------------------
def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate: a buffer closed by an end tag with checksum 0."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def irq(number: int) -> bytes:
    """IRQNoFlags (6.4.2.1): edge, active high."""
    return struct.pack("<BH", 0x22, 1 << number)


def io(start: int, length: int, align: int = 1) -> bytes:
    """IO, 16-bit decode (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, start, start, align, length)


def memory32(start: int, length: int, writable: bool = False) -> bytes:
    """Memory32Fixed (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, writable, start, length)


def interrupts(*numbers: int) -> bytes:
    """Extended interrupt (6.4.3.6): consumer, level, active high, shared."""
    body = struct.pack("<BB", 0x09, len(numbers)) + b"".join(struct.pack("<I", n) for n in numbers)
    return struct.pack("<BH", 0x89, len(body)) + body


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber, producer (6.4.3.5.3)."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 2, 0x0C, 0, 0, first, last, 0, last - first + 1)


def word_io(first: int, last: int) -> bytes:
    """WordIO, producer, entire range (6.4.3.5.3)."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 1, 0x0C, 3, 0, first, last, 0, last - first + 1)


def dword_memory(first: int, last: int, cacheable: bool = False) -> bytes:
    """DWordMemory, producer, read-write (6.4.3.5.2)."""
    flags = 0x03 if cacheable else 0x01
    return struct.pack("<BHBBBIIIII", 0x87, 23, 0, 0x0C, flags, 0, first, last, 0, last - first + 1)
