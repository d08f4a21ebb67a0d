"""The event loop of a device host.

One event at a time: a sync access, posted writes, due timers, block completions, a command of the
coordinator; each ends with a commit (commit.py). Before it sleeps the host says so in the segment
(``sleeping``), looks at the ring once
more, and only then waits - vCPUs ring the doorbell only at a sleeping host, and post before they
look, so no entry is left lying.

ZeroMQ descriptors are edge triggered: a socket is read until it has nothing before the loop waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from coordinator.contract import messages
from coordinator.contract.clock import NS_PER_S, Timer, TimerWheel
from coordinator.contract.codec import encode
from coordinator.contract.config import DevhostConfig, bus_endpoint, nbd_socket
from coordinator.contract.errors import AtollError, IslandError, MessageError
from coordinator.contract.island import Control, router
from coordinator.contract.segment import ATTN_CONTROL, Segment
from devhost.block_backend import NbdBackend
from devhost.block_client import BlockClient
from devhost.bus import Bus
from devhost.commit import Commits, Outbox
from devhost.faults import Faults
from devhost.faults import parse as parse_fault
from devhost.hand import ACCESS, COMMAND, COMPLETION, POSTED, TIMER, VCPU_SHIFT
from devhost.outlet import Outlet

log = logging.getLogger(__name__)

#: the loop looks at timers at least this often, seconds
LONGEST_WAIT = 1.0
#: how long block requests in flight may take to end when the machine stops, seconds
DRAIN_SECONDS = 10.0
#: how long one look for their answers takes, seconds
DRAIN_WAIT_SECONDS = 0.1
#: how often it is looked whether a vCPU whose reply is kept back has been called, seconds
LOOK_SECONDS = 0.001
#: between two looks whether the block daemon is there again, seconds
SEEK_SECONDS = 0.002
#: posted writes that end together at most
MOST_POSTED = 256
#: what ``handle`` returns when the answer comes later
LATER = object()


class SegmentClock:
    """Guest time from the segment's timebase; timers are fired by the service loop."""

    def __init__(self, segment: Segment) -> None:
        self.now = segment.guest_now
        self.wheel = TimerWheel()

    def timer(self, callback: Callable[[], None]) -> Timer:
        return Timer(self.wheel, callback)


