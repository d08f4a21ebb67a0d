"""How a device host dies without the guest noticing: what it has done is committed, event by event.

An event - an access, posted writes, due timers, completions, a command - changes devices, and DMA lands in
guest memory. Nothing else of it is seen outside until ``Commits.end``:

1. the records of the devices that were touched and have changed, the reply, the frames for the coordinator
and,
   as an outbox, the effects are put into the state area;
2. one store commits them (coordinator/contract/state.c);
3. shadows and time sources are stored, effects performed, each counted; posted writes count as applied;
4. the reply is sent, output shown.

A successor that finds 2 not done finds the state before the event, which it gets again: posted writes
are in the ring, the vCPU and the coordinator ask again, timers are due, completions come of requests issued
again.
DMA lands a second time with the same bytes, since neither guest nor drive have gone on. One that finds 2
done performs
the effects that were not counted and answers the repeated request from the committed reply.

An effect that was performed and not counted is performed twice, with nothing in between: a level that is
set again
is no edge. An event that changed no record and has no effects, no output is not committed; doing it again is
doing it once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from coordinator.contract import messages
from coordinator.contract.codec import encode
from coordinator.contract.errors import MessageError, RecordError
from coordinator.contract.ring import Ring
from coordinator.contract.segment import Segment
from coordinator.contract.state_area import MOST_OUTPUT
from devhost.bus import Bus, Slot
from devhost.faults import Faults
from devhost.hand import LOAD, NOTHING, Hand

log = logging.getLogger(__name__)

#: effects that an outbox can hold, by the name of the segment's method
EFFECTS = ("pin_set", "pic_intr", "dma_write")
#: commands of the coordinator that are remembered as done
DONE_COMMANDS = 64
HEADER_ROOM, WIRING_ROOM, REPLY_ROOM = 256 << 10, 256 << 10, 8 << 10
#: between two looks whether the coordinator has made room for output, seconds
LOOK_SECONDS = 0.001
TO_NOBODY = encode(messages.BusReply(serial=0, data=b""))


class Header(msgspec.Struct, frozen=True, array_like=True):
    """Of a commit. ``applied``: the ticket behind the posted writes in it; ``first``: number of its first
    effect;
    ``output``: where the coordinator's frames end; ``done``: serials of commands answered."""

    applied: int
    first: int
    effects: list[tuple[str, tuple[Any, ...]]]
    output: int
    done: list[int]


class Channel(Protocol):
    """The control socket."""

    def notify(self, notice: msgspec.Struct) -> None: ...


