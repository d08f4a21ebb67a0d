"""A whole machine to a file and back: ``migrate file:PATH`` and ``-incoming file:PATH``.

Written beside its final name and renamed when it is whole and on the disk, so a half one is never taken for a
state.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
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

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def created(path: Path) -> AsyncIterator[BinaryIO]:
    """A file that appears at ``path`` when all has gone well, and with nothing waited for after that;
    MigrationError where it cannot be written."""
    path = path.resolve()  # a link stays, and what it names is replaced
    half = path.with_name(path.name + ".part")
    try:
        file = _begun(path, half)
    except OSError as error:
        raise MigrationError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with file:
            yield file
            await _apart(lambda: os.fsync(file.fileno()))
            os.replace(half, path)
        _sync_folder(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            half.unlink()
        if isinstance(error, OSError):
            raise MigrationError(f"{path}: cannot be written: {error.strerror}") from None
        raise


def _begun(path: Path, half: Path) -> FileIO:
    """The half file, empty and ours: what a killed one left is used again, another's is not touched, and
    nothing else is followed or overwritten. OSError or MigrationError where it cannot be."""
    if path.exists() and not path.is_file():
        raise MigrationError(f"{path}: is there and is no regular file")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = FileIO(os.open(half, flags, 0o600), "w")
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise MigrationError(f"{half}: is there and is no half file of ours; remove it")
        if not os.path.samestat(found, os.lstat(half)):
            raise BlockingIOError
        os.ftruncate(file.fileno(), 0)
        os.fchmod(file.fileno(), 0o600)
    except BaseException as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise MigrationError(f"{path}: is being written by another migration") from None
        raise
    return file


def _sync_folder(path: Path) -> None:
    """The name is made durable; it counts already, since others can see it."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        log.warning("%s: its folder could not be synced: %s", path, error.strerror)


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
