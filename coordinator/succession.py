"""A device host or block daemon that has died is replaced by another process, and the guest does not notice.

Guest time stops at once. A device host's successor attaches to the segment, takes over what its predecessor
has committed (devhost/commit.py) and says hello; it gets the commands again that are open, Run first where
the guest runs. Then the host's generation is raised, which lets vCPUs ask again, and guest time goes on.

A block daemon's successor opens the exports again, under leases that it takes from the dead one, before it
listens; device hosts come back by themselves and ask again. It gets those open commands again that may be
done twice.

What a device host dies of again and again is left out (toll.py): the device is unplugged, the command fails.
Where there is nothing to be left out the machine ends, and so it does when a block daemon dies
``MOST_DEATHS`` times by its own fault as soon as it serves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from coordinator.contract import messages
from coordinator.contract._segment import lib
from coordinator.contract.errors import IslandError
from coordinator.islands import Island
from coordinator.toll import MOST_DEATHS, Toll, Work, in_hand

if TYPE_CHECKING:
    from coordinator.crew import Crew

log = logging.getLogger(__name__)

BLOCKD = "blockd"
#: how long a successor may take to say hello, seconds
HELLO_SECONDS = 60.0
#: a block daemon that has lived so long has done something, seconds
SOON_SECONDS = 10.0
#: commands to the block daemon of which a part may be done, or that go on beside it: they fail with it
ONCE = (messages.StoreVmState, messages.FetchVmState, messages.CreateSnapshots)


class Succession:
    """Of the islands of one machine that can be replaced."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        #: roles without a process that serves; set when the one that is starting has died, too
        self.vacant: dict[str, asyncio.Event] = {}
        #: replacements so far, by role
        self.restarts: dict[str, int] = {}
        #: what device hosts have died of
        self._tolls: dict[str, Toll] = {}
        #: deaths in a row of the block daemon by its own fault, and when it last began to serve
        self._faults, self._since = 0, 0.0
        #: while a migration has closed the disks: done with the role of the first device host that dies
        self._fallen: asyncio.Future[str] | None = None
        #: they are not closed
        self._disks_open = asyncio.Event()
        self._disks_open.set()
        #: whether the last order to the host was Run
        self._runs: dict[str, bool] = {}

    def disks_closed(self) -> asyncio.Future[str]:
        """No device host would find its disks: one that dies is replaced behind ``disks_opened``. The role of
        the first that does."""
        self._disks_open.clear()
        self._fallen = asyncio.get_running_loop().create_future()
        return self._fallen

    def disks_opened(self) -> None:
        self._disks_open.set()

    async def _find_disks(self, role: str) -> None:
        if role != BLOCKD and not self._disks_open.is_set():
            if self._fallen is not None and not self._fallen.done():
                self._fallen.set_result(role)
            await self._disks_open.wait()

    def replaces(self, role: str) -> bool:
        """Whether an island of this role can be replaced."""
        return role == BLOCKD or role in self._crew.hosts

    def sent(self, role: str, command: messages.Command) -> None:
        """A command is on its way to an island."""
        if isinstance(command, messages.Run | messages.Stop):
            self._runs[role] = isinstance(command, messages.Run)

    def died(self, role: str) -> bool:
        """Whether this is the death of an island that is being replaced now."""
        if not self.replaces(role) or not self._crew.serves:
            return False
        if role in self.vacant:
            self.vacant[role].set()
        else:
            self.vacant[role] = asyncio.Event()
            self._crew.show_time()
            self._crew.spawn(self._replace(role))
        return True

    async def _hopeless(self, role: str, island: Island) -> bool:
        """Whether it would die of the same again and again, and nothing can be done about it."""
        if role == BLOCKD:
            if time.monotonic() - self._since > SOON_SECONDS:
                self._faults = 0
            return self._faults >= MOST_DEATHS - 1
        assert self._crew.segment is not None
        block = self._crew.segment.host(int(role.removeprefix("devhost")))
        work = in_hand(block)
        if work is not None and work.kind == lib.HAND_LOAD:
            await asyncio.to_thread(island.epitaph)
            if island.was_killed:
                work = None
        fatal = self._tolls.setdefault(role, Toll()).fatal(work, int(block.events))
        return fatal and not self._goes_on_without(role, work)

    def _goes_on_without(self, role: str, work: Work | None) -> bool:
        """Whether there is something to be left out: the device, or the command."""
        crew = self._crew
        assert crew.segment is not None
        if work is not None and work.device:
            device, missing = crew.segment.device_name(work.device), crew.unplugged.setdefault(role, [])
            if device not in missing:
                missing.append(device)
                log.error("%s: unplugged: %s has died %d times at %s", device, role, MOST_DEATHS, work)
                told = {"device": device, "role": role, "access": str(work), "deaths": MOST_DEATHS}
                crew.event("DEVICE_UNPLUGGED_BY_FAULT", told)
                return True
        elif work is not None and work.kind == lib.HAND_COMMAND:
            for command in crew.open_commands(role):
                if command.serial == work.number:
                    text = f"{role} has died {MOST_DEATHS} times of {type(command).__name__}"
                    log.error("%s", text)
                    crew.refuse(command, text)
                    return True
        return False

    async def _replace(self, role: str) -> None:
        crew, began = self._crew, time.monotonic()
        dead: list[Island] = []
        assert crew.segment is not None
        while True:
            dead.append(crew.islands[role])
            crew.segment.break_locks(dead[-1].pid)
            crew.drain_output(role)
            if await self._hopeless(role, dead[-1]):
                await crew.mourn(role)
                return
            await self._find_disks(role)
            self.vacant[role].clear()
            hello = await crew.start_successor(role)
            if await self._arrives(role, hello):
                break
            if not crew.serves:
                return
        await (self._brief_blockd() if role == BLOCKD else self._brief_host(role))
        stood = crew.segment.guest_now()
        crew.show_time()
        blackout = time.monotonic() - began
        await self._tell(role, dead, blackout, stood)

    async def _brief_host(self, role: str) -> None:
        crew = self._crew
        assert crew.segment is not None
        waiting = crew.open_commands(role)
        del self.vacant[role]
        if self._runs.get(role) and not any(isinstance(command, messages.Run) for command in waiting):
            await crew.command(role, messages.Run(serial=crew.next_serial()))
        for command in waiting:
            await crew.send(role, command)
        crew.segment.host(int(role.removeprefix("devhost"))).generation += 1

    async def _brief_blockd(self) -> None:
        self._since = time.monotonic()
        waiting = self._crew.open_commands(BLOCKD)
        del self.vacant[BLOCKD]
        for command in waiting:
            if isinstance(command, ONCE):
                self._crew.refuse(command, "the block daemon has died, and another one goes on; try again")
            else:
                await self._crew.send(BLOCKD, command)

    async def _tell(self, role: str, dead: list[Island], blackout: float, stood: int) -> None:
        """``stood``: guest time at which it happened."""
        crew = self._crew
        self.restarts[role] = self.restarts.get(role, 0) + 1
        cause = await asyncio.to_thread(dead[0].epitaph)
        if role == BLOCKD:
            self._faults = 0 if dead[0].was_killed else self._faults + 1
        crew.standbys.warm()
        for island in dead:
            island.close()
        log.info("%s; replaced within %.1f ms", cause, blackout * 1000)
        crew.event(
            "ISLAND_RESTARTED",
            {
                "role": role, "cause": cause, "blackout-ms": round(blackout * 1000, 3),
                "restarts": self.restarts[role], "x-guest-ns": stood,
            },
        )  # fmt: skip

    async def _arrives(self, role: str, hello: asyncio.Event) -> bool:
        """False: it has died as well, or the machine ends; IslandError when it says nothing."""
        waits = [asyncio.ensure_future(event.wait()) for event in (hello, self.vacant[role])]
        either: set[asyncio.Future[Any]] = {*waits, self._crew.ending}
        await asyncio.wait(either, timeout=HELLO_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if hello.is_set():
            return True
        if self.vacant[role].is_set() or self._crew.ending.done():
            return False
        raise IslandError(f"{role} could not be replaced within {HELLO_SECONDS:.0f} s")
