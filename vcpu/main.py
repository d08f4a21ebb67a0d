"""The vCPU process: one core, its control channel, its end of the bus.

The process is in the guest nearly all the time. To get it out, the coordinator sends a message, counts
it in ``vcpu_block.commands`` and raises ATTN_CONTROL; the vCPU leaves the guest and reads until it has
as many commands as were counted - a message may arrive later than the attention.

SIGTERM keeps its default action, which ends the process wherever it is: a vCPU owns nothing that
outlives the machine.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from typing import Any

import zmq

from coordinator.contract import island, messages
from coordinator.contract.config import VcpuConfig
from coordinator.contract.errors import AtollError, MessageError
from coordinator.contract.sandbox import Sandbox
from coordinator.contract.segment import Segment
from vcpu import load, state
from vcpu.bus import BusClient
from vcpu.core import Core
from vcpu.exits import Exit

log = logging.getLogger(__name__)

DELIVER_NMI = 4
VECTOR_NMI = 2


class Vcpu:
    """Runs the core and obeys the coordinator."""

    def __init__(self, config: VcpuConfig) -> None:
        self.segment = Segment.attach(config.segment_fd)
        self.index = config.index
        self.context: zmq.Context[Any] = zmq.Context()
        self.control = island.Control(self.context, config.runtime, f"vcpu{config.index}")
        hosts = len(config.doorbell_fds)
        self.bus = BusClient(self.context, config.runtime, config.index, hosts, self.segment)
        self.core = Core(config.segment_fd, config.index, self._sync_access, config.doorbell_fds)
        self.core.block.pid = os.getpid()
        self.core.block.os_tid = threading.get_native_id()
        self.core.power_on()
        self._commands: deque[messages.AnyCommand] = deque()
        self._received = 0
        self._running = False
        self._quit = False

    def serve(self) -> None:
        """Until Quit, or a failure of our own."""
        self.control.hello()
        try:
            while not self._quit:
                if self._running:
                    self._left(self.core.run())
                else:
                    self.control.socket.poll()
                self._receive()
                while self._commands:
                    self._obey(self._commands.popleft())
        except AtollError as error:
            self.control.notify(messages.Failed(f"vcpu{self.index}: {error}"))
            raise
        finally:
            self.bus.close()
            self.control.flush()
            self.context.term()

    # ---- the guest -----------------------------------------------------------------------------
    def _left(self, reason: Exit) -> None:
        if reason is Exit.SHUTDOWN:
            self._running = False
            log.info("triple fault at rip %#x", self.core.arch.rip)
            self.control.notify(messages.GuestReset("triple-fault"))
        elif reason is Exit.ERROR:
            self._running = False
            self.control.notify(messages.Failed(f"vcpu{self.index}: {self.core.error()}"))
        elif reason is Exit.CONTROL:
            while self._received < self.core.block.commands and not self._quit:
                self.control.socket.poll()
                self._receive()

    def _sync_access(self, io: Any) -> bool:
        """See Core: called inside run(), parked."""
        serial = self.bus.send(io)
        while True:
            reply = self.bus.receive(io, serial)
            if reply is None:  # slow, or gone: then its successor is asked
                self.bus.ask_again(io)
                self._receive()
                if any(isinstance(command, messages.Quit) for command in self._commands):
                    self.core.leave()
                    return False
            elif reply.hold:
                if self._wait_held():
                    return False
                serial = self.bus.send(io)
            else:
                if not io.write:
                    room = io.width * io.count
                    io.data[0:room] = reply.data[:room].ljust(room, b"\xff")
                return True

    def _wait_held(self) -> bool:
        """A device host holds the access: wait for the coordinator. True: a command wants us out."""
        self.control.socket.poll(timeout=1)
        self._receive()
        if self._commands:
            self.core.leave()
        return bool(self._commands)

    # ---- the coordinator -----------------------------------------------------------------------
    def _receive(self) -> None:
        while True:
            try:
                command = self.control.receive()
            except MessageError as error:
                self._received += 1
                log.error("control: %s", error)
                continue
            if command is None:
                return
            self._received += 1
            self._commands.append(command)

    def _obey(self, command: messages.AnyCommand) -> None:
        try:
            value = self._do(command)
        except AtollError as error:
            self.control.answer(command, error=str(error))
        else:
            self.control.answer(command, value)

    def _do(self, command: messages.AnyCommand) -> Any:
        match command:
            case messages.Run():
                self._running = True
            case messages.Stop():
                self._running = False
            case messages.Quit():
                self._running, self._quit = False, True
            case messages.Reset():
                self.core.power_on()
            case messages.LoadCpu(mode=mode, registers=registers):
                load.load(self.core.arch, mode, registers)
                self.core.state_changed()
            case messages.SaveState():
                return state.save(self.core, self.index)
            case messages.LoadState(records=records):
                state.load(self.core, self.index, records)
            case messages.DescribeCpu():
                return state.features(self.core)
            case messages.Translate(linear=linear):
                return self.core.translate(linear)
            case messages.InjectNmi():
                self.segment.post_interrupt(self.index, DELIVER_NMI, VECTOR_NMI)
            case _:
                raise MessageError(f"a vCPU does not do {type(command).__name__}")
        return None


def main(config: VcpuConfig) -> None:
    """Entry point of the process."""
    role = f"vcpu{config.index}"
    sandbox = Sandbox("vcpu", role, config.sandbox)
    island.enter(role, config.vm, config.parent, config.log, sandbox)
    vcpu = Vcpu(config)
    sandbox.seal()
    vcpu.serve()
