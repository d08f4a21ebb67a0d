"""Task file, selection, resets, interrupt line (ATA/ATAPI-6 clauses 7 and 9)."""

from __future__ import annotations

from devhost.ide.ata import AtaDrive
from devhost.ide.atapi import AtapiDrive
from devhost.ide.drive import Drive
from tests.devhost.ide.rig import (
    BM_INTERRUPT,
    BM_STATUS,
    BSY,
    COUNT,
    DEVICE,
    DRDY,
    DRQ,
    ERR,
    ERROR,
    HIGH,
    HOB,
    LOW,
    MID,
    NIEN,
    SRST,
    STATUS,
    Backend,
    Rig,
    cdrom,
    disk,
    pattern,
)


def both() -> Rig:
    first, second = Backend(pattern(64 * 512)), Backend(pattern(40 * 2048))
    return Rig(lambda: (AtaDrive(first), AtapiDrive(second)))


def test_signature_of_a_disk_after_power_on() -> None:
    """9.12 table: count 01h, LBA 01h 00h 00h, device 00h; diagnostic code 01h."""
    rig = disk()
    assert [rig.read(at) for at in (ERROR, COUNT, LOW, MID, HIGH)] == [1, 1, 1, 0, 0]
    assert rig.read(DEVICE) & 0x5F == 0
    assert rig.status == 0x50


def test_signature_of_a_packet_device() -> None:
    """9.12: 01h 01h 14h EBh; DRDY is clear until a command."""
    rig = Rig(lambda: (AtapiDrive(), None))
    assert [rig.read(at) for at in (ERROR, COUNT, LOW, MID, HIGH)] == [1, 1, 1, 0x14, 0xEB]
    assert rig.status == 0


def test_software_reset_restores_the_signature_and_selects_drive_0() -> None:
    rig = both()
    rig.write(DEVICE, 0xB0)
    rig.write(COUNT, 0x55)
    rig.control(SRST)
    assert rig.alternate & BSY
    rig.write(COUNT, 0x77)  # not taken during the reset
    rig.control(0)
    assert rig.read(COUNT) == 1 and rig.read(DEVICE) & 0x10 == 0
    assert rig.status == 0x50
    rig.write(DEVICE, 0xB0)
    assert [rig.read(at) for at in (COUNT, LOW, MID, HIGH)] == [1, 1, 0x14, 0xEB]
    assert rig.pin.changes == []  # a reset raises no interrupt


def test_both_drives_take_writes_and_the_selected_one_answers() -> None:
    rig = both()
    for offset, value in ((COUNT, 0x12), (LOW, 0x34), (MID, 0x56), (HIGH, 0x78)):
        rig.write(offset, value)
    for device in (0xA0, 0xB0):
        rig.write(DEVICE, device)
        assert [rig.read(at) for at in (COUNT, LOW, MID, HIGH)] == [0x12, 0x34, 0x56, 0x78]
        assert rig.read(DEVICE) == device


def test_hob_reads_the_previous_content_until_the_next_write() -> None:
    """6.20, 7.8: two-deep registers; any command block write clears HOB."""
    rig = disk()
    for value in (0x11, 0x22, 0x33):
        rig.write(COUNT, value)
    assert rig.read(COUNT) == 0x33
    rig.control(HOB)
    assert rig.read(COUNT) == 0x22
    rig.write(LOW, 0)
    assert rig.read(COUNT) == 0x33


def test_absent_drive_1_reads_zero_and_takes_no_command() -> None:
    """9.16.1: drive 0 answers for drive 1 with status 00h."""
    rig = disk()
    rig.write(DEVICE, 0xB0)
    assert rig.status == rig.alternate == 0
    rig.command(0xEC)
    assert rig.status == 0 and rig.pin.changes == []
    rig.write(DEVICE, 0xA0)
    assert rig.status == 0x50


def test_nothing_on_the_cable_floats_with_dd7_low() -> None:
    rig = Rig(lambda: (None, None))
    for device in (0xA0, 0xB0):
        rig.write(DEVICE, device)
        assert rig.status == 0x7F and rig.alternate == 0x7F
        for opcode in (0xEC, 0xF8, 0xE7, 0xA0, 0x90, 0x08):  # hardware-cases 3: with no drive
            rig.command(opcode)
            rig.settle()
        assert rig.words(2) == b"\xff" * 4
    rig.control(SRST)
    rig.control(0)
    assert rig.pin.changes == []


def test_only_the_selected_drive_drives_the_interrupt_line() -> None:
    """7.15.6 and 5.2.9: INTRQ is released while another drive is selected."""
    rig = both()
    rig.command(0xEC)
    assert rig.pin.level
    rig.words(256)
    rig.write(DEVICE, 0xB0)
    assert not rig.pin.level
    rig.write(DEVICE, 0xA0)
    assert rig.pin.level
    assert rig.status == 0x50 and not rig.pin.level


def test_nien_releases_the_line_and_alternate_status_does_not_acknowledge() -> None:
    rig = disk()
    rig.control(NIEN)
    rig.command(0xE5)
    assert not rig.pin.level and not rig.bm_status & BM_INTERRUPT
    rig.control(0)
    assert rig.pin.level and rig.bm_status & BM_INTERRUPT
    assert rig.alternate == 0x50 and rig.pin.level
    assert rig.status == 0x50 and not rig.pin.level
    rig.channel.write(BM_STATUS, 1, BM_INTERRUPT, "busmaster")
    assert not rig.bm_status & BM_INTERRUPT


