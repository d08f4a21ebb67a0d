"""Bochs VBE extensions: index port 1CEh, data port 1CFh.

Source: QEMU docs/specs/standard-vga and the Bochs VBE interface description (VBE_DISPI registers).
"""

from __future__ import annotations

from dataclasses import dataclass, field

ID, XRES, YRES, BPP, ENABLE, BANK, VIRT_WIDTH, VIRT_HEIGHT, X_OFFSET, Y_OFFSET, VIDEO_MEMORY_64K = range(11)
REGISTERS = 11
LATEST_ID = 0xB0C5
ENABLED, GET_CAPS, DAC_8BIT, LINEAR, NO_CLEAR = 0x01, 0x02, 0x20, 0x40, 0x80
MAX_XRES, MAX_YRES, MAX_BPP = 2560, 1600, 32
DEPTHS = (4, 8, 15, 16, 24, 32)
BANK_SIZE = 0x10000


@dataclass
class Dispi:
    """The register file; ``memory`` is the size of the linear frame buffer in bytes."""

    memory: int
    index: int = 0
    values: list[int] = field(default_factory=lambda: [LATEST_ID, *[0] * (REGISTERS - 1)])

    @property
    def enabled(self) -> bool:
        return bool(self.values[ENABLE] & ENABLED)

    @property
    def bytes_per_line(self) -> int:
        bits = 16 if self.values[BPP] == 15 else self.values[BPP]
        return self.values[VIRT_WIDTH] * bits // 8

    @property
    def start(self) -> int:
        """Byte offset of the first visible pixel."""
        bits = 16 if self.values[BPP] == 15 else self.values[BPP]
        return self.values[Y_OFFSET] * self.bytes_per_line + self.values[X_OFFSET] * bits // 8

    @property
    def bank_offset(self) -> int:
        return self.values[BANK] * BANK_SIZE

    def read(self) -> int:
        if self.index == VIDEO_MEMORY_64K:
            return self.memory >> 16
        if self.index >= REGISTERS:
            return 0
        if self.values[ENABLE] & GET_CAPS and self.index in (XRES, YRES, BPP):
            return {XRES: MAX_XRES, YRES: MAX_YRES, BPP: MAX_BPP}[self.index]
        return self.values[self.index]

    def write(self, value: int) -> bool:
        """True when the frame buffer is to be cleared (a mode was switched on without NO_CLEAR)."""
        index = self.index
        if index == ID:
            if 0xB0C0 <= value <= LATEST_ID:
                self.values[ID] = value
        elif index == ENABLE:
            return self._enable(value)
        elif index == BPP:
            if value == 0 or value in DEPTHS:
                self.values[BPP] = value or 8
        elif index == BANK:
            if value < self.memory // BANK_SIZE:
                self.values[BANK] = value
        elif index == VIRT_WIDTH:
            if self.values[XRES] <= value <= 0x4000 and self._fits(value, self.values[YRES]):
                self.values[VIRT_WIDTH] = value
                self._set_height()
        elif index in (XRES, YRES, X_OFFSET, Y_OFFSET):
            limit = {XRES: MAX_XRES, YRES: MAX_YRES}.get(index, 0x4000)
            if value <= limit:
                old, self.values[index] = self.values[index], value
                if index in (X_OFFSET, Y_OFFSET) and not self._visible():
                    self.values[index] = old
        return False

    def _bits(self) -> int:
        return 16 if self.values[BPP] == 15 else self.values[BPP] or 8

    def _fits(self, width: int, height: int) -> bool:
        return width * self._bits() // 8 * height <= self.memory

    def _visible(self) -> bool:
        last = self.start + (self.values[YRES] - 1) * self.bytes_per_line + self.values[XRES] * self._bits() // 8
        return last <= self.memory

    def _set_height(self) -> None:
        line = self.bytes_per_line
        self.values[VIRT_HEIGHT] = min(self.memory // line, 0xFFFF) if line else 0

    def _enable(self, value: int) -> bool:
        was = self.enabled
        if value & ENABLED and not was and not (self.values[BPP] and self._fits(self.values[XRES], self.values[YRES])):
            value &= ~ENABLED
        self.values[ENABLE] = value
        if self.enabled and not was:
            self.values[BANK] = self.values[X_OFFSET] = self.values[Y_OFFSET] = 0
            self.values[VIRT_WIDTH] = self.values[XRES]
            self._set_height()
            return not value & NO_CLEAR
        return False
