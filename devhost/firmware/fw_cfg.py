"""QEMU's firmware configuration device, as SeaBIOS and Linux know it.

Source: QEMU docs/specs/fw_cfg (registers 510h, 511h, DMA at 514h; keys; file directory; DMA
descriptor), and its table-loader commands (BIOS linker loader).
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable
from typing import Any, ClassVar

from coordinator.contract.config import Machine, Media
from coordinator.contract.device import Device, Dma
from coordinator.contract.registers import Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U16, U32, Natural
from devhost.firmware.acpi import Tables

SIGNATURE, ID, UUID, RAM_SIZE, NOGRAPHIC, NB_CPUS = 0x00, 0x01, 0x02, 0x03, 0x04, 0x05
BOOT_MENU, MAX_CPUS, FILE_DIR, FILE_FIRST = 0x0E, 0x0F, 0x19, 0x20
#: selector bits above the key: write channel and architecture-local items
ENTRY_MASK = 0x3FFF
ARCH_LOCAL = 0x8000
IRQ0_OVERRIDE, E820 = ARCH_LOCAL | 2, ARCH_LOCAL | 3

VERSION_TRADITIONAL, VERSION_DMA = 1, 2
DMA_SIGNATURE = 0x51454D5520434647  # "QEMU CFG"
DMA_ERROR, DMA_READ, DMA_SKIP, DMA_SELECT, DMA_WRITE = 1, 2, 4, 8, 16
#: bytes copied at once
PIECE = 1 << 16
LAST_ADDRESS = (1 << 64) - 1

FILE_NAME = 56
LOW_RAM_LIMIT = 0xC000_0000
E820_RAM = 1
LOADER_NAME = 56


class FwCfgRecord(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "fw_cfg"
    key: U16
    offset: Natural
    dma_high: U32


class FwCfg(Device):
    """Items by key; files get keys from 20h on, sorted by name."""

    kind = "fw_cfg"
    ranges: ClassVar = {
        "main": RegisterMap(
            Register("SELECT", 0, widths=(1, 2), doc="selector"),
            Register("DATA", 1, widths=(1,), doc="next byte of the item"),
            Register("DMA_HIGH", 4, span=4, widths=(1, 2, 4), doc="big-endian address, bits 63:32"),
            Register("DMA_LOW", 8, span=4, widths=(1, 2, 4), doc="bits 31:0; writing it starts"),
        )
    }

    def __init__(self, dma: Dma, report: Callable[[int, bytes], None] | None = None) -> None:
        """``report(gpa, bytes)`` stores the result of a transfer; by default at once. A device host may
        have to run
        a transfer again, until it is committed, so it overwrites the descriptor only after that."""
        self._dma = dma
        self._report: Callable[[int, bytes], Any] = report or dma.write
        self.items: dict[int, bytes] = {
            SIGNATURE: b"QEMU",
            ID: struct.pack("<I", VERSION_TRADITIONAL | VERSION_DMA),
        }
        self._files: dict[str, bytes] = {}
        self.key = self.offset = self.dma_high = 0

    def set(self, key: int, data: bytes) -> None:
        self.items[key] = data

    def add_file(self, name: str, data: bytes) -> None:
        """A named item; the directory is made anew, so add all files before the guest runs."""
        self._files[name] = data
        directory = struct.pack(">I", len(self._files))
        for key, (label, content) in enumerate(sorted(self._files.items()), FILE_FIRST):
            self.items[key] = content
            directory += struct.pack(f">IHH{FILE_NAME}s", len(content), key, 0, label.encode())
        self.items[FILE_DIR] = directory

    def _take(self, length: int) -> bytes:
        """The next bytes of the selected item; zeros past its end."""
        data = self.items.get(self.key, b"")[self.offset : self.offset + length]
        self.offset += len(data)
        return data.ljust(length, b"\0")

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        if offset == 1:
            return self._take(1)[0]
        if offset >= 4:
            signature = DMA_SIGNATURE.to_bytes(8, "big")
            return int.from_bytes(signature[offset - 4 : offset - 4 + width], "little")
        return 0

    def read_string(self, offset: int, width: int, count: int, range_name: str = "main") -> bytes:
        if offset == 1 and width == 1:
            return self._take(count)
        return super().read_string(offset, width, count, range_name)

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        if offset == 0:
            self._select(value)
        elif offset == 4 and width == 4:
            self.dma_high = int.from_bytes(value.to_bytes(4, "little"), "big")
        elif offset == 8 and width == 4:
            low = int.from_bytes(value.to_bytes(4, "little"), "big")
            self._transfer(self.dma_high << 32 | low)
            self.dma_high = 0

    def _select(self, key: int) -> None:
        self.key, self.offset = key & (ARCH_LOCAL | ENTRY_MASK), 0

    def _transfer(self, descriptor: int) -> None:
        """Run the DMA descriptor (control, length, address; big-endian) at ``descriptor``."""
        control, length, address = struct.unpack(">IIQ", self._dma.read(descriptor, 16))
        if control & DMA_SELECT:
            self._select(control >> 16)
        error = 0
        if control & DMA_READ:
            self._copy_out(address, length)
        elif control & DMA_WRITE:
            error = DMA_ERROR
        elif control & DMA_SKIP:
            self.offset = min(self.offset + length, len(self.items.get(self.key, b"")))
        self._report(descriptor, struct.pack(">I", error))

    def _copy_out(self, address: int, length: int) -> None:
        """Item bytes, then zeros; in pieces, since ``length`` is the guest's word."""
        while length > 0 and address <= LAST_ADDRESS:
            size = min(PIECE, length, LAST_ADDRESS + 1 - address)
            self._dma.write(address, self._take(size))
            address, length = address + size, length - size

    def reset(self, hard: bool = True) -> None:
        self.key = self.offset = self.dma_high = 0

    def save(self) -> FwCfgRecord:
        return FwCfgRecord(key=self.key, offset=self.offset, dma_high=self.dma_high)

    def load(self, record: Record) -> None:
        assert isinstance(record, FwCfgRecord)
        self.key, self.offset, self.dma_high = record.key, record.offset, record.dma_high


