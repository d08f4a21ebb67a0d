"""IDENTIFY DEVICE and IDENTIFY PACKET DEVICE data (ATA/ATAPI-6 8.15 and 8.16).

Both answer 256 words. What the drive does not do is not announced: no SMART, HPA, security, APM.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

FIRMWARE = "1.0"

#: word 49: IORDY supported and may be disabled, LBA, DMA
CAPABILITIES = 0x0F00
#: word 53: words 54-58, 64-70 and 88 are valid
VALIDITY = 0x0007
#: word 63/88: multiword DMA 0-2, Ultra DMA 0-2 (the fastest of this controller's family)
MWDMA_MODES, UDMA_MODES = 0x0007, 0x0007
#: word 64: PIO modes 3 and 4; words 65-68: their cycle time, ns
PIO_MODES, CYCLE_TIME = 0x0003, 120
#: word 80: ATA/ATAPI-4, -5 and -6
MAJOR_VERSION = 0x0070
#: words 83, 84, 86 and 87 carry 01b in bits 15:14
VALID_WORD = 0x4000
#: word 82/85: NOP, write cache, look-ahead, power management, PACKET, DEVICE RESET
NOP, LOOK_AHEAD, WRITE_CACHE, POWER, PACKET, DEVICE_RESET = 0x4000, 0x0040, 0x0020, 0x0008, 0x0010, 0x0200
#: word 83/86: FLUSH CACHE EXT, FLUSH CACHE, 48-bit addresses
FLUSH_EXT, FLUSH, LBA48 = 0x2000, 0x1000, 0x0400
#: word 93, hardware reset result: device 0 or 1, number by jumper, diagnostics passed
RESET_RESULT = (0x600B, 0x6B00)
#: word 0 of the CD-ROM drive: ATAPI, type 5, removable, DRQ within 50 us, 12-byte packets (8.16.8)
PACKET_CONFIGURATION = 0x85C0


@dataclass(frozen=True)
class Geometry:
    """A CHS translation."""

    cylinders: int
    heads: int
    sectors: int

    @property
    def capacity(self) -> int:
        return self.cylinders * self.heads * self.sectors


def default_geometry(total: int) -> Geometry:
    """16 heads, 63 sectors, at most 16,383 cylinders (ATA/ATAPI-6 annex C)."""
    return Geometry(max(1, min(16383, total // (16 * 63))), 16, 63)


def _text(words: list[int], at: int, count: int, text: str) -> None:
    """ASCII, blank padded, first character in the high byte (8.15.10)."""
    raw = text.encode("ascii", "replace")[: 2 * count].ljust(2 * count)
    words[at : at + count] = struct.unpack(f">{count}H", raw)


def _finish(words: list[int]) -> bytes:
    """Word 255: signature A5h, and a checksum that makes all 512 bytes sum to zero (8.15.61)."""
    words[255] = 0x00A5
    raw = bytearray(struct.pack("<256H", *words))
    raw[511] = -sum(raw) & 0xFF
    return bytes(raw)


def _modes(words: list[int], transfer_mode: int) -> None:
    """Transfer modes; the selected one in the high byte of word 63 or 88 (8.15.29, 8.15.53)."""
    mwdma = 1 << 8 + (transfer_mode & 7) if transfer_mode >> 3 == 0x04 else 0
    udma = 1 << 8 + (transfer_mode & 7) if transfer_mode >> 3 == 0x08 else 0
    words[63] = MWDMA_MODES | mwdma
    words[64] = PIO_MODES
    words[65:69] = [CYCLE_TIME] * 4
    words[88] = UDMA_MODES | udma


def disk(
    *,
    number: int,
    total: int,
    default: Geometry,
    current: Geometry,
    multiple: int,
    max_multiple: int,
    transfer_mode: int,
    write_cache: bool,
    look_ahead: bool,
    model: str,
    serial: str,
) -> bytes:
    """IDENTIFY DEVICE data of a disk of ``total`` sectors."""
    words = [0] * 256
    words[0] = 0x0040  # fixed device
    words[1], words[3], words[6] = default.cylinders, default.heads, default.sectors
    _text(words, 10, 10, serial)
    _text(words, 23, 4, FIRMWARE)
    _text(words, 27, 20, model)
    words[47] = 0x8000 | max_multiple
    words[49] = CAPABILITIES
    words[50] = VALID_WORD
    words[51] = 0x0200
    words[53] = VALIDITY
    words[54:57] = [current.cylinders, current.heads, current.sectors]
    words[57], words[58] = current.capacity & 0xFFFF, current.capacity >> 16
    words[59] = 0x0100 | multiple if multiple else 0
    small = min(total, 0x0FFF_FFFF)
    words[60], words[61] = small & 0xFFFF, small >> 16
    _modes(words, transfer_mode)
    words[80] = MAJOR_VERSION
    words[82] = NOP | LOOK_AHEAD | WRITE_CACHE | POWER
    words[83] = VALID_WORD | FLUSH_EXT | FLUSH | LBA48
    words[84] = VALID_WORD
    words[85] = NOP | POWER | (LOOK_AHEAD if look_ahead else 0) | (WRITE_CACHE if write_cache else 0)
    words[86] = FLUSH_EXT | FLUSH | LBA48
    words[87] = VALID_WORD
    words[93] = RESET_RESULT[number]
    words[100:104] = [total >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    return _finish(words)


def cdrom(*, number: int, transfer_mode: int, model: str, serial: str) -> bytes:
    """IDENTIFY PACKET DEVICE data."""
    words = [0] * 256
    words[0] = PACKET_CONFIGURATION
    _text(words, 10, 10, serial)
    _text(words, 23, 4, FIRMWARE)
    _text(words, 27, 20, model)
    words[49] = CAPABILITIES
    words[50] = VALID_WORD
    words[53] = VALIDITY & ~1
    _modes(words, transfer_mode)
    words[80] = MAJOR_VERSION
    words[82] = words[85] = NOP | DEVICE_RESET | PACKET | POWER
    words[83] = VALID_WORD
    words[84] = words[87] = VALID_WORD
    words[93] = RESET_RESULT[number]
    return _finish(words)
