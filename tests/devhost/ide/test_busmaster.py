"""PRD tables as drivers and attackers lay them out (BMIDE 1.0 sections 1.2, 2 and 3.1; hardware-cases 4)."""

from __future__ import annotations

import pytest

from tests.devhost.ide.rig import (
    ACTIVE,
    BM_COMMAND,
    BM_ERROR,
    BM_INTERRUPT,
    BM_POINTER,
    BM_STATUS,
    BSY,
    DRQ,
    START,
    TO_MEMORY,
    Memory,
    Rig,
    cdrom,
    disk,
)


def read_dma(rig: Rig, sectors: int, lba: int = 0) -> None:
    rig.taskfile(count=sectors, lba=lba)
    rig.command(0xC8)
    rig.start()
    rig.settle()


def test_registers_mask_their_bits() -> None:
    """2.1-2.3: command bits 0 and 3, capable bits writable, pointer bits 31:2."""
    rig = disk()
    rig.channel.write(BM_POINTER, 4, 0xFFFF_FFFF, "busmaster")
    assert rig.channel.read(BM_POINTER, 4, "busmaster") == 0xFFFF_FFFC
    rig.channel.write(BM_POINTER + 1, 1, 0x12, "busmaster")
    assert rig.channel.read(BM_POINTER, 4, "busmaster") == 0xFFFF_12FC
    rig.channel.write(BM_POINTER + 2, 2, 0x3456, "busmaster")
    assert rig.channel.read(BM_POINTER, 4, "busmaster") == 0x3456_12FC
    rig.channel.write(BM_STATUS, 1, 0x60, "busmaster")
    assert rig.bm_status == 0x60
    rig.channel.write(BM_STATUS, 1, 0x9F, "busmaster")
    assert rig.bm_status == 0
    rig.channel.write(BM_COMMAND, 1, 0xFE, "busmaster")
    assert rig.channel.peek(BM_COMMAND, "busmaster") == TO_MEMORY
    assert rig.channel.read(BM_COMMAND, 4, "busmaster") == TO_MEMORY


def test_regions_larger_than_the_transfer() -> None:
    """3.1: interrupt 1, active 1: the drive is done, the table is not."""
    rig = disk()
    rig.prds((0x8000, 0x2000), (0xA000, 0x1000))
    read_dma(rig, 8)
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT | BM_ERROR) == ACTIVE | BM_INTERRUPT
    assert rig.status == 0x50
    assert rig.memory.ram[0x9000:0xA000] == bytes(0x1000)
    rig.bm_command(0)
    assert not rig.bm_status & ACTIVE


def test_regions_smaller_than_the_transfer() -> None:
    """3.1: interrupt 0, active 0: the drive still wants to move data; a further table takes the rest."""
    rig = disk()
    rig.prds((0x8000, 0x400))
    read_dma(rig, 8)
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == 0
    assert rig.alternate & (BSY | DRQ) == DRQ and not rig.pin.level
    assert rig.memory.ram[0x8000:0x8400] == rig.backend().image[:0x400]
    rig.prds((0x8400, 0xC00))
    rig.start()
    rig.settle()
    assert rig.pin.level and rig.status == 0x50
    assert rig.memory.ram[0x8000:0x9000] == rig.backend().image[:0x1000]


@pytest.mark.parametrize("write", [False, True])
def test_entries_shorter_than_a_sector(write: bool) -> None:
    """Sectors straddle entries of 2 to 1,022 bytes, at odd places."""
    rig = disk()
    lengths = [2, 510, 256, 100, 1022, 30, 2048, 128]
    assert sum(lengths) == 8 * 512
    regions, at = [], 0x9003
    for length in lengths:
        regions.append((at, length))
        at += length + 14
    rig.prds(*regions)
    source = rig.backend().image[: 8 * 512]
    if write:
        at = 0
        for address, length in regions:
            rig.memory.write(address & ~1, source[at : at + length][::-1])
            at += length
    rig.taskfile(count=8, lba=0)
    rig.command(0xCA if write else 0xC8)
    rig.start(to_memory=not write)
    assert rig.settle() == 1
    assert rig.status == 0x50 and rig.bm_status & (ACTIVE | BM_INTERRUPT) == BM_INTERRUPT
    at = 0
    for address, length in regions:  # bit 0 of the address is ignored (1.2)
        there = bytes(rig.memory.ram[address & ~1 : (address & ~1) + length])
        if write:
            assert rig.backend().image[at : at + length] == there
        else:
            assert there == source[at : at + length]
        at += length


@pytest.mark.parametrize("write", [False, True])
def test_table_without_a_complete_sector(write: bool) -> None:
    """Half a sector, the drive waits; the other half completes it. Nothing is lost or doubled."""
    rig = disk()
    original = bytes(rig.backend().image)
    rig.memory.write(0x8000, b"\x11" * 300 + b"\x22" * 212)
    rig.taskfile(count=1, lba=9)
    rig.prds((0x8000, 300))
    rig.command(0xCA if write else 0xC8)
    rig.start(to_memory=not write)
    rig.settle()
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == 0 and rig.alternate & (BSY | DRQ) == DRQ
    assert rig.backend().image == original
    rig.reload()
    rig.prds((0x8000 + 300, 212))
    rig.start(to_memory=not write)
    rig.settle()
    assert rig.status == 0x50 and rig.pin.pulses == 1
    sector = rig.backend().image[9 * 512 : 10 * 512]
    assert sector == rig.memory.ram[0x8000 : 0x8000 + 512]
    assert sector == (b"\x11" * 300 + b"\x22" * 212 if write else original[9 * 512 : 10 * 512])


