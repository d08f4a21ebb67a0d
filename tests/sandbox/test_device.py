"""Guest input to a device host cannot open a file or start a program: a device that tries, by its port.

The test is coordinator and vCPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from coordinator.contract import messages
from coordinator.contract.codec import encode
from coordinator.contract.config import Boot, DevhostConfig, Machine, bus_endpoint, control_endpoint
from coordinator.contract.island import dealer, router
from coordinator.contract.segment import Segment
from tests.devhost.machine import VRAM
from tests.sandbox.attempts import DEADLY, NAMES, NEW, REFUSALS, SECRET
from tests.sandbox.device_host import PORT

RAM = 1 << 20
SECONDS = 60


class Board:
    """A device host's process with the device in it."""

    def __init__(self, folder: Path, runtime: str, victim: int) -> None:
        machine = Machine(name="test", vcpus=1, ram=RAM, boot=Boot(direct=True))
        self.segment = Segment.create(vcpus=1, ram=RAM, vram=VRAM, rom=64 << 10)
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK)
        self.context: zmq.Context[Any] = zmq.Context()
        self.control = router(self.context, control_endpoint(runtime))
        self.control.set(zmq.RCVTIMEO, SECONDS * 1000)
        config = DevhostConfig(
            vm="test", index=0, runtime=runtime, parent=os.getpid(), machine=machine,
            segment_fd=self.segment.fd, doorbell_fd=self.doorbell, log=str(folder / "log"),
        )  # fmt: skip
        words = [msgspec.json.encode(config).decode(), str(victim), str(folder)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sandbox.device_host", *words],
            pass_fds=(self.segment.fd, self.doorbell),
        )
        while not isinstance(messages.notices.decode(self.control.recv_multipart()[1]), messages.Hello):
            pass
        self.bus = dealer(self.context, bus_endpoint(runtime, 0), b"vcpu0")
        self.bus.set(zmq.RCVTIMEO, SECONDS * 1000)
        self.serial = 0

    def send(self, data: bytes | None) -> None:
        self.serial += 1
        request = messages.BusRequest(
            serial=self.serial, vcpu=0, ticket=0, space=messages.SPACE_PORT, device=3, addr=PORT, count=1,
            width=1, write=data is not None, data=data or b"",
        )  # fmt: skip
        self.bus.send(encode(request))

    def access(self, data: bytes | None = None) -> bytes:
        self.send(data)
        return messages.replies.decode(self.bus.recv()).data

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.bus.close()
        self.control.close()
        self.context.term()
        os.close(self.doorbell)
        self.segment.close()


@pytest.fixture
def victim() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        process.kill()


@pytest.fixture
def board(tmp_path: Path, victim: int) -> Iterator[Board]:
    (tmp_path / SECRET).write_text("nobody's business")
    with tempfile.TemporaryDirectory(prefix="atoll") as runtime:
        made = Board(tmp_path, runtime, victim)
        yield made
        made.close()


def test_a_device_that_is_told_to_opens_nothing(board: Board, tmp_path: Path, victim: int) -> None:
    """All attempts that are refused, by one process, which serves on."""
    for attempt in NAMES:
        if attempt in DEADLY - {"program in memory"}:
            continue
        board.access(bytes([NAMES.index(attempt)]))
        assert board.access()[0] in REFUSALS, attempt
    assert (tmp_path / SECRET).read_text() == "nobody's business"
    assert not (tmp_path / NEW).exists()
    os.kill(victim, 0)


@pytest.mark.parametrize("attempt", ["execve", "ptrace"])
def test_a_device_that_starts_a_program_is_the_end_of_its_host(board: Board, attempt: str) -> None:
    board.send(bytes([NAMES.index(attempt)]))
    assert board.process.wait(SECONDS) == -signal.SIGSYS
