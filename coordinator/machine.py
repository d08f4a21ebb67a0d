"""A machine: its run states, from the first start to the last exit. Its islands are its crew (crew.py).

States are QEMU's: prelaunch, running, paused, shutdown, internal-error.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.contract import messages
from coordinator.contract.config import Drive, Machine
from coordinator.contract.errors import IslandError
from coordinator.contract.segment import Segment
from coordinator.crew import Crew, Ending
from coordinator.islands import Island
from coordinator.jobs import Jobs
from coordinator.loss import Loss
from coordinator.policy import Options

log = logging.getLogger(__name__)
#: what -trace asked for
trace = logging.getLogger("atoll.trace")

#: QMP's ShutdownCause, as far as guests bring it about
RESET_CAUSES = ("guest-reset", "subsystem-reset")
SHUTDOWN_CAUSES = ("guest-shutdown", *RESET_CAUSES)

#: states in which a guest that has been moved away, or not here yet, cannot be made to run
AWAY = {"postmigrate": "has been migrated away", "inmigrate": "is waiting for its migration"}
#: states in which there is no guest that could run
NEED_RESET = ("shutdown", "internal-error")
#: held still for a migration
LEAVING = "finish-migrate"
#: what may precede the guest's first instruction: loads RAM and says how vCPU 0 starts
Loader = Callable[[Segment], messages.LoadCpu | None]
#: told of a step on the way
Step = Callable[[str], Awaitable[None]]


@dataclass
class Frozen:
    """A guest that is held still. ``runstate`` is what it was before, ``stopped_at_ns`` UNIX time when it
    stopped. Set ``after`` to leave it still, in that state."""

    runstate: str
    stopped_at_ns: int
    after: str | None = None


class Vm:
    """The guest as its users see it: what they and it ask for, and what state that leads to."""

    def __init__(
        self, machine: Machine, options: Options, loader: Loader, folder: Path, log_file: str | None = None
    ) -> None:
        """``folder`` is the runtime folder; islands log there, or all into ``log_file``."""
        self.options = options
        self.state = "prelaunch"
        #: counts the coordinators that have had this guest, by migration: the higher one is right
        self.epoch = 1
        #: see migrate/manager.py and dump.py, which need this module
        self.migration: Any = None
        self.dumps: Any = None
        #: called with (event name, data) for QMP
        self.on_event: list[Callable[[str, dict[str, Any]], None]] = []
        self.on_serial: Callable[[int, bytes], None] = lambda index, data: None
        self.on_debug: Callable[[int, bytes], None] = lambda port, data: None
        self.crew = Crew(machine, options, folder, log_file, self)
        self.jobs = Jobs(self.event, self.spawn)
        self._loader = loader
        self._lock = asyncio.Lock()
        #: held while media are being exchanged
        self.media_lock = asyncio.Lock()
        #: no medium is exchanged: a migration goes by what is there
        self.media_held = False
        #: what the guest has asked for and not been given
        self._wishes: list[messages.GuestReset | messages.GuestShutdown] = []

    # ---- start ---------------------------------------------------------------------------------
    async def start(self) -> None:
        """Bring up all islands; the guest runs unless asked to wait."""
        await self.crew.start()
        await self._load()
        if self.options.incoming is not None:
            self.state = "inmigrate"
        self.crew.ready()
        options = self.options
        if not options.start_paused and options.incoming is None and options.loadvm is None:
            await self.cont()

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

    # ---- the crew ------------------------------------------------------------------------------
    @property
    def machine(self) -> Machine:
        """As it is now: removable media come and go."""
        return self.crew.machine

    @property
    def folder(self) -> Path:
        """The runtime folder."""
        return self.crew.folder

    @property
    def segment(self) -> Segment | None:
        return self.crew.segment

    @property
    def islands(self) -> dict[str, Island]:
        """By role."""
        return self.crew.islands

    @property
    def hosts(self) -> list[str]:
        """Roles of the device hosts."""
        return self.crew.hosts

    @property
    def vcpus(self) -> list[str]:
        return self.crew.vcpus

    @property
    def ending(self) -> asyncio.Future[Ending]:
        """Why the run has ended."""
        return self.crew.ending

    def end(self, ending: Ending) -> None:
        """Let the run end for this reason; the first one counts."""
        self.crew.end(ending)

    def spawn(self, work: Awaitable[None]) -> None:
        """Do something beside everything else; its failure is the machine's end."""
        self.crew.spawn(work)

    async def started(self) -> None:
        """Return when every island is there, which commands to them need; IslandError if that never comes."""
        await self.crew.started()

    def next_serial(self) -> int:
        return self.crew.next_serial()

    async def command(self, role: str, command: messages.Command) -> Any:
        """Send a command and wait for its answer; IslandError carries the island's error text."""
        return await self.crew.command(role, command)

    async def _all(self, roles: list[str], kind: type[messages.Command]) -> None:
        await asyncio.gather(*(self.command(role, kind(serial=self.next_serial())) for role in roles))

    def allow(self, drive: Drive) -> None:
        """Let the block daemon have a drive's image, which the user has named."""
        self.crew.allow(drive)

    def replace_drive(self, drive: Drive) -> None:
        """A removable drive has another medium now."""
        self.crew.replace_drive(drive)

    # ---- what islands tell ---------------------------------------------------------------------
    def noticed(self, notice: messages.AnyNotice) -> None:
        """See crew.Captain."""
        match notice:
            case messages.SerialOutput(index=index, data=data):
                self.on_serial(index, data)
            case messages.DebugOutput(port=port, data=data):
                self.on_debug(port, data)
            case messages.TraceLines(lines=lines):
                for line in lines:
                    trace.info("%s", line)
            case messages.TrayMoved(drive=drive, open=is_open):
                self.event("DEVICE_TRAY_MOVED", {"device": drive, "id": drive, "tray-open": is_open})
            case messages.TookOver(role=role, drives=drives, guest_ns=now):
                self.event("X_DRIVES_TAKEN_OVER", {"role": role, "drives": drives, "guest-ns": now})
            case messages.PhaseReached(drive=drive, phase=phase, guest_ns=now):
                self.event("X_PHASE_REACHED", {"device": drive, "phase": phase.value, "guest-ns": now})
            case messages.PhaseMissed(drive=drive, phase=phase, held=held):
                self.event("X_PHASE_MISSED", {"device": drive, "phase": phase.value, "held": held})
            case messages.GuestReset() | messages.GuestShutdown():
                self._wishes.append(notice)
                self.spawn(self._grant_wishes())
            case messages.LeaseLost(error=error):
                log.error("%s", error)

    @property
    def moved(self) -> bool:
        """See crew.Captain."""
        return self.state == "postmigrate"

    def lost(self) -> None:
        """See crew.Captain."""
        self.state = "internal-error"

    @property
    def bears_loss(self) -> bool:
        """See crew.Captain. A guest that is still arriving is better off where it comes from."""
        return self.state != "inmigrate"

    async def bereaved(self) -> None:
        """See crew.Captain."""
        async with self._lock:
            if not self.crew.losses.lost:
                return  # a reset came first
            runs = self.state == "running"
            if runs:
                await self._rest()
            if self.state not in AWAY and self.state != "shutdown":
                self.state = "internal-error"
            if runs:
                self.event("STOP")

    def loss(self, vcpu: int) -> Loss | None:
        """What is left of a vCPU that has died."""
        return self.crew.losses.of(vcpu)

    def event(self, name: str, data: dict[str, Any] | None = None) -> None:
        for listener in self.on_event:
            listener(name, data or {})

    # ---- run states ----------------------------------------------------------------------------
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
            await self._stop_vcpus()
            if step is not None:
                await step("quiesce")
            await self._all(self.hosts, messages.Stop)
        except BaseException:  # a block request that is not answered, a cancel: as if nobody had asked
            if not self.ending.done():
                await self._resume()
            raise
        self.crew.let_time(False)

    async def _stop_vcpus(self) -> None:
        """One that has died stands still; what follows from that comes after whatever is going on."""
        vacant = self.crew.losses.vacant
        stops = [self._all([role], messages.Stop) for role in self.vcpus if role not in vacant]
        for error in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(error, BaseException) and not (isinstance(error, IslandError) and vacant):
                raise error

    async def _rest(self) -> None:
        """Stand still for good; a device that cannot come to rest is left as it is."""
        with contextlib.suppress(IslandError):
            await self._stop_vcpus()
            await self._all(self.hosts, messages.Stop)
        self.crew.let_time(False)

    async def _run(self) -> None:
        """Not without a vCPU: then the machine is about to be brought to rest."""
        if self.crew.losses.vacant:
            return
        self.crew.let_time(True)
        await self._resume()

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

    async def revive(self) -> None:
        """Give every vCPU that has died another process, for a state that is about to be put in. Only while
        ``frozen``."""
        await self.crew.losses.revive()

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
        await self.crew.losses.revive()
        await self._all(self.hosts, messages.Reset)
        await self._all(self.vcpus, messages.Reset)
        await self._load()
        self.crew.losses.forget()
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
        await self.crew.close()