class Outbox:
    """What the event in hand has for the coordinator. It leaves when the event is committed."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        #: answers too large for the output ring: of commands that only look, which can be done again
        self.large: list[messages.Answer] = []
        #: serials of commands answered in this event
        self.answered: list[int] = []

    def notify(self, notice: msgspec.Struct) -> None:
        self.frames.append(encode(notice))

    def answer(self, command: messages.Command, value: Any = None, error: str | None = None) -> None:
        answer = messages.Answer(serial=command.serial, value=value, error=error)
        frame = encode(answer)
        if len(frame) > MOST_OUTPUT:
            self.large.append(answer)
        else:
            self.frames.append(frame)
            self.answered.append(command.serial)


class Commits:
    """The state area of one device host: taken over, and written."""

    def __init__(
        self, segment: Segment, bus: Bus, ring: Ring, outbox: Outbox, channel: Channel, faults: Faults
    ) -> None:
        self._segment, self._bus, self._ring, self._outbox = segment, bus, ring, outbox
        self._channel, self._faults = channel, faults
        self.area = segment.state(bus.host)
        self.output = segment.output(bus.host)
        self._block = segment.host(bus.host)
        self._header = self.area.slot("commit", HEADER_ROOM)
        self._wiring = self.area.slot("wiring", WIRING_ROOM)
        self._replies = [self.area.slot(f"vcpu{i}", REPLY_ROOM) for i in range(segment.vcpus)]
        #: last committed reply by vCPU: its serial, and encoded
        self._replied: dict[int, tuple[int, bytes]] = {}
        self.done: deque[int] = deque(maxlen=DONE_COMMANDS)
        self._head = 0
        self._wired = 0
        #: a first commit has been taken over
        self.successor = False
        #: the host has said hello: what ends now is an event of the guest's or the user's
        self.serving = False
        self._events = self._block.begun = int(self._block.events)
        self.hand = Hand(self._block)
        #: False: nothing is committed, for measurements; the host then has no successor
        self.on = True

    # ---- taking over ---------------------------------------------------------------------------
    def recover(self) -> None:
        """Before any device is made: what the predecessor has committed, if it came to that."""
        self.area.recover()
        raw = self.area.get(self._header)
        if raw is None:
            return
        self._bus.known = msgspec.msgpack.decode(self.area.get(self._wiring) or b"\x80", type=dict[str, int])
        self._wired = len(self._bus.known)
        self._bus.silent = True
        self.successor = True
        self._last = msgspec.msgpack.decode(raw, type=Header)
        self.done.extend(self._last.done)
        for vcpu, slot in enumerate(self._replies):
            frame = self.area.get(slot)
            if frame is not None:
                try:
                    self._replied[vcpu] = messages.replies.decode(frame).serial, frame
                except MessageError as error:
                    raise RecordError(f"committed reply of vcpu{vcpu}: {error}") from None

    def load(self, slots: Iterable[Slot]) -> None:
        """Let devices go on from their committed records, in this order."""
        self.about_to()
        for slot in slots:
            if slot.absent:
                continue
            self.hand.takes(LOAD, self.area.commits)
            self.hand.of(slot.id)
            raw = self.area.get(self._slot_of(slot))
            if raw is None:
                raise RecordError(f"device {slot.name} has no committed record")
            slot.device.restore(raw)
            slot.committed = raw
        self.nothing()

    def resume(self) -> None:
        """The devices are as committed: do what their last event had left to do."""
        last = self._last
        self._bus.effects.clear()  # levels that the devices have driven while they were loaded
        done = self._block.effects_done - last.first
        for name, arguments in last.effects[done:]:
            if name in EFFECTS:
                self._bus.defer(getattr(self._segment, name), *arguments)
        self._ring.ticket = max(last.applied, self._block.applied)
        self._head = last.output
        self._bus.touch_all()
        self._show()

    def reply_again(self, request: messages.BusRequest) -> bytes | None:
        """The committed reply to a request that is here for the second time; one to nobody: the request is
        older than that, and nobody waits for it any more."""
        serial, frame = self._replied.get(request.vcpu, (-1, b""))
        if request.serial > serial:
            return None
        return frame if request.serial == serial else TO_NOBODY

    # ---- committing ----------------------------------------------------------------------------
    def begin(self, kind: int = NOTHING, number: int = 0) -> None:
        """An event is in hand, see hand.py."""
        self.hand.takes(kind, number)
        self._block.begun = self._events + 1
        self._faults.at("received")

    def about_to(self) -> None:
        """Something may come that is the event in hand then."""
        self.hand.takes(NOTHING)
        self._block.begun = self._events + 1

    def nothing(self) -> None:
        """What was in hand has come to nothing, and needs no end."""
        self._block.begun = self._events

    def end(self, vcpu: int = -1, serial: int = 0, reply: bytes | None = None) -> None:
        """The event in hand, and all since the last call, ends; ``reply`` is what vCPU ``vcpu`` is to get."""
        self._faults.at("applied")
        if self.on:
            self._commit(vcpu, serial, reply)
        self._faults.at("committed")
        self._show()
        if self.serving:
            self._events += 1
            self._block.events = self._block.begun = self._events
        self._faults.at("shown")

    def _commit(self, vcpu: int, serial: int, reply: bytes | None) -> None:
        bus, outbox = self._bus, self._outbox
        changed = False
        for slot in bus.touched:
            if slot.absent:
                continue
            checkpoint = encode(slot.device.checkpoint())
            if checkpoint != slot.committed:
                self.area.put(self._slot_of(slot), checkpoint)
                slot.committed = checkpoint
                changed = True
        if len(bus.known) != self._wired:
            self.area.put(self._wiring, encode(bus.known))
            self._wired, changed = len(bus.known), True
        if not (changed or bus.effects or outbox.frames):
            return
        if reply is not None and 0 <= vcpu < len(self._replies):
            self.area.put(self._replies[vcpu], reply)
            self._replied[vcpu] = serial, reply
        self._put_output()
        self.done.extend(outbox.answered)
        outbox.answered.clear()
        effects = [(function.__name__, arguments) for function, arguments in bus.effects]
        header = Header(self._ring.ticket, self._block.effects_done, effects, self._head, list(self.done))
        self.area.put(self._header, encode(header))
        self.area.commit()

    def _put_output(self) -> None:
        for frame in self._outbox.frames:
            while (head := self.output.put(self._head, frame)) is None:
                self._channel.notify(messages.OutputReady())
                time.sleep(LOOK_SECONDS)
            self._head = head
        self._outbox.frames.clear()

    def _show(self) -> None:
        self._bus.show(self._performed)
        self._ring.applied()
        if not self.on:
            self._put_output()
        if self._head != self._block.output_head and self.output.show(self._head):
            self._channel.notify(messages.OutputReady())
        for answer in self._outbox.large:
            self._channel.notify(answer)
        self._outbox.large.clear()

    def _performed(self) -> None:
        self._block.effects_done += 1

    def _slot_of(self, slot: Slot) -> int:
        if slot.state_slot < 0:
            slot.state_slot = self.area.slot(f"dev {slot.name}", slot.device.record_room)
        return slot.state_slot


def untold(bus: Bus) -> list[str]:
    """For tests: names of devices that have changed since their last commit, though no event touched them."""
    return [
        slot.name
        for slot in [*bus.slots.values(), *bus.beside]
        if slot not in bus.touched
        and not slot.absent
        and slot.committed is not None
        and encode(slot.device.checkpoint()) != slot.committed
    ]

