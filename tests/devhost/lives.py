"""A device host that can be killed at any named step, over a real segment, with the far ends played by the
test.

``Guest`` is vCPU, coordinator and block daemon at once: what it asks for is asked again of the next life when
the one that was asked dies, as those do. Guest time moves only by ``advance``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from coordinator.contract import messages
from coordinator.contract._segment import ffi, lib
from coordinator.contract.config import Boot, DevhostConfig, Drive, Machine, Media, Rtc
from coordinator.contract.segment import Segment
from devhost.commands import Commands
from devhost.commit import untold
from devhost.faults import Faults
from devhost.pc import Pc
from devhost.service import Service
from tests.devhost.ide.rig import Backend, pattern
from tests.devhost.machine import VRAM

RAM = 1 << 20
DISK_SIZE = 64 * 512
CD_SIZE = 64 * 2048
#: of the fake IOAPIC set-up: each pin has vector 30h + its number
FIRST_VECTOR = 0x30
IOREGSEL, IOWIN, REDIRECTION = 0x00, 0x10, 0x10


class Killed(BaseException):
    """The end of a life; nothing of it runs after this."""


class Deadly(Faults):
    """Dies at the ``nth`` passing of ``point``, counts otherwise."""

    def __init__(self, point: str = "", nth: int = 0) -> None:
        self.point, self.nth = point, nth
        self.passed: dict[str, int] = {}

    def at(self, point: str) -> None:
        self.passed[point] = self.passed.get(point, 0) + 1
        if point == self.point and self.passed[point] == self.nth:
            raise Killed


class Disk(Backend):
    """A block daemon's export: ``data`` outlives the hosts."""

    def __init__(self, data: bytearray, faults: Faults) -> None:
        super().__init__(b"")
        self.image = data
        self._faults = faults
        self.completed: Any = None
        self.settled: Any = None

    def read(self, offset: int, views: Any) -> int:
        return self._sent(super().read(offset, views))

    def write(self, offset: int, views: Any) -> int:
        return self._sent(super().write(offset, views))

    def flush(self) -> int:
        return self._sent(super().flush())

    def _sent(self, cookie: int) -> int:
        self._faults.at("block-sent")
        return cookie

    def complete(self) -> None:
        """All that is pending is done, and its completions come."""
        cookies = [cookie for cookie in self.pending if cookie not in self.cancelled]
        for cookie in list(self.pending):
            self.finish(cookie)
        if cookies:
            self._faults.at("block-answered")
            for cookie in cookies:
                self.completed(cookie, 0)
            self.settled()


class Life(Service):
    """One process. Replies are kept, sockets not used."""

    def __init__(self, guest: Guest, replaces: bool) -> None:
        config = DevhostConfig(
            vm="test", index=0, runtime=str(guest.folder), parent=os.getpid(), machine=guest.machine,
            segment_fd=guest.segment.fd, doorbell_fd=-1, replaces=replaces,
            unplugged=guest.unplugged,
        )  # fmt: skip
        super().__init__(config, guest.segment, guest.faults)
        self.guest = guest
        self.replies: list[messages.BusReply] = []
        self.disks: list[Disk] = []
        self.pc = Pc(self, guest.machine)
        self.handle = Commands(self.pc).handle
        self.end_event()
        self.commits.serving = True

    def open_block_device(self, ident: str) -> Any:
        disk = Disk(self.guest.media[ident], self.faults)
        self.disks.append(disk)
        self.backends[ident] = disk  # type: ignore[assignment]
        return disk

    def _reply(self, vcpu: bytes, reply: bytes) -> None:
        self.replies.append(messages.replies.decode(reply))

    def end_event(self, vcpu: int = -1, serial: int = 0, reply: bytes | None = None) -> None:
        if hasattr(self, "pc"):
            # the clock's record says up to when it has counted, so it changes by itself
            assert [name for name in untold(self.bus) if name != "rtc"] == []
        super().end_event(vcpu, serial, reply)

    def give_up(self) -> None:
        self.router.close()
        self.channel.socket.close()
        self.context.destroy(linger=0)


