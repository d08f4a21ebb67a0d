"""VGA registers: sequencer, CRT controller, graphics and attribute controllers, DAC, VBE.

Ports 3B4h-3DFh and 1CEh-1D0h; memory window at A0000h. In text modes and linear modes the window
is plain memory (see ``window()``), in planar modes each access comes here.
Sources: IBM PS/2 Hardware Interface Technical Reference, Video Subsystem; FreeVGA register
descriptions; vbe.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from msgspec import Meta

from coordinator.contract.clock import Clock
from coordinator.contract.device import Device
from coordinator.contract.errors import RecordError
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U8, U16
from devhost.vga.planes import PLANES_SIZE, POSITION, Bytes, Planes
from devhost.vga.vbe import BPP, YRES, Dispi

#: first port of the map; offsets below are port - FIRST
FIRST = 0x3B0
ATTRIBUTE, ATTRIBUTE_READ, MISC_WRITE, SEQ_INDEX, SEQ_DATA = 0x10, 0x11, 0x12, 0x14, 0x15
DAC_MASK, DAC_READ_INDEX, DAC_WRITE_INDEX, DAC_DATA = 0x16, 0x17, 0x18, 0x19
FEATURE_READ, MISC_READ, GFX_INDEX, GFX_DATA = 0x1A, 0x1C, 0x1E, 0x1F
CRTC_INDEX_MONO, CRTC_DATA_MONO, STATUS_MONO = 0x04, 0x05, 0x0A
CRTC_INDEX, CRTC_DATA, STATUS = 0x24, 0x25, 0x2A

SEQ_MASKS = (0x03, 0x3D, 0x0F, 0x3F, 0x0E)
GFX_MASKS = (0x0F, 0x0F, 0x0F, 0x1F, 0x03, 0x7B, 0x0F, 0x0F, 0xFF)
SEQ_REGISTERS, GFX_REGISTERS, CRTC_REGISTERS, ATTRIBUTE_REGISTERS = 5, 9, 25, 21
MISC_COLOR = 0x01
CRTC_PROTECT = 0x80  # CRTC 11h: registers 0-7 are read only

#: 60 Hz picture: what the status register shows of it
FRAME_NS, RETRACE_NS, LINE_NS, BLANK_NS = 16_666_667, 1_000_000, 31_778, 6_000


@dataclass(frozen=True)
class Window:
    """What the CPU sees at A0000h. ``kind``: "planar", "text" or "linear"; base and size of the window in the
    CPU's addresses; ``offset`` into video RAM for the two that are plain memory."""

    kind: str
    base: int
    size: int
    offset: int


_Sequencer = Annotated[tuple[U8, ...], Meta(min_length=SEQ_REGISTERS, max_length=SEQ_REGISTERS)]
_Graphics = Annotated[tuple[U8, ...], Meta(min_length=GFX_REGISTERS, max_length=GFX_REGISTERS)]
_Crtc = Annotated[tuple[U8, ...], Meta(min_length=CRTC_REGISTERS, max_length=CRTC_REGISTERS)]
_Attribute = Annotated[tuple[U8, ...], Meta(min_length=ATTRIBUTE_REGISTERS, max_length=ATTRIBUTE_REGISTERS)]


class VgaRecord(Record, frozen=True, kw_only=True):
    """Registers; video memory travels with the rest of guest memory."""

    kind: ClassVar[str] = "vga"
    misc: U8
    feature: U8
    seq_index: U8
    seq: _Sequencer
    gfx_index: U8
    gfx: _Graphics
    crtc_index: U8
    crtc: _Crtc
    attribute_index: U8
    attribute_flip: bool
    attribute: _Attribute
    dac_mask: U8
    dac_state: U8
    dac_read: U8
    dac_write: U8
    dac_component: Annotated[int, Meta(ge=0, le=2)]
    palette: Annotated[bytes, Meta(min_length=768, max_length=768)]
    latches: Annotated[bytes, Meta(min_length=4, max_length=4)]
    vbe_index: U16
    vbe: tuple[U16, ...]


