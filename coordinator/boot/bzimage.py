"""Linux bzImage by the 64-bit boot protocol.

Source: Linux Documentation/arch/x86/boot.rst (header fields, 64-bit boot protocol) and
zero-page.rst; struct screen_info as described there.
"""

from __future__ import annotations

import os
import struct

from coordinator.boot import platform
from coordinator.contract import messages
from coordinator.contract.config import Machine
from coordinator.contract.errors import ConfigError
from coordinator.contract.segment import Segment
from coordinator.machine import Loader

# offsets in the image and in the zero page are the same for the setup header
SETUP_SECTS, SYSSIZE, BOOT_FLAG, HEADER, VERSION = 0x1F1, 0x1F4, 0x1FE, 0x202, 0x206
TYPE_OF_LOADER, LOADFLAGS, RAMDISK_IMAGE, RAMDISK_SIZE = 0x210, 0x211, 0x218, 0x21C
CMD_LINE_PTR, INITRD_ADDR_MAX, XLOADFLAGS, CMDLINE_SIZE = 0x228, 0x22C, 0x236, 0x238
PREF_ADDRESS, INIT_SIZE = 0x258, 0x260
HEADER_END_BYTE, HEADER_END_BASE = 0x201, 0x202
# zero page only
SCREEN_INFO, ACPI_RSDP_ADDR, E820_ENTRIES, E820_TABLE = 0x000, 0x070, 0x1E8, 0x2D0

SHORTEST = 0x268
SECTOR, SYSSIZE_UNIT, DEFAULT_SETUP_SECTS = 512, 16, 4
VERSION_64BIT = 0x020C
XLF_KERNEL_64 = 0x1
LOADED_HIGH = 0x01
UNDEFINED_LOADER = 0xFF
ENTRY_64 = 0x200
#: text mode 3: cursor 0,0; page 0, mode 3, 80 columns, 25 lines, VGA, 16 lines a character
TEXT_MODE_3 = struct.pack("<BBHHBBBBHHBBH", 0, 0, 0, 0, 3, 80, 0, 0, 3, 0, 25, 1, 16)


def recognise(image: bytes) -> bool:
    return image[BOOT_FLAG : BOOT_FLAG + 2] == b"\x55\xaa" and image[HEADER : HEADER + 4] == b"HdrS"


def _u(fmt: str, image: bytes, offset: int) -> int:
    value: int = struct.unpack_from(fmt, image, offset)[0]
    return value


def _payload(image: bytes) -> memoryview:
    """The protected-mode part; ConfigError when the file does not hold all of it."""
    if len(image) < SHORTEST:
        raise ConfigError("-kernel: the Linux kernel is cut short")
    if _u("<H", image, VERSION) < VERSION_64BIT or not _u("<H", image, XLOADFLAGS) & XLF_KERNEL_64:
        raise ConfigError(
            "-kernel: this Linux kernel has no 64-bit entry point (boot protocol 2.12 is needed)"
        )
    payload = memoryview(image)[((image[SETUP_SECTS] or DEFAULT_SETUP_SECTS) + 1) * SECTOR :]
    if len(payload) < max(_u("<I", image, SYSSIZE) * SYSSIZE_UNIT, ENTRY_64 + 1):
        raise ConfigError("-kernel: the Linux kernel is cut short")
    return payload


def loader(machine: Machine, image: bytes, initrd: bytes, append: str) -> Loader:
    """Checks the image now; the loader fills RAM at every start and reset."""
    payload = _payload(image)
    command_line = os.fsencode(append)
    if len(command_line) > min(_u("<I", image, CMDLINE_SIZE), platform.LONGEST_COMMAND_LINE - 1):
        raise ConfigError(f"-append: {len(command_line)} bytes is more than this kernel takes")
    where = platform.memory(machine)
    base, size = _u("<Q", image, PREF_ADDRESS), max(_u("<I", image, INIT_SIZE), len(payload))
    where.check(base, size, "the kernel")
    limit = min(where.top, _u("<I", image, INITRD_ADDR_MAX) + 1)
    initrd_at = (limit - len(initrd)) & ~0xFFF
    if initrd and initrd_at < base + size:
        where.check(base + size, len(initrd) + 0xFFF, "the kernel with its initrd")
        raise ConfigError(f"-initrd: {len(initrd)} bytes is more than this kernel takes")
    zero_page = _zero_page(image, machine, where, initrd_at if initrd else 0, len(initrd))

    def load(segment: Segment) -> messages.LoadCpu:
        platform.install(segment, machine, where)
        platform.put(segment, base, payload)
        platform.put(segment, platform.BOOT_PARAMS, zero_page)
        platform.put(segment, platform.COMMAND_LINE, command_line + b"\0")
        if initrd:
            platform.put(segment, initrd_at, initrd)
        cr3 = platform.identity_tables(segment)
        registers = platform.start_registers(base + ENTRY_64, rsi=platform.BOOT_PARAMS, cr3=cr3)
        return messages.LoadCpu(serial=0, mode="long", registers=registers)

    return load


def _zero_page(
    image: bytes, machine: Machine, where: platform.Memory, initrd_at: int, initrd_size: int
) -> bytes:
    page = bytearray(4096)
    end = HEADER_END_BASE + image[HEADER_END_BYTE]
    page[SETUP_SECTS:end] = image[SETUP_SECTS:end]
    page[TYPE_OF_LOADER] = UNDEFINED_LOADER
    page[LOADFLAGS] |= LOADED_HIGH
    if machine.vga:
        page[SCREEN_INFO : SCREEN_INFO + len(TEXT_MODE_3)] = TEXT_MODE_3
    struct.pack_into("<I", page, CMD_LINE_PTR, platform.COMMAND_LINE)
    struct.pack_into("<II", page, RAMDISK_IMAGE, initrd_at, initrd_size)
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, platform.RSDP)
    entries = where.e820()
    page[E820_ENTRIES] = len(entries)
    for i, entry in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * i, *entry)
    return bytes(page)
