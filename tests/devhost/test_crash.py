"""A device host killed at every named step of every event of a script: what the guest and the outside see is
what they see of one that lives.

Hardware-cases 21. Expected values are those of an uninterrupted run, whose own are proven by the chips'
tests; that each
script does what it is for is asserted in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.contract import messages
from coordinator.contract.messages import SPACE_INTA
from devhost.faults import POINTS
from tests.devhost.ide.rig import pattern
from tests.devhost.lives import CD_SIZE, DISK_SIZE, Deadly, Guest

COM1, PIC, PIT, RTC, KBD, FW_CFG = 0x3F8, 0x20, 0x40, 0x70, 0x60, 0x510
HD, CD, BUS_MASTER = 0x1F0, 0x170, 0xC000
PRD, BUFFER = 0x8000, 0x10000
MS = 1_000_000


def command(guest: Guest, base: int, opcode: int, lba: int = 0, count: int = 1, device: int = 0xE0) -> None:
    guest.post((base + 6, device), (base + 2, count), (base + 3, lba), (base + 4, 0), (base + 5, 0))
    guest.out(base + 7, opcode)


def ata_pio_read(guest: Guest) -> None:
    """IDENTIFY in two strings and single words; two sectors with status reads, which clear the interrupt."""
    command(guest, HD, 0xEC)
    assert guest.access(HD + 7)[0] == 0x58
    data = guest.access(HD, 2, 100) + guest.access(HD, 2) + guest.access(HD, 2, 155)
    assert data[98:100] == b"\x00\x0f" or len(data) == 512
    command(guest, HD, 0x20, lba=3, count=2)
    guest.complete()
    for sector in (3, 4):
        assert guest.access(HD + 7)[0] == 0x58
        assert guest.access(HD, 2, 256) == pattern(DISK_SIZE)[sector * 512 : sector * 512 + 512]
    assert guest.access(HD + 7)[0] == 0x50


def ata_pio_write(guest: Guest) -> None:
    """Two sectors from strings, then a flush."""
    command(guest, HD, 0x30, lba=5, count=2)
    for value in (0x11, 0x22):
        guest.access(HD, 2, 200, bytes([value]) * 400)
        guest.access(HD, 2, 56, bytes([value]) * 112)
        guest.complete()
        guest.access(HD + 7)
    guest.out(HD + 7, 0xE7)
    guest.complete()
    assert guest.access(HD + 7)[0] == 0x50
    assert guest.media["hd"][5 * 512 : 7 * 512] == b"\x11" * 512 + b"\x22" * 512


def dma(guest: Guest, base: int, master: int, to_memory: bool, begin: Callable[[], None], size: int) -> None:
    half = size // 2
    table = struct.pack("<IHHIHH", BUFFER, half, 0, BUFFER + 0x4000, size - half, 0x8000)
    guest.segment.dma_write(PRD, table)
    for lane in range(4):
        guest.post((master + 4 + lane, PRD >> 8 * lane & 0xFF))
    guest.post((master, 8 if to_memory else 0), (master + 2, 6))
    begin()
    guest.post((master, 9 if to_memory else 1))
    guest.complete()
    assert guest.access(master + 2)[0] & 7 == 4
    assert guest.access(base + 7)[0] == 0x50
    guest.post((master, 0), (master + 2, 6))


def ata_dma(guest: Guest) -> None:
    dma(guest, HD, BUS_MASTER, True, lambda: command(guest, HD, 0xC8, lba=8, count=8), 4096)
    expected = pattern(DISK_SIZE)[8 * 512 : 16 * 512]
    assert guest.segment.dma_read(BUFFER, 2048) + guest.segment.dma_read(BUFFER + 0x4000, 2048) == expected
    dma(guest, HD, BUS_MASTER, False, lambda: command(guest, HD, 0xCA, lba=30, count=8), 4096)
    assert guest.media["hd"][30 * 512 : 38 * 512] == expected


def packet(guest: Guest, data: bytes, by_dma: bool = False) -> None:
    guest.post((CD + 6, 0xA0), (CD + 1, int(by_dma)), (CD + 4, 0xFE), (CD + 5, 0xFF))
    guest.out(CD + 7, 0xA0)
    guest.access(CD, 2, 6, data.ljust(12, b"\0"))


def atapi(guest: Guest) -> None:
    """The first command gets the unit attention of power-on, REQUEST SENSE tells it once; reads by PIO
    and by DMA."""
    packet(guest, b"\x00")
    assert guest.access(CD + 7)[0] & 1
    for key in (6, 0):
        packet(guest, b"\x03\0\0\0\x12")
        guest.access(CD + 7)
        assert guest.access(CD, 2, 9)[2] == key
        assert guest.access(CD + 7)[0] == 0x50
    packet(guest, struct.pack(">BBIBHB", 0x28, 0, 2, 0, 1, 0))
    guest.complete()
    guest.access(CD + 7)
    assert guest.access(CD, 2, 1024) == pattern(CD_SIZE)[2 * 2048 : 3 * 2048]
    guest.access(CD + 7)
    read = struct.pack(">BBIBHB", 0x28, 0, 5, 0, 2, 0)
    dma(guest, CD, BUS_MASTER + 8, True, lambda: packet(guest, read, by_dma=True), 4096)
    got = guest.segment.dma_read(BUFFER, 2048) + guest.segment.dma_read(BUFFER + 0x4000, 2048)
    assert got == pattern(CD_SIZE)[5 * 2048 : 7 * 2048]


def uart(guest: Guest) -> None:
    """Interrupts on; bytes in, which reading takes away; bytes out."""
    guest.post((COM1 + 1, 3), (COM1 + 2, 0x07), (COM1 + 4, 0x08))
    assert guest.access(COM1 + 2)[0] & 0x0F == 2  # THR empty, cleared by this read
    assert guest.access(COM1 + 2)[0] & 0x0F == 1
    assert guest.command(messages.SerialInput, index=0, data=b"abc") == 3
    assert [guest.access(COM1) for _ in range(3)] == [b"a", b"b", b"c"]
    assert guest.access(COM1 + 5)[0] & 1 == 0
    for text in (b"Hello", b", ", b"world"):
        guest.post(*((COM1, byte) for byte in text))
    guest.out(COM1, ord("!"))
    output = [notice for notice in guest.notices if isinstance(notice, messages.SerialOutput)]
    assert b"".join(notice.data for notice in output) == b"Hello, world!"


def timers(guest: Guest) -> None:
    """The 8254 every 0.84 ms; the RTC's periodic interrupt, whose cause reading register C takes away."""
    guest.post((PIT + 3, 0x34), (PIT, 0xE8), (PIT, 0x03))
    guest.post((RTC, 0x0A), (RTC + 1, 0x26), (RTC, 0x0B))
    guest.out(RTC + 1, 0x42)
    guest.post((RTC, 0x0C))
    before = list(guest.segment.fabric.delivered)
    for _ in range(4):
        guest.advance(MS)
        guest.access(RTC + 1)
    after = list(guest.segment.fabric.delivered)
    assert (after[2] - before[2], after[8] - before[8]) == (4, 4)


