"""Bochs VBE extensions: index port 1CEh, data port 1CFh.

Source: QEMU docs/specs/standard-vga and the Bochs VBE interface description (VBE_DISPI registers).
Resolution and depth can be set only while VBE is off. Values that would show or bank beyond video
memory are not taken (CVE-2016-3710).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

ID, XRES, YRES, BPP, ENABLE, BANK, VIRT_WIDTH, VIRT_HEIGHT, X_OFFSET, Y_OFFSET, VIDEO_MEMORY_64K = range(11)
REGISTERS = 11
OLDEST_ID, LATEST_ID = 0xB0C0, 0xB0C5
ENABLED, GET_CAPS, DAC_8BIT, LINEAR, NO_CLEAR = 0x01, 0x02, 0x20, 0x40, 0x80
MAX_XRES, MAX_YRES, MAX_BPP = 2560, 1600, 32
MAX_VIRTUAL = 0x4000
DEPTHS = (4, 8, 15, 16, 24, 32)
BANK_SIZE = 0x10000


@dataclass
class Dispi:
    """The register file; ``memory`` is the size of the linear frame buffer in bytes."""

    memory: int
    index: int = 0
    values: list[int] = field(default_factory=lambda: [LATEST_ID, 0, 0, 8, *[0] * (REGISTERS - 4)])

    @property
    def enabled(self) -> bool:
        return bool(self.values[ENABLE] & ENABLED)

    @property
    def bits(self) -> int:
        """Bits a pixel takes in memory."""
        return 16 if self.values[BPP] == 15 else self.values[BPP]

    @property
    def bytes_per_line(self) -> int:
        return self.values[VIRT_WIDTH] * self.bits // 8

    @property
    def start(self) -> int:
        """Byte offset of the first visible pixel."""
        return self.values[Y_OFFSET] * self.bytes_per_line + self.values[X_OFFSET] * self.bits // 8

    @property
    def bank_offset(self) -> int:
        return self.values[BANK] * BANK_SIZE

    def sound(self) -> bool:
        """Whether the registers hold what guests can bring about: used on records of unknown origin."""
        values = self.values
        if len(values) != REGISTERS or not all(0 <= value <= 0xFFFF for value in values):
            return False
        return (
            values[XRES] <= MAX_XRES
            and values[YRES] <= MAX_YRES
            and values[BPP] in DEPTHS
            and self.bank_offset < self.memory
            and (not self.enabled or values[XRES] > 0 < values[YRES] and self._visible())
        )

    def read(self) -> int:
        if self.index == VIDEO_MEMORY_64K:
            return self.memory // BANK_SIZE
        if self.index >= REGISTERS:
            return 0
        if self.values[ENABLE] & GET_CAPS and self.index in (XRES, YRES, BPP):
            return {XRES: MAX_XRES, YRES: MAX_YRES, BPP: MAX_BPP}[self.index]
        return self.values[self.index]

    def write(self, value: int) -> bool:
        """True when the frame buffer is to be cleared (a mode was switched on without NO_CLEAR)."""
        index = self.index
        if index == ENABLE:
            return self._enable(value)
        if index == ID and OLDEST_ID <= value <= LATEST_ID:
            self.values[ID] = value
        elif index == BPP and not self.enabled and (value == 0 or value in DEPTHS):
            self.values[BPP] = value or 8
        elif (
            index in (XRES, YRES) and not self.enabled and value <= (MAX_XRES if index == XRES else MAX_YRES)
        ):
            self.values[index] = value
        elif index == BANK and value < self.memory // BANK_SIZE:
            self.values[BANK] = value
        elif index == VIRT_WIDTH and self.values[XRES] <= value <= MAX_VIRTUAL:
            if self._try({VIRT_WIDTH: value}):
                self._set_height()
        elif index in (X_OFFSET, Y_OFFSET) and value <= MAX_VIRTUAL:
            self._try({index: value})
        return False

    def _try(self, changes: dict[int, int]) -> bool:
        """Take the values if the picture stays inside video memory."""
        before: Sequence[int] = list(self.values)
        for index, value in changes.items():
            self.values[index] = value
        if self._visible():
            return True
        self.values[:] = before
        return False

    def _visible(self) -> bool:
        """The last byte shown is inside video memory."""
        last = self.start + (self.values[YRES] - 1) * self.bytes_per_line + self.values[XRES] * self.bits // 8
        return last <= self.memory

    def _set_height(self) -> None:
        line = self.bytes_per_line
        self.values[VIRT_HEIGHT] = min(self.memory // line, 0xFFFF) if line else 0

    def _enable(self, value: int) -> bool:
        if not value & ENABLED or self.enabled:
            self.values[ENABLE] = value
            return False
        fresh = {BANK: 0, X_OFFSET: 0, Y_OFFSET: 0, VIRT_WIDTH: self.values[XRES]}
        if not self.values[XRES] or not self.values[YRES] or not self._try(fresh):
            self.values[ENABLE] = value & ~ENABLED
            return False
        self.values[ENABLE] = value
        self._set_height()
        return not value & NO_CLEAR
