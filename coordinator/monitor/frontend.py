"""A prompt with simple line editing: backspace, Ctrl-u, Ctrl-w, history by the arrow keys, Tab."""

from __future__ import annotations

import asyncio
import importlib.metadata

from coordinator.chardev import Chardev
from coordinator.machine import Vm
from coordinator.monitor.commands import COMMANDS, execute

PROMPT = b"(atoll) "
LONGEST_LINE = 4096
HISTORY = 100
#: lines that wait; a peer that sends more is not read from meanwhile
MOST_WAITING = 64
WAIT_SECONDS = 0.01


class MonitorFrontend:
    """The monitor at a character device; lines are carried out one after another."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._device: Chardev | None = None
        self._welcomed: Chardev | None = None
        self._line = bytearray()
        self._escape = b""
        self._history: list[bytes] = []
        self._at = 0
        self._lines: asyncio.Queue[str] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    def connected(self, device: Chardev) -> None:
        self._device = device
        self._line.clear()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        if self._welcomed is device:  # back from the console of a shared terminal
            self._write(PROMPT)
            return
        self._welcomed = device if device.spec.mux else None
        version = importlib.metadata.version("atoll")
        self._write(f"Atoll {version} monitor - type 'help' for more information\r\n".encode() + PROMPT)

    def disconnected(self, device: Chardev) -> None:
        self._device = None

    async def room(self) -> None:
        while self._lines.qsize() >= MOST_WAITING:
            await asyncio.sleep(WAIT_SECONDS)

    def _write(self, data: bytes) -> None:
        if self._device is not None:
            self._device.write(data)

    def received(self, device: Chardev, data: bytes) -> None:
        for byte in data:
            if self._escape:
                self._arrow(byte)
            elif byte == 0x1B:
                self._escape = b"\x1b"
            elif byte in (0x0D, 0x0A):
                self._enter()
            elif byte in (0x08, 0x7F):
                self._erase(1)
            elif byte == 0x15:  # Ctrl-u
                self._erase(len(self._line))
            elif byte == 0x17:  # Ctrl-w
                self._erase(len(self._line) - len(self._line.rstrip().rpartition(b" ")[0]))
            elif byte == 0x09:
                self._complete()
            elif 0x20 <= byte < 0x7F and len(self._line) < LONGEST_LINE:
                self._line.append(byte)
                self._write(bytes([byte]))

    def _arrow(self, byte: int) -> None:
        self._escape += bytes([byte])
        if len(self._escape) == 2 and byte == ord("["):
            return
        step = {ord("A"): -1, ord("B"): 1}.get(byte, 0) if len(self._escape) == 3 else 0
        self._escape = b""
        if step and self._history:
            self._at = max(0, min(len(self._history), self._at + step))
            self._erase(len(self._line))
            if self._at < len(self._history):
                self._line += self._history[self._at]
                self._write(bytes(self._line))

    def _erase(self, count: int) -> None:
        count = min(count, len(self._line))
        if count:
            del self._line[-count:]
            self._write(b"\b \b" * count)

    def _complete(self) -> None:
        word = self._line.decode(errors="replace")
        matches = sorted(name for name in COMMANDS if name.startswith(word))
        if len(matches) == 1:
            rest = matches[0][len(word) :].encode() + b" "
            self._line += rest
            self._write(rest)
        elif matches:
            self._write(b"\r\n" + "  ".join(matches).encode() + b"\r\n" + PROMPT + bytes(self._line))

    def _enter(self) -> None:
        line = bytes(self._line)
        self._line.clear()
        self._write(b"\r\n")
        if line.strip():
            self._history = [*self._history[-HISTORY:], line]
        self._at = len(self._history)
        self._lines.put_nowait(line.decode(errors="replace"))

    async def _work(self) -> None:
        while True:
            line = await self._lines.get()
            text = await execute(self._vm, line)
            self._write(text.replace("\n", "\r\n").encode() + PROMPT)
