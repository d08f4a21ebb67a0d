"""Save and load at every point of a command (hardware-cases 7 and 8).

A scenario calls ``point()`` between all of its steps. It is run once undisturbed, then with a reload
into a fresh channel at each single point, and once with a reload at every point. What it returns,
guest memory, the medium, the number of interrupts and the sense data must be the same.

The data port is 16 bits wide, so a packet can be cut after 2, 4, 6, 8 and 10 bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from coordinator.contract.errors import RecordError
from coordinator.contract.state import pack, unpack
from devhost.ide.ata import AtaDrive
from devhost.ide.atapi import AtapiDrive
from devhost.ide.channel import IdeChannel
from devhost.ide.phases import Phase
from devhost.ide.records import ChannelRecord
from tests.devhost.ide.rig import (
    BSY,
    COUNT,
    DRQ,
    ERR,
    ERROR,
    HIGH,
    LOW,
    MID,
    SRST,
    Backend,
    Rig,
    atapi,
    cdrom,
    disk,
    pattern,
)

Point = Callable[[], None]
Scenario = Callable[[Rig, Point], Any]


def send(rig: Rig, point: Point, data: bytes, step: int = 2) -> None:
    for at in range(0, len(data), step):
        rig.send_words(data[at : at + step])
        point()


def packet(rig: Rig, point: Point, *command: int, dma: bool = False, limit: int = 0xFFFE) -> None:
    point()
    rig.begin_packet(dma, limit)
    point()
    send(rig, point, bytes(command).ljust(12, b"\0"))


def finish(rig: Rig, point: Point) -> None:
    """Complete one request after the other."""
    while rig.alternate & BSY:
        backend = rig.backend()
        cookie = next(iter(backend.pending))
        backend.finish(cookie)
        rig.drive().complete(cookie, 0)
        point()


def blocks(rig: Rig, point: Point) -> tuple[bytes, list[int]]:
    """Read word by word until the command ends."""
    data, log = bytearray(), []
    finish(rig, point)
    while (status := rig.status) & DRQ:
        log += [status, rig.read(COUNT), rig.byte_count]
        point()
        for _ in range((rig.byte_count + 1) // 2):
            data += rig.words(1)
            point()
        finish(rig, point)
    return bytes(data), [*log, status, rig.read(COUNT), rig.read(ERROR)]


def ended(rig: Rig, point: Point) -> list[int]:
    """Interrupt, registers, then the sense data."""
    point()
    log = [rig.pin.level, rig.bm_status, rig.read(ERROR), rig.read(COUNT), rig.status, rig.pin.level]
    point()
    rig.bm_command(0)
    point()
    packet(rig, point, 0x03, 0, 0, 0, 18)
    return [*log, *blocks(rig, point)[0]]


def read_10_dma(rig: Rig, point: Point) -> Any:
    """Six blocks over entries that end inside blocks; requests of one block, so that every entry is met."""
    rig.prds((0x8000, 3000), (0xA000, 1096), (0xC000, 2048), (0xD000, 100), (0xE000, 6044))
    point()
    packet(rig, point, 0x28, 0, 0, 0, 0, 30, 0, 0, 6, dma=True)
    rig.start()
    point()
    finish(rig, point)
    return ended(rig, point)


def read_10_dma_past_the_end(rig: Rig, point: Point) -> Any:
    packet(rig, point, 0x28, 0, 0, 0, 1, 0x2B, 0, 0, 2, dma=True)
    rig.start()
    return ended(rig, point)


def read_cd_dma(rig: Rig, point: Point) -> Any:
    rig.prds((0x8000, 2352), (0xA000, 10), (0xC000, 2342))
    packet(rig, point, 0xBE, 0, 0, 0, 0, 30, 0, 0, 2, 0xF8, dma=True)
    point()
    finish(rig, point)
    rig.start()
    return ended(rig, point)


def inquiry_dma(rig: Rig, point: Point) -> Any:
    rig.prds((0x8000, 20), (0xA000, 16))
    packet(rig, point, 0x12, 0, 0, 0, 36, dma=True)
    rig.start()
    return ended(rig, point)


def inquiry_pio(rig: Rig, point: Point) -> Any:
    packet(rig, point, 0x12, 0, 0, 0, 35, limit=17)
    return blocks(rig, point), ended(rig, point)


def request_sense_pio(rig: Rig, point: Point) -> Any:
    """Sense after CHECK CONDITION survives, is given once (hardware-cases 7)."""
    packet(rig, point, 0x28, 0, 0xFF, 0, 0, 0, 0, 0, 1)
    point()
    status = rig.status
    packet(rig, point, 0x03, 0, 0, 0, 18)
    return status, blocks(rig, point), ended(rig, point)


def request_sense_dma(rig: Rig, point: Point) -> Any:
    packet(rig, point, 0xFF)
    rig.prds((0x8000, 18))
    packet(rig, point, 0x03, 0, 0, 0, 18, dma=True)
    rig.start()
    return ended(rig, point)


def read_10_pio(rig: Rig, point: Point) -> Any:
    packet(rig, point, 0x28, 0, 0, 0, 0, 7, 0, 0, 1, limit=1000)
    return blocks(rig, point), ended(rig, point)


def read_cd_pio(rig: Rig, point: Point) -> Any:
    packet(rig, point, 0xBE, 0, 0, 0, 0, 7, 0, 0, 40, 0x20, limit=100)
    return blocks(rig, point), ended(rig, point)


def mode_select(rig: Rig, point: Point) -> Any:
    packet(rig, point, 0x55, 0x10, 0, 0, 0, 0, 0, 0, 20, limit=6)
    status = rig.status
    send(rig, point, bytes(8) + bytes([0x01, 10, 0x20, 9]) + bytes(8))
    packet(rig, point, 0x5A, 0, 0x01, 0, 0, 0, 0, 0, 64)
    return status, blocks(rig, point), ended(rig, point)


def events(rig: Rig, point: Point) -> Any:
    """Tray, lock, events and attention survive (hardware-cases 7)."""
    seen = []
    packet(rig, point, 0x1E, 0, 0, 0, 1)
    atapi(rig).open_tray()
    for opened in (False, True, False):
        if opened:
            atapi(rig).open_tray(force=True)
        else:
            atapi(rig).close_tray()
        packet(rig, point, 0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)
        seen.append(blocks(rig, point))
        packet(rig, point, 0x00)
        seen.append((bytes(ended(rig, point)), []))
    return seen, atapi(rig).locked


CD_SCENARIOS: list[Scenario] = [
    read_10_dma,
    read_10_dma_past_the_end,
    read_cd_dma,
    inquiry_dma,
    inquiry_pio,
    request_sense_pio,
    request_sense_dma,
    read_10_pio,
    read_cd_pio,
    mode_select,
    events,
]


def disk_read_dma(rig: Rig, point: Point) -> Any:
    rig.prds((0x8000, 700), (0xA000, 324), (0xC000, 2048))
    rig.taskfile(count=6, lba=11)
    point()
    rig.command(0xC8)
    point()
    rig.start()
    point()
    finish(rig, point)
    return rig.pin.level, rig.bm_status, rig.status


def disk_write_dma(rig: Rig, point: Point) -> Any:
    rig.memory.write(0x8000, pattern(0x8000, b"new"))
    rig.prds((0x8000, 700), (0xA000, 324), (0xC000, 2048))
    rig.taskfile48(6, 11)
    point()
    rig.command(0x35)
    point()
    rig.start(to_memory=False)
    point()
    finish(rig, point)
    return rig.pin.level, rig.bm_status, rig.status


def disk_read_multiple(rig: Rig, point: Point) -> Any:
    rig.taskfile(count=2)
    rig.command(0xC6)
    point()
    rig.taskfile(count=3, lba=5)
    rig.command(0xC4)
    data = bytearray()
    finish(rig, point)
    while rig.status & DRQ:
        for _ in range(16):
            data += rig.words(16)
            point()
    return bytes(data), rig.pin.level, rig.status


def disk_write_pio(rig: Rig, point: Point) -> Any:
    rig.taskfile(features=0x82)
    rig.command(0xEF)
    finish(rig, point)
    log = [rig.status]
    rig.taskfile(count=2, lba=5)
    point()
    rig.command(0x30)
    for number in range(2):
        log.append(rig.status)
        send(rig, point, bytes(pattern(512, b"%d" % number)), step=32)
    finish(rig, point)
    return log, rig.pin.level, rig.status


def disk_flush_and_verify(rig: Rig, point: Point) -> Any:
    rig.command(0xE7)
    point()
    finish(rig, point)
    log = [rig.status]
    rig.taskfile(count=200, lba=1)
    rig.command(0x40)
    point()
    finish(rig, point)
    return log, rig.status, rig.pin.level


def disk_taskfile(rig: Rig, point: Point) -> Any:
    """Both contents of the registers, HOB, nIEN and the selection."""
    for value in (0x1234, 0x5678):
        for offset in (COUNT, LOW, MID, HIGH):
            rig.write(offset, value >> 8)
            point()
            rig.write(offset, value & 0xFF)
    rig.control(0x80 | 2)
    rig.command(0xE5)
    point()
    log = [rig.read(at) for at in (COUNT, LOW, MID, HIGH)] + [rig.pin.level]
    rig.control(0)
    point()
    return log, rig.pin.level, rig.status


DISK_SCENARIOS: list[Scenario] = [
    disk_read_dma,
    disk_write_dma,
    disk_read_multiple,
    disk_write_pio,
    disk_flush_and_verify,
    disk_taskfile,
]


def play(
    make: Callable[[], Rig],
    scenario: Scenario,
    reload_at: Callable[[int], bool],
    reload: Callable[[Rig], None] = Rig.reload,
) -> tuple[Any, int]:
    """(what came out, number of points)"""
    rig = make()
    count = 0

    def point() -> None:
        nonlocal count
        if reload_at(count):
            reload(rig)
        count += 1

    result = scenario(rig, point)
    backend = rig.backend()
    return (result, rig.pin.pulses, bytes(rig.memory.ram), bytes(backend.image)), count


def check(
    make: Callable[[], Rig], scenario: Scenario, reload: Callable[[Rig], None] = Rig.reload, most: int = 60
) -> None:
    plain, points = play(make, scenario, lambda at: False)
    assert points > 3
    stride = 1 + points // most
    for chosen in range(0, points, stride):
        assert play(make, scenario, chosen.__eq__, reload)[0] == plain, chosen
    assert play(make, scenario, lambda at: True, reload)[0] == plain


@pytest.mark.parametrize("scenario", CD_SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_point_of_a_packet_command(scenario: Scenario) -> None:
    check(lambda: cdrom(request_limit=2048), scenario)


@pytest.mark.parametrize("scenario", DISK_SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_every_point_of_a_disk_command(scenario: Scenario) -> None:
    check(lambda: disk(request_limit=512), scenario)


def test_scenarios_did_what_they_say() -> None:
    """The comparison above would also hold for a drive that does nothing."""
    (result, pulses, ram, image), _ = play(lambda: cdrom(request_limit=2048), read_10_dma, lambda at: True)
    data = ram[0x8000 : 0x8000 + 3000] + ram[0xA000 : 0xA000 + 1096] + ram[0xC000 : 0xC000 + 2048]
    data += ram[0xD000 : 0xD000 + 100] + ram[0xE000 : 0xE000 + 6044]
    assert data == image[30 * 2048 : 36 * 2048]
    assert result[:6] == [True, 0x04, 0, 3, 0x50, False]
    (result, *_), _ = play(cdrom, read_10_dma_past_the_end, lambda at: True)
    assert (result[6 + 2] & 0xF, result[6 + 12]) == (5, 0x21)
    (_, _, ram, image), _ = play(lambda: disk(request_limit=512), disk_write_dma, lambda at: True)
    data = ram[0x8000 : 0x8000 + 700] + ram[0xA000 : 0xA000 + 324] + ram[0xC000 : 0xC000 + 2048]
    assert image[11 * 512 : 17 * 512] == data


def test_interrupt_pending_is_not_raised_twice() -> None:
    rig = cdrom()
    rig.packet(0x00)
    assert rig.pin.changes[-1]
    changes = len(rig.pin.changes)
    rig.reload()
    assert len(rig.pin.changes) == changes and rig.bm_status & 0x04
    assert rig.status == 0x50 and not rig.pin.level


def test_reset_held_over_a_reload() -> None:
    rig = disk()
    rig.control(SRST)
    rig.reload()
    assert rig.alternate & BSY
    rig.control(0)
    assert rig.status == 0x50


def test_pause_holds_new_requests_and_lets_the_one_in_flight_end() -> None:
    rig = cdrom(request_limit=2048)
    rig.prds((0x8000, 8192))
    rig.packet(0x28, 0, 0, 0, 0, 0, 0, 0, 4, dma=True)
    rig.start()
    rig.channel.pause()
    assert not rig.channel.paused()
    rig.settle()
    assert rig.channel.paused() and rig.alternate & BSY
    assert len(rig.backend().log) == 1
    rig.reload()
    rig.settle()
    assert rig.memory.ram[0x8000:0xA000] == rig.backend().image[:8192]
    assert rig.status & (BSY | ERR) == 0


def test_pause_then_resume() -> None:
    rig = disk()
    rig.channel.pause()
    rig.taskfile(count=1)
    rig.command(0x20)
    assert rig.channel.paused() and rig.backend().log == []
    rig.channel.resume()
    rig.settle()
    assert rig.words(256) == rig.backend().image[:512]


def test_loading_while_paused_issues_nothing_until_resumed() -> None:
    rig = disk()
    rig.taskfile(count=1)
    rig.command(0x20)
    record = rig.channel.save()
    backend = Backend(rig.backend().image)
    other = Rig(lambda: (AtaDrive(backend), None))
    other.channel.pause()
    other.channel.load(record)
    assert backend.log == []
    other.channel.resume()
    other.settle()
    assert other.words(256) == backend.image[:512]


def load_changed(rig: Rig, change: dict[str, Any]) -> None:
    """Load the channel's record with fields of drive 0 changed ("unit.X": of the part)."""
    record = rig.channel.save()
    assert record.drives[0] is not None
    envelope = msgspec.msgpack.decode(record.drives[0])  # kind, version, fields
    for name, value in change.items():
        *parts, last = name.split(".")
        inner = envelope["data"]
        for part in parts:
            inner = inner[part]
        assert last in inner
        inner[last] = value
    changed = msgspec.structs.replace(record, drives=(msgspec.msgpack.encode(envelope), record.drives[1]))
    IdeChannel(rig.pin, rig.memory, rig.make()).load(changed)