def pic(guest: Guest) -> None:
    """The timer's interrupt through the 8259: INTA takes it, EOI ends it."""
    for port, value in ((PIC, 0x11), (PIC + 1, 0x20), (PIC + 1, 4), (PIC + 1, 1), (PIC + 1, 0xFE)):
        guest.post((port, value))
    guest.post((PIT + 3, 0x34), (PIT, 0xA9), (PIT, 0x04))
    for _ in range(3):
        guest.advance(2 * MS)
        assert guest.segment.vcpu(0).extint_level & 1
        assert guest.access(0, space=SPACE_INTA) == b"\x20"
        guest.post((PIC, 0x0B))
        assert guest.access(PIC) == b"\x01"
        guest.out(PIC, 0x20)
        assert guest.access(PIC) == b"\0"


def keyboard(guest: Guest) -> None:
    """Keys go down and up; each scan code is read once."""
    guest.out(KBD + 4, 0x60)
    guest.out(KBD, 0x61)  # interrupts, scan codes translated
    codes = []
    guest.command(messages.SendKeys, keys=("a", "b"), hold_ms=100)
    for step in range(2):
        while guest.access(KBD + 4)[0] & 1:
            codes.append(guest.access(KBD)[0])
            guest.advance(MS)
        if step == 0:
            guest.advance(100 * MS)
    assert codes == [0x1E, 0x30, 0xB0, 0x9E]  # set 1


def board(guest: Guest) -> None:
    """PCI configuration, A20 and the map, CMOS, firmware configuration by DMA."""
    for register, value in ((0x20, 0xD000), (0x04, 5)):
        guest.access(0xCF8, 4, 1, struct.pack("<I", 0x8000_0900 | register))
        guest.access(0xCFC, 4, 1, struct.pack("<I", value))
    assert guest.access(0xD002)[0] & 0x80 == 0 and guest.segment.ports[0xC002] == 0
    for value in (0, 2):
        guest.out(0x92, value)
        guest.seen.append([(r.gpa, r.size, r.flags) for r in guest.segment.memory_map()])
    guest.post((RTC, 0x50))
    guest.out(RTC + 1, 0x5A)
    assert guest.access(RTC + 1) == b"\x5a"
    guest.segment.dma_write(0x5000, struct.pack(">IIQ", 0x0000_000A, 4, 0x6000))  # select item 0, read 4
    guest.access(FW_CFG + 8, 4, 1, struct.pack(">I", 0x5000))
    assert guest.segment.dma_read(0x5000, 4) == bytes(4) and guest.segment.dma_read(0x6000, 4) == b"QEMU"
    guest.access(FW_CFG, 2, 1, b"\0\0")
    assert guest.access(FW_CFG + 1, 1, 2) + guest.access(FW_CFG + 1, 1, 2) == b"QEMU"


SCRIPTS = [ata_pio_read, ata_pio_write, ata_dma, atapi, uart, timers, pic, keyboard, board]
#: of one point of one script so many passings are tried, spread over all
MOST = 12


def run(folder: Path, script: Callable[[Guest], None], faults: Deadly) -> Guest:
    folder.mkdir()
    guest = Guest(folder, faults)
    try:
        script(guest)
    finally:
        guest.close()
    return guest


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Any], list[Any], dict[str, int]]]:
    """Of each script, what is seen where nobody dies, and how often each point is passed."""
    found = {}
    for script in SCRIPTS:
        faults = Deadly()
        guest = run(tmp_path_factory.mktemp("lived") / "vm", script, faults)
        found[script.__name__] = guest.seen, guest.notices, faults.passed
    return found


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_nobody_notices(
    script: Callable[[Guest], None], point: str, lived: dict[str, Any], tmp_path: Path
) -> None:
    seen, notices, passed = lived[script.__name__]
    times = passed.get(point, 0)
    for nth in range(1, times + 1, max(1, times // MOST)):
        guest = run(tmp_path / f"{nth}", script, Deadly(point, nth))
        assert guest.deaths == 1
        for step, (here, there) in enumerate(zip(guest.seen, seen, strict=True)):
            assert here == there, f"killed at {point} {nth}: step {step} differs"
        told, there = (
            [one for one in said if not isinstance(one, messages.Answer | messages.TookOver)]
            for said in (guest.notices, notices)
        )
        assert told == there
