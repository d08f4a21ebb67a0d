"""A whole machine to a file and back: ``migrate file:PATH`` and ``-incoming file:PATH``.

Written beside its final name and renamed when it is whole and on the disk, so a half one is never taken for a
state.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from coordinator.contract.errors import MigrationError
from coordinator.machine import Frozen, Vm
from coordinator.migrate import describe, ram, stream
from coordinator.migrate.capture import MachineState, TimeRecord, apply, capture
from coordinator.migrate.ram import Counts
from coordinator.migrate.stream import Part


@contextlib.contextmanager
def created(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at ``path`` when all has gone well; MigrationError where it cannot be written."""
    half = path.with_name(path.name + ".part")
    try:
        file = FileIO(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w")
    except OSError as error:
        raise MigrationError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
            os.fsync(file.fileno())
        os.replace(half, path)
    except BaseException as error:
        half.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise MigrationError(f"{path}: cannot be written: {error.strerror}") from None
        raise


def opened(path: Path) -> BinaryIO:
    """For reading, unbuffered; MigrationError where that cannot be."""
    try:
        return FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "r")
    except OSError as error:
        raise MigrationError(f"{path}: cannot be opened: {error.strerror}") from None


async def write(vm: Vm, frozen: Frozen, file: BinaryIO, where: str) -> Counts:
    """Description, state, memory of a frozen machine."""
    segment = vm.segment
    assert segment is not None
    await asyncio.to_thread(_put, file, stream.encode(Part.DESCRIPTION, await describe.describe(vm)))
    state = await capture(vm, frozen.runstate, frozen.stopped_at_ns)
    await asyncio.to_thread(_put, file, stream.encode(Part.STATE, state))
    await asyncio.to_thread(_put, file, stream.encode(Part.RAM, None))
    sender = ram.Sender(segment)
    await asyncio.to_thread(sender.run, file.fileno(), where)
    await asyncio.to_thread(_put, file, stream.encode(Part.END, None))
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
    theirs = await asyncio.to_thread(stream.read, file, Part.DESCRIPTION, describe.Description, where)
    if differences := describe.differences(theirs, await describe.describe(vm)):
        raise MigrationError(f"{where}: does not fit this machine: {'; '.join(differences)}")
    state = await asyncio.to_thread(stream.read, file, Part.STATE, MachineState, where)
    await asyncio.to_thread(stream.read, file, Part.RAM, type(None), where)
    segment.empty_memory()
    receiver = ram.Receiver(segment)
    await asyncio.to_thread(receiver.run, file.fileno(), where)
    await asyncio.to_thread(stream.read, file, Part.END, type(None), where)
    return state, await apply(vm, state)
