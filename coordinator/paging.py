"""A guest's page tables, read from outside: SDM vol. 3 chapter 4 (32-bit, PAE and 4-level paging).

For looking only: nothing is checked but what is needed to find memory, and no bit is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from coordinator.contract.errors import ConfigError
from coordinator.contract.segment import Segment

CR0_PG, CR4_PSE, CR4_PAE, EFER_LMA = 1 << 31, 0x10, 0x20, 0x400
PRESENT, LARGE = 0x1, 0x80
ADDRESS = 0x000F_FFFF_FFFF_F000
PAGE_SHIFT, TABLE_BYTES = 12, 4096
#: tables that are read at most, and runs of pages in them: a guest may let tables point at one another
MOST_TABLES, MOST_RUNS = 1 << 16, 1 << 20


@dataclass(frozen=True)
class Mapping:
    """Linear addresses in a row that lead to guest-physical ones in a row; sizes are bytes."""

    linear: int
    gpa: int
    size: int


class Tables:
    """The page tables in force by a vCPU's registers (``struct cpu_arch``)."""

    def __init__(self, segment: Segment, arch: Any) -> None:
        self._segment = segment
        self.on = bool(arch.cr0 & CR0_PG)
        long, pae = bool(arch.efer & EFER_LMA), bool(arch.cr4 & CR4_PAE)
        self._width = 8 if long or pae else 4
        #: bits of the linear address by level, from the root on
        self._bits = (9, 9, 9, 9) if long else (2, 9, 9) if pae else (10, 10)
        #: a table of the root's level need not be a whole page (PAE: 32 bytes)
        self._root = int(arch.cr3) & (ADDRESS if long else 0xFFFF_FFE0 if pae else 0xFFFF_F000)
        self._large = bool(long or pae or arch.cr4 & CR4_PSE)
        self._canonical = long
        self._read = 0

    def _table(self, gpa: int, level: int) -> Any:
        """Entries as an array."""
        self._read += 1
        if self._read > MOST_TABLES:
            raise ConfigError(f"the guest has more than {MOST_TABLES} page tables")
        data = self._segment.dma_read(gpa, self._width << self._bits[level])
        return np.frombuffer(data, dtype="<u8" if self._width == 8 else "<u4").astype(np.uint64)

    def _shift(self, level: int) -> int:
        return PAGE_SHIFT + sum(self._bits[level + 1 :])

    def _is_leaf(self, entry: int, level: int) -> bool:
        """Only the two lowest levels can be: no 1 GiB pages (and the PAE root has no bit for it)."""
        last = len(self._bits) - 1
        return level == last or (level == last - 1 and self._large and bool(entry & LARGE))

    def _frame(self, entry: int, level: int) -> int:
        """Of a leaf: PSE-36 where entries have 32 bits (table 4-4)."""
        shift = self._shift(level)
        address = entry & ADDRESS & ~((1 << shift) - 1)
        if self._width == 4 and shift > PAGE_SHIFT:
            address |= (entry >> 13 & 0xFF) << 32
        return address

    def translate(self, linear: int) -> int | None:
        """Guest-physical address; None where nothing is mapped."""
        if not self.on:
            return linear
        table, self._read = self._root, 0
        for level, bits in enumerate(self._bits):
            shift = self._shift(level)
            entry = int(self._table(table, level)[linear >> shift & (1 << bits) - 1])
            if not entry & PRESENT:
                return None
            if self._is_leaf(entry, level):
                return self._frame(entry, level) | linear & (1 << shift) - 1
            table = entry & ADDRESS
        return None

    def mappings(self) -> list[Mapping]:
        """All of them, by linear address, neighbours as one. ConfigError: more than can be meant."""
        self._read = 0
        merged: list[Mapping] = []
        for runs, each in enumerate(self._walk(self._root, 0, 0) if self.on else ()):
            if runs > MOST_RUNS:
                raise ConfigError(f"the guest's page tables have more than {MOST_RUNS} runs of pages")
            last = merged[-1] if merged else None
            if last and last.linear + last.size == each.linear and last.gpa + last.size == each.gpa:
                merged[-1] = Mapping(last.linear, last.gpa, last.size + each.size)
            else:
                merged.append(each)
        return merged

    def _walk(self, table: int, level: int, linear: int) -> Iterator[Mapping]:
        entries = self._table(table, level)
        if level == len(self._bits) - 1:
            yield from self._pages(entries, linear)
            return
        shift = self._shift(level)
        for index in np.flatnonzero(entries & np.uint64(PRESENT)).tolist():
            entry, at = int(entries[index]), linear | index << shift
            if self._canonical and level == 0 and index >= 256:
                at |= 0xFFFF << 48
            if self._is_leaf(entry, level):
                yield Mapping(at, self._frame(entry, level), 1 << shift)
            else:
                yield from self._walk(entry & ADDRESS, level + 1, at)

    @staticmethod
    def _pages(entries: Any, linear: int) -> Iterator[Mapping]:
        """Of a table of the last level: pages that follow one another on both sides are one run."""
        present = np.flatnonzero(entries & np.uint64(PRESENT))
        if not len(present):
            return
        frames = (entries[present] & np.uint64(ADDRESS)).astype(np.int64) >> PAGE_SHIFT
        breaks = np.flatnonzero((np.diff(present) != 1) | (np.diff(frames) != 1)) + 1
        begins, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(present)]
        for begin, end in zip(begins, ends, strict=True):
            at = linear | int(present[begin]) << PAGE_SHIFT
            yield Mapping(at, int(frames[begin]) << PAGE_SHIFT, (end - begin) << PAGE_SHIFT)
