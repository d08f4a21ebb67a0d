"""The serial ports' host side, and the multiplexer that shares a terminal with the monitor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coordinator.chardev import Chardev, Frontend
from coordinator.contract import messages
from coordinator.contract.errors import IslandError
from coordinator.machine import Vm

#: a 16550 takes this much at once
UART_FIFO = 16
#: how long to wait for the guest to read its FIFO, seconds
RETRY_SECONDS = 0.01
#: input kept for a guest that does not read, bytes; a device that can wait is made to
ENOUGH_INPUT = 64 << 10

ESCAPE = 0x01  # Ctrl-a
HELP = (
    b"\r\nCtrl-a h    this help\r\nCtrl-a x    end the machine\r\n"
    b"Ctrl-a c    switch between console and monitor\r\n"
    b"Ctrl-a Ctrl-a  send Ctrl-a\r\n"
)


class SerialPort:
    """Frontend of serial port ``index``: guest output to the device, input to the guest at its pace."""

    def __init__(self, vm: Vm, index: int, device: Chardev) -> None:
        self._vm = vm
        self._index = index
        self.device = device
        self._input = bytearray()
        self._pump: asyncio.Task[None] | None = None
        self._room = asyncio.Event()
        self._room.set()

    def connected(self, device: Chardev) -> None: ...

    def disconnected(self, device: Chardev) -> None: ...

    def received(self, device: Chardev, data: bytes) -> None:
        self._input += data
        if len(self._input) >= ENOUGH_INPUT:
            self._room.clear()
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._feed())

    async def room(self) -> None:
        await self._room.wait()

    async def _feed(self) -> None:
        """What arrives while the machine is still starting waits for it."""
        try:
            await self._vm.started()
            while self._input:
                command = messages.SerialInput(
                    serial=self._vm.next_serial(), index=self._index, data=bytes(self._input[:UART_FIFO])
                )
                taken = int(await self._vm.command("devhost0", command) or 0)
                del self._input[:taken]
                if len(self._input) < ENOUGH_INPUT:
                    self._room.set()
                if not taken:
                    await asyncio.sleep(RETRY_SECONDS)
        except IslandError:
            self._input.clear()  # the machine has ended
            self._room.set()

    def output(self, data: bytes) -> None:
        self.device.write(data)


class MuxChannel(Chardev):
    """What one of the two frontends behind a mux sees as its device."""

    def __init__(self, mux: Mux, number: int) -> None:
        super().__init__(mux.device.spec)
        self._mux = mux
        self._number = number

    def write(self, data: bytes) -> None:
        self._mux.write(self._number, data)


class Mux:
    """Frontend of a terminal that a serial port (0) and a monitor (1) share; Ctrl-a c switches.

    Output of the serial port always shows; the monitor's only while it is in front.
    """

    def __init__(self, device: Chardev, quit_: Callable[[], None]) -> None:
        self.device = device
        self._quit = quit_
        self._front = 0
        self._escaped = False
        self.channels = (MuxChannel(self, 0), MuxChannel(self, 1))

    def connected(self, device: Chardev) -> None:
        self._frontend(0).connected(self.channels[0])

    def disconnected(self, device: Chardev) -> None:
        self._frontend(0).disconnected(self.channels[0])

    async def room(self) -> None:
        await self._frontend(self._front).room()

    def _frontend(self, number: int) -> Frontend:
        frontend = self.channels[number].frontend
        assert frontend is not None, "both channels of a mux have a frontend"
        return frontend

    def received(self, device: Chardev, data: bytes) -> None:
        plain = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte == ESCAPE:
                    plain.append(byte)
                else:
                    self._flush(plain)
                    self._command(byte)
            elif byte == ESCAPE:
                self._escaped = True
            else:
                plain.append(byte)
        self._flush(plain)

    def _flush(self, plain: bytearray) -> None:
        if plain:
            self._frontend(self._front).received(self.channels[self._front], bytes(plain))
            plain.clear()

    def _command(self, byte: int) -> None:
        if byte in b"xX":
            self._quit()
        elif byte in b"cC":
            self._front ^= 1
            if self._front == 1:
                self.device.write(b"\r\n")
                self._frontend(1).connected(self.channels[1])
            else:
                self._frontend(1).disconnected(self.channels[1])
        else:
            self.device.write(HELP)

    def write(self, number: int, data: bytes) -> None:
        if number == 0 or number == self._front:
            self.device.write(data)
