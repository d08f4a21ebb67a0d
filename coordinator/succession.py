"""A device host that has died is replaced by another process, and the guest does not notice.

Guest time stops at once. The successor attaches to the segment, takes over what its predecessor has committed
(devhost/commit.py) and says hello; it gets the commands again that are open, Run first where the guest
runs. Then
the host's generation is raised, which lets vCPUs ask again, and guest time goes on.

One that dies ``MOST_DEATHS`` times with an event in hand, while none ends, would do so for ever: it takes the
machine along. Being killed before it comes to anything is no fault of its own, so that may happen more often.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from coordinator.contract import messages
from coordinator.contract.errors import IslandError

if TYPE_CHECKING:
    from coordinator.crew import Crew

log = logging.getLogger(__name__)

MOST_DEATHS = 3
#: deaths in a row without an event
MOST_STARTS = 100
#: how long a successor may take to say hello, seconds
HELLO_SECONDS = 60.0


class Succession:
    """Of the device hosts of one machine."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        #: roles without a process that serves; set when the one that is starting has died, too
        self.vacant: dict[str, asyncio.Event] = {}
        #: replacements so far, by role
        self.restarts: dict[str, int] = {}
        #: events there had been at the last death
        self._events: dict[str, int] = {}
        #: deaths since one has ended: with one in hand, and all
        self._deaths: dict[str, tuple[int, int]] = {}
        #: whether the last order to the host was Run
        self._runs: dict[str, bool] = {}

    def sent(self, role: str, command: messages.Command) -> None:
        """A command is on its way to an island."""
        if isinstance(command, messages.Run | messages.Stop):
            self._runs[role] = isinstance(command, messages.Run)

    def died(self, role: str) -> bool:
        """Whether this is the death of a device host, which is being replaced then."""
        if role not in self._crew.hosts or not self._crew.serves:
            return False
        if role in self.vacant:
            self.vacant[role].set()
        else:
            self.vacant[role] = asyncio.Event()
            self._crew.show_time()
            self._crew.spawn(self._replace(role))
        return True

    def _hopeless(self, role: str) -> bool:
        """Whether it makes no progress from death to death."""
        assert self._crew.segment is not None
        block = self._crew.segment.host(int(role.removeprefix("devhost")))
        events, in_hand = int(block.events), int(block.begun != block.events)
        busy, deaths = self._deaths.get(role, (0, 0)) if self._events.get(role) == events else (0, 0)
        self._events[role] = events
        self._deaths[role] = busy, deaths = busy + in_hand, deaths + 1
        return busy >= MOST_DEATHS or deaths >= MOST_STARTS

    async def _replace(self, role: str) -> None:
        crew, began, dead = self._crew, time.monotonic(), []
        assert crew.segment is not None
        while True:
            dead.append(crew.islands[role])
            crew.segment.break_locks(dead[-1].pid)
            crew.drain_output(role)
            if self._hopeless(role):
                await crew.mourn(role)
                return
            self.vacant[role].clear()
            hello = await crew.start_successor(role)
            if await self._arrives(role, hello):
                break
            if not crew.serves:
                return
        waiting = crew.open_commands(role)
        del self.vacant[role]
        if self._runs.get(role) and not any(isinstance(command, messages.Run) for command in waiting):
            await crew.command(role, messages.Run(serial=crew.next_serial()))
        for command in waiting:
            await crew.send(role, command)
        crew.segment.host(int(role[7:])).generation += 1
        crew.show_time()
        blackout = time.monotonic() - began
        self.restarts[role] = self.restarts.get(role, 0) + 1
        cause = await asyncio.to_thread(dead[0].epitaph)
        crew.standbys.warm()
        for island in dead:
            island.close()
        log.info("%s; replaced within %.1f ms", cause, blackout * 1000)
        crew.event(
            "ISLAND_RESTARTED",
            {
                "role": role, "cause": cause, "blackout-ms": round(blackout * 1000, 3),
                "restarts": self.restarts[role],
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
