"""The vCPU process: control channel, bus, death of the parent. The test plays coordinator and device host."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from coordinator.contract import messages
from coordinator.contract._segment import lib
from coordinator.contract.codec import encode
from coordinator.contract.config import bus_endpoint, control_endpoint
from coordinator.contract.island import router
from coordinator.contract.segment import Segment
from tests.contract.conftest import RAM, ram_at
from tests.vcpu.guest import assemble

CODE = 0x8000
TIMEOUT_MS = 20_000
ROLE = b"vcpu0"

CHILD = """
import sys
from coordinator.contract.config import VcpuConfig
from vcpu.main import main
if __name__ == "__main__":
    runtime, segment_fd, doorbell_fd, parent = sys.argv[1], *map(int, sys.argv[2:])
    main(VcpuConfig(vm="test", index=0, runtime=runtime, parent=parent, segment_fd=segment_fd,
                    doorbell_fds=(doorbell_fd,)))
"""


class Coordinator:
    """A segment, both ends of all sockets but the vCPU's, and the vCPU's process."""

    def __init__(self, folder: Path, parent: int | None = None) -> None:
        self.segment = Segment.create(vcpus=1, ram=RAM)
        self.segment.publish_map([ram_at(self.segment, 0, RAM)])
        self.segment.start_time()
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK)
        self.context: zmq.Context[Any] = zmq.Context()
        self.control = router(self.context, control_endpoint(str(folder)))
        self.bus = router(self.context, bus_endpoint(str(folder), 0))
        for socket in (self.control, self.bus):
            socket.set(zmq.RCVTIMEO, TIMEOUT_MS)
        self._arguments = (str(folder), *map(str, (self.segment.fd, self.doorbell, parent or os.getpid())))
        self.serial = 0
        self.start()

    def start(self) -> None:
        """A process that is the vCPU from now on."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *self._arguments], pass_fds=(self.segment.fd, self.doorbell)
        )
        hello = self.notice()
        assert isinstance(hello, messages.Hello)
        assert (hello.role, hello.pid, hello.protocol) == ("vcpu0", self.process.pid, messages.PROTOCOL)

    def notice(self) -> messages.AnyNotice:
        role, frame = self.control.recv_multipart()
        assert role == ROLE
        return messages.notices.decode(frame)

    def send(self, kind: type[messages.Command], **fields: Any) -> int:
        self.serial += 1
        self.control.send_multipart((ROLE, encode(kind(serial=self.serial, **fields))))
        self.segment.call(0)
        return self.serial

    def do(self, kind: type[messages.Command], **fields: Any) -> Any:
        serial = self.send(kind, **fields)
        answer = self.notice()
        assert isinstance(answer, messages.Answer) and answer.serial == serial
        assert answer.error is None, answer.error
        return answer.value

    def load(self, source: str) -> dict[str, int]:
        """Guest code for flat 32-bit mode; its labels."""
        code, labels = assemble(source, CODE, 32)
        self.segment.dma_write(CODE, code)
        self.do(messages.Reset)
        self.do(messages.LoadCpu, mode="flat32", registers={"rip": CODE, "rsp": 0x7000, "rflags": 2})
        return labels

    def map_port(self, port: int) -> None:
        index = self.segment.allocate_register()
        self.segment.regs[index].widths = self.segment.regs[index].length = 1
        self.segment.ports[port] = index

    def request(self) -> messages.BusRequest:
        role, frame = self.bus.recv_multipart()
        assert role == ROLE
        return messages.requests.decode(frame)

    def reply(self, request: messages.BusRequest, data: bytes = b"", hold: bool = False) -> None:
        reply = messages.BusReply(serial=request.serial, data=data, hold=hold)
        self.bus.send_multipart((ROLE, encode(reply)))

    @property
    def arch(self) -> Any:
        return self.segment.vcpu(0).arch

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.control.close()
        self.bus.close()
        self.context.term()
        self.segment.close()
        os.close(self.doorbell)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for the name of a UNIX socket."""
    with tempfile.TemporaryDirectory(prefix="atoll") as name:
        yield Path(name)


@pytest.fixture
def coordinator(folder: Path) -> Iterator[Coordinator]:
    made = Coordinator(folder)
    yield made
    made.close()


def test_runs_stops_and_answers_while_in_an_endless_loop(coordinator: Coordinator) -> None:
    labels = coordinator.load("inc eax\n loop: jmp loop")
    for _ in range(50):
        coordinator.do(messages.Run)
        coordinator.do(messages.Stop)
        assert coordinator.segment.vcpu(0).parked == 1
    assert coordinator.arch.gpr[0] == 1
    assert coordinator.arch.rip == labels["loop"]
    assert coordinator.do(messages.Translate, linear=0x1234) == 0x1234


def test_wakes_from_hlt_for_commands_and_interrupts(coordinator: Coordinator) -> None:
    coordinator.load("cli\n hlt\n inc ebx\n loop: jmp loop")
    coordinator.do(messages.Run)
    coordinator.do(messages.Stop)
    coordinator.do(messages.Run)
    coordinator.do(messages.InjectNmi)
    # no handler in an empty interrupt table: the NMI is a triple fault, which is a reset
    notice = coordinator.notice()
    assert isinstance(notice, messages.GuestReset)
    coordinator.do(messages.Stop)
    assert coordinator.arch.gpr[3] == 0


def test_sync_access_is_one_request_and_one_reply(coordinator: Coordinator) -> None:
    coordinator.map_port(0x60)
    labels = coordinator.load("in al, 0x60\n out 0x60, al\n loop: jmp loop")
    coordinator.do(messages.Run)
    request = coordinator.request()
    assert (request.space, request.addr, request.write) == (0, 0x60, False)
    assert (request.width, request.count) == (1, 1)
    coordinator.reply(request, b"\x5a")
    request = coordinator.request()
    assert (request.write, request.data) == (True, b"\x5a")
    coordinator.reply(request)
    coordinator.do(messages.Stop)
    assert coordinator.arch.rip == labels["loop"]


def test_stop_waits_for_the_access_in_hand(coordinator: Coordinator) -> None:
    """Stop means an instruction boundary: an access that the device host has begun is finished first."""
    coordinator.map_port(0x60)
    coordinator.load("in al, 0x60\n mov ebx, 1\n loop: jmp loop")
    coordinator.do(messages.Run)
    request = coordinator.request()
    serial = coordinator.send(messages.Stop)
    coordinator.reply(request, b"\x11")
    answer = coordinator.notice()
    assert isinstance(answer, messages.Answer) and answer.serial == serial
    assert coordinator.arch.gpr[0] & 0xFF == 0x11


def test_a_held_access_is_asked_for_again(coordinator: Coordinator) -> None:
    coordinator.map_port(0x60)
    labels = coordinator.load("mov al, 7\n in: in al, 0x60\n loop: jmp loop")
    coordinator.do(messages.Run)
    first = coordinator.request()
    coordinator.reply(first, hold=True)
    second = coordinator.request()
    assert second.serial != first.serial and second.addr == 0x60
    serial = coordinator.send(messages.Stop)
    coordinator.reply(second, hold=True)
    coordinator.bus.set(zmq.RCVTIMEO, 0)
    while True:  # it may ask again before it has heard of the command
        try:
            coordinator.reply(coordinator.request(), hold=True)
        except zmq.Again:
            if coordinator.control.poll(1):
                break
    answer = coordinator.notice()
    assert isinstance(answer, messages.Answer) and answer.serial == serial
    assert coordinator.arch.rip == labels["in"]
    assert coordinator.arch.gpr[0] & 0xFF == 7


def test_triple_fault_is_told_and_the_vcpu_waits(coordinator: Coordinator) -> None:
    coordinator.load("ud2")
    coordinator.do(messages.Run)
    notice = coordinator.notice()
    assert isinstance(notice, messages.GuestReset) and notice.reason == "triple-fault"
    labels = coordinator.load("loop: jmp loop")
    coordinator.do(messages.Run)
    coordinator.do(messages.Stop)
    assert coordinator.arch.rip == labels["loop"]


def test_unknown_register_is_an_answer_with_an_error(coordinator: Coordinator) -> None:
    coordinator.send(messages.LoadCpu, mode="flat32", registers={"xyz": 1})
    answer = coordinator.notice()
    assert isinstance(answer, messages.Answer) and answer.error is not None and "xyz" in answer.error


def test_quit_ends_the_process_wherever_it_is(coordinator: Coordinator) -> None:
    coordinator.map_port(0x60)
    coordinator.load("in al, 0x60\n loop: jmp loop")
    coordinator.do(messages.Run)
    coordinator.request()  # never answered: the device host hangs
    coordinator.do(messages.Quit)
    assert coordinator.process.wait(TIMEOUT_MS / 1000) == 0


def test_sigterm_ends_a_running_guest(coordinator: Coordinator) -> None:
    coordinator.load("loop: jmp loop")
    coordinator.do(messages.Run)
    coordinator.process.terminate()
    assert coordinator.process.wait(TIMEOUT_MS / 1000) == -signal.SIGTERM


def test_a_running_vcpu_dies_with_its_parent(folder: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as parent:
        coordinator = Coordinator(folder, parent.pid)
        coordinator.load("loop: jmp loop")
        coordinator.do(messages.Run)
        parent.kill()
        assert coordinator.process.wait(TIMEOUT_MS / 1000) == 1
    coordinator.close()


def test_process_counts_and_names_itself(coordinator: Coordinator) -> None:
    block = coordinator.segment.vcpu(0)
    assert block.pid == coordinator.process.pid
    assert Path(f"/proc/{block.pid}/cmdline").read_bytes().startswith(b"atoll vcpu0 test")
    assert block.attention & ~lib.ATTN_TIMER == 0
