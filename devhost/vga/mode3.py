"""Text mode 3 (80 x 25, 9 x 16 cells), set as the video BIOS does: for a boot without firmware.

Source: IBM PS/2 Hardware Interface Technical Reference, Video Subsystem, "BIOS mode tables" (mode 3+).
"""

from __future__ import annotations

import numpy as np

from devhost.vga import vga as card
from devhost.vga.planes import POSITION
from devhost.vga.vga import Vga

MISC = 0x67
SEQUENCER = bytes.fromhex("03 00 03 00 02")
CRTC = bytes.fromhex("5F 4F 50 82 55 81 BF 1F 00 4F 0D 0E 00 00 00 00 9C 8E 8F 28 1F 96 B9 A3 FF")
GRAPHICS = bytes.fromhex("00 00 00 00 00 10 0E 00 FF")
ATTRIBUTES = bytes.fromhex("00 01 02 03 04 05 14 07 38 39 3A 3B 3C 3D 3E 3F 0C 00 0F 08 00")
#: attribute index bit 5: the palette is in use, the picture is on
PALETTE_ON = 0x20
BLANK = (0x20, 0x07)
GLYPH_HEIGHT, GLYPH_ROOM, CHARACTERS = 16, 32, 256
#: character 1 of the BIOS's 8 x 16 font, a smiling face, by which it is found in an option ROM
SMILE = bytes.fromhex("00 00 7E 81 A5 81 81 BD 99 81 81 7E 00 00 00 00")


def find_font(option_rom: bytes) -> bytes | None:
    """The 8 x 16 font in a video BIOS, 4096 bytes, or None."""
    at = option_rom.find(SMILE) - GLYPH_HEIGHT
    font = option_rom[at : at + GLYPH_HEIGHT * CHARACTERS] if at >= 0 else b""
    return font if len(font) == GLYPH_HEIGHT * CHARACTERS else None


def set_mode(vga: Vga, font: bytes | None) -> None:
    """Registers through the ports, palette, font, an empty screen with the cursor at its top."""

    def indexed(port: int, values: bytes) -> None:
        for index, value in enumerate(values):
            vga.write(port, 2, value << 8 | index)

    vga.write(card.MISC_WRITE, 1, MISC)
    indexed(card.SEQ_INDEX, SEQUENCER)
    vga.write(card.CRTC_INDEX, 2, 0x0011)  # registers 0-7 are writable
    indexed(card.CRTC_INDEX, CRTC)
    indexed(card.GFX_INDEX, GRAPHICS)
    vga.read(card.STATUS, 1)  # index next
    for index, value in enumerate(ATTRIBUTES):
        vga.write(card.ATTRIBUTE, 1, index)
        vga.write(card.ATTRIBUTE, 1, value)
    vga.write(card.ATTRIBUTE, 1, PALETTE_ON)
    vga.write(card.DAC_WRITE_INDEX, 1, 0)
    for component in _ega_palette():
        vga.write(card.DAC_DATA, 1, component)
    memory = vga.planes.memory
    if font is not None:
        plane = np.zeros((8, CHARACTERS, GLYPH_ROOM), np.uint8)
        plane[0, :, :GLYPH_HEIGHT] = np.frombuffer(font, np.uint8).reshape(CHARACTERS, GLYPH_HEIGHT)
        memory[POSITION[2]] = plane.reshape(-1)
    memory[0:0x8000:2], memory[1:0x8000:2] = BLANK


def _ega_palette() -> bytes:
    """The 64 EGA colours, 6 bits a component: bits 2-0 are two thirds of R, G, B, bits 5-3 one third."""
    colors = bytearray()
    for color in range(64):
        for channel in (2, 1, 0):
            colors.append(42 * (color >> channel & 1) + 21 * (color >> channel + 3 & 1))
    return bytes(colors)
