"""The islands of a machine: the segment they share, their processes, the control socket.

The coordinator is one asyncio loop; islands answer commands over ZeroMQ (see contract/messages.py).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec
import zmq
import zmq.asyncio

from coordinator import epitaph
from coordinator.contract import messages
from coordinator.contract.codec import encode
from coordinator.contract.config import (
    BlockdConfig,
    DevhostConfig,
    Drive,
    Machine,
    VcpuConfig,
    control_endpoint,
    export_of,
    rehearsal_folder,
)
from coordinator.contract.errors import IslandError, MessageError
from coordinator.contract.handout import path as handout_path
from coordinator.contract.island import router
from coordinator.contract.segment import Segment
from coordinator.contract.state_area import Output
from coordinator.departure import end_islands
from coordinator.handout import Handout
from coordinator.heartbeat import Heartbeat
from coordinator.islands import Island
from coordinator.loss import Losses
from coordinator.policy import Options
from coordinator.standbys import Standbys
from coordinator.succession import Succession

log = logging.getLogger(__name__)

#: after the start standbys are made, seconds: until then the guest, which boots, needs the processors
WARM_AFTER_SECONDS = 3.0
#: how long an island may take to say hello, seconds
START_SECONDS = 60.0
#: how long the last notice of an island may still be on its way when its death is seen, seconds
LAST_NOTICE_SECONDS = 0.3
#: of the standard VGA card: the linear frame buffer and the planes (devhost/vga/planes.py)
VRAM_SIZE = (16 << 20) + (256 << 10)
#: behind the firmware in the segment's ROM: the VGA option ROM
OPTION_ROM_ROOM = 64 << 10


@dataclass(frozen=True)
class Ending:
    """Why a run ended. ``status`` is the exit status of ``atoll run``."""

    reason: str
    status: int = 0
    error: str | None = None


class Captain(Protocol):
    """Who the islands work for."""

    def event(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Something has happened that QMP tells of."""

    def noticed(self, notice: messages.AnyNotice) -> None:
        """A notice of an island, unless it is about the island itself."""

    @property
    def moved(self) -> bool:
        """The guest is elsewhere now, and so are its disks."""

    def lost(self) -> None:
        """An island has died and takes the run with it."""

    @property
    def bears_loss(self) -> bool:
        """Whether the machine can outlive one of its vCPUs."""

    async def bereaved(self) -> None:
        """One has died, and the machine is to stand still."""


