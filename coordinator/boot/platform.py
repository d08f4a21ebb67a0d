"""What firmware would have left in RAM and in the CPUs: ACPI tables, the memory map, MTRRs.

Layout of low memory for a boot without firmware (all below the 640 KiB line, out of the kernel's way):

    07000h  GDT            08000h  boot parameters or multiboot information
    09000h  page tables    10000h  command line          F0000h  ACPI root pointer
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from coordinator.contract.config import Machine
from coordinator.contract.errors import ConfigError
from coordinator.contract.segment import Segment
from devhost.firmware import acpi

GDT, BOOT_PARAMS, PAGE_TABLES, COMMAND_LINE, RSDP = 0x7000, 0x8000, 0x9000, 0x10000, 0xF0000
LONGEST_COMMAND_LINE = 0x10000
#: where a kernel may not lie: what is laid out above, and the display. (The page below 1 MiB is where linkers
#: put the headers of a kernel at 1 MiB.)
TAKEN = ((GDT, COMMAND_LINE + LONGEST_COMMAND_LINE), (0xA0000, 0xC0000), (RSDP, RSDP + 0x1000))
#: initial stack, growing down from the end of usable low memory
STACK = 0x8F000
EBDA = 0x9FC00

LOW_RAM_LIMIT = 0xC000_0000
ACPI_ROOM = 0x10000
MIB = 1 << 20

E820_RAM, E820_RESERVED, E820_ACPI = 1, 2, 3

#: flat descriptors: unused, unused, 64-bit code, data, 32-bit code (boot protocol: CS 10h, DS 18h)
CODE64, DATA, CODE32 = 0x10, 0x18, 0x20
_GDT_ENTRIES = (0, 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF)

#: MTRRs as firmware sets them (SDM 3A 11.11): write-back by default; the display's fixed range (number 2,
#: A0000h-BFFFFh) and the last gigabyte below 4 GiB, where PCI is, uncached
MTRR_ENABLED, MTRR_FIXED_ENABLED, MTRR_WRITE_BACK, MTRR_UNCACHED, MTRR_VALID = 0x800, 0x400, 0x6, 0x0, 0x800
MTRR_DISPLAY = 2
PHYSICAL_BITS = 40
GIB = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Where RAM is and what of it the guest may use."""

    low_end: int
    high_end: int

    @property
    def acpi_base(self) -> int:
        return self.low_end - ACPI_ROOM

    @property
    def top(self) -> int:
        """End of usable RAM below 4 GiB."""
        return self.acpi_base

    def e820(self) -> list[tuple[int, int, int]]:
        """(start, size, type) as INT 15h E820h would say."""
        entries = [
            (0, EBDA, E820_RAM),
            (EBDA, 0xA0000 - EBDA, E820_RESERVED),
            (0xF0000, 0x10000, E820_RESERVED),
            (MIB, self.acpi_base - MIB, E820_RAM),
            (self.acpi_base, ACPI_ROOM, E820_ACPI),
        ]
        if self.high_end:
            entries.append((1 << 32, self.high_end - (1 << 32), E820_RAM))
        return entries

    def check(self, start: int, size: int, what: str) -> None:
        """ConfigError unless ``start`` and up is RAM that a kernel may be loaded to."""
        end = start + size
        if any(start < taken_end and taken < end for taken, taken_end in TAKEN):
            raise ConfigError(f"{what} wants to lie at {start:#x} to {end:#x}, which is not free for it")
        if end > LOW_RAM_LIMIT - ACPI_ROOM:
            raise ConfigError(f"{what} wants to lie at {start:#x} to {end:#x}, beyond what RAM there can be")
        if end > self.top:
            need = -(-(end + ACPI_ROOM) // MIB)
            raise ConfigError(f"{what} does not fit into RAM: give at least -m {need}M")


def memory(machine: Machine) -> Memory:
    """ConfigError for a machine that is too small to boot anything."""
    low = min(machine.ram, LOW_RAM_LIMIT)
    if low < 2 * MIB:
        raise ConfigError(f"-m {machine.ram >> 20}M is too little to boot a kernel; give at least 2M")
    return Memory(low, (1 << 32) + machine.ram - low if machine.ram > low else 0)


def put(segment: Segment, gpa: int, data: bytes | memoryview) -> None:
    """Bytes into RAM below 4 GiB."""
    segment.ram[gpa : gpa + len(data)] = memoryview(data)
    segment.written(segment.guest_offset + gpa, len(data))


def clear(segment: Segment, gpa: int, size: int) -> None:
    segment.ram[gpa : gpa + size] = 0
    segment.written(segment.guest_offset + gpa, size)


def install(segment: Segment, machine: Machine, where: Memory) -> None:
    """ACPI tables and GDT."""
    tables = acpi.build(machine)
    put(segment, where.acpi_base, tables.blob.linked(where.acpi_base))
    put(segment, RSDP, tables.rsdp(where.acpi_base))
    put(segment, GDT, struct.pack(f"<{len(_GDT_ENTRIES)}Q", *_GDT_ENTRIES))


def identity_tables(segment: Segment) -> int:
    """Page tables that map the first 4 GiB one to one with 2 MiB pages; returns CR3 (SDM 3A 4.5)."""
    present_writable, large = 0x3, 0x80
    pml4, pdpt, first_pd = PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000
    put(segment, pml4, struct.pack("<Q", pdpt | present_writable).ljust(4096, b"\0"))
    directory = struct.pack("<4Q", *(first_pd + 0x1000 * i | present_writable for i in range(4)))
    put(segment, pdpt, directory.ljust(4096, b"\0"))
    put(segment, first_pd, struct.pack("<2048Q", *(i << 21 | large | present_writable for i in range(2048))))
    return pml4


def mtrrs() -> dict[str, int]:
    """Register values that every vCPU gets."""
    return {
        "mtrr_def_type": MTRR_ENABLED | MTRR_FIXED_ENABLED | MTRR_WRITE_BACK,
        "mtrr_base0": 3 * GIB | MTRR_UNCACHED,
        "mtrr_mask0": (1 << PHYSICAL_BITS) - GIB | MTRR_VALID,
        "mtrr_fixed": int.from_bytes(bytes([MTRR_WRITE_BACK] * 8), "little"),
        f"mtrr_fixed{MTRR_DISPLAY}": MTRR_UNCACHED,
    }


def start_registers(rip: int, **registers: int) -> dict[str, int]:
    """For LoadCpu: entry point, stack, GDT, MTRRs and whatever the protocol wants."""
    common = {"rip": rip, "rsp": STACK, "gdt_base": GDT, "gdt_limit": 8 * len(_GDT_ENTRIES) - 1, "rflags": 2}
    return {**common, **mtrrs(), **registers}
