"""Plain ELF kernels: loadable segments at their physical addresses, then the entry point.

ELF32 starts in flat 32-bit protected mode without paging; ELF64 in long mode with the first 4 GiB
mapped one to one. Source: System V ABI, chapters 4 and 5 (gABI 4.1).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from coordinator.boot import platform
from coordinator.contract import messages
from coordinator.contract.config import Machine
from coordinator.contract.errors import ConfigError
from coordinator.contract.segment import Segment
from coordinator.machine import Loader

ELF_CLASS32, ELF_CLASS64 = 1, 2
LITTLE_ENDIAN = 1
EM_386, EM_X86_64 = 3, 62
PT_LOAD = 1


@dataclass(frozen=True)
class Loadable:
    """``data`` at physical ``address``, then zeros up to ``size``."""

    address: int
    data: bytes
    size: int


@dataclass(frozen=True)
class Elf:
    """``bits`` is 32 or 64; ``entry`` is a physical address."""

    bits: int
    entry: int
    segments: tuple[Loadable, ...]

    @property
    def end(self) -> int:
        return max(part.address + part.size for part in self.segments)

    def check(self, where: platform.Memory) -> None:
        """ConfigError unless there is room for every segment."""
        for part in self.segments:
            where.check(part.address, part.size, "the kernel")


def recognise(image: bytes) -> bool:
    return image[:4] == b"\x7fELF"


def parse(image: bytes) -> Elf:
    """ConfigError on files that are cut short or made for another machine."""
    try:
        return _parse(image)
    except (struct.error, IndexError, OverflowError):
        raise ConfigError("-kernel: the ELF file is cut short") from None


def _parse(image: bytes) -> Elf:
    bits = {ELF_CLASS32: 32, ELF_CLASS64: 64}.get(image[4])
    machine = struct.unpack_from("<H", image, 18)[0]
    if bits is None or image[5] != LITTLE_ENDIAN or machine not in (EM_386, EM_X86_64):
        raise ConfigError("-kernel: the ELF file is not for x86")
    if bits == 32:
        entry, offset = struct.unpack_from("<II", image, 24)
        size, count = struct.unpack_from("<HH", image, 42)
    else:
        entry, offset = struct.unpack_from("<QQ", image, 24)
        size, count = struct.unpack_from("<HH", image, 54)
    segments = []
    virtual_entry = entry
    for i in range(count):
        at = offset + i * size
        if bits == 32:
            kind, file_at, virtual, physical, filesz, memsz = struct.unpack_from("<6I", image, at)
        else:
            kind, _, file_at, virtual, physical, filesz, memsz = struct.unpack_from("<IIQQQQQ", image, at)
        if kind != PT_LOAD or memsz == 0:
            continue
        if file_at + filesz > len(image) or filesz > memsz:
            raise ConfigError("-kernel: the ELF file is cut short")
        if virtual <= virtual_entry < virtual + memsz:
            entry = virtual_entry - virtual + physical
        segments.append(Loadable(physical, image[file_at : file_at + filesz], memsz))
    if not segments:
        raise ConfigError("-kernel: the ELF file has nothing to load")
    return Elf(bits, entry, tuple(segments))


def put(segment: Segment, elf: Elf) -> None:
    for part in elf.segments:
        platform.put(segment, part.address, part.data)
        platform.clear(segment, part.address + len(part.data), part.size - len(part.data))


def loader(machine: Machine, image: bytes) -> Loader:
    elf = parse(image)
    where = platform.memory(machine)
    elf.check(where)

    def load(segment: Segment) -> messages.LoadCpu:
        platform.install(segment, machine, where)
        put(segment, elf)
        if elf.bits == 32:
            return messages.LoadCpu(serial=0, mode="flat32", registers=platform.start_registers(elf.entry))
        cr3 = platform.identity_tables(segment)
        registers = platform.start_registers(elf.entry, cr3=cr3)
        return messages.LoadCpu(serial=0, mode="long", registers=registers)

    return load
