"""Kernels made by hand, at the offsets of their specifications."""

from __future__ import annotations

import struct

from coordinator.contract.config import Boot, Machine

MIB = 1 << 20


def machine(ram: int = 64 * MIB, vga: bool = True) -> Machine:
    return Machine(name="test", vcpus=2, ram=ram, vga=vga, boot=Boot(direct=True))


def bzimage(
    payload: bytes = b"\xf4" * 4096,
    version: int = 0x020F,
    flags: int = 1,
    base: int = 16 * MIB,
    init_size: int = 8 * MIB,
    initrd_max: int = 0x7FFF_FFFF,
    command_line: int = 2047,
    sectors: int = 3,
) -> bytes:
    """boot.rst, "The real-mode kernel header"."""
    image = bytearray((sectors + 1) * 512)
    image[0x1F1] = sectors
    struct.pack_into("<I", image, 0x1F4, len(payload) // 16)
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x201] = 0x6A  # the header ends at 26Ch
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, version)
    struct.pack_into("<I", image, 0x22C, initrd_max)
    struct.pack_into("<HI", image, 0x236, flags, command_line)
    struct.pack_into("<QI", image, 0x258, base, init_size)
    return bytes(image) + payload


def elf(
    bits: int = 64,
    address: int = MIB,
    data: bytes = b"\xf4" * 100,
    size: int = 0x2000,
    virtual: int | None = None,
) -> bytes:
    """gABI: one segment, entered at its second byte."""
    virtual = address if virtual is None else virtual
    if bits == 64:
        header = struct.pack(
            "<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, 62, 1, virtual + 1, 64, 0, 0, 64, 56, 1, 0, 0, 0
        )
        program = struct.pack("<IIQQQQQQ", 1, 5, 120, virtual, address, len(data), size, 0x1000)
    else:
        header = struct.pack(
            "<4sBBB9xHHIIIIIHHHHHH", b"\x7fELF", 1, 1, 1, 2, 3, 1, virtual + 1, 52, 0, 0, 52, 32, 1, 0, 0, 0
        )
        program = struct.pack("<8I", 1, 84, virtual, address, len(data), size, 5, 0x1000)
    return header + program + data


def multiboot(
    flags: int = 0x1_0000, header_at: int = 8, load: int = MIB, load_end: int = 0, bss_end: int = 0
) -> bytes:
    """Multiboot 0.6.96, 3.1: the address fields say where the header itself goes."""
    magic = 0x1BADB002
    header = struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFF_FFFF)
    header += struct.pack("<5I", load + header_at, load, load_end, bss_end, load + 0x40)
    return bytes(header_at) + header + b"\xf4" * 200
