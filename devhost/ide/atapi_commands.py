"""Packet commands of a read-only CD/DVD drive (MMC-5 clause 6; SPC-3 for INQUIRY, sense and mode commands).

Each handler ends the command with ``good``, ``check``, ``reply``, ``want`` or ``read_blocks`` of the
drive. What is not in the table is ILLEGAL REQUEST, 20h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from devhost.ide import cd_sector, mmc, mode_pages, sense

if TYPE_CHECKING:
    from devhost.ide.atapi import AtapiDrive

DEFAULT_RETRIES = mode_pages.DEFAULT_RETRIES
CD_ROM_PROFILE, DVD_ROM_PROFILE = mmc.CD_ROM_PROFILE, mmc.DVD_ROM_PROFILE

Handler = Callable[["AtapiDrive", bytes], None]


@dataclass(frozen=True)
class PacketCommand:
    """``medium``: fails NOT READY without one. ``ignores_attention``: runs though a unit attention is
    pending (MMC-5 4.1.6.1)."""

    name: str
    run: Handler
    medium: bool = False
    ignores_attention: bool = False


def execute(drive: AtapiDrive, packet: bytes) -> None:
    """Run a whole packet."""
    command = COMMANDS.get(packet[0])
    if command is None:
        drive.check(sense.INVALID_OPCODE)
        return
    if drive.attention and not command.ignores_attention:
        drive.check(sense.ATTENTION[drive.attention.pop(0)])
        return
    if command.run is not request_sense:
        drive.sense = sense.GOOD  # SPC-3 4.5.1: the next command discards what was not fetched
    if command.medium and not drive.loaded:
        drive.check(drive.no_medium())
        return
    command.run(drive, packet)


def received(drive: AtapiDrive, packet: bytes, data: bytes) -> None:
    """The parameter list of a command is there; MODE SELECT(10) is the only one that has any."""
    if not packet[1] & 0x10 or packet[1] & 0x01:
        drive.check(sense.INVALID_FIELD)
        return
    error = mode_pages.select(drive, data)
    if error is None:
        drive.good()
    else:
        drive.check(error)


def _u16(packet: bytes, at: int) -> int:
    return int.from_bytes(packet[at : at + 2], "big")


def _u24(packet: bytes, at: int) -> int:
    return int.from_bytes(packet[at : at + 3], "big")


def _u32(packet: bytes, at: int) -> int:
    return int.from_bytes(packet[at : at + 4], "big")


def test_unit_ready(drive: AtapiDrive, packet: bytes) -> None:
    drive.good()


def request_sense(drive: AtapiDrive, packet: bytes) -> None:
    """SPC-3 6.27: reports and clears; without sense, a pending unit attention is reported and cleared."""
    reason = drive.sense
    if reason.key == sense.NO_SENSE and drive.attention:
        reason = sense.ATTENTION[drive.attention.pop(0)]
    drive.sense = sense.GOOD
    drive.reply(reason.encode(), packet[4])


def inquiry(drive: AtapiDrive, packet: bytes) -> None:
    """SPC-3 6.4; vital product data pages are not there."""
    if packet[1] & 0x01 or packet[2]:
        drive.check(sense.INVALID_FIELD)
    else:
        drive.reply(mmc.inquiry(drive.model), _u16(packet, 3))


def start_stop_unit(drive: AtapiDrive, packet: bytes) -> None:
    """MMC-5 6.42: LoEj and Start load or eject; all else needs nothing done."""
    if packet[4] & 0xF0 or not packet[4] & 0x02:
        drive.good()
    elif packet[4] & 0x01:
        drive.close_tray()
        drive.good()
    elif drive.locked:
        drive.check(sense.REMOVAL_PREVENTED)
    else:
        drive.eject()
        drive.good()


def prevent_allow(drive: AtapiDrive, packet: bytes) -> None:
    """MMC-5 6.15: bit 0 prevents or allows; bit 1 chooses the persistent one of the two locks."""
    lock = 2 if packet[4] & 0x02 else 1
    drive.prevent = drive.prevent | lock if packet[4] & 0x01 else drive.prevent & ~lock
    drive.good()


def read_capacity(drive: AtapiDrive, packet: bytes) -> None:
    """MMC-5 6.26: address of the last block, and the block length."""
    drive.reply(max(0, drive.blocks - 1).to_bytes(4, "big") + (2048).to_bytes(4, "big"), 8)


def read_10(drive: AtapiDrive, packet: bytes) -> None:
    drive.read_blocks(_u32(packet, 2), _u16(packet, 7))


def read_12(drive: AtapiDrive, packet: bytes) -> None:
    drive.read_blocks(_u32(packet, 2), _u32(packet, 6))


def seek_10(drive: AtapiDrive, packet: bytes) -> None:
    lba = _u32(packet, 2)
    if lba >= drive.blocks:
        drive.check(sense.LBA_OUT_OF_RANGE._replace(information=lba))
        return
    drive.current_lba = lba
    drive.good()


#: expected sector types that a Mode 1 track has: any, or Mode 1 (MMC-5 table 351)
_TYPES_OF_DATA_TRACK = (0, 2)


def read_cd(drive: AtapiDrive, packet: bytes) -> None:
    """MMC-5 6.19, for the Mode 1 track there is. C2 and sub-channel data are not offered; the sub-header
    field is empty in Mode 1; no field at all means no data."""
    if drive.is_dvd:
        drive.check(sense.INCOMPATIBLE_FORMAT)
        return
    kind = packet[1] >> 2 & 7
    lba, count = _u32(packet, 2), _u24(packet, 6)
    fields = packet[9] & 0xB8
    if kind not in _TYPES_OF_DATA_TRACK:
        drive.check(sense.ILLEGAL_MODE_FOR_TRACK)
    elif packet[9] & 0x06 or packet[10] & 0x07 or fields and not cd_sector.fields_contiguous(fields):
        drive.check(sense.INVALID_FIELD)
    elif not fields:
        drive.read_blocks(lba, 0)
    elif fields == cd_sector.FIELD_USER:
        drive.read_blocks(lba, count)
    else:
        drive.read_blocks(lba, count, fields)


def read_toc(drive: AtapiDrive, packet: bytes) -> None:
    """MMC-5 6.30. PMA, ATIP and CD-TEXT are not on a pressed data disc."""
    track = packet[6]
    build = {0: mmc.toc, 1: mmc.session_info, 2: mmc.full_toc}.get(packet[2] & 0x0F or packet[9] >> 6)
    data = build(drive.blocks, track, bool(packet[1] & 0x02)) if build else None
    if data is None:
        drive.check(sense.INVALID_FIELD)
    else:
        drive.reply(data, _u16(packet, 7))


def get_configuration(drive: AtapiDrive, packet: bytes) -> None:
    profile = 0
    if drive.loaded:
        profile = DVD_ROM_PROFILE if drive.is_dvd else CD_ROM_PROFILE
    data = mmc.configuration(profile, _u16(packet, 2), packet[1] & 0x03)
    if data is None:
        drive.check(sense.INVALID_FIELD)
    else:
        drive.reply(data, _u16(packet, 7))


def get_event_status(drive: AtapiDrive, packet: bytes) -> None:
    """MMC-5 6.7: polled only. Of the classes asked for, one with an event is reported, else the lowest. An
    event is taken off the queue unless the allocation has no room for it."""
    if not packet[1] & 0x01:
        drive.check(sense.INVALID_FIELD)
        return
    allocation = _u16(packet, 7)
    wanted = packet[4] & mmc.EVENT_CLASSES
    lowest = (wanted & -wanted).bit_length() - 1
    if not wanted:
        drive.reply(mmc.no_event_class(), allocation)
    elif wanted & 1 << mmc.MEDIA_CLASS and (drive.events or lowest == mmc.MEDIA_CLASS):
        event = drive.events[0] if drive.events else 0
        if drive.events and allocation > 4:
            drive.events.pop(0)
        drive.reply(mmc.media_event(event, drive.tray_open, drive.backend is not None), allocation)
    else:
        drive.reply(mmc.no_event(lowest), allocation)


def read_disc_information(drive: AtapiDrive, packet: bytes) -> None:
    if packet[1] & 0x07:
        drive.check(sense.INVALID_FIELD)
    else:
        drive.reply(mmc.disc_information(), _u16(packet, 7))


def mode_select(drive: AtapiDrive, packet: bytes) -> None:
    length = _u16(packet, 7)
    if length:
        drive.want(length)
    else:
        drive.good()


def mode_sense(drive: AtapiDrive, packet: bytes) -> None:
    """SPC-3 6.10: current, changeable and default values; nothing is saved."""
    if packet[2] >> 6 == mode_pages.SAVED:
        drive.check(sense.SAVING_NOT_SUPPORTED)
        return
    data = mode_pages.sense_data(drive, packet[2] & 0x3F, packet[3], packet[2] >> 6)
    if data is None:
        drive.check(sense.INVALID_FIELD)
    else:
        drive.reply(data, _u16(packet, 7))


def read_dvd_structure(drive: AtapiDrive, packet: bytes) -> None:
    if packet[1] & 0x0F:
        drive.check(sense.INVALID_FIELD)
    elif not drive.is_dvd and packet[7] != mmc.STRUCTURE_LIST:
        drive.check(sense.INCOMPATIBLE_FORMAT)
    elif (data := mmc.dvd_structure(packet[7], packet[6], drive.blocks)) is None:
        drive.check(sense.INVALID_FIELD)
    else:
        drive.reply(data, _u16(packet, 8))


def set_cd_speed(drive: AtapiDrive, packet: bytes) -> None:
    drive.good()


def mechanism_status(drive: AtapiDrive, packet: bytes) -> None:
    drive.reply(mmc.mechanism_status(drive.tray_open, drive.current_lba), _u16(packet, 8))


COMMANDS: dict[int, PacketCommand] = {
    0x00: PacketCommand("TEST UNIT READY", test_unit_ready, medium=True),
    0x03: PacketCommand("REQUEST SENSE", request_sense, ignores_attention=True),
    0x12: PacketCommand("INQUIRY", inquiry, ignores_attention=True),
    0x1B: PacketCommand("START STOP UNIT", start_stop_unit),
    0x1E: PacketCommand("PREVENT ALLOW MEDIUM REMOVAL", prevent_allow),
    0x25: PacketCommand("READ CAPACITY", read_capacity, medium=True),
    0x28: PacketCommand("READ(10)", read_10, medium=True),
    0x2B: PacketCommand("SEEK(10)", seek_10, medium=True),
    0x43: PacketCommand("READ TOC/PMA/ATIP", read_toc, medium=True),
    0x46: PacketCommand("GET CONFIGURATION", get_configuration, ignores_attention=True),
    0x4A: PacketCommand("GET EVENT STATUS NOTIFICATION", get_event_status, ignores_attention=True),
    0x51: PacketCommand("READ DISC INFORMATION", read_disc_information, medium=True),
    0x55: PacketCommand("MODE SELECT(10)", mode_select),
    0x5A: PacketCommand("MODE SENSE(10)", mode_sense),
    0xA8: PacketCommand("READ(12)", read_12, medium=True),
    0xAD: PacketCommand("READ DVD STRUCTURE", read_dvd_structure, medium=True),
    0xBB: PacketCommand("SET CD SPEED", set_cd_speed),
    0xBD: PacketCommand("MECHANISM STATUS", mechanism_status),
    0xBE: PacketCommand("READ CD", read_cd, medium=True),
}
