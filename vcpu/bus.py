"""A vCPU's end of the bus: sync accesses to the device hosts."""

from __future__ import annotations

from typing import Any

import zmq

from coordinator.contract import messages
from coordinator.contract.codec import encode
from coordinator.contract.config import bus_endpoint
from coordinator.contract.island import dealer
from coordinator.contract.segment import Segment
from vcpu._core import ffi

#: how often a vCPU that waits for a reply looks whether it is told to quit, and whether another process has
#: taken the device host's place, ms
LOOK_MS = 2


class BusClient:
    """One DEALER a device host, and at most one request open."""

    def __init__(
        self, context: zmq.Context[Any], runtime: str, index: int, hosts: int, segment: Segment
    ) -> None:
        self.index = index
        self._blocks = [segment.host(host) for host in range(hosts)]
        name = b"vcpu%d" % index
        self._sockets = [dealer(context, bus_endpoint(runtime, host), name) for host in range(hosts)]
        for socket in self._sockets:
            socket.set(zmq.RCVTIMEO, LOOK_MS)
        #: another process may have been this vCPU, and asked
        self._io = segment.vcpu(index).io
        self._serial = int(self._io.serial)
        self._frame = b""
        #: of the device host that was asked
        self._generation = 0

    def send(self, io: Any) -> int:
        """Send what ``struct io_request *`` asks for; returns the request's serial."""
        self._serial += 1
        self._io.serial = self._serial
        data = bytes(ffi.buffer(io.data, io.width * io.count)) if io.write else b""
        request = messages.BusRequest(
            serial=self._serial, vcpu=self.index, ticket=io.ticket, space=io.space, device=io.device,
            addr=io.addr, width=io.width, count=io.count, write=bool(io.write), data=data,
        )
        self._frame = encode(request)
        # before it is sent: a host that comes later than this has not got it, for all we know
        self._generation = self._blocks[io.host].generation
        self._sockets[io.host].send(self._frame)
        return self._serial

    def ask_again(self, io: Any) -> None:
        """Send the open request once more where another process is the device host by now. It knows by the
        serial whether the request has been done."""
        generation = self._blocks[io.host].generation
        if generation != self._generation:
            self._generation = generation
            self._sockets[io.host].send(self._frame)

    def receive(self, io: Any, serial: int) -> messages.BusReply | None:
        """The reply to request ``serial``; None when none came within LOOK_MS."""
        while True:
            try:
                frame = self._sockets[io.host].recv()
            except zmq.Again:
                return None
            reply = messages.replies.decode(frame)
            if reply.serial == serial:
                return reply

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
