"""VGA registers, planar memory and VBE, by their descriptions; pictures are in test_vga_render.py.

Sources: IBM PS/2 Hardware Interface Technical Reference, Video Subsystem (write and read modes, odd/even,
chain 4); Bochs VBE interface description.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.contract.clock import ManualClock
from coordinator.contract.errors import RecordError
from coordinator.contract.state import pack, unpack
from devhost.vga import mode3
from devhost.vga.render import render
from devhost.vga.vga import Vga, VgaRecord, Window

LINEAR = 1 << 20
PLANES = 256 << 10
#: port - 3B0h
ATTRIBUTE, MISC, SEQ, DAC_MASK, DAC_READ, DAC_WRITE, DAC_DATA, GFX, CRTC, STATUS = (
    0x10, 0x12, 0x14, 0x16, 0x17, 0x18, 0x19, 0x1E, 0x24, 0x2A,
)  # fmt: skip
ID, XRES, YRES, BPP, ENABLE, BANK, VIRT_WIDTH, VIRT_HEIGHT, X_OFFSET, Y_OFFSET, MEMORY = range(11)


class Card:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.windows: list[Window] = []
        self.written: list[tuple[int, int]] = []
        self.vram = np.zeros(LINEAR + PLANES, np.uint8)
        self.vga = Vga(self.vram, self.clock, self.windows.append, lambda *where: self.written.append(where))
        self.vga.write(MISC, 1, 0x67)

    def seq(self, index: int, value: int) -> None:
        self.vga.write(SEQ, 2, value << 8 | index)

    def gfx(self, index: int, value: int) -> None:
        self.vga.write(GFX, 2, value << 8 | index)

    def vbe(self, index: int, value: int) -> int:
        """Write a register and read it back."""
        self.vga.write(0, 2, index, "vbe")
        self.vga.write(1, 2, value, "vbe")
        return self.vga.read(1, 2, "vbe")

    def planar(self) -> None:
        """A0000h, 64 KiB, all planes, no odd/even: what mode 12h has."""
        self.seq(2, 0x0F)
        self.seq(4, 0x06)
        self.gfx(5, 0)
        self.gfx(6, 0x05)
        self.gfx(8, 0xFF)

    def poke(self, at: int, value: int) -> None:
        self.vga.write(at, 1, value, "window")

    def peek(self, at: int) -> int:
        return self.vga.read(at, 1, "window")

    def planes(self, at: int) -> list[int]:
        """The four bytes at an offset."""
        return [int(self.vga.planes.plane(number)[at]) for number in range(4)]

    def fill(self, at: int, values: list[int]) -> None:
        """Store into the planes one by one, through write mode 0."""
        for plane, value in enumerate(values):
            self.seq(2, 1 << plane)
            self.poke(at, value)
        self.seq(2, 0x0F)


@pytest.fixture
def card() -> Card:
    card = Card()
    card.planar()
    return card


# ---- registers ---------------------------------------------------------------------------------------
def test_attribute_controller_has_one_port_for_index_and_data(card: Card) -> None:
    card.vga.read(STATUS, 1)
    card.vga.write(ATTRIBUTE, 1, 0x10)
    card.vga.write(ATTRIBUTE, 1, 0x0C)
    card.vga.write(ATTRIBUTE, 1, 0x30)
    assert card.vga.read(ATTRIBUTE, 1) == 0x30 and card.vga.read(ATTRIBUTE + 1, 1) == 0x0C
    card.vga.read(STATUS, 1)
    card.vga.write(ATTRIBUTE, 1, 0x11)  # an index again
    assert card.vga.read(ATTRIBUTE + 1, 1) == 0


def test_palette_is_locked_while_it_is_shown(card: Card) -> None:
    """Index bit 5: registers 0-15 belong to the display."""
    card.vga.read(STATUS, 1)
    for byte in (0x20, 0x3F, 0x00, 0x2A):
        card.vga.write(ATTRIBUTE, 1, byte)
    assert card.vga.read(ATTRIBUTE + 1, 1) == 0x2A


def test_dac_goes_round_three_components(card: Card) -> None:
    card.vga.write(DAC_WRITE, 1, 0xFF)
    for value in range(1, 7):
        card.vga.write(DAC_DATA, 1, value)
    assert card.vga.read(DAC_READ, 1) == 0  # state: writing
    card.vga.write(DAC_READ, 1, 0xFF)
    assert card.vga.read(DAC_READ, 1) == 3
    assert [card.vga.read(DAC_DATA, 1) for _ in range(6)] == [1, 2, 3, 4, 5, 6]


def test_crtc_protects_its_timing(card: Card) -> None:
    """11h bit 7: 0-7 are read-only but for line compare bit 8."""
    card.vga.write(CRTC, 2, 0x8011)
    card.vga.write(CRTC, 2, 0xFF00)
    card.vga.write(CRTC, 2, 0xFF07)
    card.vga.write(CRTC, 1, 0x00)
    assert card.vga.read(CRTC + 1, 1) == 0
    card.vga.write(CRTC, 1, 0x07)
    assert card.vga.read(CRTC + 1, 1) == 0x10


def test_crtc_is_at_3b4h_or_3d4h(card: Card) -> None:
    card.vga.write(CRTC, 2, 0x550F)
    assert card.vga.read(0x05, 1) == 0xFF
    card.vga.write(MISC, 1, 0x66)
    assert card.vga.read(0x05, 1) == 0x55 and card.vga.read(CRTC + 1, 1) == 0xFF


def test_retrace_comes_sixty_times_a_second(card: Card) -> None:
    edges, last = 0, 0
    for _ in range(20_000):  # one second in steps of 50 us
        card.clock.advance(50_000)
        now = card.vga.read(STATUS, 1) >> 3 & 1
        edges += now & ~last
        last = now
    assert edges in (59, 60, 61)


# ---- what is shown where --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("select", "base", "size"), [(0, 0xA0000, 0x20000), (1, 0xA0000, 0x10000), (2, 0xB0000, 0x8000)]
)
def test_planar_windows(card: Card, select: int, base: int, size: int) -> None:
    card.gfx(6, select << 2 | 1)
    assert card.windows[-1] == Window("planar", base, size, 0)


def test_text_window_is_plain_memory(card: Card) -> None:
    mode3.set_mode(card.vga, None)
    assert card.windows[-1] == Window("text", 0xB8000, 0x8000, LINEAR)
    card.vram[LINEAR : LINEAR + 4] = (0x41, 0x1E, 0x42, 0x4F)  # what the CPU stores at B8000h
    assert [card.planes(0)[:2], card.planes(2)[:2]] == [[0x41, 0x1E], [0x42, 0x4F]]


def test_odd_even_addresses_take_turns(card: Card) -> None:
    """Sequencer 4 bit 2 clear: even addresses go to planes 0 and 2, odd ones to 1 and 3."""
    card.seq(4, 0x02)
    card.gfx(5, 0x10)
    card.poke(0x10, 0xAA)
    card.poke(0x11, 0xBB)
    assert card.planes(0x10) == [0xAA, 0xBB, 0xAA, 0xBB]
    card.gfx(4, 0)
    assert (card.peek(0x10), card.peek(0x11)) == (0xAA, 0xBB)


def test_chain4_is_linear(card: Card) -> None:
    card.seq(4, 0x0E)
    assert card.windows[-1] == Window("linear", 0xA0000, 0x10000, 0)


# ---- write modes -----------------------------------------------------------------------------------------
def test_write_mode_0_rotates_and_masks(card: Card) -> None:
    card.fill(5, [0x11, 0x22, 0x44, 0x88])
    assert card.planes(5) == [0x11, 0x22, 0x44, 0x88]
    card.peek(5)  # latches
    card.gfx(3, 0x03)  # rotate right by 3
    card.gfx(8, 0xF0)
    card.poke(5, 0x81)  # 0011_0000
    assert card.planes(5) == [0x31, 0x32, 0x34, 0x38]


def test_set_reset_replaces_the_cpu_s_byte_in_its_planes(card: Card) -> None:
    card.gfx(0, 0b0101)
    card.gfx(1, 0b0011)
    card.poke(7, 0x3C)
    assert card.planes(7) == [0xFF, 0x00, 0x3C, 0x3C]


@pytest.mark.parametrize(("function", "expected"), [(0x00, 0x0F), (0x08, 0x05), (0x10, 0x5F), (0x18, 0x5A)])
def test_logical_functions_with_the_latches(card: Card, function: int, expected: int) -> None:
    """Graphics 3 bits 4-3: replace, and, or, exclusive or."""
    card.fill(9, [0x55] * 4)
    card.peek(9)
    card.gfx(3, function)
    card.poke(9, 0x0F)
    assert card.planes(9) == [expected] * 4


def test_map_mask_protects_planes(card: Card) -> None:
    card.seq(2, 0b1010)
    card.poke(1, 0xFF)
    assert card.planes(1) == [0, 0xFF, 0, 0xFF]
    assert card.written[-2:] != [] and all(LINEAR <= offset < LINEAR + PLANES for offset, _ in card.written)


def test_write_mode_1_copies_the_latches(card: Card) -> None:
    card.fill(3, [1, 2, 3, 4])
    card.peek(3)
    card.gfx(5, 1)
    card.gfx(8, 0x0F)  # has no say
    card.poke(0x123, 0xEE)
    assert card.planes(0x123) == [1, 2, 3, 4]


def test_write_mode_2_spreads_a_color(card: Card) -> None:
    card.fill(3, [0xFF, 0, 0xFF, 0])
    card.peek(3)
    card.gfx(5, 2)
    card.gfx(8, 0x0F)
    card.poke(3, 0b0110)
    assert card.planes(3) == [0xF0, 0x0F, 0xFF, 0x00]


def test_write_mode_3_masks_with_the_rotated_byte(card: Card) -> None:
    card.fill(3, [0, 0xFF, 0, 0xFF])
    card.peek(3)
    card.gfx(5, 3)
    card.gfx(0, 0b0011)
    card.gfx(3, 4)
    card.gfx(8, 0x3C)
    card.poke(3, 0xF0)  # rotated 0F, and 3C: 0C
    assert card.planes(3) == [0x0C, 0xFF, 0x00, 0xF3]


# ---- read modes ------------------------------------------------------------------------------------------
def test_read_mode_0_gives_one_plane(card: Card) -> None:
    card.fill(6, [0xA0, 0xA1, 0xA2, 0xA3])
    for plane in range(4):
        card.gfx(4, plane)
        assert card.peek(6) == 0xA0 + plane


def test_read_mode_1_compares(card: Card) -> None:
    """A bit is set where the four planes show the colour, in the planes that count."""
    card.fill(6, [0b1100, 0b1010, 0, 0])
    card.gfx(5, 0x08)
    card.gfx(2, 0b0001)
    card.gfx(7, 0b1111)
    assert card.peek(6) == 0b0100
    card.gfx(7, 0b0001)
    assert card.peek(6) == 0b1100
    card.gfx(7, 0)
    assert card.peek(6) == 0xFF


def test_outside_the_window_nothing_answers(card: Card) -> None:
    card.gfx(6, 0x05)
    assert card.peek(0x10000) == 0xFF
    card.poke(0x10000, 0x12)
    assert card.planes(0) == [0, 0, 0, 0]


# ---- VBE -------------------------------------------------------------------------------------------------
def test_vbe_identity_and_memory(card: Card) -> None:
    assert card.vbe(ID, 0xB0C0) == 0xB0C0 and card.vbe(ID, 0xB0C5) == 0xB0C5
    assert card.vbe(ID, 0x1234) == 0xB0C5
    assert card.vbe(MEMORY, 0) == LINEAR >> 16
    card.vga.write(0, 2, 0x77, "vbe")
    assert card.vga.read(1, 2, "vbe") == 0


def test_capabilities(card: Card) -> None:
    card.vbe(ENABLE, 0x02)
    assert [card.vbe(index, 0) for index in (XRES, YRES, BPP)] == [2560, 1600, 32]


def mode(card: Card, width: int, height: int, depth: int, flags: int = 0x41) -> int:
    card.vbe(ENABLE, 0)
    for index, value in ((XRES, width), (YRES, height), (BPP, depth)):
        card.vbe(index, value)
    return card.vbe(ENABLE, flags)


def test_a_mode_clears_the_picture_unless_told_not_to(card: Card) -> None:
    card.vram[:] = 0xAA
    mode(card, 64, 32, 32, 0xC1)
    assert card.vram[0] == 0xAA
    mode(card, 64, 32, 32)
    assert not card.vram[: 64 * 32 * 4].any() and card.vram[64 * 32 * 4] == 0xAA
    assert (0, 64 * 32 * 4) in card.written
    assert card.vbe(VIRT_WIDTH, 0) == 64 and card.vbe(VIRT_HEIGHT, 0) == LINEAR // 256


def test_limits(card: Card) -> None:
    """Values beyond the maxima are not taken; a mode that does not fit is not switched on."""
    card.vbe(XRES, 640)
    assert card.vbe(XRES, 2561) == 640 and card.vbe(YRES, 1601) == 0 and card.vbe(BPP, 12) == 8
    assert mode(card, 1024, 768, 32) & 1 == 0  # 3 MiB
    assert mode(card, 0, 100, 8) & 1 == 0
    assert mode(card, 640, 480, 16) & 1 == 1
    assert card.vbe(XRES, 320) == 640  # fixed while the mode is on


@pytest.mark.parametrize("depth", [8, 15, 16, 24, 32])
def test_bank_past_video_memory(card: Card, depth: int) -> None:
    """CVE-2016-3710."""
    mode(card, 64, 64, depth)
    assert card.vbe(BANK, (LINEAR >> 16) - 1) == (LINEAR >> 16) - 1
    assert card.windows[-1] == Window("linear", 0xA0000, 0x10000, LINEAR - 0x10000)
    for bank in (LINEAR >> 16, 0xFF, 0x8000, 0xFFFF):
        assert card.vbe(BANK, bank) == (LINEAR >> 16) - 1


def test_picture_past_video_memory(card: Card) -> None:
    mode(card, 640, 400, 16)  # 512000 bytes
    assert card.vbe(Y_OFFSET, 419) == 419
    assert card.vbe(Y_OFFSET, 420) == 419  # (420 + 400) * 1280 > 1 MiB
    assert card.vbe(X_OFFSET, 0x4001) == 0
    assert card.vbe(VIRT_WIDTH, 0x4000) == 640 and card.vbe(VIRT_WIDTH, 639) == 640
    card.vbe(Y_OFFSET, 0)
    assert card.vbe(VIRT_WIDTH, 1024) == 1024 and card.vbe(VIRT_HEIGHT, 0) == LINEAR // 2048


def test_registers_behind_the_second_bar(card: Card) -> None:
    """QEMU docs/specs/standard-vga: 400h the VGA ports from 3C0h on, 500h the VBE registers."""
    assert card.vga.read(0x500, 2, "mmio") == 0xB0C5
    card.vga.write(0x502, 2, 320, "mmio")
    assert card.vbe(VIRT_WIDTH, 0) == 0 and card.vga.read(0x502, 2, "mmio") == 320
    assert card.vga.read(0x40C, 1, "mmio") == 0x67
    assert card.vga.read(0x7FE, 2, "mmio") == 0


# ---- robustness ------------------------------------------------------------------------------------------
ports = st.tuples(st.just("main"), st.integers(0, 0x2F), st.sampled_from((1, 2)))
dispi = st.tuples(st.just("vbe"), st.sampled_from((0, 1)), st.just(2))
window = st.tuples(st.just("window"), st.integers(0, 0x1FFFF), st.just(1))
bar = st.tuples(st.just("mmio"), st.integers(0x3F0, 0x520), st.sampled_from((1, 2)))
small = st.one_of(
    st.integers(0, 15), st.integers(0, 0xFFFF), st.sampled_from((0x41, 0xC1, 8, 15, 24, 32, 640, 480))
)
steps = st.lists(st.tuples(st.booleans(), st.one_of(ports, dispi, window, bar), small), max_size=60)


@given(steps)
def test_any_access_in_any_order(accesses: list[tuple[bool, tuple[str, int, int], int]]) -> None:
    """Never raises, never shows memory that is not there, always has a picture, and a record goes round."""
    card = Card()
    mode3.set_mode(card.vga, None)
    for write, (range_name, offset, width), value in accesses:
        if write:
            card.vga.write(offset, width, value & (1 << 8 * width) - 1, range_name)
        else:
            assert 0 <= card.vga.read(offset, width, range_name) < 1 << 8 * width
    for shown in card.windows:
        assert shown.kind == "planar" or 0 <= shown.offset <= card.vram.size - shown.size
        assert 0xA0000 <= shown.base < shown.base + shown.size <= 0xC0000
    assert all(0 <= at and at + length <= card.vram.size for at, length in card.written)
    picture = render(card.vga)
    copy = Card()
    copy.vram[:] = card.vram
    copy.vga.load(unpack(pack(card.vga.save()), VgaRecord))
    assert copy.vga.save() == card.vga.save() and copy.vga.window() == card.vga.window()
    assert np.array_equal(render(copy.vga), picture)


@pytest.mark.parametrize(("index", "value"), [(BANK, 0xFFFF), (XRES, 9000), (BPP, 13), (Y_OFFSET, 0x3FFF)])
def test_records_that_reach_past_video_memory_are_refused(index: int, value: int) -> None:
    card = Card()
    mode(card, 640, 400, 16)
    state = card.vga.save()
    vbe = tuple(value if number == index else old for number, old in enumerate(state.vbe))
    fields = {name: getattr(state, name) for name in state.__struct_fields__}
    with pytest.raises(RecordError):
        card.vga.load(VgaRecord(**{**fields, "vbe": vbe}))
