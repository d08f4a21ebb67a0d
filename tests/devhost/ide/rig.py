"""A channel with fake surroundings, and the steps a driver takes at its registers.

Register numbers and bits are written here anew from ATA/ATAPI-6 and BMIDE, not imported.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from coordinator.contract.device import ListPin
from coordinator.contract.drives import DrivePolicy, Incomplete, Stream
from coordinator.contract.state import pack, unpack
from devhost.ide.ata import AtaDrive
from devhost.ide.atapi import AtapiDrive
from devhost.ide.channel import IdeChannel
from devhost.ide.drive import Drive
from devhost.ide.records import ChannelRecord

DATA, ERROR, COUNT, LOW, MID, HIGH, DEVICE, STATUS = range(8)
BSY, DRDY, DF, DRQ, ERR = 0x80, 0x40, 0x20, 0x08, 0x01
NIEN, SRST, HOB = 0x02, 0x04, 0x80
BM_COMMAND, BM_STATUS, BM_POINTER = 0, 2, 4
START, TO_MEMORY = 0x01, 0x08
ACTIVE, BM_ERROR, BM_INTERRUPT = 0x01, 0x02, 0x04
EOT = 0x8000_0000
TABLE = 0x1000


def pattern(length: int, seed: bytes = b"medium") -> bytearray:
    """Bytes that tell their place."""
    blocks = (hashlib.sha256(seed + struct.pack("<Q", at)).digest() for at in range(0, length, 32))
    return bytearray(b"".join(blocks)[:length])


class Memory:
    """Guest memory: holes read as ones and swallow writes; ``opaque`` ranges have no span."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.ram = bytearray(size)
        self.opaque: list[tuple[int, int]] = []
        self.marked: list[tuple[int, int]] = []

    def read(self, gpa: int, length: int) -> bytes:
        data = bytes(self.ram[gpa : gpa + length])
        return data + b"\xff" * (length - len(data))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        room = max(0, min(len(data), len(self.ram) - gpa))
        self.ram[gpa : gpa + room] = data[:room]

    def span(self, gpa: int, length: int) -> memoryview | None:
        if gpa + length > len(self.ram):
            return None
        if any(gpa < end and start < gpa + length for start, end in self.opaque):
            return None
        return memoryview(self.ram)[gpa : gpa + length]

    def written(self, gpa: int, length: int) -> None:
        self.marked.append((gpa, length))


@dataclass
class Pending:
    kind: str
    offset: int
    views: list[memoryview] = field(default_factory=list)

    @property
    def length(self) -> int:
        return sum(map(len, self.views))


class Backend:
    """Completes when told. ``log`` keeps (kind, offset, length) of every request made."""

    def __init__(self, image: bytes | bytearray, read_only: bool = False, can_flush: bool = True) -> None:
        self.image = bytearray(image)
        self.read_only = read_only
        self.can_flush = can_flush
        self.pending: dict[int, Pending] = {}
        self.log: list[tuple[str, int, int]] = []
        self.cancelled: set[int] = set()

    @property
    def size(self) -> int:
        return len(self.image)

    def _add(self, kind: str, offset: int, views: Sequence[memoryview] = ()) -> int:
        request = Pending(kind, offset, [memoryview(view).cast("B") for view in views])
        cookie = len(self.log) + 1
        assert 0 <= offset and offset + request.length <= self.size
        self.log.append((kind, offset, request.length))
        self.pending[cookie] = request
        return cookie

    def read(self, offset: int, views: Sequence[memoryview]) -> int:
        assert all(not view.readonly for view in views)
        return self._add("read", offset, views)

    def write(self, offset: int, views: Sequence[memoryview]) -> int:
        assert not self.read_only
        return self._add("write", offset, views)

    def flush(self) -> int:
        assert self.can_flush
        return self._add("flush", 0)

    def cancel(self, cookie: int) -> None:
        """A cancelled write still lands, as the protocol allows."""
        self.cancelled.add(cookie)
        request = self.pending[cookie]
        request.views = [memoryview(bytearray(view)) for view in request.views]

    def finish(self, cookie: int, errno: int = 0) -> None:
        request = self.pending.pop(cookie)
        at = request.offset
        for view in request.views:
            if errno == 0 and request.kind == "read":
                view[:] = self.image[at : at + len(view)]
            elif errno == 0:
                self.image[at : at + len(view)] = view
            at += len(view)