class Guest:
    """The far ends of one machine and of all lives of its device host."""

    def __init__(self, folder: Path, faults: Faults, vga: bool = False) -> None:
        self.folder, self.faults = folder, faults
        self.machine = Machine(
            name="test", vcpus=1, ram=RAM, serials=1, vga=vga, boot=Boot(direct=True),
            rtc=Rtc("2020-02-29T23:59:58", "vm"),
            drives=(
                Drive(id="hd", index=0, media=Media.DISK, file="/hd"),
                Drive(id="cd", index=2, media=Media.CDROM, file="/cd", read_only=True),
            ),
        )  # fmt: skip
        self.media = {"hd": bytearray(pattern(DISK_SIZE)), "cd": bytearray(pattern(CD_SIZE))}
        vram = VRAM if vga else 0
        self.segment = Segment.create(vcpus=1, ram=RAM, vram=vram, rom=64 << 10)
        self.output = self.segment.output(0)
        self.serial = 0
        self.now = 1_000_000_000
        self.segment.set_time(self.now, 1_600_000_000_000_000_000)
        #: what the guest and the host's user have seen, step by step
        self.seen: list[Any] = []
        self.notices: list[Any] = []
        self.deaths = 0
        #: devices that the next life has not any more
        self.unplugged: tuple[str, ...] = ()
        self.life = self._born(False)
        self._listen()

    def close(self) -> None:
        self.life.give_up()
        self.segment.close()

    def _listen(self) -> None:
        """vCPU 0 takes interrupts, and each pin has a vector."""
        cpu = self.segment.vcpu(0)
        cpu.apic_mode = cpu.apic_sw_enabled = 1
        for pin in range(24):
            for half, value in enumerate((FIRST_VECTOR + pin, 0)):
                lib.ioapic_write(self.segment.header, IOREGSEL, REDIRECTION + 2 * pin + half)
                lib.ioapic_write(self.segment.header, IOWIN, value)

    # ---- life and death
    def _born(self, replaces: bool) -> Life:
        """Whoever dies while it takes over is followed by another."""
        while True:
            try:
                life = Life(self, replaces)
                if replaces:
                    self.serial += 1
                    run = messages.Run(serial=self.serial)
                    life.commits.about_to()
                    life._obey(run)
                    life.end_event()
                return life
            except Killed:
                self.deaths += 1
                replaces = True

    def _dies(self) -> None:
        self.deaths += 1
        self.life.give_up()
        self.life = self._born(True)

    # ---- steps
    def _step(self, what: Any) -> None:
        for frame in self.output.take():
            self.notices.append(messages.notices.decode(frame))
        fabric, cpu = self.segment.fabric, self.segment.vcpu(0)
        self.seen.append(
            (
                what, list(fabric.pin_sources), list(fabric.delivered), cpu.extint_level,
                bytes(self.segment.ram).translate(None, b"\0"), bytes(self.media["hd"]),
            )
        )  # fmt: skip

    def access(
        self, port: int, width: int = 1, count: int = 1, data: bytes | None = None, space: int = 0
    ) -> bytes:
        """A sync access; asked again, with the same serial, until there is a reply."""
        self.serial += 1
        request = messages.BusRequest(
            serial=self.serial, vcpu=0, ticket=lib.ring_next_ticket(self.segment.header, 0), space=space,
            device=3, addr=port, count=count, write=data is not None, data=data or b"",
            width=width,  # type: ignore[arg-type]
        )  # fmt: skip
        while True:
            life = self.life
            try:
                life._serve_request(b"vcpu0", request)
            except Killed:
                self._dies()
            for reply in life.replies:
                if reply.serial == request.serial:
                    assert not reply.hold
                    self._step(reply.data)
                    return reply.data

    def out(self, port: int, value: int, width: int = 1) -> None:
        self.access(port, width, 1, value.to_bytes(width, "little"))

    def post(self, *writes: tuple[int, int]) -> None:
        """Posted writes of a byte each."""
        for port, value in writes:
            entry = ffi.new("struct posted_entry *")
            entry.addr, entry.value, entry.width = port, value, 1
            lib.ring_post(self.segment.header, 0, entry, 0, -1)
        self._until(lambda: self.life._serve_posted(), lambda: not self.life.ring.pending())
        self._step(None)

    def advance(self, ns: int, steps: int = 1) -> None:
        """Guest time passes, ``ns`` in each of ``steps``."""
        for _ in range(steps):
            self.now += ns
            self.segment.set_time(self.now, 1_600_000_000_000_000_000)
            self._until(lambda: self.life._fire_timers(), self._nothing_due)
            self._step(None)

    def _nothing_due(self) -> bool:
        deadline = self.life.clock.wheel.next_deadline()
        return deadline is None or deadline > self.now

    def complete(self) -> None:
        """The block daemon answers until nothing is asked of it any more."""
        self._until(self._complete_once, lambda: not any(disk.pending for disk in self.life.disks))
        self._step(None)

    def _complete_once(self) -> None:
        for disk in self.life.disks:
            disk.complete()
        self.life.end_event()

    def _until(self, work: Any, done: Any) -> None:
        while not done():
            try:
                work()
            except Killed:
                self._dies()

    def command(self, kind: type[messages.Command], **fields: Any) -> Any:
        """A command of the coordinator; sent again until it is answered."""
        self.serial += 1
        command: Any = kind(serial=self.serial, **fields)
        while True:
            try:
                if command.serial not in self.life.commits.done:
                    self.life.commits.begin()
                    self.life._obey(command)
                    self.life.end_event()
                    self.life.faults.at("replied")
            except Killed:
                self._dies()
            for frame in self.output.take():
                self.notices.append(messages.notices.decode(frame))
            for notice in self.notices:
                if isinstance(notice, messages.Answer) and notice.serial == command.serial:
                    assert notice.error is None, notice.error
                    self._step(None)
                    return notice.value
