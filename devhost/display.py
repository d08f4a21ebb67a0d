"""Wiring of the standard VGA card: ports, the window at A0000h, BARs, and its option ROM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coordinator.contract.errors import ConfigError
from devhost.memory import MMIO, Layer, Region, ram, rom
from devhost.pci.function import COMMAND, COMMAND_IO, COMMAND_MEMORY, Bar, Identity, PciFunction, bar_offset
from devhost.vga import mode3
from devhost.vga.vga import FIRST, Vga, Window

if TYPE_CHECKING:
    from devhost.pc import Pc

VBE_PORTS = 0x1CE
WINDOW_BASE, WINDOW_SIZE = 0xA0000, 0x20000
LINEAR_BAR, REGISTER_BAR, ROM_BAR = 0, 2, 6
REGISTER_BAR_SIZE = SMALLEST_ROM_BAR = 0x1000
#: where a boot without firmware puts the BARs
LINEAR_BASE, REGISTER_BASE = 0xFD00_0000, 0xFEBF_0000


class Display:
    """``function`` is the PCI function 1234:1111, ``vga`` the chip."""

    def __init__(self, pc: Pc) -> None:
        self._bus, self._memory, self._segment = pc.bus, pc.memory, pc.segment
        self._changed = pc.memory_changed
        self._rom_offset = self._segment.rom_offset + pc.machine.rom_size
        self._window: Region | None = None
        self.function = PciFunction(Identity(0x1234, 0x1111, 0x030000, revision=2))
        self.vga = Vga(self._segment.vram, pc.clock, self._show_window, self._written)
        self._slot = pc.plug("vga", self.vga, (FIRST, "main"), (VBE_PORTS, "vbe"))
        linear = self.vga.linear.size
        self.function.add_bar(LINEAR_BAR, Bar(linear, False, self._linear_moved, prefetchable=True))
        self.function.add_bar(REGISTER_BAR, Bar(REGISTER_BAR_SIZE, False, self._registers_moved))
        self._option_rom = self._load_option_rom(pc.machine.vga_rom)
        if self._option_rom:
            size = max(SMALLEST_ROM_BAR, 1 << (len(self._option_rom) - 1).bit_length())
            self.function.add_bar(ROM_BAR, Bar(size, False, self._rom_moved))
        self._window = self._mmio(WINDOW_BASE, WINDOW_SIZE, "window")
        self._show_window(self.vga.window())

    def _load_option_rom(self, path: str | None) -> bytes:
        """Put the video BIOS behind the firmware in ROM."""
        if path is None:
            return b""
        room = self._segment.rom[self._rom_offset - self._segment.rom_offset :]
        try:
            with open(path, "rb") as file:
                image = file.read()
        except OSError as error:
            raise ConfigError(f"VGA BIOS {path}: {error.strerror}") from None
        if len(image) > room.size:
            raise ConfigError(f"VGA BIOS {path}: {len(image)} bytes; at most {room.size} fit")
        room[: len(image)] = np.frombuffer(image, np.uint8)
        return image

    def _mmio(self, base: int, size: int, range_name: str) -> Region:
        first, count = self._bus.map_memory(self._slot, base, size, range_name)
        return Region(
            base, size, MMIO, host=self._bus.host, device=self._slot.id, first_reg=first, regs=count
        )

    def _written(self, offset: int, length: int) -> None:
        self._segment.written(self._segment.vram_offset + offset, length)

    # ---- what moves ----------------------------------------------------------------------------------
    def _show_window(self, window: Window) -> None:
        if self._window is None:
            return  # the chip's first reset; it is shown once it is mapped
        if window.kind == "planar":
            region = self._window.cut(window.base, window.base + window.size)
        else:
            region = ram(window.base, window.size, self._segment.vram_offset + window.offset)
        self._memory.set("vga-window", Layer.VGA, region)
        self._changed()

    def _place(self, layer: str, region: Region | None) -> None:
        if region is None:
            self._memory.remove(layer)
        else:
            self._memory.set(layer, Layer.PCI, region)
        self._changed()

    def _linear_moved(self, base: int | None) -> None:
        at = self._segment.vram_offset
        self._place("vga-linear", None if base is None else ram(base, self.vga.linear.size, at))

    def _registers_moved(self, base: int | None) -> None:
        if base is None:
            self._bus.unmap_memory(self._slot, "mmio")
            self._place("vga-registers", None)
        else:
            self._place("vga-registers", self._mmio(base, REGISTER_BAR_SIZE, "mmio"))

    def _rom_moved(self, base: int | None) -> None:
        size = self.function.bars[ROM_BAR].size
        self._place("vga-rom", None if base is None else rom(base, size, self._rom_offset))

    # ---- without firmware ------------------------------------------------------------------------------
    def as_firmware_leaves_it(self) -> None:
        """BARs placed and decoded, text mode 3 with the font of the option ROM."""
        self.function.write(bar_offset(LINEAR_BAR), 4, LINEAR_BASE)
        self.function.write(bar_offset(REGISTER_BAR), 4, REGISTER_BASE)
        self.function.write(COMMAND, 2, COMMAND_IO | COMMAND_MEMORY)
        mode3.set_mode(self.vga, mode3.find_font(self._option_rom))
