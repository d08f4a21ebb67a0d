"""Disk commands at the registers; sections are those of ATA/ATAPI-6."""

from __future__ import annotations

import errno
import struct

import pytest

from devhost.ide.ata import AtaDrive
from tests.devhost.ide.rig import (
    ACTIVE,
    BM_INTERRUPT,
    BSY,
    COUNT,
    DEVICE,
    DF,
    DRQ,
    ERR,
    ERROR,
    HIGH,
    HOB,
    LOW,
    MID,
    Backend,
    Rig,
    disk,
    pattern,
)

ABRT, IDNF, UNC = 0x04, 0x10, 0x40


def identify(rig: Rig) -> tuple[int, ...]:
    rig.command(0xEC)
    assert rig.status & DRQ
    data = rig.words(256)
    assert sum(data) & 0xFF == 0 and data[510] == 0xA5  # 8.15.61
    return struct.unpack("<256H", data)


def text(words: tuple[int, ...]) -> str:
    return struct.pack(f">{len(words)}H", *words).decode().strip()


def test_identify_device() -> None:
    """8.15: general configuration, geometry, strings, capacities."""
    rig = disk(sectors=2048)
    words = identify(rig)
    assert rig.pin.pulses == 1 and rig.status == 0x50
    assert words[0] & 0x8000 == 0
    assert (words[1], words[3], words[6]) == (2048 // 1008, 16, 63)
    assert text(words[10:20]) == "S1" and text(words[27:47]) == "ATOLL TEST DISK"
    assert words[49] & 0x300 == 0x300  # LBA, DMA
    assert words[60] | words[61] << 16 == 2048
    assert words[100] | words[101] << 16 | words[102] << 32 == 2048
    assert words[83] & 0xC400 == 0x4400 and words[86] & 0x0400  # LBA48
    assert words[84] & 0xC000 == 0x4000 and words[87] & 0xC000 == 0x4000
    assert words[80] & 1 << 6  # ATA/ATAPI-6
    assert words[63] == 0x0407  # multiword DMA 2 selected


@pytest.mark.parametrize("opcode", [0x20, 0x21, 0xC4])
def test_read_sectors(opcode: int) -> None:
    """9.5: one interrupt for each DRQ block, none after the last; READ MULTIPLE has larger blocks."""
    rig = disk()
    rig.taskfile(count=4)
    rig.command(0xC6)
    assert rig.status == 0x50
    rig.taskfile(count=6, lba=100)
    pulses = rig.pin.pulses
    rig.command(opcode)
    assert rig.alternate & BSY and not rig.pin.level
    rig.settle()
    data = bytearray()
    blocks = [2048, 1024] if opcode == 0xC4 else [512] * 6
    for block in blocks:
        assert rig.pin.level
        assert rig.status & (BSY | DRQ | ERR) == DRQ
        assert not rig.pin.level
        data += rig.words(block // 2)
    assert rig.status == 0x50 and not rig.pin.level
    assert rig.pin.pulses - pulses == len(blocks)
    assert data == rig.backend().image[100 * 512 : 106 * 512]
    assert rig.backend().log == [("read", 100 * 512, 6 * 512)]


def test_read_sectors_ext_with_count_0_means_65536_sectors() -> None:
    """8.28: count 0000h; more than one request, in order."""
    rig = disk(sectors=65536 + 16)
    rig.taskfile48(0, 16)
    rig.command(0x24)
    rig.settle()
    data = bytearray()
    while rig.status & DRQ:
        data += rig.words(256)
        rig.settle()
    assert len(data) == 65536 * 512 and data == rig.backend().image[16 * 512 :]


def test_lba48_address_beyond_28_bits() -> None:
    class Huge(Backend):
        @property
        def size(self) -> int:
            return 1 << 42

    backend = Huge(b"")
    rig = Rig(lambda: (AtaDrive(backend), None))
    rig.taskfile48(3, 0x1_2345_6789)
    rig.prds((0x8000, 3 * 512))
    rig.command(0x25)
    rig.start()
    assert backend.log == [("read", 0x1_2345_6789 * 512, 1536)]
    words = identify_after_reset(rig)
    assert words[60] | words[61] << 16 == 0x0FFF_FFFF  # 8.15.27: no more than 28 bits
    rig.taskfile()
    rig.command(0xF8)  # READ NATIVE MAX ADDRESS
    assert rig.status == 0x50
    assert (rig.read(DEVICE) & 0x0F, rig.read(HIGH), rig.read(MID), rig.read(LOW)) == (0x0F, 0xFF, 0xFF, 0xFF)
    rig.command(0x27)  # READ NATIVE MAX ADDRESS EXT: 2^33 - 1
    assert rig.status == 0x50
    assert [rig.read(at) for at in (LOW, MID, HIGH)] == [0xFF, 0xFF, 0xFF]
    rig.control(HOB)
    assert [rig.read(at) for at in (LOW, MID, HIGH)] == [0xFF, 1, 0]


def identify_after_reset(rig: Rig) -> tuple[int, ...]:
    rig.control(4)
    rig.control(0)
    return identify(rig)


@pytest.mark.parametrize("opcode,blocks", [(0x30, [512] * 5), (0xC5, [2048, 512])])
def test_write_sectors(opcode: int, blocks: list[int]) -> None:
    """9.6: no interrupt for the first block, one after each; the data is on the medium at the last one."""
    rig = disk()
    rig.taskfile(count=4)
    rig.command(0xC6)
    data = bytes(pattern(5 * 512, b"new"))
    rig.taskfile(count=5, lba=33)
    pulses = rig.pin.pulses
    rig.command(opcode)
    at = 0
    for number, block in enumerate(blocks):
        assert rig.pin.level == (number > 0)
        assert rig.status & (BSY | DRQ | ERR) == DRQ
        rig.send_words(data[at : at + block])
        at += block
        if number < len(blocks) - 1:
            rig.settle()
    assert rig.alternate & BSY and not rig.pin.level
    rig.settle()
    assert rig.pin.level and rig.status == 0x50
    assert rig.pin.pulses - pulses == len(blocks)
    assert rig.backend().image[33 * 512 : 38 * 512] == data


def test_write_ext_longer_than_one_buffer() -> None:
    rig = disk(sectors=1024)
    data = bytes(pattern(300 * 512, b"long"))
    rig.taskfile48(300, 700)
    rig.command(0x34)
    for at in range(0, len(data), 512):
        assert rig.status & DRQ
        rig.send_words(data[at : at + 512])
        rig.settle()
    assert rig.status == 0x50
    assert rig.backend().image[700 * 512 : 1000 * 512] == data


@pytest.mark.parametrize("ext", [False, True])
def test_dma_is_one_request_into_guest_memory(ext: bool) -> None:
    """8.25; BMIDE 3.1: regions equal to the transfer end with interrupt set and active clear."""
    rig = disk()
    if ext:
        rig.taskfile48(128, 5)
    else:
        rig.taskfile(count=128, lba=5)
    rig.prds((0x2_0000, 0x8000), (0x4_0000, 0x8000))
    rig.command(0x25 if ext else 0xC8)
    assert rig.status & (BSY | DRQ | ERR) == DRQ and not rig.pin.level
    rig.start()
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == ACTIVE
    assert rig.backend().log == [("read", 5 * 512, 0x1_0000)]
    assert rig.settle() == 1
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == BM_INTERRUPT
    assert rig.pin.level and rig.status == 0x50 and not rig.pin.level
    image = rig.backend().image[5 * 512 :]
    assert rig.memory.ram[0x2_0000:0x2_8000] == image[:0x8000]
    assert rig.memory.ram[0x4_0000:0x4_8000] == image[0x8000:0x1_0000]
    assert rig.memory.marked == [(0x2_0000, 0x8000), (0x4_0000, 0x8000)]


@pytest.mark.parametrize("opcode", [0xCA, 0x35])
def test_write_dma(opcode: int) -> None:
    rig = disk()
    rig.memory.write(0x3_0000, pattern(0x1000, b"guest"))
    if opcode == 0x35:
        rig.taskfile48(8, 1)
    else:
        rig.taskfile(count=8, lba=1)
    rig.prds((0x3_0000, 0x400), (0x3_0400, 0xC00))
    rig.start(to_memory=False)  # started before the command: the drive's request is served at once
    rig.command(opcode)
    rig.settle()
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == BM_INTERRUPT
    assert rig.status == 0x50
    assert rig.backend().image[512 : 512 + 0x1000] == pattern(0x1000, b"guest")


def test_write_without_write_cache_is_flushed_before_it_ends() -> None:
    """8.46.4: with the cache off, data is on the medium when the command ends."""
    rig = disk()
    rig.taskfile(features=0x82)
    rig.command(0xEF)
    rig.settle()
    assert rig.status == 0x50
    words = identify(rig)
    assert words[82] & 0x20 and not words[85] & 0x20
    rig.taskfile(count=1, lba=0)
    rig.command(0x30)
    rig.send_words(bytes(512))
    rig.settle()
    assert rig.status == 0x50
    assert [kind for kind, _, _ in rig.backend().log] == ["flush", "write", "flush"]


@pytest.mark.parametrize("opcode", [0xE7, 0xEA])
@pytest.mark.parametrize("can_flush", [True, False])
def test_flush_cache(opcode: int, can_flush: bool) -> None:
    rig = disk()
    rig.backend().can_flush = can_flush
    rig.command(opcode)
    assert bool(rig.alternate & BSY) == can_flush
    rig.settle()
    assert rig.pin.pulses == 1 and rig.status == 0x50


def test_failing_flush_is_a_device_fault() -> None:
    rig = disk()
    rig.command(0xE7)
    rig.settle(errno.EIO)
    assert rig.status & (BSY | DF | ERR) == DF | ERR and rig.read(ERROR) == ABRT


def test_read_and_write_errors() -> None:
    """8.25.6, 8.61.6: UNC with the address; a failed write is a device fault."""
    rig = disk()
    rig.taskfile(count=2, lba=0x123)
    rig.command(0x20)
    rig.settle(errno.EIO)
    assert rig.pin.level and rig.status & (BSY | DRQ | ERR) == ERR
    assert rig.read(ERROR) == UNC
    assert rig.read(LOW) | rig.read(MID) << 8 == 0x123
    rig.prds((0x8000, 512))
    rig.taskfile(count=1, lba=1)
    rig.command(0xCA)
    rig.start(to_memory=False)
    rig.settle(errno.ENOSPC)
    assert rig.status & (DF | ERR) == DF | ERR and rig.bm_status & BM_INTERRUPT


def test_addresses_past_the_end_are_idnf() -> None:
    rig = disk(sectors=1000)
    for opcode in (0x20, 0x30, 0x40, 0xC8, 0xCA):
        rig.taskfile(count=2, lba=999)
        rig.command(opcode)
        assert rig.status & (BSY | DRQ | ERR) == ERR and rig.read(ERROR) == IDNF, hex(opcode)
    rig.taskfile48(1, 1 << 47)
    rig.command(0x25)
    assert rig.read(ERROR) == IDNF
    assert rig.backend().log == []


def test_chs_addresses_and_initialize_device_parameters() -> None:
    """LBA = (cylinder * heads + head) * sectors + sector - 1 (6.2.1)."""
    rig = disk(sectors=4096)
    rig.write(DEVICE, 0xA7)  # 8 heads
    rig.write(COUNT, 17)
    rig.command(0x91)
    assert rig.status == 0x50
    words = identify(rig)
    assert words[54:57] == (4096 // (8 * 17), 8, 17)
    rig.write(DEVICE, 0xA3)
    for offset, value in ((COUNT, 1), (LOW, 9), (MID, 2), (HIGH, 0)):
        rig.write(offset, value)
    rig.command(0x20)
    rig.settle()
    lba = (2 * 8 + 3) * 17 + 8
    assert rig.words(256) == rig.backend().image[lba * 512 : (lba + 1) * 512]
    for sector, head in ((0, 0), (18, 0), (1, 8)):
        rig.write(DEVICE, 0xA0 | head)
        rig.write(LOW, sector)
        rig.command(0x20)
        assert rig.read(ERROR) == IDNF


def test_verify_reads_and_moves_nothing() -> None:
    rig = disk()
    rig.taskfile(count=0, lba=3)  # 256 sectors
    rig.command(0x40)
    rig.settle()
    assert rig.status == 0x50 and rig.pin.pulses == 1
    assert sum(length for _, _, length in rig.backend().log) == 256 * 512
    rig.taskfile(count=1)
    rig.command(0x40)
    rig.settle(errno.EIO)
    assert rig.read(ERROR) == UNC


def test_set_multiple() -> None:
    """8.47: powers of two up to word 47; READ MULTIPLE without it is an abort."""
    rig = disk()
    rig.taskfile(count=1)
    rig.command(0xC4)
    assert rig.status & ERR and rig.read(ERROR) == ABRT
    for count, good in ((16, True), (3, False), (32, False), (8, True), (0, True)):
        rig.taskfile(count=count)
        rig.command(0xC6)
        assert bool(rig.status & ERR) != good
    rig.taskfile(count=8)
    rig.command(0xC6)
    assert identify(rig)[59] == 0x0108


def test_set_features() -> None:
    rig = disk()
    for features, count, good in (
        (0x03, 0x0C, True),  # PIO 4
        (0x03, 0x20, True),  # multiword DMA 0
        (0x03, 0x46, False),  # Ultra DMA 6
        (0x02, 0, True),
        (0x55, 0, True),
        (0xAA, 0, True),
        (0x66, 0, True),
        (0xCC, 0, True),
        (0x05, 0x80, False),  # no APM
        (0x99, 0, False),
    ):
        rig.taskfile(features=features, count=count)
        rig.command(0xEF)
        assert bool(rig.status & ERR) != good, (features, count)
    assert identify(rig)[63] == 0x0107


def test_power_modes() -> None:
    """6.11, 8.6: FFh active or idle, 00h standby; a media access wakes the drive."""
    rig = disk()
    for opcode, mode in ((0xE0, 0), (0xE1, 0xFF), (0x96, 0), (0xE3, 0xFF), (0x94, 0)):
        rig.command(opcode)
        assert rig.status == 0x50
        rig.command(0xE5)
        assert rig.read(COUNT) == mode
    rig.taskfile(count=1)
    rig.command(0x20)
    rig.settle()
    rig.words(256)
    rig.command(0x98)
    assert rig.read(COUNT) == 0xFF


@pytest.mark.parametrize("opcode", [0x00, 0x08, 0xA0, 0xA1, 0xB0, 0xF1, 0xFF, 0x92, 0xC7, 0x26])
def test_other_commands_abort(opcode: int) -> None:
    rig = disk()
    rig.command(opcode)
    assert rig.pin.pulses == 1
    assert rig.status & (BSY | DRQ | ERR) == ERR and rig.read(ERROR) == ABRT


def test_seek_and_recalibrate() -> None:
    rig = disk(sectors=100)
    rig.command(0x10)
    assert rig.status == 0x50
    rig.taskfile(lba=99)
    rig.command(0x70)
    assert rig.status == 0x50
    rig.taskfile(lba=100)
    rig.command(0x70)
    assert rig.read(ERROR) == IDNF


def test_write_protected_disk() -> None:
    rig = disk(read_only=True)
    rig.taskfile(count=1)
    rig.command(0x30)
    assert rig.status & ERR and rig.read(ERROR) & 0x40  # WP
    rig.taskfile(count=1)
    rig.command(0x20)
    rig.settle()
    assert rig.words(256) == rig.backend().image[:512]


def test_reset_during_a_pending_write_leaves_sector_0_alone() -> None:
    """hardware-cases 5 (CVE-2023-5088)."""
    for opcode in (0x30, 0xCA):
        rig = disk()
        before = bytes(rig.backend().image)
        rig.memory.write(0x8000, b"\xaa" * 512)
        rig.prds((0x8000, 512))
        rig.taskfile(count=1, lba=77)
        rig.command(opcode)
        if opcode == 0x30:
            rig.send_words(b"\xaa" * 512)
        else:
            rig.start(to_memory=False)
        assert rig.backend().log == [("write", 77 * 512, 512)]
        rig.control(4)
        rig.memory.write(0x8000, b"\x55" * 512)
        rig.control(0)
        rig.settle()
        image = rig.backend().image
        assert image[: 77 * 512] == before[: 77 * 512] and image[78 * 512 :] == before[78 * 512 :]
        assert image[77 * 512 : 78 * 512] in (b"\xaa" * 512, before[77 * 512 : 78 * 512])
        assert not rig.pin.level and rig.status == 0x50


@pytest.mark.parametrize("how", ["hard", "srst", "stop"])
def test_reset_or_stop_in_a_dma_touches_memory_no_more(how: str) -> None:
    rig = disk()
    rig.taskfile(count=8)
    rig.prds((0x8000, 0x1000))
    rig.command(0xC8)
    rig.start()
    if how == "hard":
        rig.channel.reset()
        assert rig.bm_status == 0
    elif how == "srst":
        rig.control(4)
        rig.control(0)
    else:
        rig.bm_command(8)
        assert rig.alternate & (BSY | DRQ) == DRQ and not rig.bm_status & ACTIVE
    rig.memory.write(0x8000, bytes(0x1000))
    rig.settle()
    assert rig.memory.ram[0x8000:0x9000] == bytes(0x1000)
    assert not rig.pin.level
    if how == "stop":  # started anew, the transfer is made
        rig.start()
        rig.settle()
        assert rig.memory.ram[0x8000:0x9000] == rig.backend().image[:0x1000] and rig.status == 0x50
