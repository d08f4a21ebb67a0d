"""What each part of a qcow2 file is, by a reading of its own that shares nothing with blockd's.

Source: "Qcow2 Image File Format". Only for files that are in order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_BITMAPS = 0x23852875
_DATA_FILE, _EXTENDED_L2 = 1 << 2, 1 << 4


class Part(NamedTuple):
    role: str
    offset: int
    length: int


class Anatomy:
    """The parts of one file."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.version, bits = self._u32(4), self._u32(20)
        self.cluster_size = 1 << bits
        self._incompatible = self._u64(72) if self.version >= 3 else 0
        order = self._u32(96) if self.version >= 3 else 4
        self.parts: list[Part] = [Part("header", 0, self._header_end())]
        self._known: set[Part] = set()
        table, clusters = self._u64(48), self._u32(56)
        self._add("refcount table", table, clusters << bits)
        for entry in self._table(table, (clusters << bits) // 8):
            self._add("refcount block", entry & ~511, self.cluster_size)
        self.entries_of_block = (self.cluster_size * 8) >> order
        self._tree("L1 table", self._u64(40), self._u32(36))
        self._snapshots(self._u64(64), self._u32(60))
        self._bitmaps()

    def _u32(self, at: int) -> int:
        return int.from_bytes(self._data[at : at + 4], "big")

    def _u64(self, at: int) -> int:
        return int.from_bytes(self._data[at : at + 8], "big")

    def _table(self, at: int, entries: int) -> Iterator[int]:
        for number in range(entries):
            yield self._u64(at + 8 * number)

    def _add(self, role: str, offset: int, length: int) -> None:
        part = Part(role, offset, length)
        if offset and length and part not in self._known:
            self._known.add(part)
            self.parts.append(part)

    def _extensions(self) -> Iterator[tuple[int, int, int]]:
        """Kind, offset of the data, its length."""
        at = self._u32(100) if self.version >= 3 else 72
        end = self._u64(8) or self.cluster_size
        while at + 8 <= end and (kind := self._u32(at)):
            length = self._u32(at + 4)
            yield kind, at + 8, length
            at += 8 + (length + 7) // 8 * 8

    def _header_end(self) -> int:
        end = self._u32(100) if self.version >= 3 else 72
        for _, offset, length in self._extensions():
            end = offset + length
        return max(end + 8, self._u64(8) + self._u32(16))

    def _tree(self, role: str, offset: int, entries: int) -> None:
        self._add(role, offset, 8 * entries)
        step = 16 if self._incompatible & _EXTENDED_L2 else 8
        shift = 62 - (self.cluster_size.bit_length() - 1 - 8)
        for l1 in self._table(offset, entries):
            table = l1 & _OFFSET
            self._add("L2 table", table, self.cluster_size)
            for number in range(self.cluster_size // step) if table else ():
                entry = self._u64(table + step * number)
                if entry & _COMPRESSED:
                    at = entry & ((1 << shift) - 1)
                    sectors = (entry & (_COMPRESSED - 1)) >> shift
                    self._add("compressed data", at, (sectors + 1) * 512 - at % 512)
                elif not self._incompatible & _DATA_FILE:
                    self._add("data", entry & _OFFSET, self.cluster_size)

    def _snapshots(self, offset: int, count: int) -> None:
        at = offset
        for _ in range(count):
            l1, entries, ident, name = struct.unpack_from(">QIHH", self._data, at)
            extra = self._u32(at + 36)
            self._tree("snapshot's L1 table", l1, entries)
            at += (40 + extra + ident + name + 7) // 8 * 8
        self._add("snapshot table", offset, at - offset)

    def _bitmaps(self) -> None:
        for kind, at, _ in self._extensions():
            if kind != _BITMAPS:
                continue
            count, _, size, directory = struct.unpack_from(">IIQQ", self._data, at)
            self._add("bitmap directory", directory, size)
            entry = directory
            for _ in range(count):
                table, entries = struct.unpack_from(">QI", self._data, entry)
                name, extra = struct.unpack_from(">HI", self._data, entry + 18)
                self._add("bitmap table", table, 8 * entries)
                for cluster in self._table(table, entries):
                    self._add("bitmap data", cluster & _OFFSET, self.cluster_size)
                entry += (24 + extra + name + 7) // 8 * 8

    def roles(self, offset: int, length: int) -> set[str]:
        """What lies in a range, whole or in part."""
        return {p.role for p in self.parts if p.offset < offset + length and offset < p.offset + p.length}
