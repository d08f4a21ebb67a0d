"""Pictures against pixels worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from devhost.vga import mode3
from devhost.vga.render import render
from tests.devhost.test_vga import (
    ATTRIBUTE,
    BPP,
    CRTC,
    DAC_DATA,
    DAC_WRITE,
    ENABLE,
    LINEAR,
    SEQ,
    STATUS,
    VIRT_WIDTH,
    X_OFFSET,
    XRES,
    Y_OFFSET,
    YRES,
    Card,
)  # fmt: skip

#: text colours of the EGA palette at 8 bits: 42 of 63 is AAh, 21 is 55h, 63 is FFh
BLACK, BLUE, GREY, WHITE, YELLOW = (0, 0, 0), (0, 0, 0xAA), (0xAA,) * 3, (0xFF,) * 3, (0xFF, 0xFF, 0x55)


def font(**glyphs: list[int]) -> bytes:
    """An 8 x 16 font, blank but for the rows given: ``c41`` is character 41h."""
    data = bytearray(4096)
    for name, rows in glyphs.items():
        at = 16 * int(name[1:], 16)
        data[at : at + len(rows)] = rows
    return bytes(data)


def text(characters: bytes = b"", glyphs: bytes | None = None) -> Card:
    """Mode 3 with the cursor off and cells at the top left."""
    card = Card()
    mode3.set_mode(card.vga, glyphs if glyphs is not None else font())
    card.vga.write(CRTC, 2, 0x200A)
    card.vram[LINEAR : LINEAR + len(characters)] = list(characters)
    return card


def attribute(card: Card, index: int, value: int) -> None:
    card.vga.read(STATUS, 1)
    for byte in (index, value, 0x20):
        card.vga.write(ATTRIBUTE, 1, byte)


def pixels(picture: np.ndarray, row: int, start: int, count: int) -> list[tuple[int, ...]]:
    return [tuple(int(c) for c in picture[row, column]) for column in range(start, start + count)]


def test_nothing_is_shown_before_a_mode_is_set() -> None:
    picture = render(Card().vga)
    assert picture.shape == (400, 720, 3) and not picture.any()


def test_screen_off() -> None:
    """Sequencer 1 bit 5."""
    card = text(b"\xdb\x0f", font(cdb=[0xFF] * 16))
    card.vga.write(SEQ, 2, 0x2001)
    assert not render(card.vga).any()


def test_text_mode_3() -> None:
    """80 x 25 cells of 9 x 16; the ninth column is background, but for C0h-DFh the eighth again."""
    card = text(b"A\x1e\xc4\x07A\x07", font(c41=[0x81, 0x00, 0xFF], cc4=[0xFF]))
    picture = render(card.vga)
    assert picture.shape == (400, 720, 3)
    assert pixels(picture, 0, 0, 9) == [YELLOW, *[BLUE] * 6, YELLOW, BLUE]
    assert pixels(picture, 1, 0, 9) == [BLUE] * 9
    assert pixels(picture, 2, 0, 9) == [*[YELLOW] * 8, BLUE]
    assert pixels(picture, 0, 9, 9) == [GREY] * 9
    assert pixels(picture, 0, 18, 9) == [GREY, *[BLACK] * 6, GREY, BLACK]


def test_bright_backgrounds_where_blinking_is_off() -> None:
    """Attribute 10h bit 3."""
    card = text(b" \xf0")
    assert pixels(render(card.vga), 0, 0, 1) == [GREY]
    attribute(card, 0x10, 0x04)
    assert pixels(render(card.vga), 0, 0, 1) == [WHITE]


def test_cursor() -> None:
    """Lines 0Ah to 0Bh at the address 0Eh, 0Fh; bit 5 of 0Ah hides it."""
    card = text()
    card.vga.write(CRTC, 2, 0x0D0A)
    card.vga.write(CRTC, 2, (80 + 2) << 8 | 0x0F)
    picture = render(card.vga)
    assert pixels(picture, 16 + 12, 18, 9) == [BLACK] * 9
    assert pixels(picture, 16 + 13, 17, 11) == [BLACK, *[GREY] * 9, BLACK]
    assert pixels(picture, 16 + 14, 18, 9) == [GREY] * 9
    assert pixels(picture, 16 + 15, 18, 9) == [BLACK] * 9
    card.vga.write(CRTC, 2, 0x200A)
    assert not render(card.vga).any()


def test_scrolled_screen() -> None:
    """Start address 0Ch, 0Dh, in cells."""
    card = text(glyphs=font(c41=[0xFF]))
    card.vram[LINEAR + 2 * 85] = 0x41
    card.vga.write(CRTC, 2, 80 << 8 | 0x0D)
    assert pixels(render(card.vga), 0, 45, 8) == [GREY] * 8


@pytest.mark.parametrize(
    ("select", "number"), [(0x00, 0), (0x10, 1), (0x01, 2), (0x11, 3), (0x03, 6), (0x13, 7)]
)
def test_fonts_for_attribute_bit_3_clear(select: int, number: int) -> None:
    """Sequencer 3 bits 4, 1, 0: maps 0-3 are the 8 KiB at 0, 16, 32, 48 KiB, maps 4-7 those behind each."""
    card = text(b"A\x07")
    card.vga.write(SEQ, 2, select << 8 | 3)
    _plane_2(card, number * 0x2000 + 0x41 * 32, 0xFF)
    assert pixels(render(card.vga), 0, 0, 8) == [GREY] * 8


@pytest.mark.parametrize(("select", "number"), [(0x04, 2), (0x20, 1), (0x2C, 7)])
def test_fonts_for_attribute_bit_3_set(select: int, number: int) -> None:
    """Bits 5, 3, 2: a second font of 256 characters."""
    card = text(b"A\x0fA\x07")
    card.vga.write(SEQ, 2, select << 8 | 3)
    _plane_2(card, number * 0x2000 + 0x41 * 32, 0xFF)
    assert (
        pixels(render(card.vga), 0, 0, 8) == [WHITE] * 8 and pixels(render(card.vga), 0, 9, 8) == [BLACK] * 8
    )


def _plane_2(card: Card, offset: int, value: int) -> None:
    """Through the window, as a BIOS loads a font."""
    before = card.vga.save()
    card.planar()
    card.seq(2, 4)
    card.poke(offset, value)
    card.vga.load(before)


def graphics(card: Card, crtc: dict[int, int]) -> None:
    """A graphics mode on top of mode 3's colours."""
    mode3.set_mode(card.vga, None)
    for index, value in {0x11: 0, 0x0A: 0x20, **crtc}.items():
        card.vga.write(CRTC, 2, value << 8 | index)
    card.vga.planes.memory[:] = 0


