"""Results of the packet commands (MMC-5 clause 6, SPC-3 clause 6)."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from devhost.ide import cd_sector
from tests.devhost.ide.rig import Backend, Rig, atapi, cdrom, pattern

NO_MEDIUM, TRAY_OPEN = (2, 0x3A, 1), (2, 0x3A, 2)
TEST_UNIT_READY = (0x00,)
EJECT, LOAD = (0x1B, 0, 0, 0, 2), (0x1B, 0, 0, 0, 3)
EVENTS = (0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)


class Large(Backend):
    """A DVD: ``size`` without the bytes."""

    @property
    def size(self) -> int:
        return 4_700_000_000 // 2048 * 2048


def dvd() -> Rig:
    rig = cdrom()
    atapi(rig).insert(Large(b""))
    assert rig.fails(*TEST_UNIT_READY) == (6, 0x28, 0)
    return rig


def test_inquiry() -> None:
    """SPC-3 6.4.2: CD device, removable, length, padded strings; no vital product data."""
    data = cdrom().result(0x12, 0, 0, 0, 255)
    assert len(data) == 36
    assert data[0] == 0x05 and data[1] == 0x80 and data[4] == 31 and data[3] & 0x0F == 1
    assert data[8:16] == b"ATOLL   " and data[16:32] == b"CD-ROM          "
    assert cdrom().fails(0x12, 1, 0x80, 0, 255) == (5, 0x24, 0)


def test_unknown_commands_are_illegal() -> None:
    rig = cdrom()
    for opcode in (0x04, 0x0A, 0x2A, 0x42, 0x52, 0xA1, 0xB9, 0xFF):
        assert rig.fails(opcode) == (5, 0x20, 0)


def test_sense_is_given_once_and_dropped_by_other_commands() -> None:
    rig = cdrom()
    rig.packet(0xFF)
    assert rig.sense() == (5, 0x20, 0)
    assert rig.sense() == (0, 0, 0)
    rig.packet(0xFF)
    rig.result(*TEST_UNIT_READY)
    assert rig.sense() == (0, 0, 0)


def test_request_sense_obeys_the_allocation_length() -> None:
    rig = cdrom()
    rig.packet(0xFF)
    assert rig.result(0x03, 0, 0, 0, 8)[2] == 5
    assert rig.result(0x03) == b""


def test_attention_after_power_on_and_reset() -> None:
    """SPC-3 4.5.6: 29h first; INQUIRY, REQUEST SENSE, GET CONFIGURATION and events are not hindered."""
    rig = cdrom()
    rig.channel.reset()
    rig.result(0x12, 0, 0, 0, 36)
    rig.result(0x46, 0, 0, 0, 0, 0, 0, 0, 8)
    rig.result(*EVENTS)
    assert rig.fails(*TEST_UNIT_READY) == (6, 0x29, 0)
    rig.result(*TEST_UNIT_READY)
    rig.channel.reset()
    assert rig.sense() == (6, 0x29, 0)
    rig.result(*TEST_UNIT_READY)


def test_no_medium_and_tray() -> None:
    rig = cdrom()
    atapi(rig).insert(None)
    for command in (
        TEST_UNIT_READY,
        (0x25,),
        (0x28, 0, 0, 0, 0, 0, 0, 0, 1),
        (0xBE, 0, 0, 0, 0, 0, 0, 0, 1, 0x10),
        (0x43, 0, 0, 0, 0, 0, 0, 0, 12),
        (0x51, 0, 0, 0, 0, 0, 0, 0, 34),
        (0x2B,),
        (0xAD, 0, 0, 0, 0, 0, 0, 0, 0, 8),
    ):
        assert rig.fails(*command) == NO_MEDIUM
    rig.result(*EJECT)
    assert rig.fails(*TEST_UNIT_READY) == TRAY_OPEN


def test_change_of_medium_as_the_guest_sees_it() -> None:
    """MMC-5 6.7.2.5: removal (3), new media (2); attention 28h once; status bits tray and medium."""
    rig = cdrom(blocks=10)
    drive = atapi(rig)
    moved: list[bool] = []
    drive.on_tray = moved.append
    assert rig.result(*EVENTS)[4:6] == bytes([0, 2])
    assert drive.open_tray()
    assert rig.fails(*TEST_UNIT_READY) == TRAY_OPEN
    assert rig.result(*EVENTS)[4:6] == bytes([3, 3])
    drive.insert(Backend(pattern(20 * 2048, b"second")))
    assert rig.result(*EVENTS)[4:6] == bytes([0, 3])
    drive.close_tray()
    assert moved == [True, False]
    assert rig.result(*EVENTS)[4:6] == bytes([2, 2])
    assert rig.fails(*TEST_UNIT_READY) == (6, 0x28, 0)
    assert rig.result(0x25) == struct.pack(">II", 19, 2048)
    assert rig.result(*EVENTS)[4:6] == bytes([0, 2])
    assert rig.result(0x28, 0, 0, 0, 0, 1, 0, 0, 1) == pattern(4096, b"second")[2048:]


def test_prevented_removal() -> None:
    """MMC-5 6.15, 6.42: 53h/02h for the guest, an eject request (1) for the host's wish; force wins."""
    rig = cdrom()
    drive = atapi(rig)
    rig.result(0x1E, 0, 0, 0, 1)
    assert drive.locked and rig.result(0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 64)[8 + 6] & 0x02
    assert rig.fails(*EJECT) == (5, 0x53, 2)
    assert not drive.open_tray() and not drive.tray_open
    assert rig.result(*EVENTS)[4:6] == bytes([1, 2])
    rig.result(0x1E)
    rig.result(*EJECT)
    assert drive.tray_open
    rig.result(*LOAD)
    assert not drive.tray_open and rig.sense() == (6, 0x28, 0)
    rig.result(0x1E, 0, 0, 0, 3)  # persistent
    rig.result(0x1E)
    assert drive.locked
    assert drive.open_tray(force=True)
    rig.channel.reset()
    assert not drive.locked


