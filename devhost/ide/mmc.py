"""Results of packet commands as bytes: pure functions of what they are given (MMC-5 clauses 5 and 6)."""

from __future__ import annotations

from devhost.ide.cd_sector import msf

CD_ROM_PROFILE, DVD_ROM_PROFILE = 0x0008, 0x0010

VENDOR, REVISION = "ATOLL", "1.0"

#: control field: data track, recorded uninterrupted; ADR 1 in the high nibble (MMC-5 tables 460, 461)
ADR_DATA_TRACK = 0x14
LEAD_OUT = 0xAA


def inquiry(model: str) -> bytes:
    """Standard data (SPC-3 6.4.2): CD-ROM, removable, ATAPI response format (SFF-8020i 10.8.1)."""
    data = bytearray(36)
    data[0], data[1], data[2], data[3], data[4] = 0x05, 0x80, 0x00, 0x21, len(data) - 5
    data[8:16] = VENDOR.encode().ljust(8)
    product = model.removeprefix(VENDOR).strip().encode("ascii", "replace")
    data[16:32] = product[:16].ljust(16)
    data[32:36] = REVISION.encode().ljust(4)
    return bytes(data)


# ---- READ TOC/PMA/ATIP, 6.30 ------------------------------------------------------------------------
def _address(lba: int, as_msf: bool) -> bytes:
    return bytes([0, *msf(lba)]) if as_msf else lba.to_bytes(4, "big")


def _listing(body: bytes, first: int = 1, last: int = 1) -> bytes:
    return (len(body) + 2).to_bytes(2, "big") + bytes([first, last]) + body


def toc(blocks: int, track: int, as_msf: bool) -> bytes | None:
    """Format 0: track 1 and the lead-out, from ``track`` on; None where there is no such track."""
    if track > 1 and track != LEAD_OUT:
        return None
    body = b""
    if track <= 1:
        body += bytes([0, ADR_DATA_TRACK, 1, 0]) + _address(0, as_msf)
    body += bytes([0, ADR_DATA_TRACK, LEAD_OUT, 0]) + _address(blocks, as_msf)
    return _listing(body)


def session_info(blocks: int, track: int, as_msf: bool) -> bytes:
    """Format 1: the first track of the only session."""
    return _listing(bytes([0, ADR_DATA_TRACK, 1, 0]) + _address(0, as_msf))


def full_toc(blocks: int, session: int, as_msf: bool) -> bytes | None:
    """Format 2: Q sub-channel entries of the lead-in (table 474); addresses are always MSF."""
    if session > 1:
        return None
    entries = (
        (0xA0, (1, 0, 0)),  # first track, disc type CD-ROM
        (0xA1, (1, 0, 0)),  # last track
        (0xA2, msf(blocks)),
        (0x01, msf(0)),
    )
    body = b"".join(bytes([1, ADR_DATA_TRACK, 0, point, 0, 0, 0, 0, *place]) for point, place in entries)
    return _listing(body)


def disc_information() -> bytes:
    """6.22, standard information: a complete disc of one complete session, not erasable."""
    data = bytearray(34)
    data[0:2] = (len(data) - 2).to_bytes(2, "big")
    data[2] = 0x0E
    data[3] = data[4] = data[5] = data[6] = 1
    data[7] = 0x20  # unrestricted use
    data[16:24] = b"\xff" * 8  # no further session, no further lead-out
    return bytes(data)


# ---- GET CONFIGURATION, 6.6 and clause 5.3 ------------------------------------------------------------
ALL_FEATURES, CURRENT_FEATURES, ONE_FEATURE = range(3)


