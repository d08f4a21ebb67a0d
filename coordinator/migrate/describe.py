"""What a machine is, as far as a stream must fit it: compared before a byte of guest memory moves.

Media are known by drive, size and content, never by path.
"""

from __future__ import annotations

import hashlib
import importlib.metadata

import msgspec

from coordinator.contract import messages
from coordinator.contract.config import Drive, Machine
from coordinator.machine import Vm


class Medium(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in a drive: ``size`` in bytes, ``content`` a digest of samples (blockd/identity.py); of a disk
    that the machine writes, which changes, ``content`` is empty and the lease says whether both sides mean
    the same."""

    size: int
    content: str
    writable: bool


class DriveDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A drive; ``medium`` is None while it is empty."""

    id: str
    index: int
    media: str
    serial: str
    medium: Medium | None


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``machine``: what the command line made it, by QEMU's names; ``features``: CPUID words, see
    vcpu/state.py; ``rom``: digest of firmware and option ROMs; ``devices``: the names of all devices, host by
    host."""

    name: str
    product: str
    machine: dict[str, str | int | bool]
    features: dict[str, int]
    tsc_khz: int
    ram: int
    vram: int
    rom: str
    drives: tuple[DriveDescription, ...]


#: fields of the machine that both sides must have alike
_COMPARED = ("vcpus", "serials", "vga", "uuid")


def _machine(machine: Machine) -> dict[str, str | int | bool]:
    result: dict[str, str | int | bool] = {name: getattr(machine, name) for name in _COMPARED}
    result["firmware"] = not machine.boot.direct
    result["rtc-base"] = machine.rtc.base
    exit_port = machine.debug_exit
    result["debug-exit"] = f"{exit_port.iobase:#x}+{exit_port.iosize}" if exit_port else "none"
    return result


async def _drive(vm: Vm, drive: Drive) -> DriveDescription:
    medium = None
    if drive.file is not None:
        command = messages.IdentifyExport(serial=vm.next_serial(), id=drive.id)
        medium = msgspec.convert(await vm.command("blockd", command), Medium)
    return DriveDescription(drive.id, drive.index, drive.media.value, drive.serial, medium)


async def describe(vm: Vm) -> Description:
    """Of a machine whose islands are all there."""
    segment = vm.segment
    assert segment is not None
    features = await vm.command("vcpu0", messages.DescribeCpu(serial=vm.next_serial()))
    return Description(
        name=vm.machine.name,
        product=f"Atoll {importlib.metadata.version('atoll')}",
        machine=_machine(vm.machine),
        features=features,
        tsc_khz=int(segment.header.time.tsc_khz),
        ram=segment.ram_size,
        vram=int(segment.header.vram_size),
        rom=hashlib.sha256(segment.rom.data).hexdigest(),
        drives=tuple([await _drive(vm, drive) for drive in vm.machine.drives]),
    )


def differences(source: Description, target: Description) -> list[str]:
    """Every way in which ``target`` is not what ``source`` was, one line each; empty where the stream fits.
    """
    found: list[str] = []
    for name in sorted(source.machine.keys() | target.machine.keys()):
        _compare(found, name, source.machine.get(name, "unknown"), target.machine.get(name, "unknown"))
    for name in sorted(source.features.keys() | target.features.keys()):
        here, there = target.features.get(name, 0), source.features.get(name, 0)
        if here != there:
            found.append(f"CPU feature word {name}: source {there:#x}, target {here:#x}")
    _compare(found, "TSC frequency (kHz)", source.tsc_khz, target.tsc_khz)
    _compare(found, "memory (bytes)", source.ram, target.ram)
    _compare(found, "video memory (bytes)", source.vram, target.vram)
    if source.rom != target.rom:
        found.append("firmware or option ROMs: their contents differ")
    theirs, ours = ({drive.id: drive for drive in side.drives} for side in (source, target))
    for ident in sorted(theirs.keys() | ours.keys()):
        _compare_drives(found, ident, theirs.get(ident), ours.get(ident))
    return found


def _compare(found: list[str], what: str, source: object, target: object) -> None:
    if source != target:
        found.append(f"{what}: source {source}, target {target}")


def _compare_drives(
    found: list[str], ident: str, source: DriveDescription | None, target: DriveDescription | None
) -> None:
    if source is None or target is None:
        found.append(f"drive {ident}: only the {'target' if source is None else 'source'} has it")
        return
    for name in ("index", "media", "serial"):
        _compare(found, f"drive {ident}: {name}", getattr(source, name), getattr(target, name))
    theirs, ours = source.medium, target.medium
    if theirs is None or ours is None:
        if theirs is not ours:
            found.append(f"drive {ident}: the {'target' if theirs is None else 'source'} alone has a medium")
        return
    _compare(found, f"drive {ident}: size (bytes)", theirs.size, ours.size)
    _compare(found, f"drive {ident}: writable", theirs.writable, ours.writable)
    if theirs.size == ours.size and theirs.content != ours.content:
        found.append(f"drive {ident}: another medium (the contents differ)")
