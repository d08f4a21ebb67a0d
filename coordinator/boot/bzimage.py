"""Linux bzImage by the 64-bit boot protocol.

Source: Linux Documentation/arch/x86/boot.rst (header fields, 64-bit boot protocol) and
zero-page.rst.
"""

from __future__ import annotations

import struct

from coordinator.boot import platform
from coordinator.contract import messages
from coordinator.contract.config import Machine
from coordinator.contract.errors import ConfigError
from coordinator.contract.segment import Segment
from coordinator.machine import Loader

# offsets in the image and in the zero page are the same for the setup header
SETUP_SECTS, BOOT_FLAG, HEADER, VERSION = 0x1F1, 0x1FE, 0x202, 0x206
TYPE_OF_LOADER, LOADFLAGS, RAMDISK_IMAGE, RAMDISK_SIZE = 0x210, 0x211, 0x218, 0x21C
CMD_LINE_PTR, INITRD_ADDR_MAX, XLOADFLAGS, CMDLINE_SIZE = 0x228, 0x22C, 0x236, 0x238
PREF_ADDRESS, INIT_SIZE = 0x258, 0x260
HEADER_END_BYTE = 0x201
# zero page only
ACPI_RSDP_ADDR, E820_ENTRIES, E820_TABLE = 0x070, 0x1E8, 0x2D0

VERSION_64BIT = 0x020C
XLF_KERNEL_64 = 0x1
LOADED_HIGH, CAN_USE_HEAP = 0x01, 0x80
UNDEFINED_LOADER = 0xFF
ENTRY_64 = 0x200


def recognise(image: bytes) -> bool:
    return len(image) > 0x400 and image[BOOT_FLAG : BOOT_FLAG + 2] == b"\x55\xaa" and image[0x202:0x206] == b"HdrS"


def _u(fmt: str, image: bytes | bytearray, offset: int) -> int:
    value: int = struct.unpack_from(fmt, image, offset)[0]
    return value


def loader(machine: Machine, image: bytes, initrd: bytes, append: str) -> Loader:
    """Checks the image now; the loader fills RAM at every start and reset."""
    if _u("<H", image, VERSION) < VERSION_64BIT or not _u("<H", image, XLOADFLAGS) & XLF_KERNEL_64:
        raise ConfigError("-kernel: this Linux kernel has no 64-bit entry point (boot protocol 2.12 is needed)")
    command_line = append.encode()
    if len(command_line) > min(_u("<I", image, CMDLINE_SIZE), platform.LONGEST_COMMAND_LINE - 1):
        raise ConfigError(f"-append: {len(command_line)} bytes is more than this kernel takes")
    where = platform.memory(machine)
    payload = memoryview(image)[((image[SETUP_SECTS] or 4) + 1) * 512 :]
    base, span = _u("<Q", image, PREF_ADDRESS), _u("<I", image, INIT_SIZE)
    limit = min(where.top, _u("<I", image, INITRD_ADDR_MAX) + 1)
    initrd_at = (limit - len(initrd)) & ~0xFFF
    if base + max(span, len(payload)) > (initrd_at if initrd else where.top):
        need = (base + max(span, len(payload)) + len(initrd) + platform.ACPI_ROOM >> 20) + 1
        raise ConfigError(f"kernel and initrd do not fit into RAM: give at least -m {need}M")
    zero_page = _zero_page(image, where, initrd_at if initrd else 0, len(initrd))

    def load(segment: Segment) -> messages.LoadCpu:
        platform.install(segment, machine, where)
        platform.put(segment, base, payload, "the kernel")
        platform.put(segment, platform.BOOT_PARAMS, zero_page, "the boot parameters")
        platform.put(segment, platform.COMMAND_LINE, command_line + b"\0", "the command line")
        if initrd:
            platform.put(segment, initrd_at, initrd, "the initrd")
        cr3 = platform.identity_tables(segment)
        registers = platform.start_registers(where, base + ENTRY_64, rsi=platform.BOOT_PARAMS, cr3=cr3)
        return messages.LoadCpu(serial=0, mode="long", registers=registers)

    return load


def _zero_page(image: bytes, where: platform.Memory, initrd_at: int, initrd_size: int) -> bytes:
    page = bytearray(4096)
    end = 0x202 + image[HEADER_END_BYTE]
    page[SETUP_SECTS:end] = image[SETUP_SECTS:end]
    page[TYPE_OF_LOADER] = UNDEFINED_LOADER
    page[LOADFLAGS] |= LOADED_HIGH
    struct.pack_into("<I", page, CMD_LINE_PTR, platform.COMMAND_LINE)
    struct.pack_into("<II", page, RAMDISK_IMAGE, initrd_at, initrd_size)
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, platform.RSDP)
    entries = where.e820()
    page[E820_ENTRIES] = len(entries)
    for i, entry in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * i, *entry)
    return bytes(page)
