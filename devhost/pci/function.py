"""A PCI function's configuration space: bytes, write masks, base address registers.

Source: PCI Local Bus Specification 3.0, chapter 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.contract.errors import RecordError

VENDOR_ID, DEVICE_ID, COMMAND, STATUS, REVISION, CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
HEADER_TYPE, BAR0, SUBSYSTEM_VENDOR, SUBSYSTEM_ID = 0x0E, 0x10, 0x2C, 0x2E
ROM_ADDRESS, INTERRUPT_LINE, INTERRUPT_PIN = 0x30, 0x3C, 0x3D

COMMAND_IO, COMMAND_MEMORY, COMMAND_MASTER = 0x1, 0x2, 0x4
ROM_ENABLE = 0x1

#: bits of COMMAND that software may set unless a function says otherwise: I/O, memory, master, SERR (6.2.2)
COMMAND_MASK = 0x0107
CONFIG_SIZE = 256
#: bytes that every record of a function must agree on: vendor, device, revision and class, header type
_IDENTITY = (slice(VENDOR_ID, COMMAND), slice(REVISION, 0x0C), slice(HEADER_TYPE, HEADER_TYPE + 1))


@dataclass
class Bar:
    """A base address register. ``size`` is a power of two; ``moved(address or None)`` is called when the
    decoded address changes. Address 0 and a range that ends at the top of its space count as not placed:
    that is what a register holds before it is set, and while its size is asked for."""

    size: int
    io: bool
    moved: Callable[[int | None], None]
    prefetchable: bool = False
    address: int | None = field(default=None, init=False)

    @property
    def flags(self) -> int:
        return 0x1 if self.io else 0x8 if self.prefetchable else 0x0


@dataclass(frozen=True)
class Identity:
    """The read-only header fields."""

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0x1AF4
    subsystem: int = 0x1100
    multifunction: bool = False
    interrupt_pin: int = 0


class PciFunction:
    """Configuration space of one function. Subclasses or wiring set masks and ``on_write(offset, width)``."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.config = bytearray(CONFIG_SIZE)
        self.mask = bytearray(CONFIG_SIZE)
        #: bits that are cleared by writing one
        self.write_one_clears = bytearray(CONFIG_SIZE)
        self.bars: dict[int, Bar] = {}
        self.on_write: Callable[[int, int], None] | None = None
        self.set(COMMAND, 2, 0, mask=COMMAND_MASK)
        self.set(INTERRUPT_LINE, 1, 0, mask=0xFF)
        self.write_one_clears[STATUS + 1] = 0xF9  # 6.2.3
        self._after_reset: dict[int, int] = {}
        self._identify()

    def _identify(self) -> None:
        i = self.identity
        self.set(VENDOR_ID, 2, i.vendor)
        self.set(DEVICE_ID, 2, i.device)
        self.set(REVISION, 1, i.revision)
        self.set(CLASS, 3, i.class_code)
        self.set(HEADER_TYPE, 1, 0x80 if i.multifunction else 0)
        self.set(SUBSYSTEM_VENDOR, 2, i.subsystem_vendor)
        self.set(SUBSYSTEM_ID, 2, i.subsystem)
        self.set(INTERRUPT_PIN, 1, i.interrupt_pin)

    def set(self, offset: int, width: int, value: int, mask: int | None = None) -> None:
        """Set a field from the device's side; ``mask`` makes bits writable by the guest."""
        self.config[offset : offset + width] = value.to_bytes(width, "little")
        if mask is not None:
            self.mask[offset : offset + width] = mask.to_bytes(width, "little")

    def get(self, offset: int, width: int) -> int:
        return int.from_bytes(self.config[offset : offset + width], "little")

    def add_bar(self, number: int, bar: Bar) -> None:
        """Number 0-5, or 6 for the expansion ROM (6.2.5)."""
        self.bars[number] = bar
        offset = bar_offset(number)
        writable = 0xFFFF_FFFF & ~(bar.size - 1)
        if number == 6:
            self.set(offset, 4, 0, mask=writable | ROM_ENABLE)
        else:
            self.set(offset, 4, bar.flags, mask=writable)

    def read(self, offset: int, width: int) -> int:
        """Guest read; past the end reads as ones."""
        if offset + width > CONFIG_SIZE:
            return (1 << 8 * width) - 1
        return int.from_bytes(self.config[offset : offset + width], "little")

    def write(self, offset: int, width: int, value: int) -> None:
        """Guest write through the masks; moves BARs and calls ``on_write``."""
        if offset + width > CONFIG_SIZE:
            return
        for i in range(width):
            at, byte = offset + i, value >> 8 * i & 0xFF
            kept = self.config[at] & ~self.mask[at]
            self.config[at] = (kept | byte & self.mask[at]) & ~(byte & self.write_one_clears[at]) & 0xFF
        self.remap()
        if self.on_write:
            self.on_write(offset, width)

    def remap(self) -> None:
        """Decode all BARs anew; tell those whose address changed."""
        command = self.get(COMMAND, 2)
        for number, bar in self.bars.items():
            raw = self.get(bar_offset(number), 4)
            address: int | None = raw & ~(bar.size - 1) & 0xFFFF_FFFF
            enabled = command & (COMMAND_IO if bar.io else COMMAND_MEMORY)
            if number == 6 and not raw & ROM_ENABLE:
                enabled = 0
            last = (address or 0) + bar.size - 1
            if not enabled or not address or last >= (0xFFFF if bar.io else 0xFFFF_FFFF):
                address = None
            if address != bar.address:
                bar.address = address
                bar.moved(address)

    @property
    def bus_master(self) -> bool:
        return bool(self.get(COMMAND, 2) & COMMAND_MASTER)

    def reset(self) -> None:
        """RST#: writable bits cleared, BARs unmapped (4.3)."""
        for at in range(CONFIG_SIZE):
            self.config[at] &= ~self.mask[at] & ~self.write_one_clears[at] & 0xFF
        for offset, value in self._after_reset.items():
            self.config[offset] = value
        self.remap()

    def register(self, offset: int, width: int, value: int, mask: int = 0) -> None:
        """A register that is ``value`` after reset, and whose ``mask`` bits are writable."""
        self.set(offset, width, value, mask)
        for i in range(width):
            self._after_reset[offset + i] = value >> 8 * i & 0xFF

    def check(self, config: bytes) -> None:
        """RecordError unless ``config`` is the configuration space of such a function."""
        if len(config) != CONFIG_SIZE or any(config[part] != self.config[part] for part in _IDENTITY):
            raise RecordError("a PCI function of the record is not the one that is here")

    def restore(self, config: bytes) -> None:
        """Load saved configuration bytes and map the BARs as they say."""
        self.config[:] = config
        self.remap()


def bar_offset(number: int) -> int:
    """Place of a base address register; number 6 is the expansion ROM's."""
    return ROM_ADDRESS if number == 6 else BAR0 + 4 * number
