"""The guest's memory and registers as a file for gdb and crash: ``dump-guest-memory``.

Physical memory is RAM and ROM as the memory map has them, video memory left out. With ``paging`` the linear
addresses of all CPUs lead to it. What has never been written is a hole of the file.

Arguments, error texts and the order of notes are QEMU's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass, field
from typing import Any

from coordinator.contract._segment import lib
from coordinator.contract.errors import ConfigError, IslandError
from coordinator.contract.segment import Segment
from coordinator.elfcore import Load, head
from coordinator.machine import Vm
from coordinator.migrate import channel
from coordinator.paging import Mapping, Tables

FORMATS = ("elf",)
#: written at once, bytes
PIECE = 1 << 20


@dataclass(frozen=True)
class Range:
    """Guest-physical memory in a row; ``offset`` is in the segment."""

    gpa: int
    size: int
    offset: int


@dataclass
class Progress:
    """As query-dump tells it: ``status`` is QEMU's DumpStatus."""

    status: str = "none"
    completed: int = 0
    total: int = 0
    error: str | None = None
    #: nobody waits for it any more
    abandoned: bool = False

    def describe(self) -> dict[str, Any]:
        return {"status": self.status, "completed": self.completed, "total": self.total}


@dataclass(frozen=True)
class Wanted:
    """``begin`` and ``length``: of guest-physical memory, all where None."""

    paging: bool
    begin: int | None = None
    length: int | None = None


@dataclass
class Dumps:
    """Of one machine; one at a time."""

    vm: Vm
    progress: Progress = field(default_factory=Progress)

    def begin(
        self, paging: bool, protocol: str, begin: int | None, length: int | None, form: str
    ) -> tuple[Wanted, int]:
        """Check everything that can be checked, and open the file. ConfigError."""
        if self.progress.status == "active":
            raise IslandError("There is a dump in process, please wait.")
        if form not in FORMATS:
            raise ConfigError(f"format '{form}' is not supported; there is {', '.join(FORMATS)}")
        if begin is not None and length is None:
            raise ConfigError("Parameter 'length' is missing")
        if length is not None and begin is None:
            raise ConfigError("Parameter 'begin' is missing")
        if length is not None and length <= 0:
            raise ConfigError("Parameter 'length' expects a non-zero length")
        return Wanted(paging, begin, length), _open(protocol)

    async def run(self, wanted: Wanted, fd: int) -> None:
        """Write it, with the guest at rest; the file is closed. What is half written does not stay."""
        self.progress = Progress("active")
        vm, progress = self.vm, self.progress

        def abandon() -> None:
            progress.abandoned = True

        try:
            async with vm.paused():
                runs = vm.state == "running"
                if runs:
                    vm.event("STOP")
                try:
                    await channel.side_by_side([lambda: _write(vm, wanted, fd, progress)], abandon)
                finally:
                    if runs:
                        vm.event("RESUME")
        except (ConfigError, IslandError, OSError) as error:
            self.progress.status = "failed"
            text = f"dump: {error.strerror}" if isinstance(error, OSError) else str(error)
            self.progress.error = text
            _discard(fd)
            raise IslandError(text) from None
        finally:
            os.close(fd)
        self.progress.status = "completed"

    async def run_detached(self, wanted: Wanted, fd: int) -> None:
        """The same; how it went is told by an event."""
        with contextlib.suppress(IslandError):
            await self.run(wanted, fd)
        data: dict[str, Any] = {"result": self.progress.describe()}
        self.vm.event(
            "DUMP_COMPLETED", data if self.progress.error is None else data | {"error": self.progress.error}
        )


