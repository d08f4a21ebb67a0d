"""The multiplexer of a terminal and the serial port behind it. Keys are those of QEMU's multiplexer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from coordinator.chardev import Chardev
from coordinator.console import ENOUGH_INPUT, UART_FIFO, Mux, SerialPort
from coordinator.contract import messages
from coordinator.contract.errors import IslandError
from tests.coordinator.fakes import FakeDevice, FakeVm, settle


class Recorder:
    """A frontend that remembers."""

    def __init__(self) -> None:
        self.input = b""
        self.calls: list[str] = []

    def connected(self, device: Chardev) -> None:
        self.calls.append("connected")

    def disconnected(self, device: Chardev) -> None:
        self.calls.append("disconnected")

    def received(self, device: Chardev, data: bytes) -> None:
        self.input += data

    async def room(self) -> None:
        self.calls.append("room")


class Rig:
    def __init__(self) -> None:
        self.device = FakeDevice(mux=True)
        self.quits = 0
        self.mux = Mux(self.device, self._quit)
        self.serial, self.monitor = Recorder(), Recorder()
        self.mux.channels[0].frontend = self.serial
        self.mux.channels[1].frontend = self.monitor
        self.mux.connected(self.device)

    def _quit(self) -> None:
        self.quits += 1

    def press(self, keys: bytes) -> None:
        self.mux.received(self.device, keys)


def test_keys_go_to_the_console_first() -> None:
    rig = Rig()
    rig.press(b"abc\x03")
    assert (rig.serial.input, rig.monitor.input) == (b"abc\x03", b"")


def test_ctrl_a_c_switches_there_and_back() -> None:
    rig = Rig()
    rig.press(b"a\x01cb\x01Cc")
    assert (rig.serial.input, rig.monitor.input) == (b"ac", b"b")
    assert rig.monitor.calls == ["connected", "disconnected"]


def test_ctrl_a_x_ends() -> None:
    for key in (b"x", b"X"):
        rig = Rig()
        rig.press(b"a\x01" + key)
        assert rig.quits == 1 and rig.serial.input == b"a"


def test_ctrl_a_twice_is_ctrl_a() -> None:
    rig = Rig()
    rig.press(b"\x01\x01")
    assert rig.serial.input == b"\x01"


def test_ctrl_a_and_its_key_may_come_apart() -> None:
    rig = Rig()
    rig.press(b"\x01")
    rig.press(b"x")
    assert rig.quits == 1


def test_help_for_h_and_for_what_is_no_key() -> None:
    for key in (b"h", b"?", b"q"):
        rig = Rig()
        rig.press(b"\x01" + key)
        for line in (b"Ctrl-a x", b"Ctrl-a c", b"Ctrl-a h"):
            assert line in rig.device.output
        assert rig.quits == 0


def test_the_consoles_output_always_shows_the_monitors_only_in_front() -> None:
    rig = Rig()
    rig.mux.channels[0].write(b"1")
    rig.mux.channels[1].write(b"2")
    assert rig.device.take() == b"1"
    rig.press(b"\x01c")
    rig.device.take()
    rig.mux.channels[0].write(b"1")
    rig.mux.channels[1].write(b"2")
    assert rig.device.take() == b"12"


# ---- serial port ----------------------------------------------------------------------------------------
def feed(test: Callable[[Any, SerialPort], Awaitable[None]]) -> None:
    async def go() -> None:
        vm: Any = FakeVm()
        await test(vm, SerialPort(vm, 0, FakeDevice()))

    asyncio.run(go())


def sent(vm: FakeVm) -> list[bytes]:
    return [command.data for _, command in vm.sent if isinstance(command, messages.SerialInput)]


def test_input_goes_at_the_pace_of_the_fifo() -> None:
    async def test(vm: FakeVm, port: SerialPort) -> None:
        vm.answers[messages.SerialInput] = lambda command: min(10, len(command.data))
        port.received(port.device, bytes(range(25)))
        await settle()
        assert sent(vm) == [bytes(range(16)), bytes(range(10, 25)), bytes(range(20, 25))]
        assert all(len(data) <= UART_FIFO for data in sent(vm))

    feed(test)


def test_input_waits_for_the_start() -> None:
    async def test(vm: FakeVm, port: SerialPort) -> None:
        vm.up.clear()
        vm.answers[messages.SerialInput] = lambda command: len(command.data)
        port.received(port.device, b"early")
        await settle()
        assert sent(vm) == []
        vm.up.set()
        await settle()
        assert sent(vm) == [b"early"]

    feed(test)


def test_too_much_input_is_held_back_and_forgotten_at_the_end() -> None:
    async def test(vm: FakeVm, port: SerialPort) -> None:
        vm.up.clear()
        port.received(port.device, bytes(ENOUGH_INPUT))
        waiting = asyncio.ensure_future(port.room())
        await settle()
        assert not waiting.done()
        vm.answers[messages.SerialInput] = IslandError("the machine has ended")
        vm.up.set()
        await settle()
        assert waiting.done() and len(sent(vm)) == 1

    feed(test)
