"""Drain, aim and policies, by the commands of the coordinator and the accesses of a guest; no process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from coordinator.contract import messages
from coordinator.contract.drives import DrivePhase, DrivePolicy, Incomplete, Stream
from coordinator.contract.errors import RecordError, UsageError
from coordinator.contract.messages import SPACE_PORT
from devhost.commands import Commands
from devhost.service import LATER
from tests.devhost.machine import Board

MS = 1_000_000
HD, CD = 0x1F0, 0x170
HD_MASTER, CD_MASTER = 0xC000, 0xC008
DATA, FEATURES, COUNT, LOW, MID, HIGH, DEVICE, COMMAND = range(8)
STATUS, ERROR = COMMAND, FEATURES
BSY, DRQ, ERR = 0x80, 0x08, 0x01
TO_MEMORY, START = 0x08, 0x01
TABLE, WHERE = 0x1000, 0x8000
READ_10 = bytes((0x28, 0, 0, 0, 0, 9, 0, 0, 2, 0, 0, 0))


class Held(Exception):
    """The vCPU waits at this access."""


class Guest:
    """A machine whose guest runs, with its drives' first unit attention taken."""

    def __init__(self) -> None:
        self.board = Board()
        self.host = self.board.host
        self.pc = self.board.pc
        self.pc.drives.as_firmware_leaves_it()
        self.commands = Commands(self.pc)
        self._serial = itertools.count(1)
        self.board.segment.start_time()
        self.packet(bytes((3, 0, 0, 0, 18)))
        self.inp(CD + STATUS)
        self.words(CD, 9)
        self.inp(CD + STATUS)

    def do(self, kind: type[messages.Command], **fields: Any) -> Any:
        """A command of the coordinator, and its answer or LATER."""
        value = self.commands.handle(kind(serial=next(self._serial), **fields))  # type: ignore[arg-type]
        self.board.bus.publish_all()
        return value

    def answer(self) -> Any:
        """The one late answer there is."""
        (value,) = self.host.answers
        self.host.answers.clear()
        return value

    def notice(self) -> Any:
        (value,) = self.host.notices
        self.host.notices.clear()
        return value

    # ---- accesses
    def out(self, port: int, value: int, width: int = 1) -> None:
        data = value.to_bytes(width, "little")
        if self.board.bus.holds(SPACE_PORT, port, data):
            raise Held
        self.board.bus.write(SPACE_PORT, port, width, 1, data)

    def inp(self, port: int) -> int:
        if self.board.bus.holds(SPACE_PORT, port, None):
            raise Held
        return self.board.inp(port)

    def post(self, port: int, value: int, width: int = 1) -> None:
        """A posted write: nobody can hold it."""
        self.board.bus.post(SPACE_PORT, port, width, value)

    def send(self, port: int, data: bytes) -> None:
        if self.board.bus.holds(SPACE_PORT, port, data):
            raise Held
        self.board.bus.write(SPACE_PORT, port, 2, len(data) // 2, data)

    def words(self, port: int, count: int) -> bytes:
        if self.board.bus.holds(SPACE_PORT, port, None):
            raise Held
        return self.board.bus.read(SPACE_PORT, port, 2, count)

    # ---- a driver
    def taskfile(self, base: int, count: int = 0, features: int = 0, limit: int = 0xFFFE) -> None:
        self.post(base + DEVICE, 0xA0 if base == CD else 0xE0)
        self.post(base + FEATURES, features)
        self.post(base + COUNT, count)
        self.post(base + LOW, 0)
        self.post(base + MID, limit & 0xFF if base == CD else 0)
        self.post(base + HIGH, limit >> 8 if base == CD else 0)

    def table(self, master: int, length: int, to_memory: bool = True) -> None:
        self.pc.dma.write(TABLE, WHERE.to_bytes(4, "little") + (length | 0x8000_0000).to_bytes(4, "little"))
        self.post(master + 4, TABLE, 4)
        self.post(master + 2, 0x06)
        self.post(master, TO_MEMORY if to_memory else 0)

    def begin_packet(self, dma: bool = False) -> None:
        self.taskfile(CD, features=int(dma))
        self.out(CD + COMMAND, 0xA0)

    def packet(self, packet: bytes, dma: bool = False) -> None:
        self.begin_packet(dma)
        self.send(CD + DATA, packet.ljust(12, b"\0"))

    def window(self) -> None:
        """READ(10) but for the start of the bus master."""
        self.table(CD_MASTER, 4096)
        self.packet(READ_10, dma=True)

    def start(self, master: int = CD_MASTER, to_memory: bool = True) -> None:
        self.post(master, (TO_MEMORY if to_memory else 0) | START)

    def complete(self) -> None:
        for backend in self.host.backends.values():
            backend.complete_all()

    def phase(self, ident: str = "cd") -> DrivePhase:
        (found,) = [drive for drive in self.do(messages.QueryPhases) if drive["id"] == ident]
        return DrivePhase(found["phase"])

    def image(self, ident: str, start: int, length: int) -> bytes:
        return bytes(self.host.backends[ident].image[start : start + length])

    def close(self) -> None:
        self.board.segment.close()


@pytest.fixture
def guest() -> Any:
    guest = Guest()
    yield guest
    guest.close()


# ---- drain -------------------------------------------------------------------------------------------
def test_nothing_to_drain(guest: Guest) -> None:
    """No policy asks for one."""
    guest.window()
    assert guest.do(messages.DrainDrives) is LATER
    assert guest.answer() == {"drained": True, "cancelled": False, "waited_ns": 0, "drives": []}
    guest.out(HD + COMMAND, 0xE5)


def test_a_drain_lets_the_packet_end_and_no_other_begin(guest: Guest) -> None:
    guest.do(messages.SetDriveProperty, driver="ide-cd", name="migrate-drain", value="100", drive="cd")
    guest.table(CD_MASTER, 4096)
    guest.begin_packet(dma=True)
    assert guest.do(messages.DrainDrives) is LATER
    assert guest.phase() is DrivePhase.PACKET_AWAITED
    guest.send(CD + DATA, READ_10[:4])
    guest.board.advance(3 * MS)
    guest.send(CD + DATA, READ_10[4:])
    guest.start()
    assert not guest.host.answers and guest.phase() is DrivePhase.DMA_TRANSFER
    guest.complete()
    assert guest.answer() == {
        "drained": True, "cancelled": False, "waited_ns": 3 * MS,
        "drives": [{"id": "cd", "phase": "interrupt-pending", "drained": True}],
    }  # fmt: skip
    assert guest.inp(CD + STATUS) & (BSY | DRQ | ERR) == 0
    for _ in range(3):  # the vCPU asks again and again, nothing of it is done
        with pytest.raises(Held):
            guest.begin_packet()
        assert guest.phase() is DrivePhase.IDLE
    guest.out(HD + COMMAND, 0xE5)  # a drive whose policy asks for no drain
    guest.out(CD + COMMAND, 0x08)  # DEVICE RESET
    guest.out(CD + COMMAND, 0x90)
    guest.inp(CD + STATUS)
    guest.do(messages.CancelDrain)
    assert not guest.host.answers  # that was answered long ago
    guest.begin_packet()
    assert guest.phase() is DrivePhase.PACKET_AWAITED


def test_what_stops_and_goes_on_after_a_drain(guest: Guest) -> None:
    """A cancel or a failure of the migration: Run gives the commands back."""
    guest.do(messages.DrainDrives, bound_ms=10)
    assert guest.answer()["drained"]
    with pytest.raises(Held):
        guest.window()
    guest.do(messages.Stop)
    assert guest.do(messages.SaveState)
    with pytest.raises(Held):
        guest.window()
    guest.do(messages.Run)
    guest.window()
    guest.start()
    guest.complete()
    assert guest.pc.dma.read(WHERE, 4096) == guest.image("cd", 9 * 2048, 4096)


def test_at_the_bound_it_says_which_drive_is_where(guest: Guest) -> None:
    guest.do(messages.SetDriveProperty, driver="ide-cd", name="migrate-drain", value="20", drive="cd")
    guest.do(messages.SetDriveProperty, driver="ide-hd", name="migrate-drain", value="50")
    guest.taskfile(HD, count=1)
    guest.out(HD + COMMAND, 0x30)
    guest.window()
    guest.do(messages.DrainDrives)
    guest.board.advance(20 * MS)
    assert not guest.host.answers  # the disk has longer
    guest.board.advance(30 * MS)
    assert guest.answer() == {
        "drained": False, "cancelled": False, "waited_ns": 50 * MS,
        "drives": [
            {"id": "hd", "phase": "pio-out", "drained": False},
            {"id": "cd", "phase": "packet-complete", "drained": False},
        ],
    }  # fmt: skip


def test_a_drain_is_cancelled(guest: Guest) -> None:
    guest.window()
    guest.do(messages.DrainDrives, bound_ms=1000)
    with pytest.raises(UsageError, match="under way"):
        guest.do(messages.DrainDrives, bound_ms=1000)
    guest.do(messages.CancelDrain)
    answer = guest.answer()
    assert answer["cancelled"] and not answer["drained"]
    guest.board.advance(2000 * MS)
    assert not guest.host.answers
    guest.do(messages.CancelDrain)
    guest.start()
    guest.complete()
    guest.inp(CD + STATUS)
    guest.begin_packet()


@pytest.mark.parametrize("kind", [messages.Stop, messages.Run, messages.Reset])
def test_a_drain_is_answered_whatever_comes(guest: Guest, kind: type[messages.Command]) -> None:
    guest.window()
    guest.do(messages.DrainDrives, bound_ms=1000)
    guest.do(kind)
    assert guest.answer()["cancelled"] is (kind is not messages.Stop)


def test_no_drain_while_time_stands_still(guest: Guest) -> None:
    guest.window()
    guest.board.segment.stop_time()
    guest.do(messages.DrainDrives, bound_ms=1000)
    assert guest.answer()["drained"] is False


def test_a_pio_burst_of_a_packet_needs_no_drain(guest: Guest) -> None:
    """The old record holds it; waiting for a vCPU that waits elsewhere could only end at the bound."""
    guest.packet(READ_10)
    guest.complete()
    guest.do(messages.DrainDrives, bound_ms=1000)
    assert guest.answer()["drained"] is True


DISK_COMMANDS = {
    "read pio": (0x20, None), "write pio": (0x30, None), "read dma": (0xC8, True), "write dma": (0xCA, False),
    "flush": (0xE7, None), "verify": (0x40, None),
}  # fmt: skip


@pytest.mark.parametrize(("opcode", "to_memory"), DISK_COMMANDS.values(), ids=DISK_COMMANDS.keys())
def test_a_disk_drains_its_command(guest: Guest, opcode: int, to_memory: bool | None) -> None:
    """Mid-command at every step: after the command, with the data half-way, with the request in flight."""
    guest.pc.dma.write(WHERE, bytes(range(256)) * 2)
    if to_memory is not None:
        guest.table(HD_MASTER, 512, to_memory)
    guest.taskfile(HD, count=1)
    before = guest.image("hd", 0, 512)
    guest.out(HD + COMMAND, opcode)
    guest.do(messages.DrainDrives, bound_ms=1000)
    assert not guest.host.answers
    data = b""
    if to_memory is not None:
        guest.start(HD_MASTER, to_memory)
    elif opcode == 0x30:
        guest.send(HD + DATA, bytes(200))
        guest.send(HD + DATA, bytes(312))
    assert not guest.host.answers
    guest.complete()
    if opcode == 0x20:
        data = guest.words(HD + DATA, 128)
        assert not guest.host.answers
        data += guest.words(HD + DATA, 128)
        assert data == before
    assert guest.answer()["drained"] is True
    with pytest.raises(Held):
        guest.out(HD + COMMAND, opcode)
    assert guest.inp(HD + STATUS) & (BSY | DRQ | ERR) == 0
    if opcode == 0xC8:
        assert guest.pc.dma.read(WHERE, 512) == before
    elif opcode == 0xCA:
        assert guest.image("hd", 0, 512) == bytes(range(256)) * 2
    elif opcode == 0x30:
        assert guest.image("hd", 0, 512) == bytes(512)


# ---- aim ---------------------------------------------------------------------------------------------
def test_caught_in_the_window_by_the_access_that_opens_it(guest: Guest) -> None:
    guest.do(messages.ArmPhase, drive="cd", phase=DrivePhase.PACKET_COMPLETE)
    guest.window()
    assert guest.notice() == messages.PhaseReached(
        drive="cd", phase=DrivePhase.PACKET_COMPLETE, guest_ns=guest.board.clock.now()
    )
    assert guest.host.kept  # the vCPU does not come to the start of the bus master
    for port in (CD + STATUS, CD + ERROR, CD_MASTER, CD_MASTER + 2):
        with pytest.raises(Held):
            guest.inp(port)
    with pytest.raises(Held):
        guest.words(CD + DATA, 1)
    guest.inp(HD + STATUS)
    guest.do(messages.Stop)
    guest.board.advance(60_000 * MS)
    assert guest.phase() is DrivePhase.PACKET_COMPLETE and not guest.host.notices
    guest.do(messages.Run)
    assert not guest.host.kept
    guest.start()
    guest.complete()
    assert guest.inp(CD + STATUS) & ERR == 0
    assert guest.pc.dma.read(WHERE, 4096) == guest.image("cd", 9 * 2048, 4096)


def test_caught_by_a_completion_before_the_interrupt_is_read(guest: Guest) -> None:
    guest.do(messages.ArmPhase, drive="cd", phase=DrivePhase.INTERRUPT_PENDING)
    guest.window()
    guest.start()
    guest.host.kept = False
    guest.complete()
    assert guest.notice().phase is DrivePhase.INTERRUPT_PENDING
    with pytest.raises(Held):
        guest.inp(CD + STATUS)
    guest.do(messages.DisarmPhase)
    assert guest.inp(CD + STATUS) & ERR == 0


def test_nothing_is_in_flight_where_a_transfer_is_caught(guest: Guest) -> None:
    guest.do(messages.ArmPhase, drive="cd", phase=DrivePhase.DMA_TRANSFER)
    guest.window()
    guest.start()
    assert guest.notice().phase is DrivePhase.DMA_TRANSFER
    guest.do(messages.Stop)
    assert guest.phase() is DrivePhase.DMA_TRANSFER and not guest.host.backends["cd"].pending
    guest.do(messages.Run)
    guest.complete()
    assert guest.pc.dma.read(WHERE, 4096) == guest.image("cd", 9 * 2048, 4096)


def test_an_aim_that_is_not_met_says_so_once(guest: Guest) -> None:
    guest.do(messages.ArmPhase, drive="cd", phase=DrivePhase.PACKET_COMPLETE, timeout_ms=40)
    guest.board.advance(40 * MS)
    assert guest.notice() == messages.PhaseMissed(drive="cd", phase=DrivePhase.PACKET_COMPLETE, held=False)
    guest.window()
    guest.board.advance(5000 * MS)
    assert not guest.host.notices


def test_who_is_caught_and_not_stopped_goes_on(guest: Guest) -> None:
    guest.do(messages.ArmPhase, drive="cd", phase=DrivePhase.DMA_TRANSFER, hold_ms=30)
    guest.window()
    guest.start()
    guest.host.notices.clear()
    guest.board.advance(30 * MS)
    assert guest.notice() == messages.PhaseMissed(drive="cd", phase=DrivePhase.DMA_TRANSFER, held=True)
    guest.complete()
    assert guest.inp(CD + STATUS) & ERR == 0


def test_an_aim_outlives_a_stop_but_not_a_reset(guest: Guest) -> None:
    guest.do(messages.ArmPhase, drive="cd", phase=DrivePhase.PACKET_AWAITED)
    guest.do(messages.Stop)
    guest.do(messages.Run)
    guest.begin_packet()
    assert guest.notice().phase is DrivePhase.PACKET_AWAITED
    guest.do(messages.Reset)
    assert not guest.host.kept and guest.phase() is DrivePhase.IDLE
    guest.do(messages.ArmPhase, drive="cd", phase=DrivePhase.PACKET_AWAITED)
    guest.do(messages.Reset)
    guest.pc.drives.as_firmware_leaves_it()
    guest.begin_packet()
    assert not guest.host.notices


# ---- policies ----------------------------------------------------------------------------------------
def test_properties_of_all_drives_of_a_driver_or_of_one(guest: Guest) -> None:
    assert guest.do(messages.SetDriveProperty, driver="ide-cd", name="migrate-stream", value="v0") == {
        ident: {"migrate-stream": "v0", "migrate-drain": "off", "migrate-incomplete": "error"}
        for ident in ("empty", "cd")
    }
    one = {"driver": "ide-cd", "name": "migrate-incomplete", "value": "drop", "drive": "empty"}
    guest.do(messages.SetDriveProperty, **one)
    drives = guest.pc.drives.by_id
    assert drives["empty"].policy == DrivePolicy(Stream.V0, None, Incomplete.DROP)
    assert drives["cd"].policy == DrivePolicy(Stream.V0, None, Incomplete.ERROR)
    assert drives["hd"].policy == DrivePolicy()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"driver": "ide-cd", "name": "migrate-stream", "value": "old"}, "full, v0"),
        ({"driver": "ide-hd", "name": "migrate-stream", "value": "v0"}, "choose one of full"),
        ({"driver": "ide-cd", "name": "migrate-stream", "value": "v0", "drive": "hd"}, "ide-cd"),
        ({"driver": "ide-cd", "name": "migrate-stream", "value": "v0", "drive": "x"}, "hd, empty, cd"),
        ({"driver": "ide-cd", "name": "migrate-drain", "value": "soon", "drive": "cd"}, "off, or mill"),
        ({"driver": "scsi-cd", "name": "migrate-stream", "value": "v0", "drive": None}, "ide-cd, ide-hd"),
    ],
)
def test_wrong_properties_change_nothing(guest: Guest, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        guest.do(messages.SetDriveProperty, **fields)
    assert all(drive.policy == DrivePolicy() for drive in guest.pc.drives.by_id.values())


def test_the_share_of_time_by_phase(guest: Guest) -> None:
    guest.do(messages.QueryPhases, reset=True)
    guest.board.advance(5 * MS)
    guest.window()
    guest.board.advance(2 * MS)
    guest.start()
    guest.board.advance(1 * MS)
    found = {drive["id"]: drive for drive in guest.do(messages.QueryPhases)}
    assert found["cd"]["ns"] == {"idle": 5 * MS, "packet-complete": 2 * MS, "dma-transfer": MS}
    assert found["cd"]["guest_ns"] == 8 * MS and found["cd"]["command"]["remaining"] == 4096
    assert found["cd"]["entries"]["packet-complete"] == 1
    disk = found["hd"]
    assert (disk["driver"], disk["ns"], disk["command"]) == ("ide-hd", {"idle": 8 * MS}, None)
    assert disk["properties"] == {"migrate-stream": "full", "migrate-drain": "off"}


# ---- a machine that goes on in another host --------------------------------------------------------------
@pytest.mark.parametrize(
    ("stream", "incomplete", "outcome"),
    [
        ("full", "drop", "data"),
        ("v0", "restart", "data"),
        ("v0", "error", "error"),
        ("v0", "drop", "nothing"),
    ],
)
def test_a_migration_in_the_window(guest: Guest, stream: str, incomplete: str, outcome: str) -> None:
    """By the commands alone; the interrupt comes through the destination's PIC."""
    guest.do(messages.SetDriveProperty, driver="ide-cd", name="migrate-stream", value=stream)
    guest.do(messages.ArmPhase, drive="cd", phase=DrivePhase.PACKET_COMPLETE)
    guest.window()
    guest.do(messages.Stop)
    records = guest.do(messages.SaveState)
    other = Guest()
    other.do(messages.SetDriveProperty, driver="ide-cd", name="migrate-incomplete", value=incomplete)
    other.pc.dma.write(TABLE, guest.pc.dma.read(TABLE, 8))
    other.do(messages.LoadState, records=records)
    expected = DrivePhase.PACKET_COMPLETE if stream == "full" else DrivePhase.INCOMPLETE
    assert other.phase() is expected
    assert not other.pc.drives.channels[1].line
    other.do(messages.Run)
    other.start()
    other.complete()
    line = other.pc.drives.channels[1].line
    status = other.inp(CD + STATUS)
    memory = other.pc.dma.read(WHERE, 4096)
    if outcome == "data":
        assert line and not status & ERR and memory == other.image("cd", 9 * 2048, 4096)
    else:
        assert memory == bytes(4096)
        assert (line, status & (DRQ | ERR)) == ((True, ERR) if outcome == "error" else (False, DRQ))
    if outcome == "error":
        assert other.inp(CD + ERROR) == 0x30 and other.inp(CD_MASTER + 2) & 0x04
    other.close()


def test_loading_asks_for_nothing_before_the_start(guest: Guest) -> None:
    guest.taskfile(HD, count=1)
    guest.out(HD + COMMAND, 0x20)
    records = guest.pc.save()  # with the request in flight
    other = Guest()
    requests = len(other.host.backends["hd"].log)
    other.do(messages.LoadState, records=records)
    assert len(other.host.backends["hd"].log) == requests
    other.do(messages.Run)
    other.complete()
    assert other.words(HD + DATA, 256) == other.image("hd", 0, 512)
    other.close()


def test_records_that_do_not_fit_are_refused_in_one_line(guest: Guest) -> None:
    records = guest.pc.save()
    with pytest.raises(RecordError) as raised:
        guest.do(messages.LoadState, records={**records, "ide1": records["ide0"]})
    assert "ide-hd" in str(raised.value) and "\n" not in str(raised.value)