def test_medium_taken_away_under_a_read() -> None:
    rig = cdrom()
    for dma in (False, True):
        rig.prds((0x8000, 2048))
        rig.packet(0x28, 0, 0, 0, 0, 0, 0, 0, 1, dma=dma)
        rig.start()
        atapi(rig).open_tray(force=True)
        assert rig.pin.level and rig.status & 1
        assert rig.sense() == TRAY_OPEN
        rig.settle()
        atapi(rig).close_tray()
        assert rig.fails(*TEST_UNIT_READY) == (6, 0x28, 0)


def test_start_stop_without_loej_moves_nothing() -> None:
    rig = cdrom()
    for byte in (0, 1, 0x10, 0x22):
        rig.result(0x1B, 0, 0, 0, byte)
        assert not atapi(rig).tray_open


def test_event_classes() -> None:
    """6.7: polled only; the lowest class; NEA where none is there; short allocations keep the event."""
    rig = cdrom()
    assert rig.fails(0x4A, 0, 0, 0, 0x10, 0, 0, 0, 8) == (5, 0x24, 0)
    assert rig.result(0x4A, 1, 0, 0, 0x80, 0, 0, 0, 8) == bytes([0, 2, 0x80, 0x56])
    assert rig.result(0x4A, 1, 0, 0, 0x02, 0, 0, 0, 8) == bytes([0, 6, 1, 0x56, 0, 0, 0, 0])
    assert rig.result(0x4A, 1, 0, 0, 0x04, 0, 0, 0, 8) == bytes([0, 6, 2, 0x56, 0, 1, 0, 0])
    atapi(rig).open_tray()
    assert rig.result(0x4A, 1, 0, 0, 0x10, 0, 0, 0, 4) == bytes([0, 6, 4, 0x56])
    assert rig.result(0x4A, 1, 0, 0, 0x56, 0, 0, 0, 8) == bytes([0, 6, 4, 0x56, 3, 3, 0, 0])
    assert rig.result(*EVENTS)[4] == 0


