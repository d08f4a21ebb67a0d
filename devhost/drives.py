"""The IDE part of the machine: PIIX3's IDE function, two channels, four drives, their block devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coordinator.contract import messages
from coordinator.contract.config import Drive as DriveConfig
from coordinator.contract.config import Media
from coordinator.contract.errors import BlockError
from devhost.bus import Slot
from devhost.ide.ata import AtaDrive
from devhost.ide.atapi import AtapiDrive
from devhost.ide.channel import IdeChannel
from devhost.ide.pci_function import IDETIM, IDETIM_ENABLED, LEGACY, Piix3Ide
from devhost.ide.watch import name_of
from devhost.service import Service

if TYPE_CHECKING:
    from devhost.pc import Pc

BUS_MASTER_PORTS = 0xC000
COMMAND_IO_AND_MASTER = 0x5


class Drives:
    """``function`` is the PCI function; drives are reached by their id."""

    def __init__(self, service: Service, pc: Pc) -> None:
        self._service, self._pc, self._bus = service, pc, service.bus
        self.by_id: dict[str, AtaDrive | AtapiDrive] = {}
        self._slot_of: dict[str, Slot] = {}
        fitted: list[AtaDrive | AtapiDrive | None] = [None] * 4
        for config in pc.machine.drives:
            fitted[config.index] = self._make(config)
        self.channels: list[IdeChannel] = []
        self._slots: list[Slot] = []
        for number, (_, _, irq) in enumerate(LEGACY):
            pair = (fitted[2 * number], fitted[2 * number + 1])
            channel = IdeChannel(pc.irq.pin(irq), pc.dma, pair)
            self.channels.append(channel)
            self._slots.append(pc.plug(f"ide{number}", channel))
        for config in pc.machine.drives:
            self._slot_of[config.id] = self._slots[config.index // 2]
            self._connect(config.id)
        self.function = Piix3Ide(self._decoded, self._moved, self._granted)

    def _make(self, config: DriveConfig) -> AtaDrive | AtapiDrive:
        backend = self._service.open_block_device(config.id) if config.file is not None else None
        drive: AtaDrive | AtapiDrive
        if config.media is Media.CDROM:
            drive = AtapiDrive(
                backend, serial=config.serial, on_tray=lambda is_open: self._tray(config.id, is_open)
            )
        else:
            assert backend is not None, "a disk has an image"
            drive = AtaDrive(backend, serial=config.serial)
        drive.policy = config.policy
        self.by_id[config.id] = drive
        return drive

    def _connect(self, ident: str) -> None:
        """Completions go to the drive, and what they change at its channel is shown."""
        backend = self._service.backends.get(ident)
        if backend is not None:
            slot = self._slot_of[ident]
            drive = self.by_id[ident]

            def completed(cookie: int, errno: int) -> None:
                self._bus.fired(slot)
                drive.complete(cookie, errno)

            backend.completed = completed
            backend.settled = lambda: self._bus.publish(slot)

    def _tray(self, ident: str, is_open: bool) -> None:
        self._service.control.notify(messages.TrayMoved(drive=ident, open=is_open))

    # ---- PCI ---------------------------------------------------------------------------------------
    def _decoded(self, number: int, on: bool) -> None:
        command, control, _ = LEGACY[number]
        self._bus.move_ports(self._slots[number], command if on else None, "command")
        self._bus.move_ports(self._slots[number], control if on else None, "control")
        self._pc.ports_changed()

    def _moved(self, base: int | None) -> None:
        for number, slot in enumerate(self._slots):
            self._bus.move_ports(slot, None if base is None else base + 8 * number, "busmaster")
        self._pc.ports_changed()

    def _granted(self, granted: bool) -> None:
        for channel, slot in zip(self.channels, self._slots, strict=True):
            channel.grant_bus(granted)
            self._bus.publish(slot)

    def as_firmware_leaves_it(self) -> None:
        for channel in (0, 1):
            self.function.write(IDETIM + 2 * channel, 2, IDETIM_ENABLED)
        self.function.write(0x20, 4, BUS_MASTER_PORTS)
        self.function.write(0x04, 2, COMMAND_IO_AND_MASTER)

    # ---- media ---------------------------------------------------------------------------------------
    def channel_of(self, ident: str) -> str:
        """Name of the channel that a drive is at, empty for one that is not here."""
        slot = self._slot_of.get(ident)
        return slot.name if slot is not None else ""

    def _cd(self, ident: str) -> AtapiDrive:
        drive = self.by_id.get(ident)
        if not isinstance(drive, AtapiDrive):
            raise BlockError(f"drive {ident} is not a CD-ROM drive")
        return drive

    def open_tray(self, ident: str, force: bool) -> bool:
        return self._cd(ident).open_tray(force)

    def close_tray(self, ident: str) -> None:
        self._cd(ident).close_tray()

    def insert(self, config: DriveConfig) -> None:
        """A medium that blockd exports now, or none."""
        drive = self._cd(config.id)
        old = self._service.backends.get(config.id)
        backend = self._service.open_block_device(config.id) if config.file is not None else None
        if backend is None:
            self._service.backends.pop(config.id, None)
        drive.insert(backend)
        self._connect(config.id)
        if old is not None:
            old.close()

    def describe(self) -> list[dict[str, Any]]:
        """For query-block, the monitor and the migration stream."""
        result = []
        for ident, drive in self.by_id.items():
            entry: dict[str, Any] = {
                "id": ident,
                "phase": name_of(drive).value,
                "stream": drive.policy.stream.value,
            }
            if isinstance(drive, AtapiDrive):
                inserted = drive.backend is not None
                entry.update(tray_open=drive.tray_open, locked=drive.locked, inserted=inserted)
            result.append(entry)
        return result
