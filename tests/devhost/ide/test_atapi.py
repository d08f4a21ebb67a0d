"""The PACKET protocol: phases, byte counts, interrupt reason (ATA/ATAPI-6 8.23, 9.8, 9.9)."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.devhost.ide.rig import (
    ACTIVE,
    BM_INTERRUPT,
    BSY,
    COUNT,
    DRDY,
    DRQ,
    ERR,
    ERROR,
    HIGH,
    LOW,
    MID,
    atapi,
    cdrom,
    pattern,
)

READ_4_AT_7 = (0x28, 0, 0, 0, 0, 7, 0, 0, 4)


def test_identify_packet_device() -> None:
    """8.16.8: ATAPI, CD-ROM, removable, DRQ within 50 us of PACKET, 12-byte packets."""
    rig = cdrom()
    rig.command(0xA1)
    assert rig.pin.level and rig.status & DRQ
    data = rig.words(256)
    words = struct.unpack("<256H", data)
    assert rig.status & (BSY | DRQ | ERR | DRDY) == DRDY
    assert words[0] == 0x85C0
    assert words[49] & 0x300 == 0x300
    assert words[82] & 0x0210 == 0x0210  # PACKET, DEVICE RESET
    assert sum(data) & 0xFF == 0


@pytest.mark.parametrize("opcode", [0xEC, 0x20])
def test_disk_commands_abort_with_the_signature(opcode: int) -> None:
    """8.15.5, 8.27.5: a driver tells a packet device by this."""
    rig = cdrom()
    rig.command(opcode)
    assert rig.pin.level and rig.status & (BSY | DRQ | ERR) == ERR
    assert rig.read(ERROR) == 0x04
    assert [rig.read(at) for at in (COUNT, LOW, MID, HIGH)] == [1, 1, 0x14, 0xEB]


@pytest.mark.parametrize("empty", [False, True])
def test_other_ata_commands(empty: bool) -> None:
    """hardware-cases 3 (CVE-2015-6855): READ NATIVE MAX and FLUSH CACHE, also on an empty drive."""
    rig = cdrom()
    if empty:
        atapi(rig).insert(None)
    for opcode, good in (
        (0xF8, False),
        (0x27, False),
        (0xE7, True),
        (0xEA, False),
        (0xE5, True),
        (0xE1, True),
    ):
        rig.command(opcode)
        rig.settle()
        assert bool(rig.status & ERR) != good, hex(opcode)
    rig.write(ERROR, 0x03)
    rig.write(COUNT, 0x22)
    rig.command(0xEF)
    assert not rig.status & ERR
    rig.write(ERROR, 0x05)
    rig.command(0xEF)
    assert rig.status & ERR


def test_phases_of_a_pio_read() -> None:
    """9.8: packet asked for without interrupt; each block and the end have one; reasons 01h, 02h, 03h."""
    rig = cdrom()
    pulses = rig.pin.pulses
    rig.begin_packet(limit=2048)
    assert rig.alternate & (BSY | DRQ) == DRQ and not rig.pin.level
    assert rig.read(COUNT) == 0x01
    rig.send_words(bytes(READ_4_AT_7).ljust(12, b"\0"))
    assert rig.alternate & (BSY | DRQ) == BSY and not rig.pin.level
    rig.settle()
    data = bytearray()
    for _ in range(4):
        assert rig.pin.level and rig.status & (BSY | DRQ) == DRQ and not rig.pin.level
        assert rig.read(COUNT) == 0x02 and rig.byte_count == 2048
        data += rig.words(1024)
    assert rig.pin.level and rig.read(COUNT) == 0x03
    assert rig.status & (BSY | DRQ | ERR | DRDY) == DRDY
    assert rig.pin.pulses - pulses == 5
    assert data == rig.backend().image[7 * 2048 : 11 * 2048]


def test_phases_of_a_dma_read() -> None:
    """9.9: one request into guest memory, one interrupt at the end, reason 03h."""
    rig = cdrom()
    pulses = rig.pin.pulses
    rig.prds((0x8000, 0x1000), (0xC000, 0x1000))
    rig.packet(*READ_4_AT_7, dma=True)
    assert not rig.pin.level and rig.backend().pending == {}
    rig.start()
    assert rig.backend().log == [("read", 7 * 2048, 8192)] and rig.alternate & BSY
    rig.settle()
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == BM_INTERRUPT
    assert rig.read(COUNT) == 0x03 and rig.status & (BSY | DRQ | ERR) == 0
    assert rig.pin.pulses - pulses == 1
    image = rig.backend().image[7 * 2048 :]
    assert rig.memory.ram[0x8000:0x9000] == image[:0x1000]
    assert rig.memory.ram[0xC000:0xD000] == image[0x1000:0x2000]


def test_result_by_dma_shorter_than_the_table() -> None:
    rig = cdrom()
    rig.prds((0x8000, 20), (0x9000, 100))
    rig.packet(0x12, 0, 0, 0, 36, dma=True)
    rig.start()
    assert rig.pin.level and rig.status & ERR == 0
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == ACTIVE | BM_INTERRUPT
    data = rig.memory.ram[0x8000 : 0x8000 + 20] + rig.memory.ram[0x9000 : 0x9000 + 16]
    assert data == rig.result(0x12, 0, 0, 0, 36)
    assert rig.memory.ram[0x9000 + 16 : 0x9000 + 100] == bytes(84)


def test_mode_select_by_dma_and_pio() -> None:
    parameters = bytes(8) + bytes([0x01, 10, 0x20, 9]) + bytes(8)
    for dma in (False, True):
        rig = cdrom()
        rig.prds((0x8000, len(parameters)))
        rig.memory.write(0x8000, parameters)
        rig.packet(0x55, 0x10, 0, 0, 0, 0, 0, 0, len(parameters), dma=dma)
        if dma:
            rig.start(to_memory=False)
        else:
            assert rig.pin.level and rig.read(COUNT) == 0x00 and rig.byte_count == 20  # IO 0, CoD 0
            assert rig.status & DRQ
            rig.send_words(parameters)
        assert rig.pin.level and rig.read(COUNT) == 0x03 and rig.status & ERR == 0
        assert rig.result(0x5A, 0, 0x01, 0, 0, 0, 0, 0, 64)[8:12] == bytes([0x01, 10, 0x20, 9])


@pytest.mark.parametrize(
    "limit,blocks",
    [
        (0xFFFF, [0xFFFE, 2, 0x8000]),  # FFFFh is FFFEh; the buffer is 64 KiB, so the next block is its rest
        (0xFFFE, [0xFFFE, 2, 0x8000]),
        (0x7FFF, [0x7FFE, 0x7FFE, 4, 0x7FFE, 2]),
        (0x8001, [0x8000, 0x8000, 0x8000]),
    ],
)
def test_byte_count_limit(limit: int, blocks: list[int]) -> None:
    """8.23.4 and hardware-cases 6: odd limits round down, FFFFh is FFFEh."""
    rig = cdrom()
    rig.packet(0x28, 0, 0, 0, 0, 0, 0, 0, 48, limit=limit)
    rig.settle()
    sizes, data = [], bytearray()
    while rig.status & DRQ:
        sizes.append(rig.byte_count)
        data += rig.words(sizes[-1] // 2)
        rig.settle()
    assert sizes == blocks
    assert data == rig.backend().image[: 48 * 2048]


def test_odd_limit_and_odd_length_at_the_end() -> None:
    """An odd count is allowed in the last block only; its last word has a pad byte."""
    rig = cdrom()
    whole = rig.result(0x12, 0, 0, 0, 36)
    for allocation, limit, blocks in (
        (35, 0xFFFE, [35]),
        (35, 35, [35]),
        (35, 17, [16, 16, 3]),
        (5, 2, [2, 2, 1]),
    ):
        rig.packet(0x12, 0, 0, 0, allocation, limit=limit)
        sizes, data = [], bytearray()
        while rig.status & DRQ:
            sizes.append(rig.byte_count)
            data += rig.words((sizes[-1] + 1) // 2)[: sizes[-1]]
        assert sizes == blocks and data == whole[:allocation]
        assert rig.read(COUNT) == 0x03


@pytest.mark.parametrize("limit", [0, 1])
def test_limit_zero_aborts_data_commands_only(limit: int) -> None:
    rig = cdrom()
    rig.packet(0x12, 0, 0, 0, 36, limit=limit)
    assert rig.pin.level and rig.status & (BSY | DRQ | ERR) == ERR and rig.read(ERROR) & 0x04
    rig.packet(0x00, limit=limit)
    assert rig.status & ERR == 0
    rig.prds((0x8000, 2048))
    rig.packet(0x28, 0, 0, 0, 0, 0, 0, 0, 1, dma=True, limit=limit)
    rig.start()
    rig.settle()
    assert rig.status & ERR == 0


@pytest.mark.parametrize("opcode", [0x28, 0xA8])
@pytest.mark.parametrize("lba,count", [(299, 2), (300, 1), (0xFFFF_FFFF, 1), (0, 301), (5, 0xFFFF)])
def test_reads_past_the_medium(opcode: int, lba: int, count: int) -> None:
    """hardware-cases 1 (CVE-2020-29443): ILLEGAL REQUEST, 21h, before any data."""
    rig = cdrom(blocks=300)
    length = [0, *count.to_bytes(2, "big")] if opcode == 0x28 else [*count.to_bytes(4, "big")]
    assert rig.fails(opcode, 0, *lba.to_bytes(4, "big"), *length) == (5, 0x21, 0)
    assert rig.backend().log == []


def test_read_12_whole_medium_by_pio() -> None:
    rig = cdrom(blocks=100)
    assert rig.result(0xA8, 0, 0, 0, 0, 0, 0, 0, 0, 100) == rig.backend().image


def test_read_nothing() -> None:
    rig = cdrom(blocks=10)
    assert rig.result(0x28, 0, 0, 0, 0, 10, 0, 0, 0) == b""


def test_overrun_of_a_reply_is_impossible() -> None:
    """hardware-cases 2 (CVE-2015-5154): the host reads and writes far more than there is."""
    rig = cdrom()
    rig.packet(0x12, 0, 0, 0, 8)
    assert rig.words(4) + rig.words(1000) == rig.result(0x12, 0, 0, 0, 8) + b"\xff" * 2000
    rig.packet(0x55, 0x10, 0, 0, 0, 0, 0, 0, 8)
    rig.send_words(bytes(8) + b"\xee" * 70000)
    assert rig.status & (BSY | DRQ | ERR) == 0
    rig.begin_packet()
    rig.send_words(b"\x12\0\0\0\x08".ljust(12, b"\0") + b"\xee" * 100)
    assert len(rig.pio_data()) == 8


def test_packet_in_pieces() -> None:
    rig = cdrom()
    rig.begin_packet()
    for at in range(0, 12, 2):
        assert rig.read(COUNT) == 0x01
        rig.send_words(bytes([0x12, 0, 0, 0, 36, 0, 0, 0, 0, 0, 0, 0])[at : at + 2])
    assert len(rig.pio_data()) == 36


def test_overlap_is_not_there() -> None:
    rig = cdrom()
    rig.write(ERROR, 0x02)
    rig.command(0xA0)
    assert rig.status & ERR and rig.read(ERROR) == 0x04


def test_read_error_is_a_medium_error_with_its_address() -> None:
    """MMC-5 annex F: 03h/11h/00h."""
    rig = cdrom()
    rig.prds((0x8000, 8192))
    for dma in (False, True):
        rig.packet(*READ_4_AT_7, dma=dma)
        rig.start()
        rig.settle(errno.EIO)
        assert rig.pin.level and rig.status & (BSY | DRQ | ERR) == ERR
        assert rig.read(ERROR) >> 4 == 3
        rig.packet(0x03, 0, 0, 0, 18)
        data = rig.pio_data()
        assert data[0] == 0xF0 and data[2] == 3 and data[12:14] == b"\x11\0"
        assert int.from_bytes(data[3:7], "big") == 7


def test_media_larger_than_4_gib_by_block_number() -> None:
    rig = cdrom(image=pattern(2048 * 4))
    assert rig.result(0x25) == struct.pack(">II", 3, 2048)
