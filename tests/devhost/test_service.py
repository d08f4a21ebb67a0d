"""The loop of the device host in a thread, with real sockets: the test is coordinator and vCPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from coordinator.contract import messages
from coordinator.contract._segment import ffi, lib
from coordinator.contract.codec import encode
from coordinator.contract.config import (
    Boot,
    DevhostConfig,
    Drive,
    Machine,
    Media,
    bus_endpoint,
    control_endpoint,
)
from coordinator.contract.drives import DrivePhase
from coordinator.contract.island import dealer, router
from coordinator.contract.segment import Segment
from devhost.commands import Commands
from devhost.pc import Pc
from devhost.service import Service
from tests.devhost.machine import VRAM

ROLE = b"devhost0"
TIMEOUT_MS = 20_000
RAM = 1 << 20


class Coordinator:
    """Both far ends of a service that runs in a thread."""

    def __init__(self, folder: Path) -> None:
        machine = Machine(
            name="test", vcpus=1, ram=RAM, serials=2, boot=Boot(direct=True), trace=("rtc_write",),
            drives=(Drive(id="cd", index=2, media=Media.CDROM),),
        )  # fmt: skip
        self.segment = Segment.create(vcpus=1, ram=RAM, vram=VRAM, rom=64 << 10)
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK)
        self.context: zmq.Context[Any] = zmq.Context()
        self.control = router(self.context, control_endpoint(str(folder)))
        self.control.set(zmq.RCVTIMEO, TIMEOUT_MS)
        config = DevhostConfig(
            vm="test", index=0, runtime=str(folder), parent=os.getpid(), machine=machine,
            segment_fd=self.segment.fd, doorbell_fd=self.doorbell,
        )  # fmt: skip
        self.output = self.segment.output(0)
        self.service = Service(config, self.segment)
        self.pc = Pc(self.service, machine)
        self.service.handle = Commands(self.pc).handle
        self.bus = dealer(self.context, bus_endpoint(str(folder), 0), b"vcpu0")
        self.bus.set(zmq.RCVTIMEO, TIMEOUT_MS)
        self.serial = 0
        self.notices: list[messages.AnyNotice] = []
        self.thread = threading.Thread(target=self.service.run)
        self.thread.start()
        assert isinstance(self.wait_for(messages.Hello), messages.Hello)

    def close(self) -> None:
        if self.thread.is_alive():
            self.do(messages.Quit)
        self.thread.join(TIMEOUT_MS / 1000)
        assert not self.thread.is_alive()
        self.bus.close()
        self.control.close()
        self.context.term()
        os.close(self.doorbell)
        self.segment.close()

    # ---- control
    def wait_for(self, kind: type[Any]) -> Any:
        """The next notice of a kind; others are kept."""
        while True:
            for notice in self.notices:
                if isinstance(notice, kind):
                    self.notices.remove(notice)
                    return notice
            role, frame = self.control.recv_multipart()
            assert role == ROLE
            for waiting in (*self.output.take(), frame):
                self.notices.append(messages.notices.decode(waiting))

    def ask(self, kind: type[messages.Command], **fields: Any) -> messages.Answer:
        self.serial += 1
        self.control.send_multipart((ROLE, encode(kind(serial=self.serial, **fields))))
        answer: messages.Answer = self.wait_for(messages.Answer)
        assert answer.serial == self.serial
        return answer

    def do(self, kind: type[messages.Command], **fields: Any) -> Any:
        answer = self.ask(kind, **fields)
        assert answer.error is None, answer.error
        return answer.value

    # ---- bus
    def access(self, port: int, width: int = 1, count: int = 1, data: bytes | None = None) -> bytes:
        """A sync access behind all that was posted so far."""
        reply = self.try_access(port, width, count, data)
        assert not reply.hold
        return reply.data

    def try_access(
        self, port: int, width: int = 1, count: int = 1, data: bytes | None = None
    ) -> messages.BusReply:
        """The same where it may be held."""
        self.send_access(port, width, count, data)
        reply = messages.replies.decode(self.bus.recv())
        assert reply.serial == self.serial
        return reply

    def send_access(self, port: int, width: int = 1, count: int = 1, data: bytes | None = None) -> None:
        self.serial += 1
        ticket = lib.ring_next_ticket(self.segment.header, 0)
        request = messages.BusRequest(
            serial=self.serial, vcpu=0, ticket=ticket, space=0, device=3, addr=port, count=count,
            width=width,  # type: ignore[arg-type]
            write=data is not None, data=data or b"",
        )  # fmt: skip
        self.bus.send(encode(request))

    def post(self, port: int, value: int, width: int = 1) -> None:
        entry = ffi.new("struct posted_entry *")
        entry.addr, entry.value, entry.width = port, value, width
        lib.ring_post(self.segment.header, 0, entry, 0, self.doorbell)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Coordinator]:
    board = Coordinator(tmp_path)
    try:
        yield board
    finally:
        board.close()


def test_a_sync_read_comes_behind_what_was_posted(board: Coordinator) -> None:
    for value in range(100):
        board.post(0x3FF, value)
        assert board.access(0x3FF) == bytes([value])  # the UART's scratch register
    host = board.segment.host(0)
    assert (host.posted_served, host.sync_served, host.roundtrips[3]) == (100, 100, 100)
    assert host.applied == 100


def test_the_doorbell_wakes_a_sleeping_host(board: Coordinator) -> None:
    """Nothing but a posted write arrives; its output comes out."""
    for byte in b"posted":
        board.post(0x3F8, byte)
    got = b""
    while len(got) < 6:
        notice = board.wait_for(messages.SerialOutput)
        assert notice.index == 0
        got += notice.data
    assert got == b"posted"


def test_strings_are_one_message(board: Coordinator) -> None:
    board.access(0x510, 2, data=b"\x00\x00")  # fw_cfg: the signature
    assert board.access(0x511, 1, 4) == b"QEMU"


def test_traces_reach_the_coordinator(board: Coordinator) -> None:
    board.post(0x70, 0x7E)
    board.access(0x71, data=b"\x5a")
    board.access(0x71)
    lines: list[str] = []
    while len(lines) < 2:
        lines += board.wait_for(messages.TraceLines).lines
    assert ["INDEX" in lines[0], lines[1].endswith("0x5a")] == [True, True]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        encode(messages.Hello(role="vcpu0", pid=1)),
        encode(messages.BusRequest(0, 0, 0, 0, 0, 0x3FF, 3, 1, False, b"")),  # type: ignore[arg-type]
        encode(messages.BusRequest(0, 0, 0, 0, 0, 0x3FF, 1, 0, False, b"")),
        encode(messages.BusRequest(0, 0, 0, 0, 0, 0x3FF, 1, 1 << 40, False, b"")),
        encode(messages.BusRequest(0, 0, 0, 0, 0, 0x3FF, 2, 2, True, b"123")),
    ],
)
def test_malformed_requests_are_dropped(board: Coordinator, frame: bytes) -> None:
    """Hardware-cases 20: no process dies of it."""
    board.bus.send(frame)
    assert board.access(0x3FF) == b"\x00"


def test_a_ticket_that_nobody_drew_is_not_waited_for(board: Coordinator) -> None:
    board.bus.send(encode(messages.BusRequest(0, 0, 1 << 62, 0, 0, 0x3FF, 1, 1, False, b"")))
    assert messages.replies.decode(board.bus.recv()).data == b"\x00"


def test_posted_writes_come_before_a_command(board: Coordinator) -> None:
    """A vCPU that has stopped has posted before: its writes belong to the state that is looked at."""
    board.post(0x3FF, 0x77)
    board.do(messages.Stop)
    uart: Any = board.pc.uarts[0]
    assert uart.read(7, 1) == 0x77
    board.do(messages.Run)


def test_timers_fire_while_time_runs(board: Coordinator) -> None:
    """The 8254's tick that POST leaves; counted in the segment."""
    board.segment.start_time()
    board.do(messages.Run)
    before = board.segment.host(0).timer_fires
    board.post(0x20, 0x11)  # the PIC's IRR is read until IRQ 0 has come
    for word in (0x20, 0x04, 0x01, 0x00):
        board.post(0x21, word)
    while not board.access(0x20)[0] & 1:
        pass
    assert board.segment.host(0).timer_fires > before