def test_a_command_clears_a_pending_interrupt() -> None:
    """7.4: writing the Command register negates INTRQ."""
    rig = disk()
    rig.command(0xE5)
    assert rig.pin.level
    rig.taskfile(count=1)
    rig.command(0x30)  # WRITE SECTORS: asks for data without an interrupt
    assert not rig.pin.level and rig.status & DRQ


def test_diagnostic_runs_on_both_and_interrupts_from_drive_0() -> None:
    """8.11: both signatures, code 01h, DEV cleared."""
    rig = both()
    rig.write(DEVICE, 0xB0)
    rig.write(COUNT, 9)
    rig.command(0x90)
    assert rig.pin.pulses == 1
    assert rig.status == 0x50 and rig.read(ERROR) == 1 and rig.read(COUNT) == 1
    assert rig.read(DEVICE) & 0x10 == 0
    rig.write(DEVICE, 0xB0)
    assert (rig.read(ERROR), rig.read(MID), rig.read(HIGH)) == (1, 0x14, 0xEB)


def test_registers_are_not_written_while_busy_or_drq() -> None:
    rig = disk()
    rig.taskfile(count=2, lba=7)
    rig.command(0x20)
    assert rig.alternate & BSY
    rig.write(LOW, 0x99)
    rig.command(0xEC)
    rig.settle()
    assert rig.read(LOW) == 7
    assert rig.words(256) == bytes(rig.backend().image[7 * 512 : 8 * 512])


def test_device_reset_of_a_packet_device() -> None:
    """8.10: taken while BSY, no interrupt, signature, DEV kept. A disk aborts it."""
    rig = both()
    rig.packet(0x03, 0, 0, 0, 18, device=1)
    rig.pio_data()
    rig.packet(0x28, 0, 0, 0, 0, 1, 0, 0, 4, device=1)
    assert rig.alternate & BSY
    before = len(rig.pin.changes)
    rig.command(0x08)
    assert rig.alternate == 0 and len(rig.pin.changes) == before
    assert rig.read(DEVICE) & 0x10
    assert [rig.read(at) for at in (ERROR, COUNT, LOW, MID, HIGH)] == [1, 1, 1, 0x14, 0xEB]
    rig.settle()
    assert rig.alternate == 0
    rig.write(DEVICE, 0xA0)
    rig.command(0x08)
    assert rig.status & ERR and rig.read(ERROR) == 0x04


def test_sleep_is_left_by_reset_only() -> None:
    """6.11.1 (PM4)."""
    rig = disk()
    rig.command(0xE6)
    assert rig.status & DRDY
    rig.command(0xEC)
    assert not rig.status & DRQ
    rig.control(SRST)
    rig.control(0)
    rig.command(0xEC)
    assert rig.status & DRQ


def test_drive_1_alone() -> None:
    backend = Backend(pattern(40 * 2048))

    def make() -> tuple[Drive | None, Drive | None]:
        return None, AtapiDrive(backend)

    rig = Rig(make)
    assert rig.status == 0x7F
    rig.packet(0x12, 0, 0, 0, 36, device=1)
    assert len(rig.pio_data()) == 36
    rig.command(0x90)
    rig.write(DEVICE, 0xB0)
    assert rig.read(MID) == 0x14


def test_bytes_at_the_data_port_and_odd_widths_do_no_harm() -> None:
    rig = cdrom()
    rig.packet(0x12, 0, 0, 0, 36)
    first = rig.channel.read(0, 1, "command")
    assert first == 0x05  # CD-ROM, and the whole word is consumed
    assert rig.channel.read(0, 4, "command").to_bytes(4, "little")[1] == 0x21
    assert rig.channel.read(STATUS, 4, "command") & 0xFF == rig.alternate
    assert rig.channel.read(1, 2, "control") == 0xFFFF
    rig.channel.write(0, 8, 0, "command")


def test_status_is_a_shadow_unless_reading_it_clears_the_interrupt() -> None:
    """7.15: reading Status clears INTRQ; 7.1: Alternate Status is the same value without that."""
    rig = disk()
    assert rig.channel.peek(STATUS, "command") == rig.channel.peek(0, "control") == 0x50
    rig.prds((0x8000, 0x1000))
    rig.taskfile(count=8, lba=0)
    rig.command(0xC8)
    rig.start()
    assert rig.channel.peek(STATUS, "command") == rig.channel.peek(0, "control")
    rig.settle()
    assert rig.pin.level
    assert rig.channel.peek(STATUS, "command") is None and rig.channel.peek(0, "control") == 0x50
    assert rig.channel.read(STATUS, 1, "command") == 0x50
    assert rig.channel.peek(STATUS, "command") == 0x50 and not rig.pin.level


def test_device_is_no_plain_register_where_no_drive_is() -> None:
    """9.16.1: an absent drive 1 reads 00h - a write of 00h selects drive 0 all the same."""
    rig = disk()
    rig.write(DEVICE, 0xA0)
    assert rig.channel.peek(DEVICE, "command") == 0xA0
    rig.write(DEVICE, 0xB0)
    assert rig.read(DEVICE) == 0x00 and rig.channel.peek(DEVICE, "command") is None
    rig.write(DEVICE, 0x00)
    assert rig.channel.peek(STATUS, "command") == 0x50
