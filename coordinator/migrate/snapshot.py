"""Snapshots of a whole machine inside its qcow2 disks: memory, devices and all disks as one.

The state is the stream of file.py and lies in one of the disks (blockd/qcow2/vmstate.py); blockd takes,
applies and deletes the disks' snapshots, all or none (blockd/machine_snapshots.py).

Error texts that clients may look at are QEMU's (migration/savevm.c, block/snapshot.c).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from io import FileIO
from typing import Any, TypeVar

from coordinator.contract import messages as island
from coordinator.contract.config import Drive
from coordinator.contract.errors import AtollError, ConfigError, IslandError, MigrationError
from coordinator.contract.segment import Segment
from coordinator.machine import NEED_RESET, Frozen, Vm
from coordinator.migrate import channel, describe, file, ram, stream
from coordinator.migrate.capture import MachineState, apply, capture
from coordinator.migrate.disks import BLOCKD, written
from coordinator.migrate.stream import Part

#: a tag is as long as QEMU's at most, bytes
LONGEST_TAG = 255

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """One that a disk has: ``size`` of the machine's state, bytes, 0 for disks without; ``date_ns`` UNIX
    time, ``clock_ns`` guest time."""

    id: str
    name: str
    size: int
    date_ns: int
    clock_ns: int


@dataclass(frozen=True)
class Disk:
    """A disk that the machine writes. ``refusal``: why it can have no snapshot with the others."""

    id: str
    refusal: str | None
    snapshots: tuple[Snapshot, ...]

    def named(self, tag: str) -> Snapshot | None:
        return next((snapshot for snapshot in self.snapshots if snapshot.name == tag), None)


# ---- what there is --------------------------------------------------------------------------------------
async def disks(vm: Vm) -> list[Disk]:
    """All disks that the machine writes."""
    drives = written(vm)
    query = island.QuerySnapshots(serial=vm.next_serial(), images=tuple(drive.id for drive in drives))
    rows = {row["id"]: row for row in await vm.command(BLOCKD, query)} if drives else {}
    return [_disk(drive, rows[drive.id]) for drive in drives]


def _disk(drive: Drive, row: dict[str, Any]) -> Disk:
    refusal = row["refusal"]
    if drive.snapshot:
        refusal = f"{drive.file}: what is written to it is thrown away (-snapshot)"
    return Disk(drive.id, refusal, tuple(Snapshot(**each) for each in row["snapshots"]))


def _check_tag(tag: str) -> None:
    try:
        length = len(tag.encode())
    except UnicodeEncodeError:
        raise ConfigError("the snapshot's name is no text") from None
    if not 1 <= length <= LONGEST_TAG:
        raise ConfigError(f"the name of a snapshot has 1 to {LONGEST_TAG} bytes, this one {length}")
    if not tag.isprintable():
        raise ConfigError("the name of a snapshot has no control characters")


async def _chosen(vm: Vm, devices: list[str] | None) -> list[Disk]:
    """The disks named, which must be all that the machine writes. ConfigError names what is wrong."""
    found = {disk.id: disk for disk in await disks(vm)}
    if devices is None:
        if not found:
            raise ConfigError("No block device can accept snapshots")
        return list(found.values())
    if not devices:
        raise ConfigError("At least one device is required for snapshot")
    known = {drive.id for drive in vm.machine.drives}
    for name in devices:
        if name not in known:
            raise ConfigError(f"No block device node '{name}'")
        if name not in found:
            raise ConfigError(f"Device '{name}' is not written by this machine, so it has no snapshots")
    for name in found:
        if name not in devices:
            raise ConfigError(f"Device '{name}' is writable and not among the devices; it must go along")
    return list(found.values())


def _all_can(chosen: list[Disk]) -> None:
    for disk in chosen:
        if disk.refusal is not None:
            text = f"Device '{disk.id}' is writable but does not support snapshots"
            raise ConfigError(f"{text}: {disk.refusal}")


def _state_disk(chosen: list[Disk], vmstate: str | None) -> Disk:
    """Where the machine's state goes: the first unless said."""
    if vmstate is None:
        return chosen[0]
    for disk in chosen:
        if disk.id == vmstate:
            return disk
    raise ConfigError(f"vmstate block device '{vmstate}' does not exist")


def _still(vm: Vm) -> None:
    if vm.media_held:
        raise ConfigError("There's a migration process in progress")


