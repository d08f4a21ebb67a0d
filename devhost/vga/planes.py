"""Display memory: four planes behind the 128 KiB window, and the linear frame buffer.

Layout of video RAM: the linear frame buffer first (VBE modes and mode 13h), then 256 KiB for the
four 64 KiB planes. Planes 0 and 1 are laid out so that the text window is plain memory: in odd/even
mode CPU address A reaches plane A & 1 at offset A & ~1, so byte (plane p, offset o) is kept at
``(o & 1) * 64 KiB + (o & ~1) + p``; planes 2 and 3 alike, 128 KiB further.

Source: IBM PS/2 Hardware Interface Technical Reference, Video Subsystem (write modes, read modes);
FreeVGA "Graphics Registers".
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PLANE = 0x10000
PLANES_SIZE = 4 * PLANE

Bytes = npt.NDArray[np.uint8]


def _positions() -> npt.NDArray[np.intp]:
    offset = np.arange(PLANE)
    pair = (offset & 1) * PLANE + (offset & ~1)
    return np.stack([pair, pair + 1, pair + 2 * PLANE, pair + 2 * PLANE + 1])


#: position in the planes' memory of (plane, offset)
POSITION = _positions()
_BITS = [np.array([0xFF if value >> plane & 1 else 0 for plane in range(4)], np.uint8) for value in range(16)]


class Planes:
    """CPU access to the planes through the graphics controller's read and write modes."""

    def __init__(self, memory: Bytes) -> None:
        if memory.size != PLANES_SIZE:
            raise ValueError(f"the planes take {PLANES_SIZE} bytes, not {memory.size}")
        self.memory = memory
        #: the four latches, one byte a plane
        self.latches = np.zeros(4, np.uint8)

    def plane(self, number: int) -> Bytes:
        """A copy of one plane in order of its offsets."""
        return self.memory[POSITION[number]]

    def read(self, offset: int, plane: int) -> int:
        """Load the latches; give the byte of one plane (read mode 0)."""
        self.latches = self.memory[POSITION[:, offset & 0xFFFF]]
        return int(self.latches[plane])

    def compare(self, offset: int, color: int, care: int) -> int:
        """Read mode 1: a bit is set where the pixel equals ``color`` in the planes of ``care``."""
        self.read(offset, 0)
        differs = (self.latches ^ _BITS[color & 15]) & _BITS[care & 15]
        return ~int(np.bitwise_or.reduce(differs)) & 0xFF

    def write(self, offset: int, values: Bytes, bit_mask: int, map_mask: int) -> None:
        """Store ``values`` (one byte a plane) under the bit mask into the planes of ``map_mask``."""
        masked = (values & bit_mask) | (self.latches & (~bit_mask & 0xFF))
        for plane in range(4):
            if map_mask >> plane & 1:
                self.memory[POSITION[plane, offset & 0xFFFF]] = masked[plane]

    def spread(self, color: int) -> Bytes:
        """FFh or 00h a plane from the four bits of ``color``."""
        return _BITS[color & 15]
