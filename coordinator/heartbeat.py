"""Whether device hosts and block daemon still serve: each is asked again and again, and answers between two
pieces of work.

Slow is not dead. What counts against one that says nothing is only time in which it could have answered:
neither time that it waits for a processor or a disk, nor time under a debugger, nor, for a block daemon, time
that a command of ours takes, which may be as slow as the storage is. A device host whose events go on needs
no answer. A process that was stopped (SIGSTOP) could not answer, so there all of it counts.

Guest time stands still once one has been silent for ``SUSPECT_SECONDS``, so that no guest's timeout fires,
whatever comes of it: an answer, and all goes on; or silence for the time that the user has set, and it is
killed and replaced.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coordinator.contract import messages
from coordinator.contract.clock import NS_PER_S

if TYPE_CHECKING:
    from coordinator.crew import Crew

log = logging.getLogger(__name__)

#: between two looks, seconds; a look that comes late, since we were not running ourselves, counts as one
LOOK_SECONDS = 0.5
SUSPECT_SECONDS = 2.0

#: proc(5), stat: states in which a process cannot be expected to answer, and the one in which it is stopped
WAITS_FOR_DISK, TRACED, STOPPED = "D", "t", "T"


class Verdict(enum.Enum):
    """What to think of an island."""

    SERVES = enum.auto()
    SUSPECT = enum.auto()
    HANGS = enum.auto()


@dataclass(frozen=True)
class Sight:
    """What a look at a process finds. ``waited_ns``: how long in all it has been ready to run, and did not;
    ``excused``: it has something to do that may take as long as it likes."""

    state: str
    waited_ns: int
    heard: bool
    excused: bool = False


class Pulse:
    """Of one process. ``limit``: seconds of silence after which it hangs, 0 for never."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._waited_ns: int | None = None
        self.silent = 0.0

    def look(self, sight: Sight) -> Verdict:
        """``LOOK_SECONDS`` after the last one, or whenever we come to it."""
        before, self._waited_ns = self._waited_ns, sight.waited_ns
        if sight.heard or before is None:
            self.silent = 0.0
        elif sight.state == STOPPED or not (sight.excused or sight.state in (WAITS_FOR_DISK, TRACED)):
            waited = (sight.waited_ns - before) / NS_PER_S
            self.silent += max(0.0, LOOK_SECONDS - waited)
        if self._limit and self.silent >= self._limit:
            return Verdict.HANGS
        return Verdict.SUSPECT if self.silent >= SUSPECT_SECONDS else Verdict.SERVES


class Heartbeat:
    """Of the islands of one machine that can be replaced."""

    def __init__(self, crew: Crew, limit: float) -> None:
        self._crew, self._limit = crew, limit
        #: roles that have been silent for some time
        self.suspects: set[str] = set()
        self._pulses: dict[int, Pulse] = {}
        self._asked: dict[str, asyncio.Future[Any]] = {}
        self._events: dict[str, int] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before = set(self.suspects)
            for role in (*self._crew.hosts, "blockd"):
                self._look(role)
            if self.suspects != before:
                self._crew.show_time()

    def _look(self, role: str) -> None:
        crew, island = self._crew, self._crew.islands[role]
        if role in crew.succession.vacant or not crew.serves:
            self._pulses.pop(island.pid, None)
            self.suspects.discard(role)
            return
        sight = self._sight(role, island.pid)
        if sight is None:
            return  # it has died, and that is seen as well
        verdict = self._pulses.setdefault(island.pid, Pulse(self._limit)).look(sight)
        if verdict is Verdict.SERVES:
            if role in self.suspects:
                log.info("%s serves again", role)
            self.suspects.discard(role)
            return
        if role not in self.suspects:
            log.warning("%s does not answer (state %s); guest time stands still", role, sight.state)
        self.suspects.add(role)
        if verdict is Verdict.HANGS:
            island.condemn(f"did not answer for {self._limit:g} s and was killed")

    def _sight(self, role: str, pid: int) -> Sight | None:
        """None when the process is gone."""
        try:
            with open(f"/proc/{pid}/stat") as file:
                state = file.read().rpartition(")")[2].split()[0]
            with open(f"/proc/{pid}/schedstat") as file:
                waited = int(file.read().split()[1])
        except OSError:
            return None
        others = [c for c in self._crew.open_commands(role) if not isinstance(c, messages.Ping)]
        return Sight(state, waited, self._heard(role), role == "blockd" and bool(others))

    def _heard(self, role: str) -> bool:
        """It has answered, or got on, since the last look; and is asked again."""
        asked = self._asked.get(role)
        answered = asked is None or asked.done()
        if answered:
            ping = messages.Ping(serial=self._crew.next_serial())
            self._asked[role] = asyncio.ensure_future(self._ask(role, ping))
        return answered or self._got_on(role)

    async def _ask(self, role: str, ping: messages.Ping) -> None:
        try:
            await self._crew.command(role, ping)
        except Exception as error:  # of no consequence here: it is seen by its death, or the machine ends
            log.debug("%s: %s", role, error)

    def _got_on(self, role: str) -> bool:
        if role == "blockd" or self._crew.segment is None:
            return False
        events = int(self._crew.segment.host(int(role.removeprefix("devhost"))).events)
        before, self._events[role] = self._events.get(role), events
        return before != events
