"""How the islands of a machine end: each by its own doing where it listens, else by force."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from coordinator.contract import messages
from coordinator.islands import Island

if TYPE_CHECKING:
    from coordinator.crew import Crew

log = logging.getLogger(__name__)

#: how long one may take to end when told to, seconds: blockd has data to flush, the others nothing to lose.
#: In this order: vCPUs first, then who they talk to
END_SECONDS = {"vcpu": 2.0, "devhost": 2.0, "blockd": 10.0}


async def end_islands(crew: Crew) -> None:
    """Return when all of them have ended."""
    for kind, patience in END_SECONDS.items():
        islands = [island for role, island in crew.islands.items() if role.startswith(kind)]
        await asyncio.gather(*(_end_island(crew, island, patience) for island in islands))


async def _ask_to_quit(crew: Crew, island: Island, patience: float) -> bool:
    """Whether it answered, or ended without a word (a signal may have come to it as well)."""
    loop = asyncio.get_running_loop()
    quit_ = asyncio.ensure_future(crew.command(island.role, messages.Quit(serial=crew.next_serial())))
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


async def _end_island(crew: Crew, island: Island, patience: float) -> None:
    """By its own doing where it listens, else by force."""
    loop = asyncio.get_running_loop()
    loop.remove_reader(island.pidfd)
    answered = False
    if island.alive() and crew.has_come(island.role):
        answered = await _ask_to_quit(crew, island, patience)
    if not answered or not await asyncio.to_thread(island.reap, patience):
        if island.alive() and crew.has_come(island.role):
            log.info("%s does not end by itself and is killed", island.role)
        island.kill()
        await asyncio.to_thread(island.reap, patience)
    island.close()
