"""MODE SENSE(10) and MODE SELECT(10) of the CD-ROM drive (SPC-3 6.8, 6.10, 7.4; MMC-5 clause 7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devhost.ide import sense
from devhost.ide.sense import Sense

if TYPE_CHECKING:
    from devhost.ide.atapi import AtapiDrive

CURRENT, CHANGEABLE, DEFAULT, SAVED = range(4)
ALL_PAGES = 0x3F
HEADER_SIZE = 8

ERROR_RECOVERY, POWER_CONDITION, TIMEOUT_PROTECT, CAPABILITIES = 0x01, 0x1A, 0x1D, 0x2A

DEFAULT_RETRIES = 5
#: speeds in kB/s of page 2Ah: 24x
SPEED = 4234


def _error_recovery(drive: AtapiDrive, control: int) -> bytes:
    """MMC-5 7.3: the recovery bits and the read retry count are the host's to set."""
    values = {
        CURRENT: (drive.recovery, drive.retries),
        CHANGEABLE: (0x3F, 0xFF),
        DEFAULT: (0, DEFAULT_RETRIES),
    }
    recovery, retries = values[control]
    return bytes([recovery, retries, 0, 0, 0, 0, 0, 0, 0, 0])


def _power_condition(drive: AtapiDrive, control: int) -> bytes:
    return bytes(10)


def _timeout_protect(drive: AtapiDrive, control: int) -> bytes:
    return bytes(8)


def _capabilities(drive: AtapiDrive, control: int) -> bytes:
    """MMC-3 5.5.10 (legacy in MMC-5 annex E): reads CD-R, CD-RW and DVD-ROM; tray that locks and ejects."""
    if control == CHANGEABLE:
        return bytes(20)
    locked = 0x02 if control == CURRENT and drive.locked else 0
    data = bytearray(20)
    data[0] = 0x0B  # reads CD-R, CD-RW, DVD-ROM
    data[2] = 0x70  # Mode 2 form 1 and 2, multi-session
    data[4] = 0x29 | locked  # tray, eject, lock
    data[6:8] = SPEED.to_bytes(2, "big")
    data[8:10] = (2).to_bytes(2, "big")  # volume levels
    data[10:12] = (512).to_bytes(2, "big")  # buffer, KiB
    data[12:14] = SPEED.to_bytes(2, "big")
    return bytes(data)


PAGES = {
    ERROR_RECOVERY: _error_recovery,
    POWER_CONDITION: _power_condition,
    TIMEOUT_PROTECT: _timeout_protect,
    CAPABILITIES: _capabilities,
}


def _page(drive: AtapiDrive, code: int, control: int) -> bytes:
    body = PAGES[code](drive, control)
    return bytes([code, len(body)]) + body


def sense_data(drive: AtapiDrive, code: int, subpage: int, control: int) -> bytes | None:
    """Header and page ``code`` (3Fh: all); None for one that does not exist. No block descriptors."""
    if code == ALL_PAGES and subpage in (0x00, 0xFF):
        body = b"".join(_page(drive, each, control) for each in PAGES)
    elif code in PAGES and not subpage:
        body = _page(drive, code, control)
    else:
        return None
    header = (HEADER_SIZE - 2 + len(body)).to_bytes(2, "big") + bytes([_medium_type(drive)]) + bytes(5)
    return header + body


def _medium_type(drive: AtapiDrive) -> int:
    """SFF-8020i 10.8.8.2: 01h 120 mm data CD, 70h no disc, 71h door open; 00h (unknown) for a DVD."""
    if drive.tray_open:
        return 0x71
    if drive.backend is None:
        return 0x70
    return 0x00 if drive.is_dvd else 0x01


def select(drive: AtapiDrive, data: bytes) -> Sense | None:
    """Check and take over a parameter list; the error, or None. Nothing is changed when any part is wrong."""
    if len(data) < HEADER_SIZE:
        return sense.PARAMETER_LENGTH
    if data[6] or data[7]:
        return sense.INVALID_PARAMETER
    at = HEADER_SIZE
    chosen: dict[int, bytes] = {}
    while at < len(data):
        if at + 2 > len(data):
            return sense.PARAMETER_LENGTH
        code, length = data[at] & 0x3F, data[at + 1]
        body = data[at + 2 : at + 2 + length]
        if code not in PAGES or data[at] & 0x40 or length != len(PAGES[code](drive, CURRENT)):
            return sense.INVALID_PARAMETER
        if len(body) < length:
            return sense.PARAMETER_LENGTH
        current, changeable = PAGES[code](drive, CURRENT), PAGES[code](drive, CHANGEABLE)
        if any((new ^ old) & ~mask for new, old, mask in zip(body, current, changeable, strict=True)):
            return sense.INVALID_PARAMETER
        chosen[code] = body
        at += 2 + length
    if ERROR_RECOVERY in chosen:
        drive.recovery, drive.retries = chosen[ERROR_RECOVERY][0], chosen[ERROR_RECOVERY][1]
    return None