def test_zero_count_means_64_kib() -> None:
    rig = disk()
    rig.prds((0x1_0000, 0), (0x2_0000, 0))
    read_dma(rig, 256)
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == BM_INTERRUPT
    assert rig.memory.ram[0x1_0000:0x3_0000] == rig.backend().image[:0x2_0000]


def test_4096_entries_of_zero() -> None:
    """hardware-cases 4: 256 MiB of table for one sector; no end-of-table bit anywhere."""
    rig = disk()
    rig.prds(*[(0x8_0000, 0)] * 4096, at=0x1_0000, last=False)
    read_dma(rig, 1)
    assert rig.status == 0x50 and rig.bm_status & ACTIVE


def test_table_of_words_without_end_goes_round_in_its_64_kib() -> None:
    rig = disk()
    rig.prds(*[(0x8_0000, 2)] * 8192, at=0x1_0000, last=False)
    rig.taskfile(count=64, lba=0)
    rig.command(0xC8)
    rig.start()
    assert rig.settle() <= 3
    assert rig.status == 0x50
    assert rig.memory.ram[0x8_0000:0x8_0002] == rig.backend().image[64 * 512 - 2 : 64 * 512]


def test_bus_master_never_started_and_then_reset() -> None:
    """hardware-cases 4 (CVE-2014-9718): the drive waits; SRST frees it."""
    rig = disk()
    rig.taskfile(count=1)
    rig.command(0xC8)
    assert rig.alternate & (BSY | DRQ) == DRQ
    rig.command(0xEC)
    assert rig.backend().log == [] and rig.pin.changes == []
    rig.control(4)
    rig.control(0)
    assert rig.status == 0x50


def test_wrong_direction_moves_nothing() -> None:
    rig = disk()
    rig.prds((0x8000, 512))
    rig.taskfile(count=1)
    rig.command(0xC8)
    rig.start(to_memory=False)
    assert rig.settle() == 0 and rig.alternate & DRQ


def test_memory_without_a_span_and_holes() -> None:
    """Video memory takes writes through the slow way; a hole swallows them."""
    rig = disk()
    rig.memory.opaque.append((0xA_0000, 0xA_2000))
    rig.prds((0xA_1000, 0x800), (0xF000_0000, 0x400), (0x8000, 0x400))
    read_dma(rig, 8)
    assert rig.status == 0x50
    image = rig.backend().image
    assert rig.memory.ram[0xA_1000:0xA_1800] == image[:0x800]
    assert rig.memory.ram[0x8000:0x8400] == image[0xC00:0x1000]
    rig.prds((0xF000_0000, 0x200))
    rig.taskfile(count=1, lba=3)
    rig.command(0xCA)
    rig.start(to_memory=False)
    rig.settle()
    assert image is rig.backend().image and image[3 * 512 : 4 * 512] == b"\xff" * 512


def test_table_in_a_hole() -> None:
    """All ones: an end-of-table entry of FFFEh bytes at FFFFFFFEh."""
    rig = disk()
    rig.channel.write(BM_POINTER, 4, 0xF000_0000, "busmaster")
    read_dma(rig, 1)
    assert rig.status == 0x50


def test_start_without_a_command_only_shows_active() -> None:
    rig = cdrom()
    rig.prds((0x8000, 512))
    rig.start()
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == ACTIVE
    rig.bm_command(TO_MEMORY)
    assert rig.bm_status & ACTIVE == 0


def test_started_again_while_active_keeps_its_place() -> None:
    rig = disk()
    rig.prds((0x8000, 0x200), (0x9000, 0x200))
    rig.taskfile(count=2)
    rig.command(0xC8)
    rig.start()
    rig.bm_command(START | TO_MEMORY)
    rig.settle()
    assert rig.memory.ram[0x9000:0x9200] == rig.backend().image[0x200:0x400]


def test_large_transfer_is_cut_into_few_requests() -> None:
    memory = Memory(8 << 20)
    rig = disk(sectors=8192, request_limit=1 << 20)
    rig.memory = rig.channel.dma = memory
    rig.channel.master._dma = memory
    rig.prds(*[(0x40_0000 + at, 0) for at in range(0, 0x20_0000, 0x1_0000)])
    rig.taskfile48(4096, 0)
    rig.command(0x25)
    rig.start()
    assert rig.settle() == 2
    assert memory.ram[0x40_0000:0x60_0000] == rig.backend().image[:0x20_0000]


def test_transfer_waits_for_the_bus_master_enable_bit() -> None:
    """PCI 3.0 table 6-1: with bit 2 of COMMAND clear the function generates no accesses."""
    rig = disk()
    rig.prds((0x8000, 0x1000))
    rig.channel.grant_bus(False)
    read_dma(rig, 8)
    assert rig.bm_status & ACTIVE and rig.memory.ram[0x8000:0x9000] == bytes(0x1000)
    rig.channel.grant_bus(True)
    rig.settle()
    assert rig.memory.ram[0x8000:0x9000] != bytes(0x1000)
    assert rig.bm_status & (ACTIVE | BM_INTERRUPT) == BM_INTERRUPT
