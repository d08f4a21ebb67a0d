"""A machine: its processes, from the first start to the last exit.

States are QEMU's: prelaunch, running, paused, shutdown, internal-error. The coordinator is one
asyncio loop; islands answer commands over ZeroMQ (see contract/messages.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
)
from coordinator.contract.errors import IslandError, MessageError
from coordinator.contract.handout import path as handout_path
from coordinator.contract.island import router
from coordinator.contract.segment import Segment
from coordinator.contract.state_area import Output
from coordinator.handout import Handout
from coordinator.islands import Island
from coordinator.jobs import Jobs
from coordinator.policy import Options
from coordinator.succession import Succession

log = logging.getLogger(__name__)
#: what -trace asked for
trace = logging.getLogger("atoll.trace")

#: how long an island may take to say hello, seconds
START_SECONDS = 60.0
#: how long it may take to end when told to, seconds: blockd has data to flush, the others nothing to lose
END_SECONDS = {"vcpu": 2.0, "devhost": 2.0, "blockd": 10.0}
#: how long the last notice of an island may still be on its way when its death is seen, seconds
LAST_NOTICE_SECONDS = 0.3
#: of the standard VGA card: the linear frame buffer and the planes (devhost/vga/planes.py)
VRAM_SIZE = (16 << 20) + (256 << 10)
#: behind the firmware in the segment's ROM: the VGA option ROM
OPTION_ROM_ROOM = 64 << 10

#: QMP's ShutdownCause, as far as guests bring it about
RESET_CAUSES = ("guest-reset", "subsystem-reset")
SHUTDOWN_CAUSES = ("guest-shutdown", *RESET_CAUSES)

#: states in which a guest that has been moved away, or not here yet, cannot be made to run
AWAY = {"postmigrate": "has been migrated away", "inmigrate": "is waiting for its migration"}
#: states in which there is no guest that could run
NEED_RESET = ("shutdown", "internal-error")
#: held still for a migration
LEAVING = "finish-migrate"

Notice = messages.AnyNotice
#: what may precede the guest's first instruction: loads RAM and says how vCPU 0 starts
Loader = Callable[[Segment], messages.LoadCpu | None]
#: told of a step on the way
Step = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Ending:
    """Why a run ended. ``status`` is the exit status of ``atoll run``."""

    reason: str
    status: int = 0
    error: str | None = None


@dataclass
class Frozen:
    """A guest that is held still. ``runstate`` is what it was before, ``stopped_at_ns`` UNIX time when it
    stopped. Set ``after`` to leave it still, in that state."""

    runstate: str
    stopped_at_ns: int
    after: str | None = None


class Vm:
    """Owns the segment, the control socket and the islands of one machine."""

    def __init__(
        self, machine: Machine, options: Options, loader: Loader, folder: Path, log_file: str | None = None
    ) -> None:
        """``folder`` is the runtime folder; islands log there, or all into ``log_file``."""
        self.machine = machine
        self.options = options
        self.state = "prelaunch"
        #: counts the coordinators that have had this guest, by migration: the higher one is right
        self.epoch = 1
        self.ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        #: see migrate/manager.py, which needs this module
        self.migration: Any = None
        #: called with (event name, data) for QMP
        self.on_event: list[Callable[[str, dict[str, Any]], None]] = []
        self.on_serial: Callable[[int, bytes], None] = lambda index, data: None
        self.on_debug: Callable[[int, bytes], None] = lambda port, data: None
        self.jobs = Jobs(self.event, self.spawn)
        self.islands: dict[str, Island] = {}
        self._loader = loader
        self._hello: dict[str, asyncio.Event] = {}
        self._open: dict[int, tuple[str, asyncio.Future[Any], messages.Command]] = {}
        self.succession = Succession(self)
        #: guest time would run, but for device hosts that are being replaced
        self._time_runs = False
        self._serial = itertools.count(1)
        self._lock = asyncio.Lock()
        #: held while media are being exchanged
        self.media_lock = asyncio.Lock()
        #: no medium is exchanged: a migration goes by what is there
        self.media_held = False
        self._tasks: set[asyncio.Task[None]] = set()
        #: what the guest has asked for and not been given
        self._wishes: list[messages.GuestReset | messages.GuestShutdown] = []
        self.folder = folder
        self._log_file = log_file
        self._started = asyncio.Event()
        self.segment: Segment | None = None
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._doorbells: list[int] = []
        self._outputs: dict[str, Output] = {}
        self._handout: Handout | None = None
        self._expected_exit = False

    # ---- start ---------------------------------------------------------------------------------
    async def start(self) -> None:
        """Bring up all islands; the guest runs unless asked to wait."""
        machine = self.machine
        self.segment = Segment.create(
            vcpus=machine.vcpus,
            ram=machine.ram,
            vram=VRAM_SIZE if machine.vga else 0,
            rom=machine.rom_size + OPTION_ROM_ROOM,
            tsc_khz=machine.tsc_khz,
        )
        self._doorbells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)]
        self._outputs = {role: self.segment.output(i) for i, role in enumerate(self.hosts)}
        plain = router(self._context, control_endpoint(str(self.folder)))
        self._socket = zmq.asyncio.Socket.shadow(plain)
        self.spawn(self._receive())
        self._start_islands()
        await self._wait_for_hellos()
        await self._load()
        if self.options.incoming is not None:
            self.state = "inmigrate"
        self._started.set()
        options = self.options
        if not options.start_paused and options.incoming is None and options.loadvm is None:
            await self.cont()

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
        machine, folder, segment = self.machine, str(self.folder), self.segment
        assert segment is not None
        common: dict[str, Any] = {"vm": machine.name, "runtime": folder, "parent": os.getpid()}
        common["sandbox"] = self.options.sandbox
        if self.options.sandbox:
            self._handout = Handout(handout_path(folder), lambda: self.islands["blockd"].pid)
        for drive in machine.drives:
            self.allow(drive)
        incoming = self.options.incoming is not None
        exports = tuple(export_of(d, incoming) for d in machine.drives if d.file is not None)
        self._island("blockd", "blockd.main", BlockdConfig, exports=exports, uuid=machine.uuid, **common)
        self._start_host(0)
        for i in range(machine.vcpus):
            self._island(
                f"vcpu{i}",
                "vcpu.main",
                VcpuConfig,
                index=i,
                segment_fd=segment.fd,
                doorbell_fds=tuple(self._doorbells),
                **common,
            )

    def _island(self, role: str, module: str, config: type, **fields: Any) -> None:
        log_file = Path(self._log_file).absolute() if self._log_file else self.folder / f"{role}.log"
        self._hello[role] = asyncio.Event()
        island = Island(role, module, config(log=str(log_file), **fields), log_file)
        self.islands[role] = island
        asyncio.get_running_loop().add_reader(island.pidfd, self._died, role)

    def _start_host(self, index: int, replaces: bool = False) -> None:
        assert self.segment is not None
        self._island(
            f"devhost{index}",
            "devhost.main",
            DevhostConfig,
            index=index,
            machine=self.machine,
            segment_fd=self.segment.fd,
            doorbell_fd=self._doorbells[index],
            replaces=replaces,
            vm=self.machine.name,
            runtime=str(self.folder),
            parent=os.getpid(),
            sandbox=self.options.sandbox,
        )

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

    async def _load(self) -> None:
        """Fill RAM and set the start state, at power-on and at every reset."""
        assert self.segment is not None
        start = self._loader(self.segment)
        if start is None:
            return
        for role in self.vcpus:  # all get what firmware sets everywhere; the first one starts
            mode = start.mode if role == "vcpu0" else "wait"
            load = messages.LoadCpu(serial=self.next_serial(), mode=mode, registers=start.registers)
            await self.command(role, load)

    def allow(self, drive: Drive) -> None:
        """Let the block daemon have a drive's image, which the user has named."""
        if self._handout is not None:
            self._handout.grants.add(drive)

    def replace_drive(self, drive: Drive) -> None:
        """A removable drive has another medium now."""
        drives = tuple(drive if old.id == drive.id else old for old in self.machine.drives)
        self.machine = msgspec.structs.replace(self.machine, drives=drives)

    # ---- messages ------------------------------------------------------------------------------
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
        """To a device host that is not there it is sent when there is another one."""
        assert self._socket is not None
        self.succession.sent(role, command)
        if role in self.succession.vacant:
            return
        try:
            await self._socket.send_multipart((role.encode(), encode(command)))
        except zmq.ZMQError as error:
            if role not in self.hosts:
                raise IslandError(f"{role} cannot be reached: {error}") from None

    def open_commands(self, role: str) -> list[messages.Command]:
        """Those that an island has not answered, oldest first."""
        return [command for _, (to, _, command) in sorted(self._open.items()) if to == role]

    async def _all(self, roles: list[str], kind: type[messages.Command]) -> None:
        await asyncio.gather(*(self.command(role, kind(serial=self.next_serial())) for role in roles))

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

    def _handle(self, role: str, notice: Notice) -> None:
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
                    self.end(
                        Ending(
                            "internal-error", 1, f"{role} speaks protocol {protocol}, not {messages.PROTOCOL}"
                        )
                    )
                elif role in self._hello:
                    self._hello[role].set()
            case messages.OutputReady():
                pass  # it has been drained before
            case messages.SerialOutput(index=index, data=data):
                self.on_serial(index, data)
            case messages.DebugOutput(port=port, data=data):
                self.on_debug(port, data)
            case messages.TraceLines(lines=lines):
                for line in lines:
                    trace.info("%s", line)
            case messages.TrayMoved(drive=drive, open=is_open):
                self.event("DEVICE_TRAY_MOVED", {"device": drive, "id": drive, "tray-open": is_open})
            case messages.PhaseReached(drive=drive, phase=phase, guest_ns=now):
                self.event("X_PHASE_REACHED", {"device": drive, "phase": phase.value, "guest-ns": now})
            case messages.PhaseMissed(drive=drive, phase=phase, held=held):
                self.event("X_PHASE_MISSED", {"device": drive, "phase": phase.value, "held": held})
            case messages.GuestReset() | messages.GuestShutdown():
                self._wishes.append(notice)
                self.spawn(self._grant_wishes())
            case messages.LeaseLost(error=error):
                log.error("%s", error)
            case messages.Failed(error=error):
                self.end(Ending("internal-error", 1, error))

    def spawn(self, work: Awaitable[None]) -> None:
        """Do something beside everything else; its failure is the machine's end."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end(Ending("internal-error", 1, str(error) or repr(error)))

    def event(self, name: str, data: dict[str, Any] | None = None) -> None:
        for listener in self.on_event:
            listener(name, data or {})

    # ---- life and death ------------------------------------------------------------------------
    def _died(self, role: str) -> None:
        asyncio.get_running_loop().remove_reader(self.islands[role].pidfd)
        if not self._expected_exit and not self.succession.died(role):
            self.spawn(self.mourn(role))

    @property
    def serves(self) -> bool:
        """All islands are there, or have been, and are to stay."""
        return self._started.is_set() and not self._expected_exit and not self.ending.done()

    async def start_successor(self, role: str) -> asyncio.Event:
        """Another process in a device host's place; the event is its hello."""
        self._start_host(int(role.removeprefix("devhost")), replaces=True)
        return self._hello[role]

    async def mourn(self, role: str) -> None:
        """An island has died: end the run with its name, state and log, unless it said why itself."""
        await asyncio.wait({self.ending}, timeout=LAST_NOTICE_SECONDS)
        if not self.ending.done():
            self.state = "internal-error"
            self.end(Ending("internal-error", 1, epitaph.describe(self, self.islands[role])))

    def end(self, ending: Ending) -> None:
        """Let the run end for this reason; the first one counts."""
        for _, future, _ in self._open.values():
            if not future.done():
                future.set_exception(IslandError(ending.error or "the machine has ended"))
        if not self.ending.done():
            self.ending.set_result(ending)

    async def _grant_wishes(self) -> None:
        async with self._lock:
            await self._grant()

    async def _grant(self) -> None:
        """Resets and shutdowns that the guest has asked for; one that fails or is cancelled half-way is done
        again. The lock is held."""
        while self._wishes and self.state not in AWAY:
            match self._wishes[0]:
                case messages.GuestReset(reason=reason):
                    cause = reason if reason in RESET_CAUSES else "guest-reset"
                    if self.options.no_reboot:
                        await self._shut_down(cause, 0)
                    else:
                        await self._reset(True, cause)
                case messages.GuestShutdown(reason=reason, status=status):
                    await self._shut_down(reason, status)
            del self._wishes[0]

    async def _shut_down(self, reason: str, status: int) -> None:
        if self.state == "running":
            await self._pause()
        self.state = "shutdown"
        self.event(
            "SHUTDOWN",
            {"guest": True, "reason": reason if reason in SHUTDOWN_CAUSES else "guest-shutdown"},
        )
        if self.options.no_shutdown and reason != "debug-exit":
            self.event("STOP")
        else:
            self.end(Ending(reason, status))

    async def _pause(self, step: Step | None = None) -> None:
        """``step`` is told of "quiesce" between vCPUs and devices."""
        assert self.segment is not None
        try:
            await self._all(self.vcpus, messages.Stop)
            if step is not None:
                await step("quiesce")
            await self._all(self.hosts, messages.Stop)
        except BaseException:  # a block request that is not answered, a cancel: as if nobody had asked
            if not self.ending.done():
                await self._resume()
            raise
        self._let_time(False)

    async def _run(self) -> None:
        self._let_time(True)
        await self._resume()

    def _let_time(self, run: bool) -> None:
        self._time_runs = run
        self.show_time()

    def show_time(self) -> None:
        """Guest time runs if it is to, and while no device host is being replaced."""
        assert self.segment is not None
        if self._time_runs and not self.succession.vacant:
            self.segment.start_time()
        else:
            self.segment.stop_time()

    async def _resume(self) -> None:
        await self._all(self.hosts, messages.Run)
        await self._all(self.vcpus, messages.Run)

    def _not_away(self) -> None:
        if self.state in AWAY:
            raise IslandError(f"the machine {AWAY[self.state]}")

    def _not_leaving(self) -> None:
        """IslandError while the guest is held for a migration, which may take as long as the other side."""
        if self.state == LEAVING:
            raise IslandError("Migration is not finalized yet")

    async def cont(self) -> None:
        """Run the guest (QMP cont)."""
        self._not_leaving()
        async with self._lock:
            if self.state == "running":
                return
            if self.state in NEED_RESET:
                raise IslandError("Resetting the Virtual Machine is required")
            self._not_away()
            await self._run()
            self.state = "running"
            self.event("RESUME")

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Hold the guest still for a look at its state."""
        self._not_leaving()
        async with self._lock:
            runs = self.state == "running"
            if runs:
                await self._pause()
            try:
                yield
            finally:
                if runs and not self.ending.done():
                    await self._run()

    @contextlib.asynccontextmanager
    async def frozen(self, step: Step | None = None) -> AsyncIterator[Frozen]:
        """Hold the guest still to save it or move it away. It goes on afterwards as before, unless told
        otherwise, and nothing else can make it run meanwhile. ``step`` is told of "quiesce" on the way, and
        may fail."""
        async with self._lock:
            self._not_away()
            runs = self.state == "running"
            if runs:
                await self._pause(step)
            if self._wishes:
                await self._grant_held(runs)
            runstate = self.state
            frozen = Frozen(runstate, time.time_ns())
            self.state = LEAVING
            try:
                yield frozen
            finally:
                self.state = frozen.after or runstate
                if self.state == "running" and not self.ending.done():
                    await self._run()

    async def _grant_held(self, runs: bool) -> None:
        """What the guest asked for before it stood still happens here, not where it goes. ``runs``: but for
        us it would be running."""
        try:
            if runs:
                self.state = "paused"
            await self._grant()
            if self.ending.done():
                raise IslandError("the guest has shut down")
        except BaseException:
            if runs and not self.ending.done():
                self.state = "running"
                await self._run()
            raise
        if runs and self.state == "paused":
            self.state = "running"

    async def blank(self) -> None:
        """Every island as after power-on, for a state that is about to be put in. Only while ``frozen``."""
        await self._all(self.hosts, messages.Reset)
        await self._all(self.vcpus, messages.Reset)

    async def paused_command(self, role: str, command: messages.Command) -> Any:
        """A command that the island takes only while the guest is still."""
        async with self.paused():
            return await self.command(role, command)

    async def arrived(self, runstate: str, passed_ns: int = 0) -> None:
        """The guest's state has come from elsewhere: let it go on as it was. ``passed_ns``: how far its clock
        is put forward."""
        async with self._lock:
            assert self.segment is not None and self.state == "inmigrate"
            time_ = self.segment.header.time
            self.segment.set_time(int(time_.guest_ns) + passed_ns, int(time_.wall_ns), int(time_.tsc_khz))
            self.state = "paused" if runstate in ("running", "prelaunch") else runstate
        if runstate == "running" and not self.options.start_paused:
            await self.cont()

    async def stop(self) -> None:
        """Pause the guest at an instruction boundary (QMP stop)."""
        self._not_leaving()
        async with self._lock:
            if self.state != "running":
                return
            await self._pause()
            self.state = "paused"
            self.event("STOP")

    async def reset(self) -> None:
        """Power-on state everywhere, for the host; goes on running if it ran."""
        self._not_leaving()
        async with self._lock:
            self._not_away()
            await self._reset(False, "host-qmp-system-reset")

    async def _reset(self, guest: bool, reason: str) -> None:
        runs = self.state == "running"
        if runs:
            await self._pause()
        await self._all(self.hosts, messages.Reset)
        await self._all(self.vcpus, messages.Reset)
        await self._load()
        self.event("RESET", {"guest": guest, "reason": reason})
        if runs:
            await self._run()
        elif self.state in NEED_RESET:
            self.state = "prelaunch"

    def quit(self, reason: str = "host-qmp-quit") -> None:
        """End the run from the host's side, at any time."""
        if not self.ending.done():
            self.event("SHUTDOWN", {"guest": False, "reason": reason})
        self.end(Ending(reason))

    async def close(self) -> None:
        """End every island in order and remove what the machine left; safe at any stage of start."""
        self._expected_exit = True
        await self._end_islands()
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

    async def _end_islands(self) -> None:
        """vCPUs first, then who they talk to, blockd last so that it can flush."""
        for kind, patience in END_SECONDS.items():
            islands = [island for role, island in self.islands.items() if role.startswith(kind)]
            await asyncio.gather(*(self._end_island(island, patience) for island in islands))

    async def _ask_to_quit(self, island: Island, patience: float) -> bool:
        """Whether it answered, or ended without a word (a signal may have come to it as well)."""
        loop = asyncio.get_running_loop()
        quit_ = asyncio.ensure_future(self.command(island.role, messages.Quit(serial=self.next_serial())))
        dead: asyncio.Future[None] = loop.create_future()

        def died() -> None:
            loop.remove_reader(island.pidfd)
            dead.set_result(None)

        loop.add_reader(island.pidfd, died)
        await asyncio.wait({quit_, dead}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        loop.remove_reader(island.pidfd)
        answered = dead.done() or (quit_.done() and quit_.exception() is None)
        quit_.cancel()
        return answered

    async def _end_island(self, island: Island, patience: float) -> None:
        """By its own doing where it listens, else by force."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(island.pidfd)
        answered = False
        if island.alive() and self._hello[island.role].is_set():
            answered = await self._ask_to_quit(island, patience)
        if not answered or not await asyncio.to_thread(island.reap, patience):
            if island.alive() and self._hello[island.role].is_set():
                log.info("%s does not end by itself and is killed", island.role)
            island.kill()
            await asyncio.to_thread(island.reap, patience)
        island.close()
