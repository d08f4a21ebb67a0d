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
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from coordinator.contract import messages as island
from coordinator.contract.errors import AtollError, MigrationError
from coordinator.contract.tls import client_context
from coordinator.machine import Frozen, Vm
from coordinator.migrate import channel, decision, describe, messages, pump, ram, stream
from coordinator.migrate.aim import Aim, caught
from coordinator.migrate.capture import MachineState, capture
from coordinator.migrate.disks import SourceDisks
from coordinator.migrate.faults import Fault
from coordinator.migrate.link import Dialer
from coordinator.migrate.parameters import Parameters
from coordinator.migrate.pump import Wire
from coordinator.migrate.status import Status
from coordinator.migrate.stream import Part
from coordinator.migrate.uri import Uri

#: how long the target may take to answer an offer, seconds: it compares, and reads samples of its media
ANSWER_SECONDS = 30.0
#: how often a target that has not answered is told again that it may run, and for how long one that was
#: given up is told to end, seconds
REMIND_SECONDS, FAREWELL_SECONDS = 0.5, 10.0


#: how long a target that has closed its connections may take to say why, and the last word to leave
REASON_SECONDS, LAST_WORD_MS = 0.3, 300

log = logging.getLogger(__name__)

T = TypeVar("T")
S = TypeVar("S", bound=messages.Said)


