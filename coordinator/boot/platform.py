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

#: MTRRs as firmware sets them: write-back by default, fixed ranges on, the PCI hole uncached (SDM 3A 11.11)
MTRR_ENABLED, MTRR_FIXED_ENABLED, MTRR_WRITE_BACK, MTRR_VALID = 0x800, 0x400, 0x6, 0x800
PHYSICAL_BITS = 40


@dataclass(frozen=True)
class Memory:
    """Where RAM is and what of it the guest may use."""

    low_end: int
    high_end: int
    acpi_base: int

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


def memory(machine: Machine) -> Memory:
    low = min(machine.ram, LOW_RAM_LIMIT)
    high = (1 << 32) + machine.ram - low if machine.ram > low else 0
    if low < 2 * MIB:
        raise ConfigError(f"-m {machine.ram >> 20}M is too little to boot a kernel; give at least 2M")
    return Memory(low, high, low - ACPI_ROOM)


def put(segment: Segment, gpa: int, data: bytes | memoryview, what: str) -> None:
    """Bytes into RAM below 4 GiB; ConfigError names what does not fit."""
    if gpa + len(data) > min(segment.ram_size, LOW_RAM_LIMIT):
        need = (gpa + len(data) + MIB - 1) // MIB
        raise ConfigError(f"{what} does not fit into RAM: give at least -m {need}M")
    segment.ram[gpa : gpa + len(data)] = memoryview(data)


def install(segment: Segment, machine: Machine, where: Memory) -> None:
    """ACPI tables and GDT."""
    tables = acpi.build(machine)
    put(segment, where.acpi_base, tables.blob.linked(where.acpi_base), "the ACPI tables")
    put(segment, RSDP, tables.rsdp(where.acpi_base), "the ACPI root pointer")
    put(segment, GDT, struct.pack(f"<{len(_GDT_ENTRIES)}Q", *_GDT_ENTRIES), "the GDT")


def identity_tables(segment: Segment) -> int:
    """Page tables that map the first 4 GiB one to one with 2 MiB pages; returns CR3 (SDM 3A 4.5)."""
    present_writable, large = 0x3, 0x80
    pml4, pdpt, first_pd = PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000
    put(segment, pml4, struct.pack("<Q", pdpt | present_writable).ljust(4096, b"\0"), "the page tables")
    directory = struct.pack("<4Q", *(first_pd + 0x1000 * i | present_writable for i in range(4)))
    put(segment, pdpt, directory.ljust(4096, b"\0"), "the page tables")
    entries = struct.pack("<2048Q", *(i << 21 | large | present_writable for i in range(2048)))
    put(segment, first_pd, entries, "the page tables")
    return pml4


def mtrrs(where: Memory) -> dict[str, int]:
    """Register values that every vCPU gets: from the end of low RAM to 4 GiB is uncached."""
    hole = (1 << 32) - 0x4000_0000 if where.low_end <= 0xC000_0000 else 0
    mask = ((1 << PHYSICAL_BITS) - 1) & ~(0x4000_0000 - 1)
    return {
        "mtrr_def_type": MTRR_ENABLED | MTRR_FIXED_ENABLED | MTRR_WRITE_BACK,
        "mtrr_base0": hole,
        "mtrr_mask0": mask | MTRR_VALID,
        "mtrr_fixed": 0x0606_0606_0606_0606,
    }


def start_registers(where: Memory, rip: int, **registers: int) -> dict[str, int]:
    """For LoadCpu: entry point, stack, GDT, MTRRs and whatever the protocol wants."""
    common = {"rip": rip, "rsp": STACK, "gdt_base": GDT, "gdt_limit": 8 * len(_GDT_ENTRIES) - 1, "rflags": 2}
    return {**common, **mtrrs(where), **registers}
