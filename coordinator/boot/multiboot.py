"""Multiboot kernels.

Source: Multiboot Specification 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3
(information structure).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from coordinator.boot import elf, platform
from coordinator.contract import messages
from coordinator.contract.config import Machine
from coordinator.contract.errors import ConfigError
from coordinator.contract.segment import Segment
from coordinator.machine import Loader

HEADER_MAGIC, BOOT_MAGIC = 0x1BADB002, 0x2BADB002
SEARCH = 8192
#: what the header may ask for: modules on pages, the memory map; a video mode is a wish
FLAGS_UNKNOWN = 0xFFF8
FLAG_ADDRESSES = 1 << 16
INFO_MEMORY, INFO_COMMAND_LINE, INFO_MODULES, INFO_MMAP, INFO_LOADER_NAME = (
    1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9,
)  # fmt: skip
#: the information structure, then memory map and modules
INFO_SIZE, INFO_ROOM = 128, platform.PAGE_TABLES - platform.BOOT_PARAMS


@dataclass(frozen=True)
class Module:
    data: bytes
    text: bytes


def _header(image: bytes) -> int | None:
    """Offset of the header: 4-byte aligned in the first 8 KiB, checksum right."""
    for at in range(0, min(len(image), SEARCH) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", image, at)
        if magic == HEADER_MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            return at
    return None


def recognise(image: bytes) -> bool:
    return _header(image) is not None


def _modules(initrd: str | None) -> list[Module]:
    """``-initrd "file words,file words"``, as QEMU has it."""
    modules = []
    for word in initrd.split(",") if initrd else ():
        file = word.split(" ")[0]
        try:
            modules.append(Module(Path(file).read_bytes(), os.fsencode(word)))
        except OSError as error:
            raise ConfigError(f"-initrd {file}: {error.strerror}") from None
    return modules


def parse(image: bytes) -> elf.Elf:
    """ConfigError on headers that do not fit the file or ask for what there is not."""
    at = _header(image)
    assert at is not None  # recognised
    try:
        return _parse(image, at)
    except struct.error:
        raise ConfigError("-kernel: the multiboot header is cut short") from None


def _parse(image: bytes, at: int) -> elf.Elf:
    (flags,) = struct.unpack_from("<I", image, at + 4)
    if flags & FLAGS_UNKNOWN:
        raise ConfigError(f"-kernel: the multiboot kernel asks for unknown features, flags {flags:#x}")
    if not flags & FLAG_ADDRESSES:
        if not elf.recognise(image):
            raise ConfigError("-kernel: the multiboot kernel is neither ELF nor says its addresses")
        kernel = elf.parse(image)
        return elf.Elf(32, kernel.entry, kernel.segments)
    header, load, load_end, bss_end, entry = struct.unpack_from("<5I", image, at + 12)
    start = at - (header - load)
    if start < 0 or load > header or (load_end and not load < load_end <= load + len(image) - start):
        raise ConfigError("-kernel: the multiboot header's addresses do not fit the file")
    data = image[start : start + load_end - load] if load_end else image[start:]
    size = max(len(data), bss_end - load if bss_end else 0)
    return elf.Elf(32, entry, (elf.Loadable(load, data, size),))


@dataclass(frozen=True)
class Information:
    """The information structure at BOOT_PARAMS, strings at COMMAND_LINE, modules at their addresses."""

    structure: bytes
    texts: bytes
    modules: tuple[tuple[int, bytes], ...]


def information(
    where: platform.Memory, kernel: elf.Elf, modules: list[Module], command_line: bytes
) -> Information:
    """ConfigError where modules or command lines do not fit."""
    text_at = platform.COMMAND_LINE
    texts = command_line + b"\0"
    free = max(kernel.end, platform.MIB)
    entries, places = b"", []
    for module in modules:
        free = (free + 0xFFF) & ~0xFFF
        where.check(free, len(module.data), "a multiboot module")
        entries += struct.pack("<IIII", free, free + len(module.data), text_at + len(texts), 0)
        texts += module.text + b"\0"
        places.append((free, module.data))
        free += len(module.data)
    loader_name = text_at + len(texts)
    texts += b"atoll\0"
    if len(texts) > platform.LONGEST_COMMAND_LINE:
        raise ConfigError("-append: the command lines of kernel and modules are too long")
    e820 = b"".join(struct.pack("<IQQI", 20, *entry) for entry in where.e820())
    if INFO_SIZE + len(e820) + len(entries) > INFO_ROOM:
        raise ConfigError(f"-initrd: {len(modules)} multiboot modules are too many")
    mmap_at = platform.BOOT_PARAMS + INFO_SIZE
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MMAP | INFO_LOADER_NAME
    info = bytearray(INFO_SIZE)
    low, high = platform.EBDA >> 10, (where.top - platform.MIB) >> 10
    struct.pack_into("<8I", info, 0, flags, low, high, 0, text_at, len(modules), mmap_at + len(e820), 0)
    struct.pack_into("<II", info, 44, len(e820), mmap_at)
    struct.pack_into("<I", info, 64, loader_name)
    return Information(bytes(info) + e820 + entries, texts, tuple(places))


def loader(machine: Machine, image: bytes, name: str, initrd: str | None, append: str) -> Loader:
    kernel = parse(image)
    where = platform.memory(machine)
    kernel.check(where)
    info = information(where, kernel, _modules(initrd), os.fsencode(f"{name} {append}".strip()))

    def load(segment: Segment) -> messages.LoadCpu:
        platform.install(segment, machine, where)
        elf.put(segment, kernel)
        platform.put(segment, platform.BOOT_PARAMS, info.structure)
        platform.put(segment, platform.COMMAND_LINE, info.texts)
        for place, data in info.modules:
            platform.put(segment, place, data)
        registers = platform.start_registers(kernel.entry, rax=BOOT_MAGIC, rbx=platform.BOOT_PARAMS)
        return messages.LoadCpu(serial=0, mode="flat32", registers=registers)

    return load
