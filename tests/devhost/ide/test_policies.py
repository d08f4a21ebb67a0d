"""Migration in the middle of a command, at the registers, by policy (hardware-cases 7 and 8).

A migration here is what the machine does: pause, let requests end, save, load into a fresh channel that
is paused, resume. The scenarios are those of test_state.py: each is run undisturbed, then with a
migration at each of its points. What the guest reads, its memory, the number of interrupts and the sense
data must be the same, or differ as docs/migration.md says.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import pytest

from coordinator.contract.drives import DrivePhase, DrivePolicy, Incomplete, Stream
from coordinator.contract.errors import RecordError
from coordinator.contract.state import pack, unpack_any
from devhost.ide.atapi import AtapiDrive
from devhost.ide.channel import IdeChannel
from devhost.ide.drive import Drive
from devhost.ide.records import AtapiState, ChannelRecord, OldAtapiState, RegisterState
from devhost.ide.watch import name_of
from tests.devhost.ide import test_state as state
from tests.devhost.ide.rig import (
    ACTIVE,
    BM_INTERRUPT,
    BSY,
    COUNT,
    DRQ,
    ERR,
    ERROR,
    SRST,
    START,
    TO_MEMORY,
    Backend,
    Rig,
    atapi,
    cdrom,
    disk,
)
from tests.devhost.ide.test_state import CD_SCENARIOS, DISK_SCENARIOS, Point, Scenario, check, play

V0 = Stream.V0
RESTART, FAIL, DROP = Incomplete.RESTART, Incomplete.ERROR, Incomplete.DROP
READ_10 = (0x28, 0, 0, 0, 0, 30, 0, 0, 2)
READ_CD = (0xBE, 0, 0, 0, 0, 30, 0, 0, 2, 0x10)
INQUIRY = (0x12, 0, 0, 0, 36)
REQUEST_SENSE = (0x03, 0, 0, 0, 18)
GET_EVENT_STATUS = (0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)
NO_SEEK_COMPLETE = (3, 0x02, 0x00)
#: where the data of these tests goes
WHERE, ROOM = 0x8000, 0x1000


def small_cd() -> Rig:
    return cdrom(request_limit=2048)


def small_disk() -> Rig:
    return disk(request_limit=512)


def ids(scenario: Scenario) -> str:
    return scenario.__name__


# ---- carry -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scenario", CD_SCENARIOS, ids=ids)
def test_carry_changes_nothing_for_packet_commands(scenario: Scenario) -> None:
    check(small_cd, scenario, Rig.migrate, most=20)


@pytest.mark.parametrize("scenario", DISK_SCENARIOS, ids=ids)
def test_carry_changes_nothing_for_disks(scenario: Scenario) -> None:
    """Read, write and flush, DMA and PIO."""
    check(small_disk, scenario, Rig.migrate, most=20)


def get_event_status_dma(rig: Rig, point: Point) -> Any:
    """The queue gives each event once."""
    atapi(rig).open_tray()
    atapi(rig).close_tray()
    seen = []
    for _ in range(3):
        rig.prds((WHERE, 8))
        state.packet(rig, point, *GET_EVENT_STATUS, dma=True)
        rig.start()
        point()
        seen.append((rig.memory.read(WHERE, 8), rig.status, rig.bm_status))
        rig.bm_command(0)
    return seen


def test_carry_keeps_events() -> None:
    check(small_cd, get_event_status_dma, Rig.migrate)
    (seen, *_), _ = play(small_cd, get_event_status_dma, lambda at: True, Rig.migrate)
    # MMC-5 table 256: the medium is gone, then there is a new one, then nothing has changed
    assert [data[4] & 0xF for data, _, _ in seen] == [3, 2, 0]


# ---- restart -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("scenario", [s for s in CD_SCENARIOS if s is not state.request_sense_dma], ids=ids)
def test_restart_changes_nothing_without_side_effects(scenario: Scenario) -> None:
    check(small_cd, scenario, partial(Rig.migrate, stream=V0, incomplete=RESTART), most=20)


def window(rig: Rig, *packet: int, length: int = ROOM) -> None:
    """A packet command by DMA, all but the start of the bus master, in a driver's order."""
    rig.prds((WHERE, length))
    rig.channel.write(2, 1, 0x06, "busmaster")
    rig.bm_command(TO_MEMORY)
    rig.packet(*packet, dma=True)
    rig.settle()
    assert name_of(rig.drive()) is DrivePhase.PACKET_COMPLETE