def test_sixteen_color_planes() -> None:
    """Mode 12h: 640 x 480, bit 7 of a byte is its leftmost pixel, plane p is bit p of the colour."""
    card = Card()
    graphics(card, {0x01: 79, 0x07: 0x3E, 0x09: 0x40, 0x12: 0xDF, 0x13: 40})
    card.planar()
    for plane, value in enumerate((0b1100_0000, 0b1010_0000, 0b0000_0000, 0b1001_0000)):
        card.seq(2, 1 << plane)
        card.poke(80 + 1, value)
    picture = render(card.vga)
    assert picture.shape == (480, 640, 3)
    # colours 11, 1, 2, 8 of the palette: bright cyan, blue, green, dark grey
    assert pixels(picture, 1, 7, 6) == [
        BLACK, (0x55, 0xFF, 0xFF), BLUE, (0, 0xAA, 0), (0x55,) * 3, BLACK,
    ]  # fmt: skip
    attribute(card, 0x12, 0x01)  # colour plane enable
    assert pixels(render(card.vga), 1, 8, 2) == [BLUE, BLUE]


def test_256_colors_of_mode_13h() -> None:
    """320 x 200, each pixel 2 x 2; 6-bit DAC components spread over 8 bits."""
    card = Card()
    graphics(card, {0x01: 79, 0x07: 0x1F, 0x09: 0x41, 0x12: 0x8F, 0x13: 40})
    card.seq(4, 0x0E)
    card.gfx(5, 0x40)
    card.gfx(6, 0x05)
    card.vga.write(DAC_WRITE, 1, 200)
    for component in (63, 32, 1):
        card.vga.write(DAC_DATA, 1, component)
    card.vram[320 * 3 + 5] = 200
    picture = render(card.vga)
    assert picture.shape == (400, 640, 3)
    color = (255, 130, 4)
    assert pixels(picture, 6, 9, 4) == pixels(picture, 7, 9, 4) == [BLACK, color, color, BLACK]
    assert pixels(picture, 5, 10, 1) == pixels(picture, 8, 10, 1) == [BLACK]


def vbe(depth: int) -> Card:
    """4 x 2 pixels shown of lines 8 wide, from (1, 1) on."""
    card = Card()
    for index, value in (
        (XRES, 4),
        (YRES, 2),
        (BPP, depth),
        (ENABLE, 0x41),
        (VIRT_WIDTH, 8),
        (X_OFFSET, 1),
        (Y_OFFSET, 1),
    ):
        card.vbe(index, value)
    return card


@pytest.mark.parametrize(
    ("depth", "pixel", "color"),
    [
        (32, b"\x11\x22\x33\x00", (0x33, 0x22, 0x11)),
        (24, b"\x11\x22\x33", (0x33, 0x22, 0x11)),
        (16, (0x1F << 11 | 0x20 << 5 | 0x01).to_bytes(2, "little"), (0xFF, 0x82, 0x08)),
        (15, (0x1F << 10 | 0x10 << 5 | 0x01).to_bytes(2, "little"), (0xFF, 0x84, 0x08)),
    ],
)
def test_vbe_true_color(depth: int, pixel: bytes, color: tuple[int, ...]) -> None:
    card = vbe(depth)
    size = len(pixel)
    at = (2 * 8 + 3) * size  # line 2, column 3: (1, 2) of the picture
    card.vram[at : at + size] = list(pixel)
    picture = render(card.vga)
    assert picture.shape == (2, 4, 3)
    assert pixels(picture, 1, 1, 3) == [BLACK, color, BLACK] and not picture[0].any()


def test_vbe_palette_of_6_and_8_bits() -> None:
    card = vbe(8)
    card.vga.write(DAC_WRITE, 1, 9)
    for component in (0x3F, 0x20, 0x80):
        card.vga.write(DAC_DATA, 1, component)
    card.vram[8 + 1] = 9
    assert pixels(render(card.vga), 0, 0, 1) == [(0xFF, 0x82, 0x00)]
    card.vbe(ENABLE, 0x61)
    assert pixels(render(card.vga), 0, 0, 1) == [(0x3F, 0x20, 0x80)]


def test_the_font_of_an_option_rom_is_found() -> None:
    glyphs = bytearray(font(c41=[0x18, 0x24]))
    glyphs[16:32] = bytes.fromhex("00007e81a581 81bd9981817e00000000".replace(" ", ""))
    rom = b"\x55\xaa" + bytes(777) + bytes(glyphs) + bytes(99)
    assert mode3.find_font(rom) == bytes(glyphs)
    assert mode3.find_font(rom[:2000]) is None and mode3.find_font(b"\x55\xaa" + bytes(9000)) is None
    assert mode3.find_font(bytes(glyphs[16:]) + bytes(16)) is None
