"""The picture on the screen, from registers and display memory, as an RGB array.

Source: FreeVGA "CRT Controller" and "Attribute Controller"; VBE depths from vbe.py.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from devhost.vga import vbe
from devhost.vga.vga import Vga

Picture = npt.NDArray[np.uint8]

#: nothing on the screen yet: an empty text screen's size
BLANK = (400, 720, 3)


def render(vga: Vga) -> Picture:
    """Height x width x 3."""
    if vga.vbe.enabled:
        return _vbe(vga)
    if vga.seq[1] & 0x20 or not vga.attribute_index & 0x20 and not any(vga.crtc):
        return np.zeros(BLANK, np.uint8)
    if not vga.graphics:
        return _text(vga)
    return _chain4(vga) if vga.chain4 or vga.gfx[5] & 0x40 else _planar(vga)


def _colors(vga: Vga) -> Picture:
    """The DAC's 256 colours at 8 bits (6-bit components unless VBE asked for 8)."""
    if vga.vbe.values[vbe.ENABLE] & vbe.DAC_8BIT:
        return vga.palette
    six = vga.palette & 0x3F
    return (six << 2 | six >> 4).astype(np.uint8)


def _sixteen(vga: Vga) -> Picture:
    """The 16 attribute colours through the attribute palette (10h bit 7, 14h) and the DAC."""
    high = vga.attribute[0x14]
    indices = []
    for entry in vga.attribute[:16]:
        if vga.attribute[0x10] & 0x80:
            entry = entry & 0x0F | (high & 3) << 4
        indices.append((entry & 0x3F | (high & 0x0C) << 4) & vga.dac_mask)
    return _colors(vga)[indices]


def _lines(vga: Vga) -> int:
    overflow = vga.crtc[7]
    return (vga.crtc[0x12] | (overflow & 0x02) << 7 | (overflow & 0x40) << 3) + 1


def _start(vga: Vga) -> int:
    return vga.crtc[0x0C] << 8 | vga.crtc[0x0D]


def _text(vga: Vga) -> Picture:
    columns = vga.crtc[1] + 1
    height = (vga.crtc[9] & 0x1F) + 1
    rows = max(1, _lines(vga) // height)
    width = 8 if vga.seq[1] & 1 else 9
    stride = vga.crtc[0x13] * 2 or columns
    cells = (_start(vga) + np.arange(rows)[:, None] * stride + np.arange(columns)) & 0x7FFF
    plain = vga.planes.memory
    characters, attributes = plain[cells * 2], plain[cells * 2 + 1]
    bits = np.unpackbits(_glyphs(vga, characters, attributes)[:, :, :height, None], axis=-1)
    if width == 9:
        ninth = np.where(
            ((characters & 0xE0) == 0xC0)[..., None, None] & bool(vga.attribute[0x10] & 4), bits[..., 7:], 0
        )
        bits = np.concatenate([bits, ninth.astype(np.uint8)], axis=-1)
    bits = _with_cursor(vga, bits, height, rows, columns)
    foreground = attributes & 0x0F
    background = attributes >> 4 & (0x07 if vga.attribute[0x10] & 8 else 0x0F)
    index = np.where(bits, foreground[..., None, None], background[..., None, None])
    picture = _sixteen(vga)[index]
    return np.ascontiguousarray(picture.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3))


def _glyphs(vga: Vga, characters: Picture, attributes: Picture) -> Picture:
    """32 rows of 8 pixels for each character. Sequencer register 3 has the font for attribute bit 3 clear in
    bits 4, 1 and 0, for it set in bits 5, 3 and 2; plane 2 holds eight fonts of 8 KiB."""
    select = vga.seq[3]
    clear = (select & 0x03) << 1 | select >> 4 & 1
    set_ = (select & 0x0C) >> 1 | select >> 5 & 1
    fonts = vga.planes.plane(2).reshape(8, 256, 32)
    return fonts[np.where(attributes & 8, set_, clear), characters]


def _with_cursor(vga: Vga, bits: Picture, height: int, rows: int, columns: int) -> Picture:
    start, end = vga.crtc[0x0A], vga.crtc[0x0B] & 0x1F
    at = (vga.crtc[0x0E] << 8 | vga.crtc[0x0F]) - _start(vga)
    stride = vga.crtc[0x13] * 2 or columns
    row, column = divmod(at, stride)
    if not start & 0x20 and 0 <= row < rows and column < columns:
        bits = bits.copy()
        bits[row, column, start & 0x1F : min(end, height - 1) + 1] = 1
    return bits


def _planar(vga: Vga) -> Picture:
    """Sixteen colours, four planes; also the CGA-like modes, seen as planes."""
    bytes_per_line = vga.crtc[0x13] * 2
    columns, repeat = vga.crtc[1] + 1, (vga.crtc[9] & 0x1F) + 1
    if vga.crtc[9] & 0x80:
        repeat *= 2
    rows = max(1, _lines(vga) // repeat)
    offsets = (_start(vga) + np.arange(rows)[:, None] * bytes_per_line + np.arange(columns)) & 0xFFFF
    index = np.zeros((rows, columns * 8), np.uint8)
    for plane in range(4):
        bits = np.unpackbits(vga.planes.plane(plane)[offsets], axis=1)
        index |= bits << plane
    index &= vga.attribute[0x12] & 0x0F
    return np.repeat(_sixteen(vga)[index], repeat, axis=0)


def _chain4(vga: Vga) -> Picture:
    """256 colours, mode 13h and its relatives: 320 pixels doubled by the CRTC."""
    width = (vga.crtc[1] + 1) * 4
    stride = vga.crtc[0x13] * 8 or width
    repeat = (vga.crtc[9] & 0x1F) + 1
    rows = max(1, _lines(vga) // repeat)
    offsets = (_start(vga) * 4 + np.arange(rows)[:, None] * stride + np.arange(width)) & 0xFFFF
    colors = _colors(vga)[vga.linear[offsets] & vga.dac_mask]
    return np.repeat(np.repeat(colors, repeat, axis=0), 2, axis=1)


def _vbe(vga: Vga) -> Picture:
    width, height, depth = (vga.vbe.values[i] for i in (vbe.XRES, vbe.YRES, vbe.BPP))
    if depth == 4:
        return _planar(vga)
    size = vga.vbe.bits // 8
    # Dispi keeps the picture inside video memory
    lines = np.lib.stride_tricks.as_strided(
        vga.linear[vga.vbe.start :], (height, width * size), (vga.vbe.bytes_per_line, 1)
    )
    raw = lines.reshape(height, width, size)
    if depth == 8:
        return _colors(vga)[raw[..., 0] & vga.dac_mask]
    if depth >= 24:
        return np.ascontiguousarray(raw[..., 2::-1])
    value = raw[..., 0].astype(np.uint16) | raw[..., 1].astype(np.uint16) << 8
    green_bits = 5 if depth == 15 else 6
    blue, green, red = value & 31, value >> 5 & (1 << green_bits) - 1, value >> 5 + green_bits & 31
    channels = [
        red << 3 | red >> 2,
        green << 8 - green_bits | green >> 2 * green_bits - 8,
        blue << 3 | blue >> 2,
    ]
    return np.stack(channels, axis=-1).astype(np.uint8)
