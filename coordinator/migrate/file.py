"""A whole machine to a file and back: ``migrate file:PATH`` and ``-incoming file:PATH``.

Written beside its final name and renamed when it is whole and on the disk, so a half one is never taken for a
state.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from coordinator.contract.errors import MigrationError
from coordinator.machine import Frozen, Vm
from coordinator.migrate import channel, describe, ram, stream
from coordinator.migrate.capture import MachineState, TimeRecord, apply, capture
from coordinator.migrate.ram import Counts
from coordinator.migrate.stream import Part


@contextlib.asynccontextmanager
async def created(path: Path) -> AsyncIterator[BinaryIO]:
    """A file that appears at ``path`` when all has gone well, and with nothing waited for after that;
    MigrationError where it cannot be written."""
    half = path.with_name(path.name + ".part")
    try:
        file = FileIO(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w")
    except OSError as error:
        raise MigrationError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
            await _apart(lambda: os.fsync(file.fileno()))
        os.replace(half, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            half.unlink()
        if isinstance(error, OSError):
            raise MigrationError(f"{path}: cannot be written: {error.strerror}") from None
        raise


async def _apart(job: Callable[[], None], abandon: Callable[[], None] = lambda: None) -> None:
    """In a thread, which has ended when this has, also by a cancel: the file is closed next."""
    await channel.side_by_side([job], abandon)


def opened(path: Path) -> BinaryIO:
    """For reading, unbuffered; MigrationError where that cannot be."""
    try:
        return FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "r")
    except OSError as error:
        raise MigrationError(f"{path}: cannot be opened: {error.strerror}") from None


async def write(vm: Vm, frozen: Frozen, file: BinaryIO, where: str) -> Counts:
    """Description, state, memory of a frozen machine."""
    description = await describe.describe(vm)
    state = await capture(vm, frozen.runstate, frozen.stopped_at_ns)
    return await put_whole(vm, description, state, file, where)


async def put_whole(
    vm: Vm, description: describe.Description, state: MachineState, file: BinaryIO, where: str
) -> Counts:
    """The same of a machine that has been described."""
    assert vm.segment is not None
    sender = ram.Sender(vm.segment)

    def put() -> None:
        _put(file, stream.encode(Part.DESCRIPTION, description))
        _put(file, stream.encode(Part.STATE, state))
        _put(file, stream.encode(Part.RAM, None))
        sender.run(file.fileno(), where)
        _put(file, stream.encode(Part.END, None))

    def abandon() -> None:
        sender.cancelled = True

    await _apart(put, abandon)
    return sender.counts


def _put(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) or 0 :]


async def read(vm: Vm, file: BinaryIO, where: str) -> tuple[MachineState, TimeRecord]:
    """Put what ``write`` made into a machine that has not run. MigrationError names every difference, or what
    is wrong."""
    segment = vm.segment
    assert segment is not None
    here = await describe.describe(vm)
    found: list[MachineState] = []

    def get() -> None:
        theirs = stream.read(file, Part.DESCRIPTION, describe.Description, where)
        if differences := describe.differences(theirs, here):
            raise MigrationError(f"{where}: does not fit this machine: {'; '.join(differences)}")
        state = stream.read(file, Part.STATE, MachineState, where)
        stream.read(file, Part.RAM, type(None), where)
        segment.empty_memory()
        ram.Receiver(segment).run(file.fileno(), where)
        stream.read(file, Part.END, type(None), where)
        if file.read(1):
            raise MigrationError(f"{where}: goes on behind its end")
        found.append(state)

    await _apart(get)
    return found[0], await apply(vm, found[0])