# ---- saving ---------------------------------------------------------------------------------------------
async def save(
    vm: Vm, tag: str, vmstate: str | None = None, devices: list[str] | None = None, replace: bool = False
) -> None:
    """Keep the machine under a name; it goes on as before, also when this fails. ``replace``: one of that
    name goes in the moment in which the new one is there."""
    _check_tag(tag)
    async with vm.media_lock:
        _still(vm)
        chosen = await _chosen(vm, devices)
        _all_can(chosen)
        place = _state_disk(chosen, vmstate)
        if not replace and any(disk.named(tag) for disk in chosen):
            raise ConfigError(f"Snapshot '{tag}' already exists in one or more devices")
        async with _held(vm) as frozen:
            if frozen.runstate in NEED_RESET:
                raise ConfigError("there is no guest to save; the machine needs a reset")
            await _save(vm, frozen, tag, place.id, [disk.id for disk in chosen], replace)


async def _save(
    vm: Vm, frozen: Frozen, tag: str, place: str, images: list[str], replace: bool
) -> None:
    segment = _segment(vm)
    description = await describe.describe(vm)
    state = await capture(vm, frozen.runstate, frozen.stopped_at_ns)
    try:
        path = _path(vm)
        command = island.StoreVmState(serial=vm.next_serial(), id=place, path=path)
        async with _blockd(vm, command) as (sock, answer):
            try:
                with FileIO(sock.fileno(), "w", closefd=False) as target:
                    await file.put_whole(vm, description, state, target, f"drive {place}")
                sock.shutdown(socket.SHUT_WR)
            except (AtollError, OSError):
                channel.cut([sock])
                await answer  # blockd knows why, if it was blockd
                raise
            await answer
        await vm.command(
            BLOCKD,
            island.CreateSnapshots(
                serial=vm.next_serial(),
                tag=tag,
                images=tuple(images),
                vmstate=place,
                date_ns=frozen.stopped_at_ns,
                clock_ns=int(segment.header.time.guest_ns),
                replace=replace,
            ),
        )
    except BaseException:
        if not vm.ending.done():
            with contextlib.suppress(IslandError):
                await vm.command(BLOCKD, island.DropVmState(serial=vm.next_serial()))
        raise


# ---- loading --------------------------------------------------------------------------------------------
async def load(vm: Vm, tag: str, vmstate: str | None = None, devices: list[str] | None = None) -> None:
    """Make the machine what it was, and let it go on if it runs now. Until memory is replaced a failure
    leaves it as it was; after that there is no machine that could run, and its state is internal-error. A
    machine without one of its vCPUs, which has died, gets another, and is paused."""
    _check_tag(tag)
    async with vm.media_lock:
        _still(vm)
        chosen = await _chosen(vm, devices)
        _all_can(chosen)
        place = _found(chosen, tag, vmstate)
        async with _held(vm) as frozen:
            await _load(vm, frozen, tag, place.id, [disk.id for disk in chosen])


def _found(chosen: list[Disk], tag: str, vmstate: str | None) -> Disk:
    """The disk with the machine's state, where all have a snapshot of that name, made together."""
    found = {disk.id: snapshot for disk in chosen if (snapshot := disk.named(tag)) is not None}
    if missing := [disk.id for disk in chosen if disk.id not in found]:
        raise ConfigError(f"Snapshot '{tag}' does not exist in one or more devices ({', '.join(missing)})")
    if vmstate is None:
        place = next((disk for disk in chosen if found[disk.id].size), chosen[0])
    else:
        place = _state_disk(chosen, vmstate)
    if not found[place.id].size:
        text = f"Device '{place.id}': snapshot '{tag}' has no machine state"
        raise ConfigError(f"{text}; 'atoll img snapshot -a' applies it offline")
    for disk in chosen:
        if found[disk.id].date_ns != found[place.id].date_ns:
            raise ConfigError(
                f"Device '{disk.id}': its snapshot '{tag}' was not made together with that of '{place.id}'"
            )
    return place


async def _load(vm: Vm, frozen: Frozen, tag: str, place: str, images: list[str]) -> None:
    segment = _segment(vm)
    where = f"snapshot {tag}"
    dead = any(vm.loss(index) for index in range(vm.machine.vcpus))
    await vm.revive()
    here = await describe.describe(vm)
    before = None if dead else await _Before.of(vm, frozen)
    command = island.FetchVmState(serial=vm.next_serial(), id=place, tag=tag, path=_path(vm))
    async with _blockd(vm, command) as (sock, _):
        with FileIO(sock.fileno(), "r", closefd=False) as source:
            state = await _in_thread(lambda: _head(source, here, where), sock)
            try:
                await vm.blank()
                await apply(vm, state)
                await vm.command(
                    BLOCKD,
                    island.ApplySnapshots(serial=vm.next_serial(), tag=tag, images=tuple(images)),
                )
            except AtollError:
                if before is not None:
                    await before.again(vm)
                raise
            after, frozen.after = frozen.after, "internal-error"
            try:
                await _in_thread(lambda: _memory(segment, source, where), sock)
            except MigrationError as error:
                raise MigrationError(f"{error}; its disks are at snapshot '{tag}', memory is lost") from None
            vm.crew.losses.forget()
            frozen.after = after if frozen.runstate == "running" else "paused"