def start(rig: Rig) -> None:
    rig.bm_command(TO_MEMORY | START)
    rig.settle()


def data(rig: Rig, length: int) -> bytes:
    return rig.memory.read(WHERE, length)


def succeeded(rig: Rig) -> bool:
    return rig.pin.level and rig.bm_status & BM_INTERRUPT != 0 and rig.status & (BSY | DRQ | ERR) == 0


def test_restart_loses_the_sense_of_request_sense() -> None:
    """The source has given its sense away when it evaluated the packet (SPC-3 6.27): what full beats."""
    found = {}
    for stream in Stream:
        rig = cdrom()
        rig.packet(0xFF)
        assert rig.status & ERR
        window(rig, *REQUEST_SENSE, length=18)
        rig.migrate(stream, RESTART)
        start(rig)
        assert succeeded(rig)
        reply = data(rig, 18)
        found[stream] = (reply[2] & 0xF, reply[12])
    assert found == {Stream.FULL: (5, 0x20), V0: (0, 0)}


def test_restart_loses_the_event_of_get_event_status() -> None:
    found = {}
    for stream in Stream:
        rig = cdrom()
        atapi(rig).open_tray()
        window(rig, *GET_EVENT_STATUS, length=8)
        rig.migrate(stream, RESTART)
        start(rig)
        assert succeeded(rig)
        found[stream] = data(rig, 8)[4] & 0xF
    assert found == {Stream.FULL: 3, V0: 0}


# ---- error -------------------------------------------------------------------------------------------
COMMANDS = {"READ(10)": READ_10, "READ CD": READ_CD, "INQUIRY": INQUIRY, "REQUEST SENSE": REQUEST_SENSE}


@pytest.mark.parametrize("packet", COMMANDS.values(), ids=COMMANDS.keys())
def test_error_is_given_once_and_the_retry_succeeds(packet: tuple[int, ...]) -> None:
    rig = cdrom()
    before = bytes(rig.memory.ram[WHERE:])
    window(rig, *packet)
    pulses = rig.pin.pulses

    def still() -> None:
        assert not rig.pin.level and not rig.bm_status & BM_INTERRUPT
        assert rig.alternate == 0x58  # DRDY, DSC, DRQ: as the source left it

    rig.migrate(V0, FAIL, before_start=still)
    assert rig.pin.level and rig.pin.pulses == pulses + 1
    start(rig)  # the guest knows of nothing yet
    assert rig.bm_status & (BM_INTERRUPT | ACTIVE) == BM_INTERRUPT | ACTIVE
    rig.bm_command(0)
    assert rig.status & (BSY | DRQ | ERR) == ERR
    assert (rig.read(ERROR), rig.read(COUNT)) == (0x30, 0x03)  # sense key 3; I/O and C/D: command ended
    assert bytes(rig.memory.ram[WHERE:]) == before
    assert rig.sense() == NO_SEEK_COMPLETE
    assert rig.sense() == (0, 0, 0)
    window(rig, *packet)
    start(rig)
    assert succeeded(rig)
    expected = cdrom()
    window(expected, *packet)
    start(expected)
    assert data(rig, ROOM) == data(expected, ROOM) != bytes(ROOM)


@pytest.mark.parametrize("hits", [1, 5, 12])
def test_error_hits_every_retry_that_is_migrated_again(hits: int) -> None:
    """Each costs the guest one attempt: a driver that gives up after some of them reports an I/O error."""
    rig = cdrom()
    for _ in range(hits):
        window(rig, *READ_10)
        rig.migrate(V0, FAIL)
        start(rig)
        rig.bm_command(0)
        assert rig.status & ERR and rig.sense() == NO_SEEK_COMPLETE
    window(rig, *READ_10)
    start(rig)
    assert succeeded(rig) and data(rig, 4096) == rig.backend().image[30 * 2048 : 32 * 2048]


