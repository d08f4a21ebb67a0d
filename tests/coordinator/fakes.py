"""A machine without processes, and a character device without a file."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

from coordinator.chardev import Chardev
from coordinator.chardev_spec import ChardevSpec
from coordinator.contract import messages
from coordinator.contract.config import Drive, Machine, Media
from coordinator.contract.errors import IslandError
from coordinator.contract.segment import Segment


class FakeVm:
    """What monitors and serial ports need of a ``Vm``; ``sent`` is what islands were asked."""

    def __init__(self, segment: Segment | None = None, **machine: Any) -> None:
        self.machine = Machine(
            name="fake",
            vcpus=2,
            ram=2 << 20,
            drives=(Drive("ide1-cd0", 2, Media.CDROM, file="/a.iso"),),
            **machine,
        )
        self.state = "running"
        self.segment = segment
        self.islands = {f"vcpu{i}": SimpleNamespace(pid=1000 + i) for i in range(2)}
        self.vcpus = ["vcpu0", "vcpu1"]
        self.crew = SimpleNamespace(
            succession=SimpleNamespace(restarts={}), standbys=SimpleNamespace(pids=dict[str, int])
        )
        self.on_event: list[Callable[[str, dict[str, Any]], None]] = []
        self.media_lock = asyncio.Lock()
        self.media_held = False
        self.sent: list[tuple[str, messages.Command]] = []
        self.done: list[str] = []
        #: what an island answers to a kind of command; an exception is raised
        self.answers: dict[type, Any] = {}
        self.up = asyncio.Event()
        self.up.set()

    def next_serial(self) -> int:
        return len(self.sent) + 1

    async def started(self) -> None:
        await self.up.wait()

    async def command(self, role: str, command: messages.Command) -> Any:
        self.sent.append((role, command))
        answer = self.answers.get(type(command))
        if isinstance(answer, Exception):
            raise answer
        return answer(command) if callable(answer) else answer

    def loss(self, vcpu: int) -> None:
        return None

    async def paused_command(self, role: str, command: messages.Command) -> Any:
        return await self.command(role, command)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        yield

    def event(self, name: str, data: dict[str, Any] | None = None) -> None:
        for listener in self.on_event:
            listener(name, data or {})

    async def stop(self) -> None:
        self.done.append("stop")
        self.state = "paused"
        self.event("STOP")

    async def cont(self) -> None:
        self.done.append("cont")
        if self.state == "shutdown":
            raise IslandError("Resetting the Virtual Machine is required")
        self.state = "running"

    async def reset(self) -> None:
        self.done.append("reset")

    def quit(self) -> None:
        self.done.append("quit")

    def replace_drive(self, drive: Drive) -> None:
        self.done.append(f"drive {drive.file}")


class FakeDevice(Chardev):
    """Keeps what is written."""

    def __init__(self, mux: bool = False) -> None:
        super().__init__(ChardevSpec("stdio", mux=mux))
        self.output = b""

    def write(self, data: bytes) -> None:
        self.output += data

    def take(self) -> bytes:
        taken, self.output = self.output, b""
        return taken


async def settle(turns: int = 20) -> None:
    """Let every task that can go on go on."""
    for _ in range(turns):
        await asyncio.sleep(0)