def test_commands(board: Coordinator) -> None:
    assert board.do(messages.QueryDrives) == [
        {
            "id": "cd", "phase": "idle", "stream": "full",
            "tray_open": False, "locked": False, "inserted": False,
        }
    ]  # fmt: skip
    width, height, picture = board.do(messages.Screen)
    assert (width, height, len(picture)) == (720, 400, 720 * 400 * 3)
    assert board.do(messages.SerialInput, index=1, data=b"x") == 1
    assert board.access(0x2F8) == b"x"
    assert "master" in board.do(messages.DescribeChip, what="pic")
    board.do(messages.OpenTray, drive="cd")
    assert board.wait_for(messages.TrayMoved) == messages.TrayMoved(drive="cd", open=True)
    board.do(messages.SendKeys, keys=("a",))
    board.do(messages.PowerButton)
    board.do(messages.Reset)
    assert board.access(0x3FF) == b"\x00"


def begin_packet(board: Coordinator, data: bytes = b"\xa0") -> messages.BusReply:
    board.pc.drives.as_firmware_leaves_it()
    board.post(0x176, 0xA0)
    return board.try_access(0x177, data=data)


def test_a_drain_is_answered_when_the_packet_has_ended(board: Coordinator) -> None:
    """The host serves the guest meanwhile, and holds what would begin."""
    board.segment.start_time()
    assert not begin_packet(board).hold
    board.serial += 1
    drain = messages.DrainDrives(serial=board.serial, bound_ms=600_000)
    board.control.send_multipart((ROLE, encode(drain)))
    assert board.do(messages.QueryPhases)[0]["phase"] == "packet-awaited"
    board.access(0x170, 2, 6, bytes(12))  # TEST UNIT READY: there is no medium
    answer = board.wait_for(messages.Answer)
    assert (answer.serial, answer.value["drained"]) == (drain.serial, True)
    for _ in range(3):
        assert begin_packet(board).hold
    board.do(messages.CancelDrain)
    assert not begin_packet(board).hold


