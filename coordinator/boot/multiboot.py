"""Multiboot kernels.

Source: Multiboot Specification 0.6.96, sections 3.1 (header), 3.2 (machine state), 3.3
(information structure).
"""

from __future__ import annotations

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
FLAG_ADDRESSES = 1 << 16
INFO_MEMORY, INFO_COMMAND_LINE, INFO_MODULES, INFO_MMAP, INFO_LOADER_NAME = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
INFO_SIZE = 116


@dataclass(frozen=True)
class Module:
    data: bytes
    text: bytes


def _header(image: bytes) -> int | None:
    """Offset of the header: 4-byte aligned in the first 8 KiB, checksum right."""
    for at in range(0, min(len(image), SEARCH) - 12, 4):
        magic, flags, checksum = struct.unpack_from("<III", image, at)
        if magic == HEADER_MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            return at
    return None


def recognise(image: bytes) -> bool:
    return _header(image) is not None


def _modules(initrd: str | None) -> list[Module]:
    modules = []
    for word in initrd.split(",") if initrd else ():
        file = word.split(" ")[0]
        try:
            modules.append(Module(Path(file).read_bytes(), word.encode()))
        except OSError as error:
            raise ConfigError(f"-initrd {file}: {error.strerror}") from None
    return modules


def _kernel(image: bytes) -> elf.Elf:
    at = _header(image)
    assert at is not None
    (flags,) = struct.unpack_from("<I", image, at + 4)
    if not flags & FLAG_ADDRESSES:
        if not elf.recognise(image):
            raise ConfigError("-kernel: the multiboot kernel is neither ELF nor says its addresses")
        return elf.parse(image)
    header, load, load_end, bss_end, entry = struct.unpack_from("<5I", image, at + 12)
    start = at - (header - load)
    if start < 0 or load > header or (load_end and load_end < load):
        raise ConfigError("-kernel: the multiboot header's addresses do not fit the file")
    data = image[start : start + load_end - load] if load_end else image[start:]
    size = max(len(data), bss_end - load if bss_end else 0)
    return elf.Elf(32, entry, (elf.Loadable(load, data, size),))


def loader(machine: Machine, image: bytes, name: str, initrd: str | None, append: str) -> Loader:
    kernel = _kernel(image)
    modules = _modules(initrd)
    where = platform.memory(machine)
    command_line = f"{name} {append}".strip().encode()

    def load(segment: Segment) -> messages.LoadCpu:
        platform.install(segment, machine, where)
        elf.put(segment, kernel)
        _put_information(segment, where, kernel, modules, command_line)
        registers = platform.start_registers(where, kernel.entry, rax=BOOT_MAGIC, rbx=platform.BOOT_PARAMS)
        return messages.LoadCpu(serial=0, mode="flat32", registers=registers)

    return load


def _put_information(
    segment: Segment, where: platform.Memory, kernel: elf.Elf, modules: list[Module], command_line: bytes
) -> None:
    text_at = platform.COMMAND_LINE
    texts = command_line + b"\0"
    free = max(part.address + part.size for part in kernel.segments)
    entries = []
    for module in modules:
        free = (free + 0xFFF) & ~0xFFF
        platform.put(segment, free, module.data, "a multiboot module")
        entries.append(struct.pack("<IIII", free, free + len(module.data), text_at + len(texts), 0))
        texts += module.text + b"\0"
        free += len(module.data)
    loader_name = text_at + len(texts)
    texts += b"atoll\0"
    if len(texts) > platform.LONGEST_COMMAND_LINE:
        raise ConfigError("-append: the command lines of kernel and modules are too long")
    platform.put(segment, text_at, texts, "the command line")
    e820 = b"".join(struct.pack("<IQQI", 20, *entry) for entry in where.e820())
    mmap_at = platform.BOOT_PARAMS + 128
    modules_at = mmap_at + len(e820)
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MMAP | INFO_LOADER_NAME
    info = bytearray(INFO_SIZE)
    struct.pack_into(
        "<8I", info, 0, flags, platform.EBDA >> 10, (where.top - platform.MIB) >> 10, 0, text_at, len(entries), modules_at, 0
    )
    struct.pack_into("<II", info, 44, len(e820), mmap_at)
    struct.pack_into("<I", info, 64, loader_name)
    platform.put(segment, platform.BOOT_PARAMS, bytes(info).ljust(128, b"\0") + e820 + b"".join(entries), "multiboot information")
