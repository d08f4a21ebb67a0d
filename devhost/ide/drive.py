"""What disk and CD-ROM drive share: the phases of a command and the three ways its data moves.

* PIO: bursts (DRQ blocks) through ``buffer``, filled from or written to the medium in chunks.
* Buffered DMA: the same buffer, copied through the PRD table in one go.
* Direct DMA: the block request itself is aimed at guest memory through the PRD table.

A command is a phase, a request and cursors, never a callback, so it can be saved at any point. The
only thing not saved is the request in flight: loading issues it again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from coordinator.contract.drives import DrivePolicy, Stream
from coordinator.contract.state import Record
from devhost.ide import registers as reg
from devhost.ide.backend import BlockBackend, Buffer
from devhost.ide.phases import (
    CHUNK,
    MAX_REGIONS,
    REQUEST_LIMIT,
    Bus,
    Flight,
    Phase,
    Power,
    Request,
    check_state,
)
from devhost.ide.records import DriveState
from devhost.ide.taskfile import TaskFile

#: where the fields of DriveState are in a drive
COMMON_FIELDS = {
    "current": "taskfile.current", "previous": "taskfile.previous", "device": "taskfile.device",
    **{
        name: name
        for name in (
            "status", "error", "intrq", "power", "phase", "opcode", "request", "use_dma", "to_host", "direct",
            "begun", "buffer", "position", "burst_end", "offset", "remaining",
        )
    },
}  # fmt: skip


class Drive(ABC):
    """A device on the cable. ``attach`` comes before any access."""

    sector_size: ClassVar[int]
    #: status and signature after a reset
    signature: ClassVar[tuple[int, int]]
    reset_status: ClassVar[int]

    phase: Phase
    #: ATA command in progress
    opcode: int
    request: Request
    use_dma: bool
    direct: bool
    to_host: bool
    #: data of the command, cursor of the host, end of the DRQ block
    buffer: bytearray
    position: int
    burst_end: int
    #: bytes of the medium: where the next request starts, how much is left
    offset: int
    remaining: int
    #: a direct transfer has moved data
    begun: bool

    def __init__(self, backend: BlockBackend | None, *, request_limit: int = REQUEST_LIMIT) -> None:
        self.backend = backend
        self.request_limit = max(self.sector_size, request_limit // self.sector_size * self.sector_size)
        self.number = 0
        self.bus: Bus
        self.taskfile = TaskFile()
        self.power = Power.ACTIVE
        #: paused: no more requests; but ``running_out``, which ends when the command waits for the host
        self.held = self.running_out = False
        #: stopped at an armed phase, see watch.py
        self.caught = False
        #: told of every request that is due; True: the drive is caught there
        self.on_request: Callable[[], bool] = lambda: False
        self.policy = DrivePolicy()
        self._flight: Flight | None = None
        self._clear_command()
        self.status = self.error = 0
        self.intrq = False

    def attach(self, bus: Bus, number: int) -> None:
        self.bus = bus
        self.number = number
        self.reset(hard=True)

    # ---- for the channel -------------------------------------------------------------------------
    @abstractmethod
    def execute(self, opcode: int) -> None:
        """The Command register was written while the drive is selected and neither BSY nor DRQ."""

    @property
    def asleep(self) -> bool:
        return self.power is Power.SLEEP

    @property
    def waits_for_dma(self) -> bool:
        return self.phase is Phase.DMA_WAIT

    def diagnose(self) -> None:
        """EXECUTE DEVICE DIAGNOSTIC, and the end of a reset: code 01h, signature (ATA/ATAPI-6 8.11, 9.12)."""
        self._abort()
        self.taskfile.signature(*self.signature)
        self.error = 0x01
        self.status = self.reset_status
        self.intrq = False
        self.power = Power.ACTIVE

    def reset(self, hard: bool) -> None:
        """RESET- (``hard``) or SRST."""
        if hard:
            self.taskfile.device = 0
        self.diagnose()

    def hold_in_reset(self) -> None:
        """SRST is asserted: the command is dropped, BSY shows (ATA/ATAPI-6 9.3)."""
        self._abort()
        self.intrq = False
        self.status = reg.BSY

    def set_interrupt(self, level: bool) -> None:
        self.intrq = level
        self.bus.interrupt_changed()

    def pio_read(self, count: int) -> bytes:
        """``count`` bytes from the data port; ones when no block is there."""
        if self.phase is Phase.PIO_IN and self.burst_end - self.position > count:
            start = self.position
            self.position = start + count
            return bytes(self.buffer[start : start + count])
        out = bytearray()
        while count:
            if self.phase is not Phase.PIO_IN:
                out += b"\xff" * count
                break
            take = min(count, self.burst_end - self.position)
            out += self.buffer[self.position : self.position + take]
            self.position += take
            count -= take
            if self.position == self.burst_end:
                if self.position & 1 and count:  # the last word of an odd block has a pad byte
                    out.append(0)
                    count -= 1
                self._burst_done()
        return bytes(out)

    def pio_write(self, data: Buffer) -> None:
        """Bytes for the data port; ignored when no block is asked for."""
        at = 0
        while at < len(data) and self.phase is Phase.PIO_OUT:
            take = min(len(data) - at, self.burst_end - self.position)
            self.buffer[self.position : self.position + take] = data[at : at + take]
            self.position += take
            at += take
            if self.position == self.burst_end:
                at += self.position & 1
                self._burst_done()

    def dma_start(self) -> None:
        """The bus master is running and this drive asks for DMA."""
        if self.bus.master.ready(self.to_host):
            self._move()

    def dma_stop(self) -> None:
        """The bus master was stopped: a transfer under way is aborted (BMIDE 2.1), the drive asks again."""
        if self.phase is Phase.MEDIUM and self.direct:
            self._cancel()
            self._await_dma()

    def pause(self) -> None:
        """Start no more requests; the one in flight may end. An old record cannot hold a command that is busy
        with the medium: for one, requests follow until the command waits for the host or has ended."""
        self.held = True
        if self.policy.stream is Stream.V0 and self.phase is Phase.MEDIUM:
            self.running_out, self.caught = True, False
            self._go_on()

    def paused(self) -> bool:
        return self._flight is None and not (self.running_out and self.phase is Phase.MEDIUM)

    def resume(self) -> None:
        self.held = self.running_out = False
        self._go_on()

    def release(self) -> None:
        """Go on from where ``on_request`` caught the drive."""
        self.caught = False
        self._go_on()

    def _go_on(self) -> None:
        if self.phase is Phase.MEDIUM and self._flight is None:
            self._issue()

    # ---- for subclasses ---------------------------------------------------------------------------
    @abstractmethod
    def finished(self) -> None:
        """All data of the command has moved."""

    @abstractmethod
    def failed(self, errno: int) -> None:
        """A block request ended with an error; ``offset`` is where."""

    @abstractmethod
    def announce_burst(self, left: int) -> int:
        """Size of the next DRQ block when ``left`` bytes are to move; ATAPI announces it, too."""

    def received(self) -> None:
        """The host has sent the whole buffer of a command that does not write to the medium."""
        self.finished()

    def shaped(self, data: bytearray) -> bytearray:
        """What the host gets for ``data`` of the medium at ``offset``."""
        return data

    def end_command(self) -> None:
        """Back to idle; status, error and interrupt are the caller's."""
        self._flight = None
        self._clear_command()

    def send(self, data: Buffer) -> None:
        """Command result: ``data`` goes to the host by PIO or DMA."""
        self.buffer = bytearray(data)
        self.position = 0
        self.to_host = True
        self._offer(interrupt=True)

    def receive(self, length: int, interrupt: bool) -> None:
        """Wait for ``length`` bytes from the host."""
        self.buffer = bytearray(length)
        self.position = 0
        self.to_host = False
        self._offer(interrupt)

    def begin_medium(self, request: Request, offset: int = 0, length: int = 0, direct: bool = False) -> None:
        """Start moving ``length`` bytes at byte ``offset`` of the medium, or a flush. ``direct``: by DMA."""
        self.request = request
        self.offset = offset
        self.remaining = length
        self.direct = direct
        self.to_host = request is not Request.WRITE
        if direct:
            self._await_dma()
            self.dma_start()
        elif request is Request.WRITE:
            self.receive(min(length, CHUNK), interrupt=False)
        else:
            self._issue()

    # ---- phases -------------------------------------------------------------------------------------
    def _clear_command(self) -> None:
        self.phase = Phase.IDLE
        self.opcode = 0
        self.request = Request.NONE
        self.use_dma = self.direct = False
        self.to_host = True
        self.buffer = bytearray()
        self.position = self.burst_end = 0
        self.offset = self.remaining = 0
        self.begun = False

    def _abort(self) -> None:
        self._cancel()
        self._clear_command()

    def _cancel(self) -> None:
        if self._flight is not None:
            flight, self._flight = self._flight, None
            if self.backend is not None:
                self.backend.cancel(flight.cookie)

    def _await_dma(self) -> None:
        self.phase = Phase.DMA_WAIT
        self.status = reg.READY | reg.DRQ

    def _offer(self, interrupt: bool) -> None:
        """The buffer is ready to move."""
        if self.use_dma:
            self._await_dma()
            self.dma_start()
        else:
            self._begin_burst(interrupt)

    def _begin_burst(self, interrupt: bool) -> None:
        self.burst_end = self.position + self.announce_burst(len(self.buffer) - self.position)
        self.phase = Phase.PIO_IN if self.to_host else Phase.PIO_OUT
        self.status = reg.READY | reg.DRQ
        if interrupt:
            self.set_interrupt(True)

    def _burst_done(self) -> None:
        if self.position < len(self.buffer):
            self._begin_burst(interrupt=True)
        else:
            self._buffer_done()

    def _buffer_done(self) -> None:
        """The host has had, or has given, the whole buffer."""
        if self.to_host:
            if self.remaining:
                self._issue()
            else:
                self.finished()
        elif self.request is Request.WRITE:
            self._issue()
        else:
            self.received()

    def _move(self) -> None:
        """DMA is possible: start the direct request, or copy the buffer now."""
        if self.direct:
            self._issue()
            return
        memory, master = self.bus.dma, self.bus.master
        while self.position < len(self.buffer) and master.ready(self.to_host):
            plan = master.plan(len(self.buffer) - self.position)
            for address, length in plan.regions:
                end = self.position + length
                if self.to_host:
                    memory.write(address, memoryview(self.buffer)[self.position : end])
                else:
                    self.buffer[self.position : end] = memory.read(address, length)
                self.position = end
            master.commit(plan)
        if self.position == len(self.buffer):
            self._buffer_done()

    # ---- block requests -----------------------------------------------------------------------------
    def _issue(self) -> None:
        """Start the next block request of the command, unless held or caught."""
        self.phase = Phase.MEDIUM
        self.status = reg.BUSY
        if self.held and not self.running_out or self.caught or self.on_request():
            return
        backend = self.backend
        if backend is None:
            self.failed(0)
        elif self.request is Request.FLUSH:
            if backend.can_flush:
                self._flight = Flight(backend.flush(), 0)
            else:  # the server promises that completed writes are durable
                self.finished()
        elif self.direct:
            if not self.bus.master.ready(self.to_host):
                self._await_dma()
            elif self.to_host:
                self._issue_direct_read(backend)
            else:
                self._issue_direct_write(backend)
        elif self.request is Request.WRITE:
            self._flight = Flight(backend.write(self.offset, [memoryview(self.buffer)]), len(self.buffer))
        else:
            self.buffer = bytearray()
            self.position = self.burst_end = 0
            length = min(self.remaining, CHUNK)
            data = bytearray(length)
            self._flight = Flight(backend.read(self.offset, [memoryview(data)]), length, data=data)

    def _issue_direct_read(self, backend: BlockBackend) -> None:
        """One request straight into guest memory. Where the PRD table ends inside a sector, the rest of the
        sector is read into scratch."""
        plan = self.bus.master.plan(min(self.remaining, self.request_limit))
        head = self.offset % self.sector_size
        tail = -(head + plan.length) % self.sector_size
        span = self.bus.dma.span
        copies: list[tuple[int, int, Buffer | None]] = []
        views: list[memoryview] = [memoryview(bytearray(head))] if head else []
        if len(plan.regions) > MAX_REGIONS:
            bounce = memoryview(bytearray(plan.length))
            views.append(bounce)
            at = 0
            for address, length in plan.regions:
                copies.append((address, length, bounce[at : at + length]))
                at += length
        else:
            for address, length in plan.regions:
                view = span(address, length)
                if view is None:
                    view = memoryview(bytearray(length))
                    copies.append((address, length, view))
                else:
                    copies.append((address, length, None))
                views.append(view)
        if tail:
            views.append(memoryview(bytearray(tail)))
        self._flight = Flight(backend.read(self.offset - head, views), plan.length, plan, copies=copies)

    def _issue_direct_write(self, backend: BlockBackend) -> None:
        """One request straight from guest memory. Bytes short of a sector wait in ``buffer``."""
        plan = self.bus.master.plan(min(self.remaining, self.request_limit) - len(self.buffer))
        memory = self.bus.dma
        pieces: list[memoryview] = []
        odd = self.buffer or plan.length % self.sector_size
        if odd or len(plan.regions) > MAX_REGIONS:
            data = self.buffer + b"".join(memory.read(*region) for region in plan.regions)
            whole = len(data) // self.sector_size * self.sector_size
            residue = bytes(data[whole:])
            pieces.append(memoryview(data)[:whole])
        else:
            whole, residue = plan.length, b""
            for region in plan.regions:
                view = memory.span(*region)
                pieces.append(memoryview(memory.read(*region)) if view is None else view)
        if whole:
            self._flight = Flight(backend.write(self.offset, pieces), whole, plan, residue=residue)
        else:
            self._written(Flight(0, 0, plan, residue=residue))

    def complete(self, cookie: int, errno: int) -> None:
        """A block request has ended; unknown cookies are those of cancelled requests."""
        flight = self._flight
        if flight is None or flight.cookie != cookie:
            return
        self._flight = None
        if errno:
            self.failed(errno)
        elif self.request is Request.FLUSH:
            self.finished()
        elif self.request is Request.WRITE:
            self._written(flight)
        else:
            self._read(flight)

    def _read(self, flight: Flight) -> None:
        if self.direct:
            memory = self.bus.dma
            for address, length, copy in flight.copies:
                if copy is None:
                    memory.written(address, length)
                else:
                    memory.write(address, copy)
            assert flight.plan is not None
            self.bus.master.commit(flight.plan)
            self._advance(flight.length)
            return
        self.remaining -= flight.length
        if self.request is Request.VERIFY:
            self.offset += flight.length
            if self.remaining:
                self._issue()
            else:
                self.finished()
            return
        self.buffer = self.shaped(flight.data)
        self.offset += flight.length
        self.position = 0
        self._offer(interrupt=True)

    def _written(self, flight: Flight) -> None:
        if self.direct:
            assert flight.plan is not None
            self.buffer = bytearray(flight.residue)
            self.bus.master.commit(flight.plan)
            self._advance(flight.length)
            return
        self.offset += flight.length
        self.remaining -= flight.length
        if self.remaining:
            self.receive(min(self.remaining, CHUNK), interrupt=True)
        else:
            self.finished()

    def _advance(self, length: int) -> None:
        """A direct request is done: go on, wait for more descriptors, or finish."""
        self.offset += length
        self.remaining -= length
        self.begun = True
        if not self.remaining:
            self.finished()
        elif self.bus.master.ready(self.to_host):
            self._issue()
        else:
            self._await_dma()

    # ---- state ----------------------------------------------------------------------------------------
    @abstractmethod
    def save(self) -> Record:
        """In the version that ``policy`` asks for; RecordError where that cannot hold the command."""

    @abstractmethod
    def load(self, blob: bytes) -> None:
        """Take over a packed record."""

    @abstractmethod
    def checkpoint(self) -> tuple[Any, ...]:
        """All state, with all of the command whatever ``policy`` says."""

    @abstractmethod
    def recorded(self, checkpoint: list[Any]) -> Record:
        """The record of a decoded checkpoint; msgspec.ValidationError, ValueError where it is none."""

    def save_common(self) -> dict[str, Any]:
        """The fields of ``DriveState``."""
        return {
            "current": tuple(self.taskfile.current),
            "previous": tuple(self.taskfile.previous),
            "device": self.taskfile.device,
            "status": self.status,
            "error": self.error,
            "intrq": self.intrq,
            "phase": self.phase.value,
            "opcode": self.opcode,
            "request": self.request.value,
            "use_dma": self.use_dma,
            "to_host": self.to_host,
            "direct": self.direct,
            "begun": self.begun,
            "buffer": bytes(self.buffer),
            "position": self.position,
            "burst_end": self.burst_end,
            "offset": self.offset,
            "remaining": self.remaining,
            "power": self.power.value,
        }

    def load_common(self, state: DriveState) -> None:
        """Take over ``DriveState``; RecordError where cursors do not fit together."""
        medium = self.backend.size if self.backend is not None else 0
        phase, request, self.power = check_state(state, self.sector_size, medium)
        self._cancel()
        self.running_out = self.caught = False
        self.taskfile.current = list(state.current)
        self.taskfile.previous = list(state.previous)
        self.taskfile.device = state.device
        self.status, self.error, self.intrq = state.status, state.error, state.intrq
        self.phase, self.request, self.opcode = phase, request, state.opcode
        self.use_dma, self.to_host, self.direct = state.use_dma, state.to_host, state.direct
        self.begun = state.begun
        self.buffer = bytearray(state.buffer)
        self.position, self.burst_end = state.position, state.burst_end
        self.offset, self.remaining = state.offset, state.remaining

    def load_done(self) -> None:
        """All of the channel is loaded: issue again what was in flight."""
        if self.phase is Phase.MEDIUM:
            self._issue()