def test_toc_formats() -> None:
    """6.30 tables 459-474: one data track, lead-out at the end of the medium."""
    rig = cdrom(blocks=300)
    toc = rig.result(0x43, 0, 0, 0, 0, 0, 0, 0, 100)
    assert toc == bytes([0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xAA, 0]) + (300).to_bytes(4, "big")
    msf = rig.result(0x43, 2, 0, 0, 0, 0, 0, 0, 100)
    assert msf[8:12] == bytes([0, 0, 2, 0])  # LBA 0 is 00:02:00
    assert msf[16:20] == bytes([0, 0, 6, 0])  # 300 + 150 frames
    assert rig.result(0x43, 0, 0, 0, 0, 0, 0xAA, 0, 100) == bytes([0, 10, 1, 1]) + toc[12:]
    assert rig.fails(0x43, 0, 0, 0, 0, 0, 2, 0, 100) == (5, 0x24, 0)
    assert rig.result(0x43, 0, 1, 0, 0, 0, 0, 0, 100) == bytes([0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0])
    full = rig.result(0x43, 2, 2, 0, 0, 0, 0, 0, 100)
    assert len(full) == 4 + 4 * 11 and [full[4 + 11 * at + 3] for at in range(4)] == [0xA0, 0xA1, 0xA2, 1]
    assert full[4 + 22 + 8 :][:3] == bytes([0, 6, 0])
    assert rig.result(0x43, 0, 0, 0, 0, 0, 0, 0, 4) == toc[:4]
    assert rig.result(0x43, 0, 0, 0, 0, 0, 0, 0, 100, 0x40)[1] == 10  # SFF-8020i: format in byte 9
    for form in (3, 4, 5):
        assert rig.fails(0x43, 0, form, 0, 0, 0, 0, 0, 100) == (5, 0x24, 0)


def features(data: bytes) -> dict[int, tuple[int, bytes]]:
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    found, at = {}, 8
    while at < len(data):
        code, flags, length = struct.unpack(">HBB", data[at : at + 4])
        found[code] = (flags, data[at + 4 : at + 4 + length])
        at += 4 + length
    assert list(found) == sorted(found)
    return found


def test_get_configuration() -> None:
    """5.3, 6.6: current profile; RT 0 all, 1 current, 2 one feature."""
    rig = cdrom()
    data = rig.result(0x46, 0, 0, 0, 0, 0, 0, 1, 0)
    assert data[6:8] == b"\x00\x08"  # CD-ROM
    found = features(data)
    assert set(found) == {0, 1, 2, 3, 0x10, 0x1E, 0x1F, 0x100}
    assert found[0][1] == bytes([0, 0x10, 0, 0, 0, 8, 1, 0])
    assert found[1][1][:4] == bytes([0, 0, 0, 2])  # ATAPI
    assert found[3][1][0] >> 5 == 1 and found[3][1][0] & 0x09 == 0x09  # tray, eject, lock
    assert found[0x1E][0] & 1 == 1 and found[0x1F][0] & 1 == 0
    assert set(features(rig.result(0x46, 1, 0, 0x10, 0, 0, 0, 1, 0))) == {0x10, 0x1E, 0x100}
    assert set(features(rig.result(0x46, 2, 0, 0x1F, 0, 0, 0, 1, 0))) == {0x1F}
    assert features(rig.result(0x46, 2, 0, 0x20, 0, 0, 0, 1, 0)) == {}
    assert rig.fails(0x46, 3, 0, 0, 0, 0, 0, 1, 0) == (5, 0x24, 0)
    atapi(rig).insert(None)
    assert rig.result(0x46, 0, 0, 0, 0, 0, 0, 0, 8)[6:8] == b"\0\0"
    assert dvd().result(0x46, 0, 0, 0, 0, 0, 0, 0, 8)[6:8] == b"\0\x10"


def test_disc_information() -> None:
    """6.22: finalized, one session, one track."""
    data = cdrom().result(0x51, 0, 0, 0, 0, 0, 0, 0, 255)
    assert len(data) == 34 and data[:7] == bytes([0, 32, 0x0E, 1, 1, 1, 1])


