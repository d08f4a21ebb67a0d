"""What the coordinator may ask of the device host, one method a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coordinator.contract import messages
from coordinator.contract.errors import UsageError
from devhost.chips.keycodes import QCODES
from devhost.pc import Pc
from devhost.quiesce import Quiesce
from devhost.vga.render import render

NS_PER_MS = 1_000_000
MOST_KEYS = 16


class Commands:
    """``handle`` is the service's hook; its value goes back as the answer."""

    def __init__(self, pc: Pc) -> None:
        self._pc = pc
        self._quiesce = Quiesce(pc)
        self._table: dict[type[messages.Command], Callable[[Any], Any]] = {
            messages.Run: self._run,
            messages.Stop: self._stop,
            messages.Reset: self._reset,
            messages.SaveState: lambda command: pc.save(),
            messages.LoadState: self._load,
            messages.DescribeChip: self._describe,
            messages.PowerButton: lambda command: pc.pm.press_power_button(),
            messages.SendKeys: self._send_keys,
            messages.SerialInput: self._serial_input,
            messages.Screen: self._screen,
            messages.OpenTray: lambda command: pc.drives.open_tray(command.drive, command.force),
            messages.CloseTray: lambda command: pc.drives.close_tray(command.drive),
            messages.InsertMedium: lambda command: pc.drives.insert(command.drive),
            messages.QueryDrives: lambda command: pc.drives.describe(),
            **self._quiesce.table(),
        }

    def handle(self, command: messages.AnyCommand) -> Any:
        self._present(command)
        action = self._table.get(type(command))
        if action is None:
            raise UsageError(f"a device host does not take {type(command).__name__}")
        return action(command)

    def _present(self, command: messages.AnyCommand) -> None:
        """UsageError when the command is for a device that has been unplugged."""
        match command:
            case messages.SerialInput(index=index):
                name = f"serial{index}"
            case messages.SendKeys():
                name = "i8042"
            case messages.PowerButton():
                name = "acpi-pm"
            case messages.OpenTray(drive=drive) | messages.CloseTray(drive=drive):
                name = self._pc.drives.channel_of(drive)
            case messages.InsertMedium(drive=config):
                name = self._pc.drives.channel_of(config.id)
            case _:
                return
        slot = self._pc.slots.get(name)
        if slot is not None and slot.absent:
            raise UsageError(f"{name} has been unplugged by a fault")

    def _run(self, command: messages.Run) -> None:
        self._quiesce.running()
        for slot in self._pc.present:
            slot.device.resume()

    def _pause(self) -> None:
        for slot in self._pc.present:
            slot.device.pause()

    def _stop(self, command: messages.Stop) -> None:
        """Pause every device; block requests in flight end before the answer."""
        self._quiesce.stopped()
        self._pause()
        self._pc.service.drain(lambda: all(slot.device.paused() for slot in self._pc.present))

    def _reset(self, command: messages.Reset) -> None:
        self._quiesce.end_drain()
        self._quiesce.disarm()
        self._pc.power_on()

    def _load(self, command: messages.LoadState) -> None:
        """Nothing moves, no request is made and no choice taken before Run."""
        self._pause()
        self._pc.load(command.records)

    def _describe(self, command: messages.DescribeChip) -> str:
        if command.what == "pic":
            return "".join(line + "\n" for line in self._pc.pic.summary())
        raise UsageError(f"there is no chip {command.what!r} to describe")

    def _send_keys(self, command: messages.SendKeys) -> None:
        """Press all in order; release them in reverse order when the hold time is over."""
        unknown = [key for key in command.keys if key not in QCODES]
        if unknown:
            raise UsageError(f"Unknown key: '{unknown[0]}'")
        if not 1 <= len(command.keys) <= MOST_KEYS:
            raise UsageError(f"{len(command.keys)} keys at once; 1 to {MOST_KEYS} are possible")
        self._pc.hold_keys(command.keys, self._pc.clock.now() + command.hold_ms * NS_PER_MS)

    def _serial_input(self, command: messages.SerialInput) -> int:
        if not 0 <= command.index < len(self._pc.uarts):
            raise UsageError(f"there is no serial port {command.index}")
        return self._pc.uarts[command.index].receive(command.data)

    def _screen(self, command: messages.Screen) -> tuple[int, int, bytes]:
        if self._pc.display is None:
            raise UsageError("there is no VGA card")
        picture = render(self._pc.display.vga)
        return picture.shape[1], picture.shape[0], picture.tobytes()