class Rig:
    """A channel, its surroundings and a driver's steps."""

    def __init__(
        self,
        make: Callable[[], tuple[Drive | None, Drive | None]],
        memory: Memory | None = None,
        line: ListPin | None = None,
    ) -> None:
        self.make = make
        self.memory = memory or Memory()
        self.pin = line or ListPin()
        self.channel = IdeChannel(self.pin, self.memory, make())

    # ---- registers
    def read(self, offset: int) -> int:
        return self.channel.read(offset, 1, "command")

    def write(self, offset: int, value: int) -> None:
        self.channel.write(offset, 1, value, "command")

    @property
    def status(self) -> int:
        """Clears the interrupt."""
        return self.read(STATUS)

    @property
    def alternate(self) -> int:
        peeked = self.channel.peek(0, "control")
        assert peeked == self.channel.read(0, 1, "control")
        return peeked

    def control(self, value: int) -> None:
        self.channel.write(0, 1, value, "control")

    def words(self, count: int) -> bytes:
        return self.channel.read_string(DATA, 2, count, "command")

    def send_words(self, data: bytes) -> None:
        self.channel.write_string(DATA, 2, data, "command")

    @property
    def bm_status(self) -> int:
        peeked = self.channel.peek(BM_STATUS, "busmaster")
        assert peeked == self.channel.read(BM_STATUS, 1, "busmaster")
        return peeked

    def bm_command(self, value: int) -> None:
        self.channel.write(BM_COMMAND, 1, value, "busmaster")

    # ---- surroundings
    def drive(self, number: int = 0) -> Drive:
        drive = self.channel.drives[number]
        assert drive is not None
        return drive

    def backend(self, number: int = 0) -> Backend:
        backend = self.drive(number).backend
        assert isinstance(backend, Backend)
        return backend

    def settle(self, errno: int = 0) -> int:
        """Complete all requests, those that follow too; how many there were."""
        count = 0
        while busy := [
            (drive, cookie)
            for drive in self.channel.fitted
            if isinstance(drive.backend, Backend)
            for cookie in drive.backend.pending
        ]:
            for drive, cookie in busy:
                assert isinstance(drive.backend, Backend)
                drive.backend.finish(cookie, errno)
                drive.complete(cookie, errno)
                count += 1
        return count

    def reload(self) -> None:
        """Save, and go on with a fresh channel; requests in flight are lost with the old one."""
        record = unpack(pack(self.channel.save()), ChannelRecord)
        for drive in self.channel.fitted:
            if isinstance(drive.backend, Backend):
                drive.backend.pending.clear()
        level = self.pin.level
        self.channel = IdeChannel(self.pin, self.memory, self.make())
        self.channel.load(record)
        assert self.pin.level == level

    def stop(self) -> None:
        """The machine stops: requests in flight, and what must follow them, come to their end."""
        self.channel.pause()
        self.settle()
        assert self.channel.paused()

    def migrate(
        self,
        stream: Stream = Stream.FULL,
        incomplete: Incomplete = Incomplete.ERROR,
        before_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Stop, save, load into a fresh channel, start. Nothing is requested, and no line moves, before the
        start; ``before_start`` may look."""
        for drive in self.channel.fitted:
            drive.policy = DrivePolicy(stream=stream)
        self.stop()
        record = unpack(pack(self.channel.save()), ChannelRecord)
        changes, requests = len(self.pin.changes), self._requests()
        self.channel = IdeChannel(self.pin, self.memory, self.make())
        for drive in self.channel.fitted:
            drive.policy = DrivePolicy(incomplete=incomplete)
        self.channel.pause()
        self.channel.load(record)
        assert (len(self.pin.changes), self._requests()) == (changes, requests)
        before_start()
        self.channel.resume()
        self.settle()

    def _requests(self) -> int:
        drives = [drive.backend for drive in self.channel.fitted]
        return sum(len(backend.log) for backend in drives if isinstance(backend, Backend))

    # ---- driver
    def taskfile(self, features: int = 0, count: int = 0, lba: int = 0, device: int = 0) -> None:
        self.write(DEVICE, 0xE0 | device << 4 | lba >> 24 & 0x0F)
        self.write(ERROR, features)
        self.write(COUNT, count)
        for offset, shift in ((LOW, 0), (MID, 8), (HIGH, 16)):
            self.write(offset, lba >> shift & 0xFF)

    def taskfile48(self, count: int, lba: int) -> None:
        self.write(DEVICE, 0xE0)
        for shift in (8, 0):
            self.write(COUNT, count >> shift & 0xFF)
            self.write(LOW, lba >> (24 if shift else 0) & 0xFF)
            self.write(MID, lba >> (32 if shift else 8) & 0xFF)
            self.write(HIGH, lba >> (40 if shift else 16) & 0xFF)

    def command(self, opcode: int) -> None:
        self.write(STATUS, opcode)

    def prds(self, *regions: tuple[int, int], at: int = TABLE, last: bool = True) -> None:
        """Lay a PRD table down and point the bus master at it."""
        for number, (address, length) in enumerate(regions):
            flag = EOT if last and number == len(regions) - 1 else 0
            self.memory.write(at + 8 * number, struct.pack("<II", address, length & 0xFFFF | flag))
        self.channel.write(BM_POINTER, 4, at, "busmaster")

    def start(self, to_memory: bool = True) -> None:
        """As drivers do: clear status, set direction, start."""
        direction = TO_MEMORY if to_memory else 0
        self.channel.write(BM_STATUS, 1, BM_ERROR | BM_INTERRUPT, "busmaster")
        self.bm_command(direction)
        self.bm_command(direction | START)

    def packet(self, *command: int, dma: bool = False, limit: int = 0xFFFE, device: int = 0) -> None:
        """PACKET and all of the command packet."""
        self.begin_packet(dma, limit, device)
        self.send_words(bytes(command).ljust(12, b"\0"))

    def begin_packet(self, dma: bool = False, limit: int = 0xFFFE, device: int = 0) -> None:
        self.write(DEVICE, 0xA0 | device << 4)
        self.write(ERROR, int(dma))
        self.write(MID, limit & 0xFF)
        self.write(HIGH, limit >> 8)
        self.command(0xA0)

    @property
    def byte_count(self) -> int:
        return self.read(MID) | self.read(HIGH) << 8

    def pio_data(self) -> bytes:
        """Read DRQ blocks of a packet command until it ends; settles requests on the way."""
        out = bytearray()
        self.settle()
        while self.status & DRQ:
            assert self.read(COUNT) == 0x02, "interrupt reason: data to the host"
            length = self.byte_count
            out += self.words((length + 1) // 2)[:length]
            self.settle()
        return bytes(out)

    def result(self, *command: int) -> bytes:
        """Data of a packet command that must succeed."""
        self.packet(*command)
        data = self.pio_data()
        assert self.alternate & (BSY | DRQ | ERR) == 0, self.sense()
        assert self.read(COUNT) == 0x03
        return data

    def sense(self) -> tuple[int, int, int]:
        """REQUEST SENSE: key, additional code, qualifier."""
        self.packet(0x03, 0, 0, 0, 18)
        data = self.pio_data()
        assert data[0] & 0x7F == 0x70 and data[7] == 10 and len(data) == 18
        return data[2] & 0x0F, data[12], data[13]

    def fails(self, *command: int) -> tuple[int, int, int]:
        """Sense of a packet command that must end with CHECK CONDITION."""
        self.packet(*command)
        self.settle()
        assert self.status & (BSY | DRQ | ERR) == ERR
        assert self.read(COUNT) == 0x03
        key = self.read(ERROR) >> 4
        sense = self.sense()
        assert sense[0] == key
        return sense


def disk(sectors: int = 2048, read_only: bool = False, request_limit: int = 1 << 20) -> Rig:
    """A channel with one disk of ``sectors``."""
    backend = Backend(pattern(sectors * 512), read_only)

    def make() -> tuple[Drive | None, Drive | None]:
        return AtaDrive(backend, model="ATOLL TEST DISK", serial="S1", request_limit=request_limit), None

    return Rig(make)


def cdrom(blocks: int = 300, image: bytes | bytearray | None = None, request_limit: int = 1 << 20) -> Rig:
    """A channel with one CD-ROM drive, its first unit attention taken."""
    backend = Backend(pattern(blocks * 2048) if image is None else image)
    rig = Rig(lambda: (AtapiDrive(backend, request_limit=request_limit), None))
    assert rig.sense() == (6, 0x29, 0)
    return rig


def atapi(rig: Rig) -> AtapiDrive:
    drive = rig.drive()
    assert isinstance(drive, AtapiDrive)
    return drive