@dataclass(frozen=True)
class _Before:
    """What loading replaces before memory: to be put back when it cannot go on."""

    state: MachineState
    #: reset writes there
    vram: bytes

    @classmethod
    async def of(cls, vm: Vm, frozen: Frozen) -> _Before:
        segment = _segment(vm)
        state = await capture(vm, frozen.runstate, frozen.stopped_at_ns)
        return cls(state, os.pread(segment.fd, int(segment.header.vram_size), segment.vram_offset))

    async def again(self, vm: Vm) -> None:
        segment = _segment(vm)
        await vm.blank()
        os.pwrite(segment.fd, self.vram, segment.vram_offset)
        await apply(vm, self.state)


def _head(source: FileIO, here: describe.Description, where: str) -> MachineState:
    """In a thread: the state; MigrationError names every difference of the machines."""
    theirs = stream.read(source, Part.DESCRIPTION, describe.Description, where)
    if differences := describe.differences(theirs, here):
        raise MigrationError(f"{where}: does not fit this machine: {'; '.join(differences)}")
    state = stream.read(source, Part.STATE, MachineState, where)
    stream.read(source, Part.RAM, type(None), where)
    return state


def _memory(segment: Segment, source: FileIO, where: str) -> None:
    """In a thread: memory, to the end of the stream."""
    segment.empty_memory()
    ram.Receiver(segment).run(source.fileno(), where)
    stream.read(source, Part.END, type(None), where)


# ---- deleting -------------------------------------------------------------------------------------------
async def delete(vm: Vm, tag: str, devices: list[str] | None = None) -> None:
    """Forget the snapshots of that name; those that have none do not mind."""
    async with vm.media_lock:
        _still(vm)
        chosen = await _chosen(vm, devices)
        having = tuple(disk.id for disk in chosen if disk.named(tag) is not None)
        _all_can([disk for disk in chosen if disk.id in having])
        command = island.DeleteSnapshots(serial=vm.next_serial(), tag=tag, images=having)
        await vm.command(BLOCKD, command)


# ---- the way to blockd ----------------------------------------------------------------------------------
def _segment(vm: Vm) -> Segment:
    assert vm.segment is not None
    return vm.segment


def _path(vm: Vm) -> str:
    """Where blockd finds us; one snapshot at a time."""
    return str(vm.folder / "state")


@contextlib.asynccontextmanager
async def _held(vm: Vm) -> AsyncIterator[Frozen]:
    """The guest stands, and listeners are told."""
    runs = False
    try:
        async with vm.frozen() as frozen:
            runs = frozen.runstate == "running"
            if runs:
                vm.event("STOP")
            yield frozen
    finally:
        if runs and vm.state == "running":
            vm.event("RESUME")


@contextlib.asynccontextmanager
async def _blockd(
    vm: Vm, command: island.StoreVmState | island.FetchVmState
) -> AsyncIterator[tuple[socket.socket, asyncio.Future[Any]]]:
    """The connection that blockd makes for a command, and its answer; IslandError where it does not."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(command.path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(command.path)
        try:
            listener.listen()
            listener.setblocking(False)
            answer = asyncio.ensure_future(vm.command(BLOCKD, command))
            came = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(listener))
            try:
                await asyncio.wait({answer, came}, return_when=asyncio.FIRST_COMPLETED)
                if not came.done():
                    answer.result()
                sock, _ = await came
            except BaseException:
                came.cancel()
                answer.cancel()
                await asyncio.gather(came, answer, return_exceptions=True)
                raise
        finally:
            os.unlink(command.path)
    with sock:
        sock.setblocking(True)
        try:
            yield sock, answer
        finally:
            channel.cut([sock])
            await asyncio.gather(answer, return_exceptions=True)


async def _in_thread(job: Callable[[], T], sock: socket.socket) -> T:
    """What a job that reads from blockd gives; it has ended when this has."""
    found: list[T] = []
    await channel.side_by_side([lambda: found.append(job())], lambda: channel.cut([sock]))
    return found[0]


# ---- telling --------------------------------------------------------------------------------------------
def new_tag() -> str:
    """As QEMU names a snapshot that nobody has named."""
    return time.strftime("vm-%Y%m%d%H%M%S")