def describe(fw_cfg: FwCfg, machine: Machine) -> None:
    """The items by which firmware learns what it runs on."""
    fw_cfg.set(UUID, uuid.UUID(machine.uuid).bytes)
    fw_cfg.set(RAM_SIZE, struct.pack("<Q", machine.ram))
    fw_cfg.set(NOGRAPHIC, struct.pack("<H", int(machine.nographic)))
    fw_cfg.set(NB_CPUS, struct.pack("<H", machine.vcpus))
    fw_cfg.set(MAX_CPUS, struct.pack("<H", machine.vcpus))
    fw_cfg.set(BOOT_MENU, struct.pack("<H", int(machine.boot.menu)))
    fw_cfg.set(IRQ0_OVERRIDE, struct.pack("<I", 1))
    low = min(machine.ram, LOW_RAM_LIMIT)
    ranges = [(0, low)] + ([(1 << 32, machine.ram - low)] if machine.ram > low else [])
    fw_cfg.add_file(
        "etc/e820", b"".join(struct.pack("<QQI", start, size, E820_RAM) for start, size in ranges)
    )


def set_boot_order(fw_cfg: FwCfg, machine: Machine, order: str) -> None:
    """The drives that firmware is to try, in order."""
    fw_cfg.add_file("bootorder", "".join(f"{path}\n" for path in boot_paths(machine, order)).encode() + b"\0")


def boot_paths(machine: Machine, order: str) -> list[str]:
    """Open Firmware paths of the drives in boot order, as SeaBIOS matches them."""
    kinds = {"c": Media.DISK, "d": Media.CDROM}
    paths = []
    for letter in order:
        for drive in machine.drives:
            if drive.media is kinds.get(letter):
                paths.append(f"/pci@i0cf8/ide@1,1/drive@{drive.index // 2}/disk@{drive.index % 2}")
    return paths


TABLES_FILE, RSDP_FILE, LOADER_FILE = "etc/acpi/tables", "etc/acpi/rsdp", "etc/table-loader"
ALLOCATE, ADD_POINTER, ADD_CHECKSUM = 1, 2, 3
ZONE_HIGH, ZONE_FSEG = 1, 2


def _command(kind: int, body: bytes) -> bytes:
    return struct.pack("<I", kind) + body.ljust(124, b"\0")


def _label(name: str) -> bytes:
    return name.encode().ljust(LOADER_NAME, b"\0")


def add_acpi(fw_cfg: FwCfg, tables: Tables) -> None:
    """Hand the tables to firmware with the commands that allocate, link and checksum them."""
    blob = tables.blob
    fw_cfg.add_file(TABLES_FILE, bytes(blob.data))
    fw_cfg.add_file(RSDP_FILE, tables.rsdp(0))
    script = _command(ALLOCATE, _label(RSDP_FILE) + struct.pack("<IB", 16, ZONE_FSEG))
    script += _command(ALLOCATE, _label(TABLES_FILE) + struct.pack("<IB", 64, ZONE_HIGH))
    for at in blob.pointers:
        script += _command(ADD_POINTER, _label(TABLES_FILE) + _label(TABLES_FILE) + struct.pack("<IB", at, 4))
    for at, start, length in blob.checksums:
        script += _command(ADD_CHECKSUM, _label(TABLES_FILE) + struct.pack("<III", at, start, length))
    script += _command(ADD_POINTER, _label(RSDP_FILE) + _label(TABLES_FILE) + struct.pack("<IB", 16, 4))
    script += _command(ADD_CHECKSUM, _label(RSDP_FILE) + struct.pack("<III", 8, 0, 20))
    fw_cfg.add_file(LOADER_FILE, script)