def _nothing() -> None:
    pass


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
        self._link: Dialer | None = None
        self._socks: list[socket.socket] = []
        self._lost: asyncio.Task[None] | None = None
        self._frozen: Frozen | None = None
        self._sender: ram.Sender | None = None
        self._state: MachineState | None = None
        self._disks = SourceDisks(vm, self.transfer)
        #: the target has said that it cannot
        self._refused = False
        #: and that the guest is there
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
        channel.cut(self._socks)

    # ---- phases ----------------------------------------------------------------------------------
    async def negotiate(self) -> None:
        """Machine, CPU features, media: every difference is named before a byte of memory moves."""
        await self._disks.check(self.parameters.unleased_disks == "allow")
        self._link = Dialer(self.uri, self.transfer)
        self._undo.push_async_callback(self._farewell)
        await self._link.connect()
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
                answer = await self._ask("negotiate", offer, messages.Accepted)
                if not offer.stands:
                    await ahead
        except TimeoutError:
            raise MigrationError(f"{self.uri}: nobody answers") from None
        self._socks = await channel.connect(
            self.uri,
            answer.port,
            answer.path,
            answer.token,
            self.parameters.multifd_channels,
            self._tls(),
        )
        self._undo.callback(channel.close, self._socks)
        self._lost = asyncio.ensure_future(channel.gone(self._socks[0]))
        self._undo.callback(self._lost.cancel)
        self.status.set_up()
        self.status.move("active")

    async def aim(self) -> None:
        """Where it was asked for the guest runs on until a drive enters a phase, see aim.py."""
        aim = Aim.parse(self.parameters.x_aim)
        if aim is not None and self.vm.state == "running":
            catch = self._undo.enter_async_context(caught(self.vm, aim))
            self.status.aimed = await self._unless_lost(catch)

    async def drain(self) -> None:
        """Where a drive's policy asks for it the guest runs on until no command of it is half-way, up to the
        bound; then on undrained, and ``x-drains`` says so. Run ends a drain as well."""
        self._undo.push_async_callback(self._end_drain)
        for host in self.vm.hosts:
            command = island.DrainDrives(serial=self.vm.next_serial())
            result = await self._unless_lost(self.vm.command(host, command))
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
        self._hold.push_async_callback(self._give_back)

    async def _give_back(self) -> None:
        if not self.committed:
            await self._disks.abort()

    async def settle(self) -> None:
        """The state of all but memory. Interrupts that are posted and not taken travel as they are, so
        nothing moves here."""
        assert self._frozen is not None
        self._state = await capture(self.vm, self._frozen.runstate, self._frozen.stopped_at_ns)
        self.status.drives = list(self._state.drives)

    async def send(self) -> None:
        """Guest memory, by all connections side by side."""
        assert self.vm.segment is not None
        self.status.move("device")
        sender = self._sender = ram.Sender(self.vm.segment)
        self.status.pages, self.status.counts = sender.total, lambda: sender.counts
        self.status.passed()

        def abandon() -> None:
            sender.cancelled = True
            self._cut()

        wire = Wire(self.parameters.zstd_level, bool(self.parameters.tls_creds))
        peer = str(self.uri)
        jobs = [partial(pump.send, sock, wire, lambda fd: sender.run(fd, peer)) for sock in self._socks]
        await self._unless_lost(channel.side_by_side(jobs, abandon))

    async def verify(self) -> None:
        """The state; then the target has everything, and can use it."""
        assert self._sender is not None
        counts = self._sender.counts
        state = messages.State(
            transfer=self.transfer,
            state=stream.encode(Part.STATE, self._state),
            normal=counts.normal,
            zero=counts.zero,
            leases=self._disks.leases,
        )
        answer = await self._unless_lost(self._ask("verify", state, messages.Verified))
        sent = self._sender.counts
        if (answer.normal, answer.zero) != (sent.normal, sent.zero):
            came, went = answer.normal + answer.zero, sent.normal + sent.zero
            raise MigrationError(f"{self.uri}: says that {came} pages have come, {went} were sent")

    async def release(self) -> None:
        """The commit point. While the record is being made nobody knows whether it is there, so from here on
        the guest stands, whatever happens."""
        assert self._frozen is not None
        await asyncio.sleep(0)  # the last moment for a cancel
        self.committed, self._frozen.after = True, "postmigrate"
        try:
            await asyncio.shield(self._decide())
        except MigrationError:
            self.committed, self._frozen.after = False, None
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
        await self._ask("resume", message, messages.Running, lambda: self.status.move("postcopy-paused"))
        self._answered = True
        self.status.resumed()
        await self._tell(messages.Heard(transfer=self.transfer))
        if self._disks.leases is None:
            decision.forget(self.transfer)

    # ---- talking ---------------------------------------------------------------------------------
    async def _tell(self, message: messages.AnyOfSource) -> None:
        assert self._link is not None
        await self._link.send(message)

    async def _ask(
        self, phase: str, question: messages.AnyOfSource, kind: type[S], silent: Callable[[], None] = _nothing
    ) -> S:
        """The answer of this kind. The question is repeated, since either may be lost on the way; ``silent``
        is called when it has to be."""
        answer = asyncio.ensure_future(self._hear(kind))
        copies = self._fault.copies(phase)
        try:
            while True:
                for _ in range(copies):
                    await self._tell(question)
                copies = 1
                await asyncio.wait({answer}, timeout=REMIND_SECONDS)
                if answer.done():
                    return answer.result()
                silent()
        finally:
            answer.cancel()

    async def _hear(self, kind: type[S]) -> S:
        """The next answer of this kind; MigrationError when the target refuses."""
        assert self._link is not None
        while True:
            answer = await self._link.receive()
            if isinstance(answer, messages.Refused):
                self._refused = True
                raise MigrationError(f"{self.uri}: {answer.reason}")
            if isinstance(answer, kind):
                return answer

    async def _unless_lost(self, work: Awaitable[T]) -> T:
        """What the work gives; MigrationError when the target closes its connections first, with the reason
        that it gave, if it did."""
        assert self._lost is not None
        task = asyncio.ensure_future(work)
        failure = MigrationError(f"{self.uri}: the target is gone")
        try:
            await asyncio.wait({task, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        except MigrationError as error:
            failure = error
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if not self._refused:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REASON_SECONDS):
                    await self._hear(messages.Refused)
        raise failure

    async def redirect(self, uri: Uri) -> None:
        """The target listens somewhere else now (migrate with resume)."""
        assert self._link is not None
        await self._link.redirect(uri)
        self.uri = uri

    async def _farewell(self) -> None:
        """Done with the target; one that is not to have the guest is told so, and again in the background, as
        it may be out of reach."""
        assert self._link is not None
        link, self._link = self._link, None
        if self.committed and not (self._answered or self._refused):
            place = self._disks.decision or decision.place(self.transfer)
            log.warning("the guest was released to %s, which has not answered", self.uri)
            log.warning("say there: migrate-recover file:%s", place)
        if self.committed or not link.met:
            await link.close(LAST_WORD_MS if link.met else 0)
            return
        why = "its machine ends" if self.vm.ending.done() else self._why
        message = messages.Abort(transfer=self.transfer, reason=why)
        await link.send(message)
        if self.vm.ending.done():
            await link.close(LAST_WORD_MS)
        else:
            self.vm.spawn(self._repeat(link, message))

    async def _repeat(self, link: Dialer, message: messages.Abort) -> None:
        try:
            for _ in range(round(FAREWELL_SECONDS / REMIND_SECONDS)):
                await asyncio.sleep(REMIND_SECONDS)
                await link.send(message)
        finally:
            await link.close()


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