def _open(protocol: str) -> int:
    kind, _, where = protocol.partition(":")
    if kind == "file" and where:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOCTTY
            return os.open(where, flags, 0o600)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"Could not open '{where}': {reason}") from None
    if kind == "fd" and where.isascii() and where.isdigit():
        # what we have been started with is not closed on exec, all of our own is
        with contextlib.suppress(OSError, OverflowError):
            if int(where) > 2 and not fcntl.fcntl(int(where), fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                return fcntl.fcntl(int(where), fcntl.F_DUPFD_CLOEXEC, 3)
        raise ConfigError(f"fd {where} was not given to this process")
    raise ConfigError(f"Invalid parameter '{protocol}': say file:PATH or fd:NUMBER")


def _discard(fd: int) -> None:
    """A file that is not whole is of no use."""
    with contextlib.suppress(OSError):
        if stat.S_ISREG(os.fstat(fd).st_mode):
            os.ftruncate(fd, 0)
            os.unlink(os.readlink(f"/proc/self/fd/{fd}"))


def ranges(segment: Segment) -> list[Range]:
    """RAM and ROM by guest-physical address, neighbours as one."""
    found: list[Range] = []
    for region in segment.memory_map():
        video = segment.vram_offset <= region.read_offset < segment.rom_offset
        if not region.flags & lib.REGION_READ or video:
            continue
        last = found[-1] if found else None
        gpa, size, offset = int(region.gpa), int(region.size), int(region.read_offset)
        if last and (last.gpa + last.size, last.offset + last.size) == (gpa, offset):
            found[-1] = Range(last.gpa, last.size + size, last.offset)
        else:
            found.append(Range(gpa, size, offset))
    return found


def _cut(whole: list[Range], begin: int, end: int) -> list[Range]:
    cut = []
    for each in whole:
        low, high = max(each.gpa, begin), min(each.gpa + each.size, end)
        if low < high:
            cut.append(Range(low, high - low, each.offset + low - each.gpa))
    return cut


def _archs(vm: Vm) -> list[Any]:
    """Registers of all CPUs, those of the dead as they were."""
    assert vm.segment is not None
    losses = [vm.loss(index) for index in range(vm.machine.vcpus)]
    return [
        vm.segment.vcpu(index).arch if loss is None else loss.block.arch for index, loss in enumerate(losses)
    ]


def _mapped(mapping: Mapping, memory: list[Range]) -> list[Load]:
    """What of a mapping leads to memory that is in the file."""
    found, at = [], 0
    for each in memory:
        low = max(each.gpa, mapping.gpa)
        high = min(each.gpa + each.size, mapping.gpa + mapping.size)
        if low < high:
            linear = mapping.linear + low - mapping.gpa
            found.append(Load(at + low - each.gpa, linear, low, high - low))
        at += each.size
    return found


def _loads(segment: Segment, archs: list[Any], memory: list[Range], paging: bool) -> list[Load]:
    mappings: dict[Mapping, None] = {}
    for arch in archs if paging else ():
        tables = Tables(segment, arch)
        if tables.on:
            mappings.update(dict.fromkeys(tables.mappings()))
    if mappings:
        return [load for mapping in mappings for load in _mapped(mapping, memory)]
    loads, at = [], 0
    for each in memory:
        loads.append(Load(at, 0, each.gpa, each.size))
        at += each.size
    return loads


def _write(vm: Vm, wanted: Wanted, fd: int, progress: Progress) -> None:
    """In a thread."""
    segment = vm.segment
    assert segment is not None
    memory = ranges(segment)
    if wanted.begin is not None and wanted.length is not None:
        memory = _cut(memory, wanted.begin, wanted.begin + wanted.length)
        if not memory:
            raise ConfigError("there is no memory in this range")
    progress.total = sum(each.size for each in memory)
    archs = _archs(vm)
    first = head(archs, _loads(segment, archs, memory, wanted.paging))
    sparse = stat.S_ISREG(os.fstat(fd).st_mode)
    _put(fd, first)
    for each in memory:
        _copy(segment.fd, each, fd, sparse, progress)
        progress.completed += each.size
    if sparse:
        os.ftruncate(fd, os.lseek(fd, 0, os.SEEK_CUR))


def _put(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _copy(source: int, piece: Range, fd: int, sparse: bool, progress: Progress) -> None:
    """One range; its holes become holes, or zeroes where there can be none."""
    at, end = piece.offset, piece.offset + piece.size
    while at < end:
        data = min(_next_data(source, at, end), end)
        if data > at:
            _skip(fd, data - at, sparse)
        at = data
        stop = min(os.lseek(source, at, os.SEEK_HOLE), end) if at < end else end
        while at < stop:
            if progress.abandoned:
                raise IslandError("the machine has ended")
            bytes_ = os.pread(source, min(PIECE, stop - at), at)
            _put(fd, bytes_)
            at += len(bytes_)


def _next_data(source: int, at: int, end: int) -> int:
    try:
        return os.lseek(source, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # only a hole is left
            return end
        raise


def _skip(fd: int, size: int, sparse: bool) -> None:
    if sparse:
        os.lseek(fd, size, os.SEEK_CUR)
        return
    zeroes = memoryview(bytes(min(size, PIECE)))
    while size:
        _put(fd, zeroes[: min(size, PIECE)])
        size -= min(size, PIECE)