def by_pio(scenario: Scenario) -> bool:
    return not scenario.__name__.endswith(("_dma", "_end"))


@pytest.mark.parametrize("scenario", [s for s in CD_SCENARIOS if by_pio(s)], ids=ids)
@pytest.mark.parametrize("incomplete", [FAIL, DROP], ids=lambda choice: choice.value)
def test_pio_is_not_touched(incomplete: Incomplete, scenario: Scenario) -> None:
    check(small_cd, scenario, partial(Rig.migrate, stream=V0, incomplete=incomplete), most=15)


def test_the_error_needs_the_machine_to_start_once() -> None:
    """A destination that is stopped, sent on and started elsewhere gives one error, there."""
    rig = cdrom()
    window(rig, *READ_10)
    pulses = rig.pin.pulses

    def send_on() -> None:
        assert name_of(rig.drive()) is DrivePhase.INCOMPLETE
        record = unpack_any(pack(rig.channel.save()), ChannelRecord)
        rig.channel = IdeChannel(rig.pin, rig.memory, rig.make())
        rig.channel.pause()
        rig.channel.load(record)
        assert rig.pin.pulses == pulses

    rig.migrate(V0, FAIL, before_start=send_on)
    assert rig.pin.pulses == pulses + 1
    rig.channel.pause()
    rig.channel.resume()
    assert rig.pin.pulses == pulses + 1
    assert rig.status & ERR and rig.sense() == NO_SEEK_COMPLETE


# ---- drop --------------------------------------------------------------------------------------------
def device_reset(rig: Rig) -> None:
    rig.command(0x08)


def software_reset(rig: Rig) -> None:
    rig.control(SRST)
    rig.control(0)


@pytest.mark.parametrize("packet", COMMANDS.values(), ids=COMMANDS.keys())
@pytest.mark.parametrize("recover", [device_reset, software_reset])
def test_drop_loses_the_dma_and_a_reset_recovers(
    recover: Callable[[Rig], None], packet: tuple[int, ...]
) -> None:
    rig = cdrom()
    before = bytes(rig.memory.ram[WHERE:])
    window(rig, *packet)
    pulses = rig.pin.pulses
    rig.migrate(V0, DROP)
    start(rig)
    for stream, incomplete in ((Stream.FULL, FAIL), (V0, RESTART)):  # lost is lost, whatever comes after
        assert name_of(rig.drive()) is DrivePhase.LOST
        assert rig.alternate == 0x58 and rig.bm_status & (ACTIVE | BM_INTERRUPT) == ACTIVE
        assert rig.pin.pulses == pulses and bytes(rig.memory.ram[WHERE:]) == before
        assert rig.words(2) == b"\xff" * 4
        rig.migrate(stream, incomplete)
    rig.command(0xA0)  # not taken while DRQ is set
    assert name_of(rig.drive()) is DrivePhase.LOST
    rig.bm_command(0)
    recover(rig)
    assert name_of(rig.drive()) is DrivePhase.IDLE and not rig.alternate & (BSY | DRQ)
    window(rig, *READ_10)
    start(rig)
    assert succeeded(rig) and data(rig, 4096) == rig.backend().image[30 * 2048 : 32 * 2048]


# ---- version 0 beside the window -----------------------------------------------------------------------
def away_from_the_window(rig: Rig) -> None:
    if name_of(rig.drive()) is not DrivePhase.PACKET_COMPLETE:
        rig.migrate(V0, DROP)


@pytest.mark.parametrize("scenario", [*CD_SCENARIOS, get_event_status_dma], ids=ids)
def test_v0_loses_nothing_outside_the_window(scenario: Scenario) -> None:
    """Between commands, in a packet, in a PIO burst, and once DMA has begun (the source ends that). A buffer
    that a packet has filled from the medium counts as the window."""

    def reload(rig: Rig) -> None:
        if not (name_of(rig.drive()) is DrivePhase.MEDIUM and rig.drive().use_dma):
            away_from_the_window(rig)

    check(small_cd, scenario, reload, most=20)