class Vga(Device):
    """``vram`` is all of video memory; ``window_changed(Window)`` is called when the CPU's view changes,
    ``written(offset, length)`` when the card itself has stored into video memory."""

    kind = "vga"
    # what can change the CPU's view of memory is not posted: the new view is there when the write returns
    ranges: ClassVar = {
        "main": RegisterMap(
            Register("CRTC mono", 0x04, span=2, write=Access.POSTED, widths=(1, 2), doc="FreeVGA CRTC"),
            Register("STATUS mono", 0x0A, write=Access.POSTED, doc="input status 1 / feature control"),
            Register("ATTR", 0x10, span=2, write=Access.POSTED, doc="attribute controller"),
            Register("MISC", 0x12, span=2, write=Access.POSTED, doc="misc output / input status 0"),
            Register("SEQ", 0x14, span=2, widths=(1, 2), doc="sequencer; its memory mode is in the view"),
            Register("DAC", 0x16, span=4, write=Access.POSTED, doc="DAC"),
            Register("FEATURE", 0x1A, span=3, write=Access.POSTED, doc="feature control, misc read"),
            Register("GFX", 0x1E, span=2, widths=(1, 2), doc="graphics controller; selects the window"),
            Register("CRTC", 0x24, span=2, write=Access.POSTED, widths=(1, 2), doc="CRT controller"),
            Register("STATUS", 0x2A, write=Access.POSTED, doc="input status 1 / feature control"),
            size=0x30,
        ),
        "vbe": RegisterMap(
            Register("DISPI index", 0, widths=(2,), write=Access.POSTED, doc="VBE_DISPI_IOPORT_INDEX"),
            Register("DISPI data", 1, span=2, widths=(2,), doc="VBE_DISPI_IOPORT_DATA; mode and bank"),
        ),
        "window": RegisterMap(
            Register("window", 0, span=0x20000, widths=(1,), write=Access.POSTED, doc="planar memory")
        ),
        "mmio": RegisterMap(Register("mmio", 0, span=0x1000, widths=(1, 2), doc="QEMU standard-vga BAR 2")),
    }

    def __init__(
        self,
        vram: Bytes,
        clock: Clock,
        window_changed: Callable[[Window], None],
        written: Callable[[int, int], None],
    ) -> None:
        self.linear = vram[: vram.size - PLANES_SIZE]
        self.planes = Planes(vram[vram.size - PLANES_SIZE :])
        self._planes_offset = vram.size - PLANES_SIZE
        self._clock = clock
        self._window_changed, self._written = window_changed, written
        self.vbe = Dispi(self.linear.size)
        self._window: Window | None = None
        self.reset()

    def reset(self, hard: bool = True) -> None:
        self.misc = self.feature = 0
        self.seq_index = self.gfx_index = self.crtc_index = self.attribute_index = 0
        self.attribute_flip = False
        self.seq = [0] * SEQ_REGISTERS
        self.gfx = [0] * GFX_REGISTERS
        self.crtc = [0] * CRTC_REGISTERS
        self.attribute = [0] * ATTRIBUTE_REGISTERS
        self.dac_mask, self.dac_state = 0xFF, 0
        self.dac_read = self.dac_write = self.dac_component = 0
        self.palette = np.zeros((256, 3), np.uint8)
        self.planes.latches = np.zeros(4, np.uint8)
        self.vbe = Dispi(self.linear.size)
        self._show_window()

    # ---- what the CPU and the screen see -----------------------------------------------------------
    @property
    def graphics(self) -> bool:
        return bool(self.gfx[6] & 1)

    @property
    def chain4(self) -> bool:
        return bool(self.seq[4] & 8)

    def window(self) -> Window:
        """The memory window as the registers say (graphics register 6, sequencer register 4, VBE)."""
        if self.vbe.enabled and self.vbe.values[BPP] > 4:
            return Window("linear", 0xA0000, 0x10000, self.vbe.bank_offset)
        base, size = ((0xA0000, 0x20000), (0xA0000, 0x10000), (0xB0000, 0x8000), (0xB8000, 0x8000))[
            self.gfx[6] >> 2 & 3
        ]
        if self.chain4:
            return Window("linear", base, min(size, 0x10000), 0)
        odd_even = not self.seq[4] & 4 and self.gfx[5] & 0x10
        plain = not self.gfx[5] & 0x0B and self.gfx[8] == 0xFF and not self.gfx[1] and not self.gfx[3]
        if odd_even and plain and self.seq[2] & 3 == 3 and size == 0x8000:
            return Window("text", base, size, self._planes_offset)
        return Window("planar", base, size, 0)

    def _show_window(self) -> None:
        window = self.window()
        if window != self._window:
            self._window = window
            self._window_changed(window)

    # ---- ports -----------------------------------------------------------------------------------
    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        if range_name == "window":
            return self._memory_read(offset)
        if range_name == "vbe":
            return self.vbe.index if offset == 0 else self.vbe.read()
        if range_name == "mmio":
            return self._mmio_read(offset, width)
        if width == 2:
            return self.read(offset, 1) | self.read(offset + 1, 1) << 8
        return self._port_read(offset)

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        if range_name == "window":
            self._memory_write(offset, value & 0xFF)
        elif range_name == "vbe":
            self._vbe_write(offset, value & 0xFFFF)
        elif range_name == "mmio":
            self._mmio_write(offset, width, value)
        elif width == 2:
            self._port_write(offset, value & 0xFF)
            self._port_write(offset + 1, value >> 8 & 0xFF)
        else:
            self._port_write(offset, value & 0xFF)

    def _decoded(self, offset: int) -> bool:
        """The CRTC answers at 3Bxh or 3Dxh by MISC bit 0."""
        if offset < 0x10:
            return not self.misc & MISC_COLOR
        return offset < 0x20 or bool(self.misc & MISC_COLOR)

    def _port_read(self, offset: int) -> int:
        if not self._decoded(offset):
            return 0xFF
        match offset:
            case 0x10:
                return self.attribute_index
            case 0x11:
                index = self.attribute_index & 0x1F
                return self.attribute[index] if index < ATTRIBUTE_REGISTERS else 0
            case 0x12:
                return 0x10  # input status 0: monitor sense
            case 0x14:
                return self.seq_index
            case 0x15:
                return self.seq[self.seq_index] if self.seq_index < SEQ_REGISTERS else 0
            case 0x16:
                return self.dac_mask
            case 0x17:
                return self.dac_state
            case 0x18:
                return self.dac_write
            case 0x19:
                return self._dac_read()
            case 0x1A:
                return self.feature
            case 0x1C:
                return self.misc
            case 0x1E:
                return self.gfx_index
            case 0x1F:
                return self.gfx[self.gfx_index] if self.gfx_index < GFX_REGISTERS else 0
            case 0x04 | 0x24:
                return self.crtc_index
            case 0x05 | 0x25:
                return self.crtc[self.crtc_index] if self.crtc_index < CRTC_REGISTERS else 0
            case 0x0A | 0x2A:
                return self._status()
            case _:
                return 0xFF

    def _status(self) -> int:
        """Input status 1: bit 3 vertical retrace, bit 0 no display; a read resets the attribute flip-flop."""
        self.attribute_flip = False
        at = self._clock.now() % FRAME_NS
        retrace = at < RETRACE_NS
        blank = retrace or at % LINE_NS < BLANK_NS
        return 0x08 * retrace | 0x01 * blank

    def _dac_read(self) -> int:
        value = int(self.palette[self.dac_read, self.dac_component])
        self.dac_component += 1
        if self.dac_component == 3:
            self.dac_component, self.dac_read = 0, self.dac_read + 1 & 0xFF
        return value

    def _port_write(self, offset: int, value: int) -> None:
        if not self._decoded(offset):
            return
        match offset:
            case 0x10 | 0x11:
                self._attribute_write(value)
            case 0x12:
                self.misc = value
            case 0x14:
                self.seq_index = value & 7
            case 0x15:
                if self.seq_index < SEQ_REGISTERS:
                    self.seq[self.seq_index] = value & SEQ_MASKS[self.seq_index]
                    self._show_window()
            case 0x16:
                self.dac_mask = value
            case 0x17:
                self.dac_read, self.dac_component, self.dac_state = value, 0, 3
            case 0x18:
                self.dac_write, self.dac_component, self.dac_state = value, 0, 0
            case 0x19:
                self.palette[self.dac_write, self.dac_component] = value
                self.dac_component += 1
                if self.dac_component == 3:
                    self.dac_component, self.dac_write = 0, self.dac_write + 1 & 0xFF
            case 0x1E:
                self.gfx_index = value & 0xF
            case 0x1F:
                if self.gfx_index < GFX_REGISTERS:
                    self.gfx[self.gfx_index] = value & GFX_MASKS[self.gfx_index]
                    self._show_window()
            case 0x04 | 0x24:
                self.crtc_index = value & 0x3F
            case 0x05 | 0x25:
                self._crtc_write(value)
            case 0x0A | 0x2A:
                self.feature = value & 0x10

    def _attribute_write(self, value: int) -> None:
        if not self.attribute_flip:
            self.attribute_index = value & 0x3F
        else:
            index = self.attribute_index & 0x1F
            palette_locked = index < 16 and self.attribute_index & 0x20
            if index < ATTRIBUTE_REGISTERS and not palette_locked:
                self.attribute[index] = value & 0x3F if index < 16 else value
        self.attribute_flip = not self.attribute_flip

    def _crtc_write(self, value: int) -> None:
        index = self.crtc_index
        if index >= CRTC_REGISTERS:
            return
        if index <= 7 and self.crtc[0x11] & CRTC_PROTECT:
            if index == 7:  # line compare bit 8 stays writable
                self.crtc[7] = self.crtc[7] & ~0x10 | value & 0x10
            return
        self.crtc[index] = value

    # ---- VBE ---------------------------------------------------------------------------------------
    def _vbe_write(self, offset: int, value: int) -> None:
        if offset == 0:
            self.vbe.index = value
            return
        if self.vbe.write(value):
            length = self.vbe.bytes_per_line * self.vbe.values[YRES]
            self.linear[:length] = 0
            self._written(0, length)
        self._show_window()

    def _mmio_read(self, offset: int, width: int) -> int:
        if 0x400 <= offset < 0x420:
            return self.read(offset - 0x400 + ATTRIBUTE, width)
        if 0x500 <= offset < 0x516 and width == 2:
            saved, self.vbe.index = self.vbe.index, offset - 0x500 >> 1
            value = self.vbe.read()
            self.vbe.index = saved
            return value
        return 0

    def _mmio_write(self, offset: int, width: int, value: int) -> None:
        if 0x400 <= offset < 0x420:
            self.write(offset - 0x400 + ATTRIBUTE, width, value)
        elif 0x500 <= offset < 0x516 and width == 2:
            saved, self.vbe.index = self.vbe.index, offset - 0x500 >> 1
            self._vbe_write(1, value)
            self.vbe.index = saved

    # ---- the planar window ----------------------------------------------------------------------
    def _address(self, offset: int) -> tuple[int, int, int] | None:
        """(offset in the planes, read plane, write mask) of a CPU address less A0000h; None outside."""
        window = self.window()
        at = offset - (window.base - 0xA0000)
        if not 0 <= at < window.size:
            return None
        mask, plane = self.seq[2], self.gfx[4]
        if not self.seq[4] & 4:  # odd/even: address bit 0 picks the plane
            mask &= 0b1010 if at & 1 else 0b0101
            plane = plane & 2 | at & 1
            at &= ~1
        return at & 0xFFFF, plane, mask

    def _memory_read(self, offset: int) -> int:
        where = self._address(offset)
        if where is None:
            return 0xFF
        at, plane, _ = where
        if self.gfx[5] & 8:
            return self.planes.compare(at, self.gfx[2], self.gfx[7])
        return self.planes.read(at, plane)

    def _memory_write(self, offset: int, value: int) -> None:
        where = self._address(offset)
        if where is None:
            return
        at, _, map_mask = where
        planes, bit_mask = self.planes, self.gfx[8]
        mode = self.gfx[5] & 3
        if mode == 1:
            self._store(at, planes.latches, 0xFF, map_mask)
            return
        rotate = self.gfx[3] & 7
        rotated = (value >> rotate | value << 8 - rotate) & 0xFF
        if mode == 0:
            enable = planes.spread(self.gfx[1])
            values = (planes.spread(self.gfx[0]) & enable) | (np.full(4, rotated, np.uint8) & ~enable)
        elif mode == 2:
            values = planes.spread(value)
        else:
            values, bit_mask = planes.spread(self.gfx[0]), bit_mask & rotated
        match self.gfx[3] >> 3 & 3:
            case 1:
                values = values & planes.latches
            case 2:
                values = values | planes.latches
            case 3:
                values = values ^ planes.latches
        self._store(at, values, bit_mask, map_mask)

    def _store(self, at: int, values: Bytes, bit_mask: int, map_mask: int) -> None:
        self.planes.write(at, values, bit_mask, map_mask)
        for plane in range(4):
            if map_mask >> plane & 1:
                self._written(self._planes_offset + int(POSITION[plane, at]), 1)

    # ---- state -------------------------------------------------------------------------------------
    def save(self) -> VgaRecord:
        fields: dict[str, Any] = {name: getattr(self, name) for name in _SCALARS}
        fields.update((name, tuple(getattr(self, name))) for name in _FILES)
        return VgaRecord(
            **fields,
            palette=self.palette.tobytes(),
            latches=self.planes.latches.tobytes(),
            vbe_index=self.vbe.index,
            vbe=tuple(self.vbe.values),
        )

    def load(self, record: Record) -> None:
        assert isinstance(record, VgaRecord)
        vbe = Dispi(self.linear.size, record.vbe_index, list(record.vbe))
        if not vbe.sound():
            raise RecordError("record of vga: VBE registers that no guest can bring about")
        self.vbe = vbe
        for name in _SCALARS:
            setattr(self, name, getattr(record, name))
        for name in _FILES:
            setattr(self, name, list(getattr(record, name)))
        self.palette = np.frombuffer(record.palette, np.uint8).reshape(256, 3).copy()
        self.planes.latches = np.frombuffer(record.latches, np.uint8).copy()
        self._show_window()


_SCALARS = (
    "misc", "feature", "seq_index", "gfx_index", "crtc_index", "attribute_index", "attribute_flip",
    "dac_mask", "dac_state", "dac_read", "dac_write", "dac_component",
)  # fmt: skip
_FILES = ("seq", "gfx", "crtc", "attribute")
