"""Sense data: what went wrong with the last packet command (SPC-3 4.5, MMC-5 annex F)."""

from __future__ import annotations

from typing import NamedTuple

NO_SENSE, NOT_READY, MEDIUM_ERROR, HARDWARE_ERROR = 0x0, 0x2, 0x3, 0x4
ILLEGAL_REQUEST, UNIT_ATTENTION, ABORTED_COMMAND = 0x5, 0x6, 0xB


class Sense(NamedTuple):
    """Key, additional code and qualifier; ``information`` is the address concerned, if any."""

    key: int
    asc: int = 0
    ascq: int = 0
    information: int | None = None

    def encode(self) -> bytes:
        """Fixed format, current error (SPC-3 4.5.3)."""
        data = bytearray(18)
        data[0] = 0x70 if self.information is None else 0xF0
        data[2] = self.key
        if self.information is not None:
            data[3:7] = self.information.to_bytes(4, "big")
        data[7] = len(data) - 8
        data[12], data[13] = self.asc, self.ascq
        return bytes(data)


GOOD = Sense(NO_SENSE)
TRAY_CLOSED_NO_MEDIUM = Sense(NOT_READY, 0x3A, 0x01)
TRAY_OPEN = Sense(NOT_READY, 0x3A, 0x02)
NO_SEEK_COMPLETE = Sense(MEDIUM_ERROR, 0x02, 0x00)
UNRECOVERED_READ = Sense(MEDIUM_ERROR, 0x11, 0x00)
PARAMETER_LENGTH = Sense(ILLEGAL_REQUEST, 0x1A, 0x00)
INVALID_OPCODE = Sense(ILLEGAL_REQUEST, 0x20, 0x00)
LBA_OUT_OF_RANGE = Sense(ILLEGAL_REQUEST, 0x21, 0x00)
INVALID_FIELD = Sense(ILLEGAL_REQUEST, 0x24, 0x00)
INVALID_PARAMETER = Sense(ILLEGAL_REQUEST, 0x26, 0x00)
INCOMPATIBLE_FORMAT = Sense(ILLEGAL_REQUEST, 0x30, 0x02)
SAVING_NOT_SUPPORTED = Sense(ILLEGAL_REQUEST, 0x39, 0x00)
REMOVAL_PREVENTED = Sense(ILLEGAL_REQUEST, 0x53, 0x02)
ILLEGAL_MODE_FOR_TRACK = Sense(ILLEGAL_REQUEST, 0x64, 0x00)
ABORTED = Sense(ABORTED_COMMAND)

#: unit attention conditions by name, in order of precedence (SPC-3 4.5.6, MMC-5 4.1.6)
ATTENTION = {
    "reset": Sense(UNIT_ATTENTION, 0x29, 0x00),
    "medium": Sense(UNIT_ATTENTION, 0x28, 0x00),
}