def test_mode_sense() -> None:
    """SPC-3 6.10: header, page control, unknown pages; nothing can be saved."""
    rig = cdrom()
    data = rig.result(0x5A, 0, 0x2A, 0, 0, 0, 0, 0, 128)
    assert int.from_bytes(data[:2], "big") == len(data) - 2
    assert data[2] == 0x01 and data[6:8] == b"\0\0"
    assert data[8] == 0x2A and data[9] == len(data) - 10 and data[10] & 0x08  # reads DVD-ROM
    pages, at, every = [], 8, rig.result(0x5A, 0, 0x3F, 0, 0, 0, 0, 1, 0)
    while at < len(every):
        pages.append(every[at])
        at += 2 + every[at + 1]
    assert at == len(every) and pages == [0x01, 0x1A, 0x1D, 0x2A]
    assert rig.fails(0x5A, 0, 0xC1, 0, 0, 0, 0, 0, 128) == (5, 0x39, 0)
    assert rig.fails(0x5A, 0, 0x05, 0, 0, 0, 0, 0, 128) == (5, 0x24, 0)
    assert rig.result(0x5A, 0, 0x41, 0, 0, 0, 0, 0, 128)[11] == 0xFF  # changeable: retry count
    atapi(rig).open_tray()
    assert rig.result(0x5A, 0, 0x01, 0, 0, 0, 0, 0, 128)[2] == 0x71


@pytest.mark.parametrize(
    "parameters,sense",
    [
        (bytes(4), (5, 0x1A, 0)),
        (bytes(7) + b"\x08" + bytes(8), (5, 0x26, 0)),  # block descriptor
        (bytes(8) + bytes([0x05, 2, 0, 0]), (5, 0x26, 0)),
        (bytes(8) + bytes([0x01, 9]) + bytes(9), (5, 0x26, 0)),
        (bytes(8) + bytes([0x01, 10, 0, 5, 0]), (5, 0x1A, 0)),
        (bytes(8) + bytes([0x01, 10, 0, 5, 1]) + bytes(7), (5, 0x26, 0)),  # not changeable
        (bytes(8) + bytes([0x01]), (5, 0x1A, 0)),
    ],
)
def test_mode_select_refuses(parameters: bytes, sense: tuple[int, int, int]) -> None:
    rig = cdrom()
    rig.packet(0x55, 0x10, 0, 0, 0, 0, 0, 0, len(parameters))
    rig.send_words(parameters + bytes(len(parameters) & 1))
    assert rig.status & 1 and rig.sense() == sense


def test_mode_select_flags() -> None:
    rig = cdrom()
    rig.result(0x55, 0x10)
    for flags in (0x00, 0x11):  # page format 0, save pages
        rig.packet(0x55, flags, 0, 0, 0, 0, 0, 0, 8)
        rig.send_words(bytes(8))
        assert rig.sense() == (5, 0x24, 0)


def test_mechanism_status_seek_and_speed() -> None:
    rig = cdrom(blocks=300)
    rig.result(0x2B, 0, 0, 0, 1, 0x20)
    assert rig.result(0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8) == bytes([0, 0, 0, 1, 0x20, 0, 0, 0])
    rig.result(0x28, 0, 0, 0, 0, 7, 0, 0, 4)
    assert rig.result(0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8)[4] == 11
    assert rig.fails(0x2B, 0, 0, 0, 1, 0x2C) == (5, 0x21, 0)
    rig.result(0xBB, 0, 0xFF, 0xFF)
    atapi(rig).open_tray()
    assert rig.result(0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8)[1] & 0x10


def test_dvd_structure() -> None:
    rig = dvd()
    last = 0x030000 + 4_700_000_000 // 2048 - 1
    data = rig.result(0xAD, 0, 0, 0, 0, 0, 0, 0, 0x08, 0x04)
    assert len(data) == 2052 and data[:2] == (2050).to_bytes(2, "big")
    assert data[4] == 0x01 and data[8:12] == b"\0\x03\0\0" and int.from_bytes(data[12:16], "big") == last
    assert rig.result(0xAD, 0, 0, 0, 0, 0, 0, 1, 0, 100) == bytes([0, 6, 0, 0, 0, 0, 0, 0])
    assert rig.fails(0xAD, 0, 0, 0, 0, 0, 0, 3, 0, 100) == (5, 0x24, 0)
    assert rig.fails(0xAD, 0, 0, 0, 0, 0, 1, 0, 0, 100) == (5, 0x24, 0)
    assert cdrom().fails(0xAD, 0, 0, 0, 0, 0, 0, 0, 8, 4) == (5, 0x30, 2)
    assert rig.fails(0xBE, 0, 0, 0, 0, 0, 0, 0, 1, 0x10) == (5, 0x30, 2)


