"""Removable media: tray and medium of a drive, across device host and block daemon."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from coordinator.contract import messages
from coordinator.contract.config import IMAGE_FORMATS, Drive, Media, export_of
from coordinator.contract.errors import ConfigError, IslandError
from coordinator.contract.nbd import absolute_name, is_network_name
from coordinator.machine import Vm


class NotFound(IslandError):
    """There is no such drive."""


def drive(vm: Vm, name: str) -> Drive:
    """The drive with this id; NotFound lists those there are."""
    for candidate in vm.machine.drives:
        if candidate.id == name:
            return candidate
    known = ", ".join(d.id for d in vm.machine.drives) or "none"
    raise NotFound(f"Device '{name}' not found (drives: {known})")


def _removable(vm: Vm, name: str) -> Drive:
    found = drive(vm, name)
    if found.media is not Media.CDROM:
        raise IslandError(f"Device '{name}' is not removable")
    if vm.media_held:
        raise IslandError(f"Device '{name}': media stay as they are while a migration is under way")
    return found


async def open_tray(vm: Vm, name: str, force: bool = False) -> None:
    """A tray the guest has locked stays shut unless forced; the guest is asked to open it."""
    _removable(vm, name)
    is_open = await vm.command(
        "devhost0", messages.OpenTray(serial=vm.next_serial(), drive=name, force=force)
    )
    if not is_open:
        raise IslandError(
            f"Device '{name}' is locked and force was not specified, wait for tray to open and try again"
        )


async def close_tray(vm: Vm, name: str) -> None:
    _removable(vm, name)
    await vm.command("devhost0", messages.CloseTray(serial=vm.next_serial(), drive=name))


async def _remove(vm: Vm, old: Drive) -> None:
    empty = msgspec.structs.replace(old, file=None)
    await vm.command("devhost0", messages.InsertMedium(serial=vm.next_serial(), drive=empty))
    if old.file is not None:
        await vm.command("blockd", messages.CloseExport(serial=vm.next_serial(), id=old.id))
    vm.replace_drive(empty)


async def _insert(vm: Vm, new: Drive) -> None:
    assert new.file is not None
    vm.allow(new)
    export = export_of(new)
    await vm.command("blockd", messages.OpenExport(serial=vm.next_serial(), export=export))
    await vm.command("devhost0", messages.InsertMedium(serial=vm.next_serial(), drive=new))
    vm.replace_drive(new)


async def eject(vm: Vm, name: str, force: bool = False) -> None:
    """Open the tray and take the medium out."""
    async with vm.media_lock:
        await open_tray(vm, name, force)
        await _remove(vm, _removable(vm, name))


async def change(
    vm: Vm, name: str, filename: str, image_format: str | None = None, force: bool = False
) -> None:
    """Open the tray, swap the medium, close it. Where the new one cannot be used, the old one comes back."""
    image_format = image_format or "raw"
    if image_format not in IMAGE_FORMATS:
        raise ConfigError(f"format {image_format} is not known; choose one of {', '.join(IMAGE_FORMATS)}")
    _removable(vm, name)
    path = absolute_name(filename)
    if not is_network_name(path):
        if not os.path.exists(path):
            raise ConfigError(f"Could not open '{filename}': No such file or directory")
        if not os.access(path, os.R_OK) or os.path.isdir(path):
            raise ConfigError(f"Could not open '{filename}': not a readable file")
    async with vm.media_lock:
        old = _removable(vm, name)
        await open_tray(vm, name, force)
        await _remove(vm, old)
        try:
            await _insert(vm, msgspec.structs.replace(old, file=path, format=image_format, read_only=True))
        except IslandError as error:
            if old.file is not None:
                await _insert(vm, old)
            raise ConfigError(f"Could not open '{filename}': {error}") from None
        finally:
            await close_tray(vm, name)


async def describe(vm: Vm) -> list[dict[str, Any]]:
    """One dict a drive, by the field names of QEMU's BlockInfo."""
    drives = {d["id"]: d for d in await vm.command("devhost0", messages.QueryDrives(serial=vm.next_serial()))}
    exports = {e["id"]: e for e in await vm.command("blockd", messages.QueryExports(serial=vm.next_serial()))}
    result = []
    for d in vm.machine.drives:
        state, export = drives.get(d.id, {}), exports.get(d.id)
        info: dict[str, Any] = {
            "device": d.id,
            "qdev": d.id,
            "type": "unknown",
            "locked": bool(state.get("locked", False)),
            "removable": d.media is Media.CDROM,
            "io-status": "ok",
        }
        if d.media is Media.CDROM:
            info["tray_open"] = bool(state.get("tray_open", False))
        if d.file is not None and export is not None:
            image = {"filename": d.file, "format": export["format"], "virtual-size": export["size"]}
            info["inserted"] = {
                "file": d.file, "drv": export["format"], "ro": d.read_only, "encrypted": False,
                "iops": 0, "iops_rd": 0, "iops_wr": 0, "bps": 0, "bps_rd": 0, "bps_wr": 0,
                "detect_zeroes": "off", "write_threshold": 0, "backing_file_depth": 0,
                "cache": {"writeback": True, "direct": False, "no-flush": False}, "image": image,
            }  # fmt: skip
        result.append(info)
    return result