def _features(profile: int) -> list[tuple[int, bool, int, bytes]]:
    """(code, current, version and persistence, data) of every feature, ascending."""
    cd, dvd = profile == CD_ROM_PROFILE, profile == DVD_ROM_PROFILE
    known = (DVD_ROM_PROFILE, CD_ROM_PROFILE)
    profiles = b"".join(number.to_bytes(2, "big") + bytes([number == profile, 0]) for number in known)
    return [
        (0x0000, True, 0x03, profiles),
        (0x0001, True, 0x0B, bytes([0, 0, 0, 2, 0x01, 0, 0, 0])),  # core: ATAPI, device busy event
        (0x0002, True, 0x07, bytes([0x02, 0, 0, 0])),  # morphing: operational change events
        (0x0003, True, 0x0B, bytes([0x29, 0, 0, 0])),  # removable: tray, eject, lock
        (0x0010, cd or dvd, 0x00, bytes([0, 0, 0x08, 0, 0, 0x10, 0x01, 0])),  # random readable
        (0x001E, cd, 0x08, bytes(4)),  # CD read
        (0x001F, dvd, 0x08, bytes(4)),  # DVD read
        (0x0100, True, 0x03, b""),  # power management
    ]


def configuration(profile: int, start: int, request: int) -> bytes | None:
    """Features from ``start`` on; ``request`` is the RT field; None for a reserved one."""
    if request > ONE_FEATURE:
        return None
    body = bytearray()
    for code, current, flags, data in _features(profile):
        wanted = code == start if request == ONE_FEATURE else code >= start
        if wanted and (current or request != CURRENT_FEATURES):
            body += code.to_bytes(2, "big") + bytes([flags & 0xFE | current, len(data)]) + data
    return (len(body) + 4).to_bytes(4, "big") + bytes(2) + profile.to_bytes(2, "big") + bytes(body)


# ---- GET EVENT STATUS NOTIFICATION, 6.7 ---------------------------------------------------------------
POWER_CLASS, MEDIA_CLASS = 2, 4
#: bit mask of supported classes: operational change, power management, media, device busy
EVENT_CLASSES = 1 << 1 | 1 << POWER_CLASS | 1 << MEDIA_CLASS | 1 << 6


def no_event_class() -> bytes:
    """None of the classes asked for is supported: NEA set, header only."""
    return bytes([0, 2, 0x80, EVENT_CLASSES])


def no_event(number: int) -> bytes:
    """No change in a class other than media; the power status is "active"."""
    return bytes([0, 6, number, EVENT_CLASSES, 0, number == POWER_CLASS, 0, 0])


def media_event(event: int, tray_open: bool, present: bool) -> bytes:
    """Media event descriptor (6.7.2.5): bit 0 tray open, bit 1 medium present."""
    return bytes([0, 6, MEDIA_CLASS, EVENT_CLASSES, event, tray_open | present << 1, 0, 0])


def mechanism_status(tray_open: bool, lba: int) -> bytes:
    """6.12: no changer, idle."""
    return bytes([0, 0x10 if tray_open else 0]) + (lba & 0xFF_FFFF).to_bytes(3, "big") + bytes(3)


# ---- READ DVD STRUCTURE (READ DISC STRUCTURE), 6.22 ----------------------------------------------------
STRUCTURE_PHYSICAL, STRUCTURE_COPYRIGHT, STRUCTURE_MANUFACTURER, STRUCTURE_LIST = 0x00, 0x01, 0x04, 0xFF
DVD_FIRST_SECTOR = 0x030000
#: formats that can be read, and the whole length of each answer
_STRUCTURE_SIZES = {STRUCTURE_PHYSICAL: 2052, STRUCTURE_COPYRIGHT: 8, STRUCTURE_MANUFACTURER: 2052}


def dvd_structure(form: int, layer: int, blocks: int) -> bytes | None:
    """Format ``form`` of a single-layer disc; None where there is none."""
    if form == STRUCTURE_LIST:
        sizes = _STRUCTURE_SIZES.items()
        body = b"".join(bytes([code, 0x40]) + size.to_bytes(2, "big") for code, size in sizes)
    elif form not in _STRUCTURE_SIZES or layer:
        return None
    else:
        body = bytes(_STRUCTURE_SIZES[form] - 4)
        if form == STRUCTURE_PHYSICAL:
            last = DVD_FIRST_SECTOR + blocks - 1
            # DVD-ROM version 1; 120 mm, rate not specified; one embossed layer; standard density
            head = bytes([0x01, 0x0F, 0x01, 0x00, 0]) + DVD_FIRST_SECTOR.to_bytes(3, "big")
            head += bytes([0]) + last.to_bytes(3, "big")
            body = head + body[len(head) :]
    return (len(body) + 2).to_bytes(2, "big") + bytes(2) + body