def test_read_cd_fields() -> None:
    """6.19, table 352 for Mode 1: sync 12, header 4, user data 2,048, EDC and ECC 288 bytes."""
    rig = cdrom(blocks=100)
    user = bytes(rig.backend().image[20 * 2048 : 22 * 2048])
    raw = rig.result(0xBE, 0, 0, 0, 0, 20, 0, 0, 2, 0xF8)
    assert len(raw) == 2 * 2352
    assert raw[:12] == b"\0" + b"\xff" * 10 + b"\0"
    assert raw[12:16] == bytes([0x00, 0x02, 0x20, 0x01])  # 170 frames = 00:02:20 in BCD, mode 1
    assert raw[16:2064] == user[:2048] and raw[2352 + 16 : 2352 + 2064] == user[2048:]
    for fields, start, end in (
        (0x10, 16, 2064),
        (0x30, 12, 2064),
        (0xB0, 0, 2064),
        (0x20, 12, 16),
        (0x18, 16, 2352),
    ):
        data = rig.result(0xBE, 0, 0, 0, 0, 20, 0, 0, 2, fields)
        assert data == raw[start:end] + raw[2352 + start : 2352 + end], hex(fields)
    assert rig.result(0xBE, 0x08, 0, 0, 0, 20, 0, 0, 2, 0x10) == user  # expected type Mode 1
    assert rig.result(0xBE, 0, 0, 0, 0, 20, 0, 0, 2, 0) == b""
    rig.prds((0x8000, 4704))
    rig.packet(0xBE, 0, 0, 0, 0, 20, 0, 0, 2, 0xF8, dma=True)
    rig.start()
    rig.settle()
    assert rig.status & 1 == 0 and rig.memory.ram[0x8000 : 0x8000 + 4704] == raw
    assert rig.fails(0xBE, 0x04, 0, 0, 0, 20, 0, 0, 1, 0x10) == (5, 0x64, 0)  # CD-DA expected
    for fields, sub in ((0x90, 0), (0x12, 0), (0x10, 1), (0x28, 0)):
        assert rig.fails(0xBE, 0, 0, 0, 0, 20, 0, 0, 1, fields, sub) == (5, 0x24, 0)
    assert rig.fails(0xBE, 0, 0, 0, 0, 99, 0, 0, 2, 0xF8) == (5, 0x21, 0)


def test_raw_sectors_satisfy_the_codes_of_ecma_130() -> None:
    """Clause 14.3: the sector up to the EDC is divisible by its polynomial; annex A: every P and Q vector, in
    GF(2^8) over x^8+x^4+x^3+x^2+1, has both check sums zero. Computed here bit by bit."""
    sector = cd_sector.raw_sectors(pattern(2048), 0x1234)[0]
    remainder = 0
    # (x^16 + x^15 + x^2 + 1)(x^16 + x^2 + x + 1)
    product = 0
    for bit in range(17):
        if 0x18005 >> bit & 1:
            product ^= 0x10007 << bit
    for byte in sector[:2068]:
        for bit in range(8):
            remainder = remainder << 1 | int(byte) >> bit & 1
            if remainder >> 32:
                remainder ^= product
    assert remainder == 0
    assert not np.any(sector[2068:2076])

    def double(value: int) -> int:
        return value << 1 ^ (0x11D if value & 0x80 else 0)

    body = [int(value) for value in sector[12:]]
    # Q covers 2,236 bytes (header to P); its parity follows. P is 24 symbols at distance 86, then two.
    vectors = [[m + 86 * n for n in range(26)] for m in range(86)]
    for odd in (0, 1):
        for row in range(26):
            places = [2 * ((44 * m + 43 * row) % 1118) + odd for m in range(43)]
            vectors.append([*places, 2236 + 2 * row + odd, 2236 + 52 + 2 * row + odd])
    for places in vectors:
        plain = weighted = 0
        for place in places:
            plain ^= body[place]
            weighted = double(weighted) ^ body[place]
        assert plain == weighted == 0