class Crew:
    """Owns the segment, the control socket and the islands of one machine."""

    def __init__(
        self, machine: Machine, options: Options, folder: Path, log_file: str | None, captain: Captain
    ) -> None:
        """``folder`` is the runtime folder; islands log there, or all into ``log_file``."""
        self.machine = machine
        self.options = options
        self.folder = folder
        self.ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self.islands: dict[str, Island] = {}
        self.segment: Segment | None = None
        self.event = captain.event
        self.succession = Succession(self)
        self.heartbeat = Heartbeat(self, options.island_timeout)
        self.losses = Losses(self)
        #: devices that have been unplugged by their faults, by role of their hosts
        self.unplugged: dict[str, list[str]] = {}
        #: guest time would run, but for islands that are being replaced or do not answer
        self._time_runs = False
        self.captain = captain
        self._log_file = log_file
        self._hello: dict[str, asyncio.Event] = {}
        self._open: dict[int, tuple[str, asyncio.Future[Any], messages.Command]] = {}
        self._serial = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = asyncio.Event()
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._doorbells: list[int] = []
        self._outputs: dict[str, Output] = {}
        self._handout: Handout | None = None
        #: what guests write to drives whose images are to stay as they are
        self._scratch: dict[str, IO[bytes]] = {}
        #: the leases of its disks have yet to come from where the guest comes from
        self.awaits_disks = options.incoming is not None
        kinds = {"devhost": lambda: self._host(0), "blockd": lambda: self._blockd(True)}
        self.standbys = Standbys(kinds, folder)
        #: islands are being ended
        self.leaving = False

    # ---- start ---------------------------------------------------------------------------------
    async def start(self) -> None:
        """Bring up all islands; they have said hello."""
        machine = self.machine
        self.segment = Segment.create(
            vcpus=machine.vcpus,
            ram=machine.ram,
            vram=VRAM_SIZE if machine.vga else 0,
            rom=machine.rom_size + OPTION_ROM_ROOM,
            hosts=len(self.hosts),
            tsc_khz=machine.tsc_khz,
        )
        self._doorbells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in self.hosts]
        self._outputs = {role: self.segment.output(i) for i, role in enumerate(self.hosts)}
        plain = router(self._context, control_endpoint(str(self.folder)))
        self._socket = zmq.asyncio.Socket.shadow(plain)
        self.spawn(self._receive())
        self._start_islands()
        await self._wait_for_hellos()

    def ready(self) -> None:
        """What must be done before commands may come has been done."""
        self._started.set()
        asyncio.get_running_loop().call_later(WARM_AFTER_SECONDS, self.standbys.warm)
        self.spawn(self.heartbeat.run())

    async def started(self) -> None:
        """Return when every island is there, which commands to them need; IslandError if that never comes."""
        waiting = asyncio.ensure_future(self._started.wait())
        either: set[asyncio.Future[Any]] = {waiting, self.ending}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self.ending.done():
            raise IslandError("the machine has ended")

    def _start_islands(self) -> None:
        machine = self.machine
        if self.options.sandbox:
            self._handout = Handout(handout_path(str(self.folder)), lambda: self.islands["blockd"].pid)
        for drive in machine.drives:
            self.allow(drive)
            if drive.snapshot and drive.file is not None:
                self._scratch[drive.id] = _temporary_file()
        os.mkdir(rehearsal_folder(str(self.folder)), 0o700)
        self._start("blockd", *self._blockd())
        for i in range(len(self.hosts)):
            self._start(f"devhost{i}", *self._host(i))
        for i in range(machine.vcpus):
            self._start(f"vcpu{i}", *self._vcpu(i))

    # ---- what each is started with
    @property
    def _common(self) -> dict[str, Any]:
        return {
            "vm": self.machine.name, "runtime": str(self.folder), "parent": os.getpid(),
            "sandbox": self.options.sandbox,
        }  # fmt: skip

    def _blockd(self, replaces: bool = False) -> tuple[str, BlockdConfig]:
        drives = () if self.captain.moved else self.machine.drives
        exports = tuple(export_of(d, self.awaits_disks) for d in drives if d.file is not None)
        scratch_fds = tuple(self._scratch[each.id].fileno() for each in exports if each.snapshot)
        return "blockd.main", BlockdConfig(
            exports=exports, uuid=self.machine.uuid, replaces=replaces, scratch_fds=scratch_fds,
            **self._common,
        )  # fmt: skip

    def _host(self, index: int, replaces: bool = False) -> tuple[str, DevhostConfig]:
        assert self.segment is not None
        return "devhost.main", DevhostConfig(
            index=index, machine=self.machine, segment_fd=self.segment.fd, doorbell_fd=self._doorbells[index],
            replaces=replaces, commits=self.options.commits,
            unplugged=tuple(self.unplugged.get(f"devhost{index}", ())), fault=self.options.fault,
            **self._common,
        )  # fmt: skip

    def _vcpu(self, index: int) -> tuple[str, VcpuConfig]:
        assert self.segment is not None
        return "vcpu.main", VcpuConfig(
            index=index, segment_fd=self.segment.fd, doorbell_fds=tuple(self._doorbells), **self._common
        )

    def start_vcpu(self, index: int) -> asyncio.Event:
        """A process that is a vCPU from now on, of one that has died; the event is its hello."""
        self._start(f"vcpu{index}", *self._vcpu(index))
        return self._hello[f"vcpu{index}"]

    def _start(self, role: str, module: str, config: Any) -> None:
        log_file = self._log_of(role)
        config = msgspec.structs.replace(config, log=str(log_file))
        self._enlist(Island(role, module, config, log_file))

    def _log_of(self, role: str) -> Path:
        return Path(self._log_file).absolute() if self._log_file else self.folder / f"{role}.log"

    def _enlist(self, island: Island) -> None:
        self._hello[island.role] = asyncio.Event()
        self.islands[island.role] = island
        asyncio.get_running_loop().add_reader(island.pidfd, self._died, island.role)

    async def _wait_for_hellos(self) -> None:
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        for role, event in self._hello.items():
            hello = asyncio.ensure_future(event.wait())
            either: set[asyncio.Future[Any]] = {hello, self.ending}
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait(either, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            hello.cancel()
            if self.ending.done():
                raise IslandError("the machine has ended while it was starting")
            if not event.is_set():
                raise IslandError(f"{role} did not start within {START_SECONDS:.0f} s")

    def allow(self, drive: Drive) -> None:
        """Let the block daemon have a drive's image, which the user has named."""
        if self._handout is not None:
            self._handout.grants.add(drive)

    def replace_drive(self, drive: Drive) -> None:
        """A removable drive has another medium now."""
        drives = tuple(drive if old.id == drive.id else old for old in self.machine.drives)
        self.machine = msgspec.structs.replace(self.machine, drives=drives)

    # ---- messages ------------------------------------------------------------------------------
    def has_come(self, role: str) -> bool:
        """Whether an island has said hello."""
        return self._hello[role].is_set()

    def next_serial(self) -> int:
        return next(self._serial)

    async def command(self, role: str, command: messages.Command) -> Any:
        """Send a command and wait for its answer; IslandError carries the island's error text."""
        assert self._socket is not None
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._open[command.serial] = (role, future, command)
        try:
            await self.send(role, command)
            if role.startswith("vcpu") and self.segment is not None:
                self.segment.call(int(role[4:]))
            return await future
        finally:
            self._open.pop(command.serial, None)

    async def send(self, role: str, command: messages.Command) -> None:
        """To one that is being replaced it is sent when there is another one."""
        assert self._socket is not None
        if role in self.losses.vacant:
            raise IslandError(f"{role} has died")
        self.succession.sent(role, command)
        if role in self.succession.vacant:
            if self.ending.done():
                raise IslandError("the machine has ended")
            return
        try:
            await self._socket.send_multipart((role.encode(), encode(command)))
        except zmq.ZMQError as error:
            if not self.succession.replaces(role):
                raise IslandError(f"{role} cannot be reached: {error}") from None

    def refuse(self, command: messages.Command, error: str) -> None:
        """A command will not be answered by its island."""
        _, future, _ = self._open.get(command.serial, (None, None, None))
        if future is not None and not future.done():
            future.set_exception(IslandError(error))

    def open_commands(self, role: str) -> list[messages.Command]:
        """Those that an island has not answered, oldest first."""
        waiting = sorted(self._open.items())
        return [command for _, (to, future, command) in waiting if to == role and not future.done()]

    def fail_commands(self, role: str, error: str) -> None:
        """Nobody will answer those that an island has not answered yet."""
        for to, future, _ in self._open.values():
            if to == role and not future.done():
                future.set_exception(IslandError(error))

    @property
    def hosts(self) -> list[str]:
        """Roles of the device hosts."""
        return ["devhost0"]

    @property
    def vcpus(self) -> list[str]:
        return [f"vcpu{i}" for i in range(self.machine.vcpus)]

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            identity, frame = await self._socket.recv_multipart()
            role = identity.decode(errors="replace")
            self.drain_output(role)
            try:
                notice = messages.notices.decode(frame)
            except MessageError as error:
                log.error("from %s: %s", role, error)
                continue
            self._handle(role, notice)

    def drain_output(self, role: str) -> None:
        """What a device host has in its output ring."""
        if role in self._outputs:
            for frame in self._outputs[role].take():
                try:
                    self._handle(role, messages.notices.decode(frame))
                except MessageError as error:
                    log.error("from %s: %s", role, error)

    def _handle(self, role: str, notice: messages.AnyNotice) -> None:
        match notice:
            case messages.Answer(serial=serial, value=value, error=error):
                _, future, _ = self._open.get(serial, (role, None, None))
                if future is not None and not future.done():
                    if error is None:
                        future.set_result(value)
                    else:
                        future.set_exception(IslandError(error))
            case messages.Hello(protocol=protocol):
                if protocol != messages.PROTOCOL:
                    text = f"{role} speaks protocol {protocol}, not {messages.PROTOCOL}"
                    self.end(Ending("internal-error", 1, text))
                elif role in self._hello:
                    self._hello[role].set()
            case messages.OutputReady():
                pass  # it has been drained before
            case messages.Failed(error=error):
                if self.losses.failed(role, error):
                    return
                self.end(Ending("internal-error", 1, error))
            case _:
                self.captain.noticed(notice)

    def spawn(self, work: Awaitable[None]) -> None:
        """Do something beside everything else; its failure is the machine's end."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end(Ending("internal-error", 1, str(error) or repr(error)))

    # ---- guest time ----------------------------------------------------------------------------
    def let_time(self, run: bool) -> None:
        """Let guest time run, or stand still."""
        self._time_runs = run
        self.show_time()

    def show_time(self) -> None:
        """Guest time runs if it is to, and while no island has died or does not answer."""
        assert self.segment is not None
        missing = self.succession.vacant or self.losses.vacant or self.heartbeat.suspects
        if self._time_runs and not missing:
            self.segment.start_time()
        else:
            self.segment.stop_time()

    # ---- life and death ------------------------------------------------------------------------
    def _died(self, role: str) -> None:
        asyncio.get_running_loop().remove_reader(self.islands[role].pidfd)
        if self.leaving or (self.options.commits and self.succession.died(role)) or self.losses.died(role):
            return
        self.spawn(self.mourn(role))

    def mend_ring(self, host: int, dead: list[int]) -> bool:
        """See Segment.mend_ring."""
        assert self.segment is not None
        return self.segment.mend_ring(host, dead, self._doorbells[host])

    @property
    def serves(self) -> bool:
        """All islands are there, or have been, and are to stay."""
        return self._started.is_set() and not self.leaving and not self.ending.done()

    async def start_successor(self, role: str) -> asyncio.Event:
        """Another process in an island's place, the standby where there is one; the event is its hello."""
        module: str
        config: msgspec.Struct
        if role == "blockd":
            module, config = self._blockd(replaces=True)
        else:
            module, config = self._host(int(role.removeprefix("devhost")), replaces=True)
        island = self.standbys.take(role, role.rstrip("0123456789"), config, self._log_of(role))
        if island is not None:
            self._enlist(island)
        else:
            self._start(role, module, config)
        return self._hello[role]

    async def mourn(self, role: str) -> None:
        """An island has died: end the run with its name, state and log, unless it said why itself."""
        await asyncio.wait({self.ending}, timeout=LAST_NOTICE_SECONDS)
        if not self.ending.done():
            self.captain.lost()
            self.end(Ending("internal-error", 1, epitaph.describe(self, self.islands[role])))

    def end(self, ending: Ending) -> None:
        """Let the run end for this reason; the first one counts."""
        for _, future, _ in self._open.values():
            if not future.done():
                future.set_exception(IslandError(ending.error or "the machine has ended"))
        if not self.ending.done():
            self.ending.set_result(ending)

    async def close(self) -> None:
        """End every island in order and remove what the machine left; safe at any stage of start."""
        self.leaving = True
        self.standbys.close()
        await end_islands(self)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
        if self._handout is not None:
            self._handout.close()
        self._context.destroy(linger=0)
        if self.segment is not None:
            self.segment.close()
        for fd in self._doorbells:
            os.close(fd)
        for file in self._scratch.values():
            file.close()


def _temporary_file() -> IO[bytes]:
    """Without a name, so nothing is left of it whatever happens."""
    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        raise IslandError(f"no temporary file can be made: {error.strerror or error}") from None