class Service:
    """Owns the sockets and the loop; ``handle`` answers the coordinator's commands."""

    def __init__(self, config: DevhostConfig, segment: Segment, faults: Faults | None = None) -> None:
        self.config = config
        self.segment = segment
        self.faults = faults or parse_fault(config.fault)
        self.clock = SegmentClock(segment)
        self.bus = Bus(segment, config.index)
        self.bus.grouped = True
        self.ring = segment.ring(config.index)
        self.context: zmq.Context[Any] = zmq.Context()
        self.channel = Control(self.context, config.runtime, f"devhost{config.index}")
        self.router = router(self.context, bus_endpoint(config.runtime, config.index))
        #: for notices and answers: they leave when the event in hand is committed
        self.control = Outbox()
        self.outlet = Outlet(self.control)
        self.commits = Commits(segment, self.bus, self.ring, self.control, self.channel, self.faults)
        self.commits.on = config.commits
        self.bus.in_hand = self._in_hand
        if config.replaces:
            self.commits.recover()
        self.handle: Callable[[messages.AnyCommand], Any] = lambda command: None
        #: block devices of the drives, by drive id
        self.backends: dict[str, NbdBackend] = {}
        self._counters = segment.host(config.index)
        self._running = True
        self._in_access = self._keep_reply = False
        #: replies kept back: (routing id, vCPU, frame)
        self._kept: list[tuple[bytes, int, bytes]] = []
        #: commands that have come while another was being obeyed
        self._later: deque[messages.AnyCommand] = deque()

    def _in_hand(self, device: int, space: int, address: int, write: bool) -> None:
        self.commits.hand.of(device, space, address, write)
        self.faults.access(space, address)

    def open_block_device(self, ident: str) -> NbdBackend:
        """Connect to the block daemon's export ``ident``; the loop serves it from now on."""
        client = BlockClient(nbd_socket(self.config.runtime), ident)
        client.connect()
        backend = self.backends[ident] = NbdBackend(client, self.faults)
        backend.answered = lambda place: self.commits.hand.takes(COMPLETION, place)
        return backend

    def end_event(self, vcpu: int = -1, serial: int = 0, reply: bytes | None = None) -> None:
        """What has been done is committed and shown; ``reply``, to the request ``serial``, may be sent after
        this."""
        self.outlet.flush()
        self.commits.end(vcpu, serial, reply)

    # ---- the loop --------------------------------------------------------------------------------
    def run(self) -> None:
        """Serve until Quit."""
        sockets = (self.router, self.channel.socket)
        fixed = [self.config.doorbell_fd, *(socket.fileno() for socket in sockets)]
        self.end_event()  # the state at power-on, or the end of taking over
        self.commits.serving = True
        self.channel.hello()
        while self._running:
            busy = self._serve_bus()
            busy |= self._serve_posted()
            busy |= self._fire_timers()
            if self._kept:
                self._release_called()
            # last, since sending can swallow the edge of the control socket
            busy |= self._serve_control()
            self._wait(fixed, 0.0 if busy else self._idle())
        self.close()

    def close(self) -> None:
        """Give the sockets up."""
        self.channel.flush()
        self.router.close()
        self.context.term()

    def _wait(self, fixed: list[int], timeout: float) -> None:
        """Sleep until something happens; serve the block devices."""
        for backend in self.backends.values():
            if backend.lost:
                backend.seek()
        if any(backend.lost for backend in self.backends.values()):
            timeout = min(timeout, SEEK_SECONDS)
        backends = {backend.fileno(): backend for backend in self.backends.values() if backend.connected}
        blocked = [fd for fd, backend in backends.items() if backend.wants_write]
        readable, writable, _ = select.select([*fixed, *backends], blocked, [], timeout)
        self.ring.sleeping(False)
        for fd in writable:
            backends[fd].on_writable()
        for fd in readable:
            if fd in backends:
                self.commits.about_to()
                backends[fd].on_readable()
            elif fd == self.config.doorbell_fd:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
        if self.bus.touched:
            self.end_event()
        else:
            self.commits.nothing()

    def drain(self, done: Callable[[], bool]) -> None:
        """Serve block devices alone until ``done``, and say that we live; IslandError when that takes too
        long."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while not done():
            if time.monotonic() > deadline or not self.backends:
                raise IslandError("devices do not come to rest: a block request is not answered")
            self._wait([], DRAIN_WAIT_SECONDS)
            if (command := self._next_command()) is not None:
                self._later.append(command)

    def _idle(self) -> float:
        """Nothing is left to do: promise to be woken, and say for how long to sleep."""
        self.ring.sleeping(True)
        if self.ring.pending():
            return 0.0
        longest = LOOK_SECONDS if self._kept else LONGEST_WAIT
        deadline = self.clock.wheel.next_deadline()
        if deadline is None or not self.segment.time_runs():
            return longest
        return max(0.0, min(longest, (deadline - self.clock.now()) / NS_PER_S))

    def _fire_timers(self) -> bool:
        deadline = self.clock.wheel.next_deadline()
        if deadline is None:
            return False
        now = self.clock.now()
        if deadline > now:
            return False
        self.commits.begin(TIMER, deadline)
        self._counters.timer_fires += self.clock.wheel.fire(now)
        self.bus.settle()
        self.end_event()
        return True

    def _serve_posted(self) -> bool:
        """An event of the posted writes that are whole."""
        if not self.ring.pending():
            return False
        self.commits.begin()
        self._apply_posted(None)
        self.end_event()
        return True

    def _apply_posted(self, upto: int | None) -> None:
        """Apply posted writes in ticket order: what is whole, or all below ticket ``upto``."""
        taken = 0
        while (upto is not None or taken < MOST_POSTED) and (entry := self.ring.take(upto)) is not None:
            space, addr, width, value = entry
            self.commits.hand.takes(POSTED, self.ring.ticket)
            self.bus.post(space, addr, width, value)
            taken += 1

    def _serve_bus(self) -> bool:
        worked = False
        while True:
            try:
                frames = self.router.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return worked
            worked = True
            try:
                request = messages.requests.decode(frames[-1])
                if request.write and len(request.data) != request.width * request.count:
                    raise MessageError(
                        f"{len(request.data)} bytes for {request.count} items of {request.width}"
                    )
            except MessageError as error:
                log.error("bus: %s", error)
                continue
            self._serve_request(frames[0], request)

    def _serve_request(self, vcpu: bytes, request: messages.BusRequest) -> None:
        self.commits.begin()
        if (again := self.commits.reply_again(request)) is not None:
            self._reply(vcpu, again)
            self.commits.nothing()
            return
        reply = self._access(request)
        frame = encode(reply)
        self.end_event(request.vcpu, request.serial, None if reply.hold else frame)
        if self._keep_reply:
            self._keep_reply = False
            self._kept.append((vcpu, request.vcpu, frame))
        else:
            self._reply(vcpu, frame)
        self.faults.at("replied")

    def _reply(self, vcpu: bytes, reply: bytes) -> None:
        try:
            self.router.send_multipart((vcpu, reply))
        except zmq.ZMQError as error:  # the vCPU is gone; the coordinator knows
            log.error("bus: no way back to %s: %s", vcpu, error)

    def _access(self, request: messages.BusRequest) -> messages.BusReply:
        """The access itself, behind the posted writes that were made before it."""
        self._apply_posted(min(request.ticket, self._counters.next_ticket))
        self.commits.hand.takes(ACCESS, request.vcpu << VCPU_SHIFT | request.serial)
        if self.bus.holds(request.space, request.addr, request.data if request.write else None):
            return messages.BusReply(serial=request.serial, data=b"", hold=True)
        self.segment.count_roundtrip(self.config.index, request.device)
        self._in_access = True
        data = b""
        if request.write:
            self.bus.write(request.space, request.addr, request.width, request.count, request.data)
        else:
            data = self.bus.read(request.space, request.addr, request.width, request.count)
        self._in_access = False
        return messages.BusReply(serial=request.serial, data=data)

    def keep_reply(self) -> None:
        """Do not let the vCPU whose access is in hand, if any, go on before it has been called out of the
        guest: it is to stop behind this very access."""
        self._keep_reply = self._in_access

    def release_replies(self) -> None:
        """Send the replies kept back."""
        self._keep_reply = False
        kept, self._kept = self._kept, []
        for vcpu, _, reply in kept:
            self._reply(vcpu, reply)

    def _release_called(self) -> None:
        """Send those whose vCPU leaves the guest at its next instruction."""
        for entry in list(self._kept):
            name, vcpu, reply = entry
            known = 0 <= vcpu < self.segment.vcpus
            if not known or self.segment.vcpu(vcpu).attention & ATTN_CONTROL:
                self._kept.remove(entry)
                self._reply(name, reply)

    def _serve_control(self) -> bool:
        worked = False
        while True:
            command = self._later.popleft() if self._later else self._next_command()
            if command is None:
                return worked
            worked = True
            if command.serial not in self.commits.done:  # else its answer is in the output ring
                self.commits.begin()
                self._obey(command)
                self.end_event()
                self.faults.at("replied")
            if not self._running:
                return True

    def _next_command(self) -> messages.AnyCommand | None:
        """The next one that is more than a question whether we live; None when none is waiting."""
        while True:
            try:
                command = self.channel.receive()
            except MessageError as error:
                log.error("control: %s", error)
                continue
            if not isinstance(command, messages.Ping):
                return command
            self.channel.answer(command)

    def _obey(self, command: messages.AnyCommand) -> None:
        while self.ring.pending():  # what vCPUs wrote before they stopped comes before the command
            self._apply_posted(None)
        self.commits.hand.takes(COMMAND, command.serial)
        if isinstance(command, messages.Quit):
            self._running = False
            self.control.answer(command)
            return
        try:
            value = self.handle(command)
        except AtollError as error:
            self.control.answer(command, error=str(error))
        else:
            if value is not LATER:
                self.control.answer(command, value)
        self.bus.publish_all()