@pytest.mark.parametrize(
    "drive,change",
    [
        ("disk", {"position": 9}),
        ("disk", {"phase": "pio-in"}),
        ("disk", {"phase": "packet"}),
        ("disk", {"phase": "unheard-of"}),
        ("disk", {"phase": "medium"}),
        ("disk", {"request": "read", "offset": 0, "remaining": 1 << 40}),
        ("disk", {"request": "read", "phase": "medium", "remaining": 100}),
        ("disk", {"request": "write", "phase": "medium", "to_host": False, "remaining": 512}),
        ("disk", {"request": "flush", "phase": "medium", "direct": True}),
        ("disk", {"phase": "dma-wait"}),
        ("disk", {"opcode": 0xC4}),
        ("disk", {"heads": 0}),
        ("disk", {"power": "off"}),
        ("disk", {"status": 256}),
        ("disk", {"buffer": b"x" * (1 << 20)}),
        ("cd", {"unit.attention": ["what"]}),
        ("cd", {"packet_filled": 13}),
        ("cd", {"phase": "packet", "packet_filled": 12}),
        ("cd", {"phase": "incomplete"}),
        ("disk", {"phase": "incomplete", "use_dma": True}),
        ("cd", {"request": "write"}),
        ("cd", {"shape": 0x90}),
        ("cd", {"shape": 0x01}),
        ("cd", {"phase": "pio-in", "opcode": 0xA0, "buffer": b"xx", "burst_end": 2, "byte_limit": 0}),
    ],
)
def test_impossible_records_are_refused(drive: str, change: dict[str, Any]) -> None:
    rig = disk() if drive == "disk" else cdrom()
    with pytest.raises(RecordError):
        load_changed(rig, change)


def test_records_of_other_machines_are_refused() -> None:
    with pytest.raises(RecordError):
        disk().channel.load(cdrom().channel.save())
    with pytest.raises(RecordError):
        cdrom().channel.load(disk().channel.save())
    with pytest.raises(RecordError):
        Rig(lambda: (None, None)).channel.load(disk().channel.save())
    blob = pack(disk().channel.save())
    with pytest.raises(RecordError):
        unpack(blob[:-3], ChannelRecord)


def test_two_drives_travel_together() -> None:
    first, second = Backend(pattern(64 * 512)), Backend(pattern(40 * 2048))
    rig = Rig(lambda: (AtaDrive(first), AtapiDrive(second)))
    rig.taskfile(count=1, lba=3)
    rig.command(0x20)
    rig.reload()
    assert rig.channel.drives[0] is not None and rig.channel.drives[0].phase is Phase.MEDIUM
    rig.settle()
    assert rig.words(256) == first.image[3 * 512 : 4 * 512]
    rig.packet(0x03, 0, 0, 0, 18, device=1)
    rig.reload()
    assert rig.pio_data()[12] == 0x29
