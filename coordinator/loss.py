"""A vCPU whose process has died: the guest stands still, and what the vCPU was stays to be looked at.

No other process can go on in its place: what the dead one had in hand - an instruction half-way, x87
registers - is nowhere else. So guest time stops at once, the other islands come to rest, and the state of the
machine is internal-error. Its registers are in the segment (struct vcpu_block); a copy is kept, and told in a
file of the runtime folder (postmortem.py). A reset, or a state that is loaded, starts another process,
which ends the loss.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator import postmortem
from coordinator.contract.errors import IslandError

if TYPE_CHECKING:
    from coordinator.crew import Crew

log = logging.getLogger(__name__)

#: how long another process may take to say hello, seconds
HELLO_SECONDS = 60.0
#: between two attempts to fill what the dead one has left open, seconds
MEND_SECONDS = 0.001


@dataclass(frozen=True)
class Loss:
    """``block`` is its struct vcpu_block, exact as far as it can be, ``report`` the file that tells of it."""

    role: str
    block: Any
    report: Path


class Losses:
    """Of the vCPUs of one machine."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        #: roles whose state is lost: theirs in the segment is void
        self.lost: dict[str, Loss] = {}
        #: roles without a process; set when the one that is starting has died, too
        self.vacant: dict[str, asyncio.Event] = {}
        #: what they said last
        self._words: dict[str, str] = {}

    def of(self, vcpu: int) -> Loss | None:
        """What is left of a vCPU, None while it lives."""
        return self.lost.get(f"vcpu{vcpu}")

    def failed(self, role: str, words: str) -> bool:
        """An island says that it cannot go on. Whether that is a vCPU which the machine outlives."""
        if not self._bearable(role):
            return False
        self._words[role] = words
        self._crew.islands[role].kill()
        return True

    def _bearable(self, role: str) -> bool:
        return role.startswith("vcpu") and self._crew.serves and self._crew.captain.bears_loss

    def died(self, role: str) -> bool:
        """Whether this is a death that the machine outlives."""
        if not self._bearable(role):
            return False
        crew, index = self._crew, int(role.removeprefix("vcpu"))
        assert crew.segment is not None
        crew.segment.break_locks(crew.islands[role].pid)
        crew.segment.lost(index)
        if role in self.vacant:
            self.vacant[role].set()
            return True
        self.vacant[role] = asyncio.Event()
        crew.show_time()
        if role not in self.lost:
            block = postmortem.copy_block(crew.segment, index)
            self.lost[role] = Loss(role, block, crew.folder / f"{role}.death")
        crew.fail_commands(role, f"{role} has died")
        crew.spawn(self._follow(role))
        return True

    async def _follow(self, role: str) -> None:
        crew, island = self._crew, self._crew.islands[role]
        await self._mend()
        await crew.captain.bereaved()
        cause = await asyncio.to_thread(island.epitaph)
        if words := self._words.pop(role, None) or island.last_words():
            cause += f"; its last words: {words}"
        loss = self.lost.get(role)
        if loss is None:
            return  # a reset came first
        try:
            text = postmortem.report(crew, int(role.removeprefix("vcpu")), loss.block, cause)
            loss.report.write_text(text)
        except OSError as error:
            log.error("%s: %s", loss.report, error.strerror)
        log.info("%s", cause)
        rip = int(loss.block.arch.rip)
        crew.event("ISLAND_DIED", {"role": role, "cause": cause, "rip": rip, "report": str(loss.report)})

    async def _mend(self) -> None:
        """Until no posted write is waited for that nobody will make."""
        crew = self._crew
        assert crew.segment is not None
        while not crew.ending.done():
            dead = [int(role.removeprefix("vcpu")) for role in self.vacant]
            if all([crew.mend_ring(host, dead) for host in range(len(crew.hosts))]):
                return
            await asyncio.sleep(MEND_SECONDS)

    async def revive(self) -> None:
        """Start a process for each vCPU that has none; its state is that after power-on."""
        for role in list(self.vacant):
            await self._start(role)

    async def _start(self, role: str) -> None:
        crew = self._crew
        await self._mend()
        old = crew.islands[role]
        self.vacant[role].clear()
        hello = crew.start_vcpu(int(role.removeprefix("vcpu")))
        old.close()
        waits = [asyncio.ensure_future(event.wait()) for event in (hello, self.vacant[role])]
        either: set[asyncio.Future[Any]] = {*waits, crew.ending}
        await asyncio.wait(either, timeout=HELLO_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if not hello.is_set():
            raise IslandError(f"{role} could not be started again")
        del self.vacant[role]
        restarts = crew.succession.restarts
        restarts[role] = restarts.get(role, 0) + 1

    def forget(self) -> None:
        """All vCPUs have a state again."""
        self.lost = {role: loss for role, loss in self.lost.items() if role in self.vacant}
