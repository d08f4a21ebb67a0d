"""The machine's new side. It ends when the source goes on, and runs only when the source has said that it
never will again.

Between ``verified`` and that word it cannot know, so it waits, whatever happens to the connections.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from coordinator.contract.errors import AtollError, IslandError, MigrationError
from coordinator.contract.segment import Segment
from coordinator.contract.tls import server_context
from coordinator.machine import Vm
from coordinator.migrate import channel, decision, describe, messages, pump, ram, stream
from coordinator.migrate.capture import MachineState, TimeRecord, apply
from coordinator.migrate.disks import TargetDisks
from coordinator.migrate.door import Door
from coordinator.migrate.faults import Fault
from coordinator.migrate.link import Listener
from coordinator.migrate.parameters import Parameters
from coordinator.migrate.pump import Wire
from coordinator.migrate.status import Status
from coordinator.migrate.stream import Part
from coordinator.migrate.uri import Uri

log = logging.getLogger(__name__)

#: for how long a source that has not heard Running can ask again, seconds
LINGER_SECONDS = 120.0
#: how often a source that has been accepted and does not come is looked for, and for how long it may be
#: out of reach, seconds
LOOK_SECONDS, GONE_SECONDS = 0.5, 3.0
#: sources that are remembered as not welcome
UNWELCOME = 64

#: between attempts to take leases that the source has released, seconds
GRANT_SECONDS = 1.0

T = TypeVar("T")


class NotWelcome(MigrationError):
    """A source cannot come this way; nothing has happened, and another one may."""


class Target:
    """One machine to come. ``uri`` is where the source finds us."""

    def __init__(self, vm: Vm, uri: Uri, parameters: Parameters, status: Status) -> None:
        """MigrationError when nobody can listen there, BlockError when the credentials are of no use."""
        self.vm, self.parameters, self.status = vm, parameters, status
        self._fault = Fault.parse(parameters.x_fault)
        #: where the user gave credentials; the source must have a certificate, too
        self._tls = channel.Tls(server_context(parameters.tls_creds)) if parameters.tls_creds else None
        self._link = Listener(uri)
        self._transfer, self._epoch = "", 0
        #: transfers that could not come this way, and why, the last ones: what they still say is stale
        self._unwelcome: dict[str, str] = {}
        self._inbox: asyncio.Queue[messages.AnyOfSource] = asyncio.Queue()
        self._socks: list[socket.socket] = []
        self._receiver: ram.Receiver | None = None
        self._state: MachineState | None = None
        self._time: TimeRecord | None = None
        self._disks: TargetDisks | None = None
        #: everything is here; only the source's word is missing
        self.in_doubt = False
        #: set to go on without it: the user has shown the source's record
        self._shown: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        #: what has been answered, and would be again
        self._accepted: messages.Accepted | None = None
        self._verified: messages.Verified | None = None
        self._running: messages.Running | None = None

    async def run(self) -> None:
        """Until the guest goes on here; MigrationError when it does not come."""
        listening = asyncio.ensure_future(self._listen())
        self.vm.spawn(self._linger(listening))
        try:
            while True:
                try:
                    offer = await self._negotiate()
                    await self._receive(offer)
                    break
                except NotWelcome as error:
                    log.warning("migration: a source was refused: %s", error)
                    await self._wait_for_another(_reason(error))
            await self._resume(await self._released())
        except BaseException as error:
            await self._refuse(_reason(error))
            listening.cancel()
            raise
        finally:
            channel.close(self._socks)

    def close(self) -> None:
        """Nobody is answered any more."""
        self._link.close()

    async def _refuse(self, reason: str) -> None:
        """The guest will not run here."""
        if self._transfer:
            await self._link.send(messages.Refused(transfer=self._transfer, reason=reason))
            await asyncio.sleep(0.05)  # to leave before we do

    async def _wait_for_another(self, why: str) -> None:
        transfer, self._transfer, self._epoch, self._accepted = self._transfer, "", 0, None
        self.status.transfer = ""
        self._unwelcome[transfer] = why
        if len(self._unwelcome) > UNWELCOME:
            del self._unwelcome[next(iter(self._unwelcome))]
        while not self._inbox.empty():
            self._inbox.get_nowait()
        await self._link.send(messages.Refused(transfer=transfer, reason=why))

    # ---- steps -----------------------------------------------------------------------------------
    async def _at(self, point: str) -> None:
        self.status.phase = point
        await self._fault.at(f"target.{point}", lambda: channel.cut(self._socks))

    async def _negotiate(self) -> messages.Offer:
        """Wait for a source, and see whether its machine fits this one."""
        offer = await self._next(messages.Offer)
        await self._at("negotiate")
        if offer.protocol != messages.PROTOCOL:
            raise NotWelcome(f"the source speaks protocol {offer.protocol}, this build {messages.PROTOCOL}")
        self._wire_fits(offer)
        where = "the source"
        theirs = stream.decode(offer.description, Part.DESCRIPTION, describe.Description, where)
        if differences := describe.differences(theirs, await describe.describe(self.vm)):
            raise MigrationError(f"{theirs.name}: does not fit the machine here: {'; '.join(differences)}")
        return offer

    def _wire_fits(self, offer: messages.Offer) -> None:
        if not 1 <= offer.channels <= 16:
            raise NotWelcome(f"{offer.channels} connections were offered; 1 to 16 are possible")
        if offer.compression not in ("none", "zstd"):
            raise NotWelcome(f"the source compresses by {offer.compression!r}; this build knows zstd")
        if offer.tls != (self._tls is not None):
            one, other = ("source", "target") if offer.tls else ("target", "source")
            raise NotWelcome(
                f"the {one} wants TLS and the {other} has no tls-creds: set them on both sides"
            )

    async def _receive(self, offer: messages.Offer) -> None:
        """Memory straight into the segment, then the state into the islands."""
        segment = self.vm.segment
        assert segment is not None
        segment.empty_memory()
        ahead = asyncio.ensure_future(ram.Ahead(segment, offer.runs, write=True).run())
        try:
            if not offer.stands:
                await self._unless_aborted(asyncio.shield(ahead))
            await self._take(offer, segment)
        finally:
            ahead.cancel()

    async def _take(self, offer: messages.Offer, segment: Segment) -> None:
        """Connections, memory, which is ready or becomes so meanwhile, then the state."""
        door = Door(self._link.uri, self.parameters.x_data_port)
        turned_away: list[str] = []
        door.on_turned_away = lambda why: self._turned_away(turned_away, why)
        try:
            self._accepted = messages.Accepted(
                transfer=self._transfer, token=door.token, port=door.port, path=door.path
            )
            for _ in range(self._fault.copies("target.accept")):
                await self._link.send(self._accepted)
            admission = door.admit(offer.channels, self._tls)
            self._socks = await self._unless_unreachable(self._unless_aborted(admission))
        except MigrationError as error:
            if turned_away:
                raise NotWelcome(f"a data connection was turned away: {turned_away[-1]}") from error
            raise
        finally:
            door.close()
        self.status.set_up()
        self.status.move("active")
        await self._at("receive")
        receiver = self._receiver = ram.Receiver(segment)
        wire = Wire(int(offer.compression == "zstd"), offer.tls)
        tallies = [pump.Tally() for _ in self._socks]
        self.status.counts = lambda: pump.on_the_wire(wire, receiver.counts, tallies)
        jobs = [
            partial(pump.receive, sock, wire, tally, lambda fd: receiver.run(fd, "the source"))
            for sock, tally in zip(self._socks, tallies, strict=True)
        ]
        words = asyncio.ensure_future(self._load())
        try:
            memory = channel.side_by_side(jobs, lambda: channel.cut(self._socks))
            await self._unless_failed(memory, words)
            complete = await self._unless_gone(words)
        finally:
            words.cancel()
            await asyncio.gather(words, return_exceptions=True)
        counts = receiver.counts
        if (complete.normal, complete.zero) != (counts.normal, counts.zero):
            came, went = counts.normal + counts.zero, complete.normal + complete.zero
            raise MigrationError(f"{came} pages have come, the source says {went}")

    def _turned_away(self, so_far: list[str], why: str) -> None:
        """The source is told, in case it was its connection."""
        so_far.append(why)
        self.vm.spawn(self._tell(messages.TurnedAway(transfer=self._transfer, reason=why)))

    async def _tell(self, message: messages.Said) -> None:
        await self._link.send(message)

    async def _load(self) -> messages.Complete:
        """The state into the islands, while memory comes; then the source's word on that."""
        message = await self._next(messages.State)
        await self._at("load")
        self._state = stream.decode(message.state, Part.STATE, MachineState, "the source")
        self._disks = TargetDisks(self.vm, self._transfer, message.leases)
        await self._disks.check()
        self._time = await apply(self.vm, self._state)
        self.status.drives = list(self._state.drives)
        return await self._next(messages.Complete)

    async def _released(self) -> int:
        """Tell the source that all is here, and wait for its word. Returns its epoch."""
        assert self._receiver is not None
        counts = self._receiver.counts
        await self._at("verify")
        self.in_doubt = True
        self._verified = messages.Verified(
            transfer=self._transfer, normal=counts.normal, zero=counts.zero
        )
        for _ in range(self._fault.copies("target.verify")):
            await self._link.send(self._verified)
        lost = asyncio.ensure_future(channel.gone(self._socks[0]))
        word = asyncio.ensure_future(self._next(messages.Released))
        try:
            await first(word, self._shown, lost)
            if not word.done() and not self._shown.done():
                self.status.move("postcopy-paused")
                self._in_doubt()
                await first(word, self._shown)
            return word.result().epoch if word.done() else self._shown.result()
        finally:
            word.cancel()
            lost.cancel()

    def _in_doubt(self) -> None:
        """What the user can do about a source that is out of reach, or gone, and has not said a last word."""
        name, record = self.vm.machine.name, decision.place(self._transfer).name
        log.warning("the guest is here and waits: its source is gone and has not said that it released it")
        log.warning("where the source has left %s: atoll migrate --recover %s file:%s", record, name, record)
        log.warning("where there is none and the source is dead, nobody may run it: quit")

    async def _resume(self, epoch: int) -> None:
        assert self._state is not None and self._time is not None
        await self._at("resume")
        await self._grant()
        self.vm.epoch = epoch + 1
        passed = self._time.passed_ns(self.parameters.stopped_time)
        await self.vm.arrived(self._state.runstate, passed)
        self.status.resumed()
        self.status.times = {
            "stopped-at": self._time.stopped_at_ns,
            "resumed-at": time.time_ns(),
            "guest-stopped": self._time.guest_ns,
            "guest-resumed": self._time.guest_ns + passed,
        }
        self._running = messages.Running(transfer=self._transfer, epoch=self.vm.epoch)
        for _ in range(self._fault.copies("target.resume")):
            await self._link.send(self._running)

    async def _grant(self) -> None:
        """The disks are ours. What stands in the way (a full disk, a folder that is out of reach) may pass,
        and the source has let go: so this is tried until it succeeds."""
        assert self._disks is not None
        while True:
            try:
                return await self._disks.grant()
            except IslandError as error:
                if self.vm.ending.done():
                    raise
                self.status.error = str(error)
                self.status.move("postcopy-paused")
                log.warning("migration: %s", error)
                await asyncio.sleep(GRANT_SECONDS)

    # ---- talking ---------------------------------------------------------------------------------
    async def _listen(self) -> None:
        """Sort what comes: a question that was answered before is answered again, what is of another transfer
        dropped."""
        while True:
            message = await self._link.receive()
            if message.transfer in self._unwelcome:
                if isinstance(message, messages.Offer):
                    await self._refuse_other(message, self._unwelcome[message.transfer])
            elif isinstance(message, messages.Offer) and not self._transfer:
                self._transfer, self._epoch = message.transfer, message.epoch
                self.status.transfer = message.transfer
                self._inbox.put_nowait(message)
            elif message.transfer != self._transfer:
                if isinstance(message, messages.Offer):
                    await self._refuse_other(message, "another machine is coming here")
            elif isinstance(message, messages.Heard) and self._running is not None:
                return
            elif answer := self._answered_before(message):
                await self._link.send(answer)
            elif not isinstance(message, messages.Offer | messages.Heard):
                self._inbox.put_nowait(message)

    async def _refuse_other(self, offer: messages.Offer, why: str) -> None:
        await self._link.send(messages.Refused(transfer=offer.transfer, reason=why))

    def _answered_before(self, message: messages.AnyOfSource) -> messages.AnyOfTarget | None:
        match message:
            case messages.Offer():
                return self._accepted
            case messages.Complete():
                return self._verified
            case messages.Released():
                return self._running
        return None

    async def _linger(self, listening: asyncio.Task[None]) -> None:
        """Answer for some time after the end, in case the last word was lost."""
        try:
            while self._running is None and not listening.done():
                await asyncio.wait({listening}, timeout=LINGER_SECONDS)
            if not listening.done():
                await asyncio.wait({listening}, timeout=LINGER_SECONDS)
        finally:
            listening.cancel()
            self._link.close()

    async def _next(self, kind: type[T]) -> T:
        """The next message, if it is of this kind; MigrationError when the source gives up."""
        while True:
            message = await self._inbox.get()
            if isinstance(message, messages.Abort):
                raise MigrationError(f"the source goes on: {message.reason}")
            if isinstance(message, messages.Released) and message.epoch != self._epoch:
                log.warning("migration: a word of epoch %d, not %d", message.epoch, self._epoch)
            elif isinstance(message, kind):
                return message

    async def _unless_aborted(self, work: Awaitable[T]) -> T:
        """What the work gives; MigrationError when the source gives up first. A State may come early."""
        task = asyncio.ensure_future(work)
        word: asyncio.Task[messages.AnyOfSource] = asyncio.ensure_future(self._inbox.get())
        try:
            await first(task, word)
            if word.done() and isinstance(message := word.result(), messages.Abort):
                raise MigrationError(f"the source goes on: {message.reason}")
            if word.done():
                self._inbox.put_nowait(word.result())
            return await task
        finally:
            word.cancel()
            task.cancel()
            await asyncio.gather(word, task, return_exceptions=True)

    async def _unless_failed(self, work: Awaitable[T], other: asyncio.Task[Any]) -> T:
        """What the work gives; the error of the other task when that fails first."""
        task = asyncio.ensure_future(work)
        try:
            await first(task, other)
            if not task.done():
                other.result()
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _unless_unreachable(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work gives; MigrationError when the source, which has no connection yet whose end could
        tell, is out of reach first. It is looked for by the answer that it may have missed."""
        assert self._accepted is not None
        task = asyncio.ensure_future(work)
        clock = asyncio.get_running_loop().time
        seen = clock()
        try:
            while True:
                await asyncio.wait({task}, timeout=LOOK_SECONDS)
                if task.done():
                    return task.result()
                if await self._link.send(self._accepted):
                    seen = clock()
                elif clock() - seen > GONE_SECONDS:
                    raise MigrationError("the source is gone")
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _unless_gone(self, work: Awaitable[T]) -> T:
        """What the work gives; MigrationError when the source closes its connections first."""
        lost = asyncio.ensure_future(channel.gone(self._socks[0]))
        task = asyncio.ensure_future(work)
        try:
            await first(task, lost)
            if not task.done():
                raise MigrationError("the source is gone")
            return task.result()
        finally:
            lost.cancel()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # ---- recovery --------------------------------------------------------------------------------
    async def recover(self, place: Path) -> None:
        """Go on by the source's own record, where the source is no more (migrate-recover). That of leased
        disks lies with them, and is found there."""
        if self._disks is not None and self._disks.leased:
            await self._disks.grant()
            if not self._shown.done():
                self._shown.set_result(self._epoch)
            return
        record = decision.read(place)
        if record.transfer != self._transfer:
            raise MigrationError(f"{place}: is the record of another migration")
        if not self._shown.done():
            self._shown.set_result(record.epoch)

    def listen_at(self, uri: Uri) -> None:
        """Be found at another address, too (migrate-recover); MigrationError when nobody can listen there."""
        self._link.also(uri)


async def first(*waiting: asyncio.Future[Any]) -> None:
    """Returns when one of them is done."""
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)


def _reason(error: BaseException) -> str:
    if not isinstance(error, AtollError):
        return "its machine ends"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
