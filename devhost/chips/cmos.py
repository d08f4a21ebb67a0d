"""What PC firmware looks for in CMOS RAM: memory sizes, CPUs, boot order, drive types.

Sources: the IBM PC AT layout (10h to 33h; IBM PC AT technical reference, 6183355, "CMOS RAM") and
the bytes that SeaBIOS documents for emulated PCs (34h, 35h, 38h, 3Dh, 5Bh to 5Fh).
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20

FLOPPY_TYPES = 0x10
DISK_TYPES = 0x12
EQUIPMENT = 0x14
BASE_MEMORY = 0x15  # KiB
EXTENDED_MEMORY = 0x17  # KiB above 1 MiB
EXTENDED_MEMORY_POST = 0x30  # the same, as the power-on test found it
MEMORY_ABOVE_16M = 0x34  # 64 KiB units
BOOT_FLAGS_1 = 0x38  # high nibble: third device; bit 0: do not check a floppy's signature
BOOT_FLAGS_2 = 0x3D  # low nibble: first device; high nibble: second
MEMORY_ABOVE_4G = 0x5B  # 64 KiB units, three bytes
CPUS_LESS_1 = 0x5F

#: equipment: mathematics coprocessor, PS/2 mouse; no floppy; display by its own BIOS
EQUIPMENT_PC = 0x02 | 0x04

#: letters of ``-boot order=``
BOOT_DEVICE = {"a": 1, "c": 2, "d": 3, "n": 4}


def boot_flags(order: str) -> dict[int, int]:
    """The bytes that say what to boot from: up to three letters of `BOOT_DEVICE`."""
    devices = [BOOT_DEVICE[letter] for letter in order[:3]] + [0] * 3
    return {BOOT_FLAGS_2: devices[1] << 4 | devices[0], BOOT_FLAGS_1: devices[2] << 4 | 1}


def contents(below_4g: int, above_4g: int, cpus: int) -> dict[int, int]:
    """Presets for `Mc146818`. Sizes in bytes."""
    cmos = {FLOPPY_TYPES: 0, DISK_TYPES: 0, EQUIPMENT: EQUIPMENT_PC, CPUS_LESS_1: cpus - 1}

    def put(address: int, value: int, size: int = 2) -> None:
        for i in range(size):
            cmos[address + i] = value >> 8 * i & 0xFF

    put(BASE_MEMORY, 640)
    extended = min(max(below_4g - MIB, 0) // KIB, 0xFFFF)
    put(EXTENDED_MEMORY, extended)
    put(EXTENDED_MEMORY_POST, extended)
    put(MEMORY_ABOVE_16M, min(max(below_4g - 16 * MIB, 0) // (64 * KIB), 0xFFFF))
    put(MEMORY_ABOVE_4G, above_4g // (64 * KIB), 3)
    return cmos