def test_v0_with_nothing_under_way_is_full() -> None:
    """Sense, unit attention, events, tray, lock, modes and registers."""
    rigs = {}
    for stream in Stream:
        rig = rigs[stream] = Rig(lambda: (AtapiDrive(None), None))
        drive = atapi(rig)
        rig.packet(0x1E, 0, 0, 0, 1)
        drive.open_tray(force=True)
        rig.packet(0x28, 0, 0, 0, 9, 9, 9, 9, 9)
        drive.close_tray()
        drive.insert(Backend(bytes(2048 * 4)))
        rig.make = lambda: (AtapiDrive(Backend(bytes(2048 * 4))), None)
        rig.migrate(stream)
        atapi(rig).policy = DrivePolicy()
    full, old = (atapi(rigs[stream]).save() for stream in (Stream.FULL, V0))
    assert isinstance(full, AtapiState) and isinstance(old, AtapiState)
    # the packet of the last command is history
    assert msgspec.structs.replace(full, packet=bytes(12), packet_filled=0, byte_limit=0) == old


def test_a_transfer_under_way_ends_before_v0_is_saved() -> None:
    """As emulators of the time did: the guest gets its data and its interrupt."""
    rig = small_cd()
    window(rig, *READ_10)
    rig.bm_command(TO_MEMORY | START)
    rig.migrate(V0, DROP)
    assert succeeded(rig) and data(rig, 4096) == rig.backend().image[30 * 2048 : 32 * 2048]


def test_restart_cannot_evaluate_what_data_has_replaced() -> None:
    """The table was too short: half of the data has moved, and the buffer is no packet any more."""
    rig = cdrom()
    window(rig, *READ_10, length=2048)
    start(rig)
    assert name_of(rig.drive()) is DrivePhase.DMA_STALLED
    rig.migrate(V0, RESTART)
    assert rig.status & ERR and rig.sense() == NO_SEEK_COMPLETE


# ---- the record ----------------------------------------------------------------------------------------
def test_what_version_0_has() -> None:
    """docs/migration.md names these; none of them says what a DMA command was."""
    registers = {"current", "previous", "device", "status", "error", "intrq", "power"}
    assert set(RegisterState.__struct_fields__) == registers
    assert set(OldAtapiState.__struct_fields__) == registers | {"unit", "pio"}
    assert (OldAtapiState.kind, OldAtapiState.version, AtapiState.version) == ("ide-cd", 0, 1)
    rig = cdrom()
    window(rig, *READ_10)
    rig.drive().policy = DrivePolicy(stream=V0)
    old = rig.drive().save()
    assert isinstance(old, OldAtapiState) and old.pio is not None
    assert old.pio.buffer == bytes(READ_10).ljust(12, b"\0")
    assert (old.pio.offset, old.pio.remaining, old.pio.position, old.pio.end) == (0, 0, 12, 12)


def test_v0_of_a_drive_at_work_is_refused() -> None:
    rig = cdrom()
    rig.packet(*READ_10)
    rig.drive().policy = DrivePolicy(stream=V0)
    with pytest.raises(RecordError, match="busy"):
        rig.channel.save()


def old_record(rig: Rig, *packet: int) -> dict[str, Any]:
    """Version 0 in the window, as fields."""
    window(rig, *packet)
    rig.drive().policy = DrivePolicy(stream=V0)
    fields: dict[str, Any] = msgspec.to_builtins(rig.drive().save(), builtin_types=(bytes,))
    return fields


@pytest.mark.parametrize(
    "change",
    [
        {"then": "what"},
        {"position": 13},
        {"position": 11},
        {"then": "reply"},
        {"then": "reply", "position": 0, "byte_limit": 0},
        {"then": "reply", "position": 0, "offset": 1 << 40},
        {"then": "reply", "position": 0, "end": 13},
        {"then": "reply", "position": 0, "remaining": 7},
        {"then": "reply", "position": 0, "shape": 0x90},
        {"buffer": b"x" * 13, "position": 13, "end": 13},
    ],
)
def test_impossible_old_records_are_refused(change: dict[str, Any]) -> None:
    rig = cdrom()
    fields = old_record(rig, *READ_10)
    fields["pio"].update(change)
    blob = pack(msgspec.convert(fields, OldAtapiState))
    with pytest.raises(RecordError):
        rig.drive().load(blob)


