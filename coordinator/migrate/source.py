"""The machine's old side: a flat list of phases, each with its undo.

Until ``release`` has made its record, whatever fails, or a cancel, undoes what was done in reverse order and
the guest goes on here. After it the guest never runs here again, a cancel is refused, and the target is told
until it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from coordinator.contract import messages as island
from coordinator.contract.errors import AtollError, MigrationError
from coordinator.contract.tls import client_context
from coordinator.machine import Frozen, Vm
from coordinator.migrate import channel, decision, describe, messages, pump, ram, stream
from coordinator.migrate.aim import Aim, caught
from coordinator.migrate.capture import MachineState, capture
from coordinator.migrate.conversation import Conversation
from coordinator.migrate.disks import SourceDisks
from coordinator.migrate.faults import Fault
from coordinator.migrate.parameters import Parameters
from coordinator.migrate.pump import Wire
from coordinator.migrate.status import Status
from coordinator.migrate.stream import Part
from coordinator.migrate.uri import Uri

#: how long the target may take to answer an offer, seconds: it compares, and reads samples of its media
ANSWER_SECONDS = 30.0
#: how long a machine that ends in the moment of release waits to know whether it was released, seconds
DECIDE_SECONDS = 5.0
log = logging.getLogger(__name__)


class Source:
    """One attempt to move a machine away."""

    def __init__(self, vm: Vm, uri: Uri, parameters: Parameters, status: Status) -> None:
        self.vm, self.uri, self.parameters, self.status = vm, uri, parameters, status
        self.transfer = secrets.token_hex(8)
        self.epoch = vm.epoch
        #: the record is made, or being made: there is no way back
        self.committed = False
        self._fault = Fault.parse(parameters.x_fault)
        self._undo = contextlib.AsyncExitStack()
        self._hold = contextlib.AsyncExitStack()
        self._talk: Conversation | None = None
        self._frozen: Frozen | None = None
        self._sender: ram.Sender | None = None
        self._captured: MachineState | None = None
        self._state: messages.State | None = None
        self._disks = SourceDisks(vm, self.transfer)
        #: the device host that died while the disks were closed
        self._fallen: asyncio.Future[str] | None = None
        #: the target has said that the guest is there
        self._answered = False
        #: what a target that does not get the guest is told
        self._why = ""

    async def run(self) -> None:
        """To the end; MigrationError (the guest goes on here) unless ``committed``."""
        try:
            for phase in PHASES:
                await self._begin(phase.name)
                await phase.work(self)
                await self._at(f"{phase.name}.done")
        except BaseException as error:
            self._why = reason(error)
            raise
        finally:
            await self._undo.aclose()

    async def _begin(self, name: str) -> None:
        self.status.phase = name
        await self._at(name)

    async def _at(self, point: str) -> None:
        """Room for a fault."""
        try:
            await self._fault.at(point, self._cut)
        except MigrationError as error:
            if not self.committed:
                raise
            log.warning("migration: %s; but the guest has been released", error)

    def _tls(self) -> channel.Tls | None:
        """For connecting, where the user gave credentials."""
        folder = self.parameters.tls_creds
        name = self.parameters.tls_hostname or self.uri.host or "localhost"
        return channel.Tls(client_context(folder, name), name) if folder else None

    def _cut(self) -> None:
        if self._talk is not None:
            self._talk.cut()

    # ---- phases ----------------------------------------------------------------------------------
    async def negotiate(self) -> None:
        """Machine, CPU features, media: every difference is named before a byte of memory moves."""
        await self._disks.check(self.parameters.unleased_disks == "allow")
        talk = self._talk = Conversation(self.uri, self.transfer, lambda point: self._fault.copies(point))
        self._undo.push_async_callback(self._farewell)
        await talk.connect()
        description = await describe.describe(self.vm)
        assert self.vm.segment is not None
        runs = tuple(itertools.islice(ram.data_runs(self.vm.segment), ram.MOST_RUNS))
        offer = messages.Offer(
            transfer=self.transfer,
            protocol=messages.PROTOCOL,
            epoch=self.epoch,
            description=stream.encode(Part.DESCRIPTION, description),
            channels=self.parameters.multifd_channels,
            compression=self.parameters.multifd_compression,
            tls=bool(self.parameters.tls_creds),
            runs=runs,
            stands=self.vm.state != "running",
        )
        ahead = asyncio.ensure_future(ram.Ahead(self.vm.segment, runs, write=False).run())
        self._undo.callback(ahead.cancel)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = await talk.ask("negotiate", offer, messages.Accepted)
                if not offer.stands:
                    await ahead
        except TimeoutError:
            raise MigrationError(f"{self.uri}: nobody answers") from None
        self._undo.callback(talk.hang_up)
        await talk.connect_data(answer, offer.channels, self._tls())
        self.status.set_up()
        self.status.move("active")

    async def aim(self) -> None:
        """Where it was asked for the guest runs on until a drive enters a phase, see aim.py."""
        aim = Aim.parse(self.parameters.x_aim)
        if aim is not None and self.vm.state == "running":
            catch = self._undo.enter_async_context(caught(self.vm, aim))
            self.status.aimed = await self._talking.unless_lost(catch)

    async def drain(self) -> None:
        """Where a drive's policy asks for it the guest runs on until no command of it is half-way, up to the
        bound; then on undrained, and ``x-drains`` says so. Run ends a drain as well."""
        self._undo.push_async_callback(self._end_drain)
        for host in self.vm.hosts:
            command = island.DrainDrives(serial=self.vm.next_serial())
            result = await self._talking.unless_lost(self.vm.command(host, command))
            if result["drives"]:
                self.status.drains.append(result)

    async def _end_drain(self) -> None:
        if not self.committed:
            for host in self.vm.hosts:
                await self.vm.command(host, island.CancelDrain(serial=self.vm.next_serial()))

    async def stop(self) -> None:
        """vCPUs at an instruction boundary, posted writes applied, devices paused: see Vm.frozen."""
        self._undo.push_async_callback(self._hold.aclose)
        self._hold.callback(self._went_on)
        self.status.stopped()
        self._frozen = await self._hold.enter_async_context(self.vm.frozen(self._begin))

    def _went_on(self) -> None:
        if not self.committed:
            self.status.resumed()

    async def flush(self) -> None:
        """All disks at rest: what was written is durable, their images are closed, and their leases marked.
        """
        await self._disks.prepare()
        if self._disks.leases is not None:
            self._fallen = self.vm.crew.succession.disks_closed()
            self._hold.callback(self._reopened)
        self._hold.push_async_callback(self._give_back)

    def _reopened(self) -> None:
        if not self.committed:
            self.vm.crew.succession.disks_opened()

    async def _give_back(self) -> None:
        if not self.committed:
            await self._disks.abort()

    async def settle(self) -> None:
        """The state of all but memory. Interrupts that are posted and not taken travel as they are, so
        nothing moves here."""
        assert self._frozen is not None
        work = capture(self.vm, self._frozen.runstate, self._frozen.stopped_at_ns)
        self._captured = await self._unless_fallen(work)
        self.status.drives = list(self._captured.drives)

    async def _unless_fallen(self, work: Awaitable[MachineState]) -> MachineState:
        """What the work gives; MigrationError when a device host dies first that has to be asked."""
        if self._fallen is None:
            return await work
        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._fallen}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise MigrationError(f"{self._fallen.result()} has died while its disks were at rest")
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def send(self) -> None:
        """The state, which the target loads meanwhile, and guest memory, by all connections side by side."""
        assert self.vm.segment is not None
        self.status.move("device")
        self._state = messages.State(
            transfer=self.transfer,
            state=stream.encode(Part.STATE, self._captured),
            leases=self._disks.leases,
        )
        await self._talking.tell(self._state, "send")
        sender = self._sender = ram.Sender(self.vm.segment)
        wire = Wire(self.parameters.zstd_level, bool(self.parameters.tls_creds))
        talk, peer = self._talking, str(self.uri)
        tallies = [pump.Tally() for _ in talk.socks]
        self.status.pages = sender.total
        self.status.counts = lambda: pump.on_the_wire(wire, sender.counts, tallies)
        self.status.passed()

        def abandon() -> None:
            sender.cancelled = True
            self._cut()

        jobs = [
            partial(pump.send, sock, wire, tally, lambda fd: sender.run(fd, peer))
            for sock, tally in zip(talk.socks, tallies, strict=True)
        ]
        await talk.unless_lost(channel.side_by_side(jobs, abandon))

    async def verify(self) -> None:
        """The target says that it has everything, and can use it."""
        assert self._sender is not None and self._state is not None
        sent = self._sender.counts
        question = messages.Complete(transfer=self.transfer, normal=sent.normal, zero=sent.zero)
        ask = self._talking.ask("verify", question, messages.Verified, before_again=self._state)
        answer = await self._talking.unless_lost(ask)
        if (answer.normal, answer.zero) != (sent.normal, sent.zero):
            came, went = answer.normal + answer.zero, sent.normal + sent.zero
            raise MigrationError(f"{self.uri}: says that {came} pages have come, {went} were sent")

    async def release(self) -> None:
        """The commit point. While the record is being made nobody knows whether it is there, so from here on
        the guest stands, whatever happens."""
        assert self._frozen is not None
        await asyncio.sleep(0)  # the last moment for a cancel
        self.committed, self._frozen.after = True, "postmigrate"
        deciding = asyncio.ensure_future(self._decide())
        try:
            await asyncio.shield(deciding)
        except MigrationError:
            self.committed, self._frozen.after = False, None
            raise
        except asyncio.CancelledError:  # the machine ends; how that went is known in a moment, and then said
            await asyncio.wait({deciding}, timeout=DECIDE_SECONDS)
            self.committed = not deciding.done() or deciding.exception() is None
            raise
        await self._hold.aclose()

    async def _decide(self) -> None:
        """One record: beside the leases where there are some, else in a folder of the user's."""
        if self._disks.leases is not None:
            await self._disks.release()
            return
        machine = self.vm.machine
        await asyncio.to_thread(
            decision.release, self.transfer, self.epoch, machine.name, machine.uuid
        )

    async def resume(self) -> None:
        """The target may run: said until it answers. It may be long in coming, or at another address
        (``redirect``)."""
        message = messages.Released(transfer=self.transfer, epoch=self.epoch)
        talk = self._talking
        await talk.ask("resume", message, messages.Running, lambda: self.status.move("postcopy-paused"))
        self._answered = True
        self.status.resumed()
        await talk.tell(messages.Heard(transfer=self.transfer))
        if self._disks.leases is None:
            decision.forget(self.transfer)

    # ---- talking ---------------------------------------------------------------------------------
    @property
    def _talking(self) -> Conversation:
        assert self._talk is not None
        return self._talk

    async def redirect(self, uri: Uri) -> None:
        """The target listens somewhere else now (migrate with resume)."""
        await self._talking.redirect(uri)
        self.uri = uri

    async def _farewell(self) -> None:
        """Done with the target; one that is not to have the guest is told so, and again in the background, as
        it may be out of reach."""
        talk = self._talking
        if self.committed and not (self._answered or talk.refused):
            self._leave_word()
        if self.committed or not talk.met:
            await talk.close()
            return
        why = "its machine ends" if self.vm.ending.done() else self._why
        message = messages.Abort(transfer=self.transfer, reason=why)
        await talk.tell(message)
        if self.vm.ending.done():
            await talk.close()
        else:
            self.vm.spawn(talk.say_farewell(message))

    def _leave_word(self) -> None:
        """What the user can do when the machine ends and the target has not said that it runs."""
        place = self._disks.decision or decision.place(self.transfer)
        if decision.seen(place):
            log.warning("the guest was released to %s, which has not answered", self.uri)
            log.warning("say there: atoll migrate --recover NAME file:%s", place)
        else:
            log.warning("the guest was about to be released to %s, and there is no record of it", self.uri)
            log.warning("should %s appear, say there: atoll migrate --recover NAME file:%s", place, place)


@dataclass(frozen=True)
class Phase:
    """``work`` leaves what undoes it on the stack of the Source."""

    name: str
    work: Callable[[Source], Awaitable[None]]


PHASES = (
    Phase("negotiate", Source.negotiate),
    Phase("aim", Source.aim),
    Phase("drain", Source.drain),
    Phase("stop", Source.stop),
    Phase("flush", Source.flush),
    Phase("settle", Source.settle),
    Phase("send", Source.send),
    Phase("verify", Source.verify),
    Phase("release", Source.release),
    Phase("resume", Source.resume),
)


def reason(error: BaseException) -> str:
    """One line for status and events."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    return str(error) if isinstance(error, AtollError) else repr(error)
