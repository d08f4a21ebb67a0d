"""One channel of the bus-master IDE function: three registers and the walk through the PRD table.

Source: BMIDE 1.0 sections 1.2 (PRD table), 2 (registers), 3.1 (status combinations); PIIX3 2.5.1-2.5.3.

A PRD is 8 bytes: base address (bit 0 ignored), byte count (bit 0 ignored, 0 = 64 KiB), end of table
in bit 31 of the second word. The table pointer counts within 64 KiB, as tables must not cross that
boundary. Regions are taken to be linear in memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from coordinator.contract.device import Dma

COMMAND, STATUS, POINTER = 0, 2, 4

COMMAND_START, COMMAND_TO_MEMORY = 0x01, 0x08
STATUS_ACTIVE, STATUS_ERROR, STATUS_INTERRUPT = 0x01, 0x02, 0x04
#: drive 0/1 DMA capable: software's own notes
STATUS_CAPABLE = 0x60

PRD_SIZE = 8
TABLE_WINDOW = 0x10000
#: descriptors visited for one request: a whole table
PRDS_PER_PLAN = TABLE_WINDOW // PRD_SIZE
#: descriptors fetched at once
FETCH = 32
END_OF_TABLE = 0x8000_0000

_ENTRY = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the walk stands: next descriptor, and what is left of the current region."""

    descriptor: int = 0
    address: int = 0
    left: int = 0
    last: bool = False

    @property
    def exhausted(self) -> bool:
        return self.last and self.left == 0


@dataclass(frozen=True, slots=True)
class Plan:
    """Memory regions for the next ``length`` bytes, and the cursor behind them."""

    regions: list[tuple[int, int]]
    length: int
    after: Cursor


class BusMaster:
    """Registers and PRD cursor of one channel; the drive decides when data moves."""

    def __init__(self, dma: Dma) -> None:
        self._dma = dma
        self.command = 0
        self.status = 0
        self.pointer = 0
        self.cursor = Cursor()
        #: COMMAND.BME of the PCI function
        self.granted = True

    def reset(self) -> None:
        """PIIX3: all bus master registers are 0 after RST#."""
        self.command = self.status = self.pointer = 0
        self.cursor = Cursor()

    @property
    def active(self) -> bool:
        return bool(self.status & STATUS_ACTIVE)

    def ready(self, to_memory: bool) -> bool:
        """Whether the engine runs in this direction."""
        return self.granted and self.active and bool(self.command & COMMAND_TO_MEMORY) == to_memory

    def read(self, offset: int) -> int:
        if offset == COMMAND:
            return self.command
        if offset == STATUS:
            return self.status
        if offset >= POINTER:
            return self.pointer >> 8 * (offset - POINTER) & 0xFF
        return 0

    def write_command(self, value: int) -> tuple[bool, bool]:
        """Returns (started, stopped): the edges of the start bit."""
        was = self.command & COMMAND_START
        self.command = value & (COMMAND_START | COMMAND_TO_MEMORY)
        now = self.command & COMMAND_START
        if now and not was:
            self.status |= STATUS_ACTIVE
            self.cursor = Cursor(descriptor=self.pointer)
        elif was and not now:
            self.status &= ~STATUS_ACTIVE
        return bool(now and not was), bool(was and not now)

    def write_status(self, value: int) -> None:
        """Error and interrupt are cleared by writing one; the capable bits are plain (BMIDE 2.2)."""
        kept = self.status & ~(value & (STATUS_ERROR | STATUS_INTERRUPT)) & ~STATUS_CAPABLE
        self.status = kept | value & STATUS_CAPABLE

    def write_pointer(self, offset: int, width: int, value: int) -> None:
        """Byte lanes of the table address; bits 1:0 are 0."""
        shift = 8 * (offset - POINTER)
        mask = (1 << 8 * width) - 1 << shift
        self.pointer = (self.pointer & ~mask | value << shift & mask) & 0xFFFF_FFFC

    def interrupt(self) -> None:
        """The drive's interrupt line rose (BMIDE 2.2: set by the rising edge, also without a transfer)."""
        self.status |= STATUS_INTERRUPT

    def plan(self, limit: int) -> Plan:
        """Regions for up to ``limit`` bytes from the cursor on; adjacent ones are joined."""
        regions: list[tuple[int, int]] = []
        descriptor, address, left, last = (
            self.cursor.descriptor,
            self.cursor.address,
            self.cursor.left,
            self.cursor.last,
        )
        need = limit
        visited = 0
        table = b""
        at = 0
        while True:
            if left and need:
                take = min(left, need)
                if regions and sum(regions[-1]) == address:
                    regions[-1] = (regions[-1][0], regions[-1][1] + take)
                else:
                    regions.append((address, take))
                address += take
                left -= take
                need -= take
            if not need or last or visited == PRDS_PER_PLAN:
                break
            if at == len(table):
                room = TABLE_WINDOW - (descriptor & TABLE_WINDOW - 1)
                table = self._dma.read(descriptor, min(FETCH * PRD_SIZE, room & -PRD_SIZE or PRD_SIZE))
                at = 0
            address, word = _ENTRY.unpack_from(table, at)
            at += PRD_SIZE
            address &= 0xFFFF_FFFE
            left = word & 0xFFFE or 0x10000
            last = bool(word & END_OF_TABLE)
            descriptor = descriptor & ~(TABLE_WINDOW - 1) | descriptor + PRD_SIZE & TABLE_WINDOW - 1
            visited += 1
        return Plan(regions, limit - need, Cursor(descriptor, address, left, last))

    def commit(self, plan: Plan) -> None:
        """The plan's bytes have moved. The engine goes inactive at the end of the table (BMIDE 3.1)."""
        self.cursor = plan.after
        if self.cursor.exhausted:
            self.status &= ~STATUS_ACTIVE