def test_a_whole_packet_of_a_pio_command_is_refused() -> None:
    rig = cdrom()
    fields = old_record(rig, *READ_10)
    fields["current"] = (0, *fields["current"][1:])  # features: no DMA
    with pytest.raises(RecordError):
        rig.drive().load(pack(msgspec.convert(fields, OldAtapiState)))


@pytest.mark.parametrize(("make", "kind", "known"), [(cdrom, "ide-cd", "0 and 1"), (disk, "ide-hd", "1")])
def test_newer_versions_are_refused_by_name(make: Callable[[], Rig], kind: str, known: str) -> None:
    rig = make()
    blob = msgspec.msgpack.encode({"kind": kind, "version": 2, "data": {}})
    with pytest.raises(RecordError, match=f"record of {kind}: version 2, this build knows {known}"):
        rig.drive().load(blob)


def test_each_drive_of_a_channel_has_its_own_stream() -> None:
    first, second = Backend(bytes(2048 * 64)), Backend(bytes(range(256)) * 8 * 64)
    drives: list[Drive] = []

    def make() -> tuple[Drive, Drive]:
        drives[:] = [AtapiDrive(first), AtapiDrive(second)]
        return drives[0], drives[1]

    rig = Rig(make)
    drives[1].policy = DrivePolicy(stream=V0)
    record = rig.channel.save()
    kinds = [type(unpack_any(blob, AtapiState, OldAtapiState)) for blob in record.drives if blob]
    assert kinds == [AtapiState, OldAtapiState]
    IdeChannel(rig.pin, rig.memory, rig.make()).load(record)


# ---- at random ---------------------------------------------------------------------------------------
def random_regions(dice: random.Random, total: int) -> list[tuple[int, int]]:
    """PRD entries of even lengths, for ``total`` bytes and a little more."""
    regions, at, left = [], 0x8000, total
    while left > 0:
        length = min(0xFFFE, 2 * dice.randint(1, max(1, total // 4)))
        regions.append((at, length))
        at += length + 2 * dice.randint(0, 64)
        left -= length
    return regions


def random_scenario(seed: int) -> Scenario:
    """Commands drawn from a seed, the same at each call."""

    def scenario(rig: Rig, point: Point) -> Any:
        dice = random.Random(seed)
        log: list[Any] = []
        for _ in range(dice.randint(1, 4)):
            blocks, lba = dice.randint(1, 4), dice.randint(0, 299)
            fields = dice.choice((0x10, 0xF8, 0x20, 0))
            packet = dice.choice(
                (
                    (0x28, 0, 0, 0, lba >> 8, lba & 255, 0, 0, blocks),
                    (0xBE, 0, 0, 0, lba >> 8, lba & 255, 0, 0, blocks, fields),
                    INQUIRY, (0x25,), (0x43, 0, 0, 0, 0, 0, 0, 0, 12), (0x00,), (0xEE,),
                )
            )  # fmt: skip
            if dice.random() < 0.6:
                rig.prds(*random_regions(dice, 2352 * blocks))
                state.packet(rig, point, *packet, dma=True)
                if dice.random() < 0.5:
                    state.finish(rig, point)
                rig.start()
                point()
                state.finish(rig, point)
                log.append(state.ended(rig, point))
            else:
                state.packet(rig, point, *packet, limit=dice.choice((2, 8, 100, 2048, 4097, 0xFFFF)))
                log.append(state.blocks(rig, point))
                log.append(state.ended(rig, point))
        return log

    return scenario


POLICIES: dict[str, Callable[[Rig], None]] = {
    "carry": Rig.migrate,
    "restart": partial(Rig.migrate, stream=V0, incomplete=RESTART),
    "outside": away_from_the_window,
}


@pytest.mark.parametrize("policy", ["carry", "restart"])
@pytest.mark.parametrize("seed", range(12))
def test_any_commands_at_any_points(seed: int, policy: str) -> None:
    scenario = random_scenario(seed)
    plain, points = play(small_cd, scenario, lambda at: False)
    dice = random.Random(seed)
    for share in (2 / points, 0.1, 0.5):
        chosen = {at for at in range(points) if dice.random() < share}
        assert play(small_cd, scenario, chosen.__contains__, POLICIES[policy])[0] == plain, sorted(chosen)
