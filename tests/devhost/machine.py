"""A whole PC over a real segment, with a manual clock, fake block devices and no process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec

from coordinator.contract.clock import ManualClock
from coordinator.contract.config import Boot, DebugExit, Drive, Machine, Media, Rtc
from coordinator.contract.messages import SPACE_MEMORY, SPACE_PORT
from coordinator.contract.segment import Segment
from devhost.bus import Bus
from devhost.outlet import Outlet
from devhost.pc import Pc
from tests.devhost.ide.rig import Backend, pattern

RAM = 4 << 20
VRAM = (1 << 20) + (256 << 10)
ROM = 256 << 10
ROM_ROOM = 64 << 10
PCI = 0xCF8


class Disk(Backend):
    """A fake block device with the hooks that the service's loop calls."""

    def __init__(self, size: int) -> None:
        super().__init__(pattern(size))
        self.completed: Callable[[int, int], None] = lambda cookie, errno: None
        self.settled: Callable[[], None] = lambda: None

    def complete_all(self) -> None:
        for cookie in list(self.pending):
            self.finish(cookie)
            if cookie not in self.cancelled:
                self.completed(cookie, 0)
        self.settled()


class Host:
    """What a Pc needs of the service; ``notices`` is what the coordinator would have heard."""

    def __init__(self, segment: Segment, clock: ManualClock) -> None:
        self.segment, self.clock = segment, clock
        self.config = SimpleNamespace(index=0, unplugged=())
        self.bus = Bus(segment, 0)
        self.notices: list[msgspec.Struct] = []
        #: answers that came later than their command
        self.answers: list[Any] = []
        self.control = SimpleNamespace(
            notify=self.notices.append, answer=lambda command, value: self.answers.append(value)
        )
        #: of the reply to the access in hand
        self.kept = False
        self.outlet = Outlet(self.control)
        self.commits = SimpleNamespace(successor=False)
        self.backends: dict[str, Disk] = {}

    def open_block_device(self, ident: str) -> Disk:
        backend = self.backends[ident] = Disk(64 * 2048)
        return backend

    def drain(self, done: Callable[[], bool]) -> None:
        while any(backend.pending for backend in self.backends.values()):
            for backend in self.backends.values():
                backend.complete_all()
        assert done()

    def keep_reply(self) -> None:
        self.kept = True

    def release_replies(self) -> None:
        self.kept = False


def machine(**changes: Any) -> Machine:
    """Everything that can be fitted."""
    drives = (
        Drive(id="hd", index=0, media=Media.DISK, file="/hd"),
        Drive(id="empty", index=1, media=Media.CDROM),
        Drive(id="cd", index=2, media=Media.CDROM, file="/cd", read_only=True),
    )
    whole = Machine(
        name="test", vcpus=2, ram=RAM, drives=drives, serials=2, rtc=Rtc("2020-02-29T23:59:58", "vm"),
        rom_size=ROM, debug_exit=DebugExit(), boot=Boot(direct=False),
    )  # fmt: skip
    return msgspec.structs.replace(whole, **changes)


class Board:
    """The machine, and accesses as a guest makes them."""

    def __init__(self, config: Machine | None = None, at: int = 0) -> None:
        self.config = config or machine()
        vram = VRAM if self.config.vga else 0
        self.segment = Segment.create(
            vcpus=self.config.vcpus, ram=self.config.ram, vram=vram, rom=self.config.rom_size + ROM_ROOM
        )
        self.clock = ManualClock(at)
        self.host = Host(self.segment, self.clock)
        self.pc = Pc(self.host, self.config)  # type: ignore[arg-type]
        self.bus = self.pc.bus

    def inp(self, port: int, width: int = 1) -> int:
        return int.from_bytes(self.bus.read(SPACE_PORT, port, width, 1), "little")

    def out(self, port: int, value: int, width: int = 1) -> None:
        self.bus.write(SPACE_PORT, port, width, 1, value.to_bytes(width, "little"))

    def load(self, gpa: int, width: int = 4) -> int:
        return int.from_bytes(self.bus.read(SPACE_MEMORY, gpa, width, 1), "little")

    def store(self, gpa: int, value: int, width: int = 4) -> None:
        self.bus.write(SPACE_MEMORY, gpa, width, 1, value.to_bytes(width, "little"))

    def config_read(self, slot: int, function: int, register: int, width: int) -> int:
        self.out(PCI, 0x8000_0000 | slot << 11 | function << 8 | register & 0xFC, 4)
        return self.inp(PCI + 4 + (register & 3), width)

    def config_write(self, slot: int, function: int, register: int, width: int, value: int) -> None:
        self.out(PCI, 0x8000_0000 | slot << 11 | function << 8 | register & 0xFC, 4)
        self.out(PCI + 4 + (register & 3), value, width)

    def advance(self, ns: int) -> None:
        self.clock.advance(ns)
        self.bus.publish_all()

    def device(self, port: int) -> str:
        """Who answers a port, by the segment."""
        index = self.segment.ports[port]
        return self.segment.device_name(self.segment.regs[index].device) if index else "nobody"

    def regions(self) -> list[tuple[int, ...]]:
        """The memory map in force."""
        return [
            (r.gpa, r.size, r.flags, r.read_offset, r.write_offset, r.device)
            for r in self.segment.memory_map()
        ]

    def region(self, gpa: int) -> tuple[int, ...] | None:
        """(flags, read offset, write offset, device) at an address, offsets as the CPU adds them up."""
        for start, size, flags, read, write, device in self.regions():
            if start <= gpa < start + size:
                return flags, read + gpa - start, write + gpa - start, device
        return None
