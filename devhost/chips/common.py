"""What the chips share: byte-wide bus access, integer fields of records, a pin that nobody wired."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

from msgspec import Meta

from coordinator.contract.device import Device

#: Integer fields of records: a value out of range is refused when the record is decoded.
U8 = Annotated[int, Meta(ge=0, le=0xFF)]
U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
Natural = Annotated[int, Meta(ge=0)]


class NoPin:
    """An output that the board leaves open."""

    def set(self, level: bool) -> None:
        pass


class ByteDevice(Device):
    """A chip with an 8-bit data bus. As on the ISA bus, a wider access becomes byte accesses at
    successive ports, lowest first."""

    @abstractmethod
    def read_byte(self, offset: int, range_name: str) -> int:
        """The byte at ``offset``, FFh where there is no register."""

    @abstractmethod
    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        """Store ``value`` (0 to FFh); ignored where there is no register."""

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        if width == 1:
            return self.read_byte(offset, range_name)
        value = 0
        for i in range(width):
            value |= self.read_byte(offset + i, range_name) << 8 * i
        return value

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        for i in range(width):
            self.write_byte(offset + i, value >> 8 * i & 0xFF, range_name)