def arm_and_reach(board: Coordinator) -> None:
    """The vCPU has written the command, and has no reply."""
    board.segment.start_time()
    board.pc.drives.as_firmware_leaves_it()
    board.do(messages.ArmPhase, drive="cd", phase=DrivePhase.PACKET_AWAITED, hold_ms=600_000)
    board.post(0x176, 0xA0)
    board.send_access(0x177, data=b"\xa0")
    assert board.wait_for(messages.PhaseReached).drive == "cd"
    board.do(messages.QueryDrives)
    assert not board.bus.poll(0)


def test_a_vcpu_that_is_called_gets_the_reply_that_was_kept_back(board: Coordinator) -> None:
    """Its attention is raised by then, so that it stops behind the access."""
    arm_and_reach(board)
    board.segment.call(0)
    assert not messages.replies.decode(board.bus.recv()).hold
    board.do(messages.Stop)
    assert board.do(messages.QueryPhases)[0]["phase"] == "packet-awaited"


@pytest.mark.parametrize("kind", [messages.DisarmPhase, messages.Run, messages.Reset])
def test_replies_kept_back_are_sent_in_the_end(board: Coordinator, kind: type[messages.Command]) -> None:
    arm_and_reach(board)
    board.do(kind)
    assert not messages.replies.decode(board.bus.recv()).hold


@pytest.mark.parametrize(
    ("kind", "fields", "error"),
    [
        (messages.SerialInput, {"index": 2, "data": b""}, "no serial port 2"),
        (messages.SendKeys, {"keys": ("a", "anykey")}, "Unknown key: 'anykey'"),
        (messages.SendKeys, {"keys": ()}, "0 keys"),
        (messages.DescribeChip, {"what": "fpu"}, "'fpu'"),
        (messages.OpenTray, {"drive": "hd9"}, "hd9"),
        (messages.InjectNmi, {}, "InjectNmi"),
        (messages.ArmPhase, {"drive": "dvd", "phase": DrivePhase.IDLE}, "choose one of cd"),
        (
            messages.SetDriveProperty,
            {"driver": "ide-cd", "name": "migrate-stream", "value": "old"},
            "choose one of full, v0",
        ),
    ],
)
def test_errors_are_one_line(board: Coordinator, kind: Any, fields: dict[str, Any], error: str) -> None:
    answer = board.ask(kind, **fields)
    assert answer.error is not None and error in answer.error and "\n" not in answer.error


def test_quit_lets_output_leave(board: Coordinator) -> None:
    board.post(0x3F8, ord("!"))
    board.do(messages.Quit)
    assert board.wait_for(messages.SerialOutput).data == b"!"
    board.thread.join(TIMEOUT_MS / 1000)
