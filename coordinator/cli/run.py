"""``atoll run``: a machine from a command line in QEMU's spelling."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from coordinator import boot, chardev, pieces, stats
from coordinator.cli import build, options
from coordinator.cli.build import Settings
from coordinator.console import Mux, SerialPort
from coordinator.contract.errors import AtollError, ConfigError
from coordinator.machine import Ending, Vm
from coordinator.monitor import MonitorFrontend
from coordinator.qmp.server import QmpFrontend

#: exit status when a signal ended the run: 128 + signal number
_SIGNAL_BASE = 128


def run(arguments: list[str]) -> int:
    """The subcommand; returns the exit status of the guest's end."""
    if any(word in ("-h", "-help", "--help") for word in arguments):
        print(options.help_text())
        return 0
    settings = build.settings(arguments)
    build.check_files(settings)
    _start_log(settings)
    return asyncio.run(_run(settings))


def _start_log(s: Settings) -> None:
    try:
        stream = open(s.log_file, "a", buffering=1, encoding="utf-8") if s.log_file else sys.stderr  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"-D {s.log_file}: {error.strerror}") from None
    logging.basicConfig(stream=stream, format="%(asctime)s %(message)s", level=logging.INFO, force=True)


async def _run(s: Settings) -> int:
    vga_rom = str(pieces.firmware("vgabios-stdvga.bin")) if s.vga else None
    if s.kernel is not None:
        machine = build.machine(s, vga_rom, rom_size=0)
        loader = boot.kernel_loader(machine, Path(s.kernel), s.initrd, s.append)
    else:
        image = boot.read_firmware(Path(s.bios) if s.bios else pieces.firmware("bios-256k.bin"))
        machine = build.machine(s, vga_rom, rom_size=len(image))
        loader = boot.firmware_loader(image)
    vm = Vm(machine, s.options, loader)
    loop = asyncio.get_running_loop()
    stop_signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    devices: list[chardev.Chardev] = []
    killed: list[signal.Signals] = []

    def killed_by(number: signal.Signals) -> None:
        killed.append(number)
        asyncio.ensure_future(vm.quit("host-signal", 0))

    with _pidfile(s.pidfile):
        started = time.monotonic()
        try:
            for number in stop_signals:
                loop.add_signal_handler(number, killed_by, number)
            devices = _attach(vm, s)
            for device in devices:
                await device.open()
            for device in devices:
                await device.wait()
            await vm.start()
            ending = await vm.ending
        except AtollError as error:
            ending = Ending("internal-error", 1, str(error))
        finally:
            if s.stats and vm.segment is not None:
                _write_stats(s.stats, stats.collect(vm, time.monotonic() - started))
            await vm.close()
            for device in devices:
                await device.close()
    return _report(ending, killed)


def _report(ending: Ending, killed: list[signal.Signals]) -> int:
    if ending.error is not None:
        print(f"atoll run: {ending.error}", file=sys.stderr)
        return ending.status or 1
    if killed:
        print(f"atoll run: ended by {killed[0].name}", file=sys.stderr)
        return _SIGNAL_BASE + killed[0] if killed[0] == signal.SIGINT else 0
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
            mux = Mux(device, lambda: asyncio.ensure_future(vm.quit()) and None)
            device.frontend = mux
            port.device = mux.channels[0]
            mux.channels[0].frontend = port
            mux.channels[1].frontend = MonitorFrontend(vm)
        else:
            device.frontend = port
    for spec in s.monitors:
        device = chardev.make(spec.device)
        device.frontend = QmpFrontend(vm, pretty=spec.pretty) if spec.mode == "control" else MonitorFrontend(vm)
        devices.append(device)

    def serial(index: int, data: bytes) -> None:
        if index < len(ports):
            ports[index].output(data)

    vm.on_serial = serial
    return devices


@contextlib.contextmanager
def _pidfile(path: str | None):  # type: ignore[no-untyped-def]
    if path is None:
        yield
        return
    try:
        Path(path).write_text(f"{os.getpid()}\n")
    except OSError as error:
        raise ConfigError(f"-pidfile {path}: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def _write_stats(path: str, numbers: dict[str, object]) -> None:
    try:
        Path(path).write_text(json.dumps(numbers, indent=1) + "\n")
    except OSError as error:
        print(f"atoll run: -stats {path}: {error.strerror}", file=sys.stderr)
