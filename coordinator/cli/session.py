"""One run of a machine: its devices on the host, its start, its end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

from coordinator import boot, chardev, pieces, stats
from coordinator.cli import build
from coordinator.cli.settings import Settings
from coordinator.console import Mux, SerialPort
from coordinator.contract.config import Machine
from coordinator.contract.errors import AtollError, ConfigError
from coordinator.crew import Ending
from coordinator.dump import Dumps
from coordinator.machine import Loader, Vm
from coordinator.migrate import snapshot
from coordinator.migrate.manager import Manager
from coordinator.monitor import MonitorFrontend
from coordinator.qmp.door import Door
from coordinator.qmp.server import QmpFrontend

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: what a shell reports of a program that Ctrl-C ended
STATUS_INTERRUPTED = 130
UNCONFINED = (
    "atoll run: WARNING: -sandbox off: a guest that takes over a process of this machine can do what you can"
)


def run(s: Settings, folder: Path) -> int:
    """Returns the exit status."""
    _start_log(s)
    if not s.options.sandbox:
        print(UNCONFINED, file=sys.stderr)
    machine, loader = _machine(s)
    _hint(s)
    return asyncio.run(_run(s, machine, loader, folder))


def _start_log(s: Settings) -> None:
    """Log lines to -D; a log that cannot be written is no reason to print tracebacks."""
    logging.raiseExceptions = False
    try:
        stream = open(s.log_file, "a", buffering=1, encoding="utf-8") if s.log_file else sys.stderr  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"-D {s.log_file}: {error.strerror}") from None
    logging.getLogger("atoll.trace").setLevel(logging.INFO)
    logging.basicConfig(
        stream=stream,
        format="%(asctime)s %(message)s",
        level=logging.INFO if s.log_file else logging.WARNING,
        force=True,
    )


def _machine(s: Settings) -> tuple[Machine, Loader]:
    vga_rom = str(pieces.firmware("vgabios-stdvga.bin")) if s.vga else None
    if s.kernel is not None:
        machine = build.machine(s, vga_rom, rom_size=0)
        return machine, boot.kernel_loader(machine, Path(s.kernel), s.initrd, s.append)
    image = boot.read_firmware(Path(s.bios) if s.bios else pieces.firmware("bios-256k.bin"))
    return build.machine(s, vga_rom, rom_size=len(image)), boot.firmware_loader(image)


def _hint(s: Settings) -> None:
    """Nobody would see or control this machine: probably not what was meant."""
    serial = any(spec.kind != "null" for spec in s.serials)
    if not serial and not s.monitors and not s.options.start_paused and sys.stderr.isatty():
        print("atoll run: the machine has no console; say -nographic or -serial stdio", file=sys.stderr)


async def _run(s: Settings, machine: Machine, loader: Loader, folder: Path) -> int:
    vm = Vm(machine, s.options, loader, folder, s.log_file)
    loop = asyncio.get_running_loop()
    vm.migration = Manager(vm)
    vm.dumps = Dumps(vm)
    vm.on_event.append(_tell)
    devices = _attach(vm, s)
    killed: list[signal.Signals] = []

    def killed_by(number: signal.Signals) -> None:
        killed.append(number)
        vm.quit("host-signal")

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, killed_by, number)
    started = time.monotonic()
    stats_error = None
    try:
        ending = await _until_the_end(vm, devices)
        if s.stats and vm.segment is not None:
            stats_error = _write_stats(s.stats, stats.collect(vm, time.monotonic() - started))
    finally:
        await vm.migration.close()
        await vm.close()
        for device in devices:
            await device.close()
    status = _report(ending, killed)
    return status or (1 if stats_error else 0)


def _tell(name: str, data: dict[str, Any]) -> None:
    """What a user must hear of who has no QMP."""
    if name == "ISLAND_DIED":
        print(
            f"atoll run: {data['cause']}; RIP={data['rip']:016x}; the machine stands still, see"
            f" {data['report']}; system_reset or loadvm gives it another",
            file=sys.stderr,
        )


async def _until_the_end(vm: Vm, devices: list[chardev.Chardev]) -> Ending:
    """Start, and wait for the end, which may come while the machine is still starting."""

    async def start() -> None:
        for device in devices:
            await device.open()
        for device in devices:
            await device.wait()
        await vm.start()
        if vm.options.incoming is not None:
            vm.migration.incoming(vm.options.incoming)
        elif vm.options.loadvm is not None:
            await snapshot.load(vm, vm.options.loadvm)
            if not vm.options.start_paused:
                await vm.cont()

    starting = asyncio.create_task(start())
    try:
        either: set[asyncio.Future[Any]] = {starting, vm.ending}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not vm.ending.done():
            starting.result()
        return await vm.ending
    except AtollError as error:
        return vm.ending.result() if vm.ending.done() else Ending("internal-error", 1, str(error))
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


def _report(ending: Ending, killed: list[signal.Signals]) -> int:
    if ending.error is not None:
        print(f"atoll run: {ending.error}", file=sys.stderr)
        return ending.status or 1
    if killed:
        print(f"atoll run: ended by {killed[0].name}", file=sys.stderr)
        return STATUS_INTERRUPTED if killed[0] is signal.SIGINT else 0
    return ending.status


def _attach(vm: Vm, s: Settings) -> list[chardev.Chardev]:
    """Character devices with their frontends: serial ports, monitors, or both on one terminal."""
    devices: list[chardev.Chardev] = []
    ports: list[SerialPort] = []
    for index, spec in enumerate(s.serials):
        device = chardev.make(spec)
        devices.append(device)
        port = SerialPort(vm, index, device)
        ports.append(port)
        if spec.mux:
            mux = Mux(device, vm.quit)
            device.frontend = mux
            port.device = mux.channels[0]
            mux.channels[0].frontend = port
            mux.channels[1].frontend = MonitorFrontend(vm)
        else:
            device.frontend = port
    for monitor in s.monitors:
        device = chardev.make(monitor.device)
        device.frontend = (
            QmpFrontend(vm, monitor.pretty) if monitor.mode == "control" else MonitorFrontend(vm)
        )
        device.lossy = False
        devices.append(device)

    def serial(index: int, data: bytes) -> None:
        if index < len(ports):
            ports[index].output(data)

    vm.on_serial = serial
    devices.append(Door(vm, vm.folder))
    return devices


def _write_stats(path: str, numbers: dict[str, object]) -> str | None:
    """The error, which has been said, if there was one."""
    try:
        Path(path).write_text(json.dumps(numbers, indent=1) + "\n")
    except OSError as error:
        print(f"atoll run: -stats {path}: {error.strerror}", file=sys.stderr)
        return error.strerror
    return None
