"""An ELF core file of a guest: headers and notes. The memory itself is dump.py's.

Sources: System V ABI (ELF-64: header, program headers, PN_XNUM), Linux elfcore.h (struct elf_prstatus of
x86-64), and the layout of the note "QEMU", by which crash(8) finds a kernel that has moved itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

ET_CORE, EM_X86_64 = 4, 62
PT_LOAD, PT_NOTE = 1, 4
NT_PRSTATUS = 1
#: more program headers than this are counted in a section header
PN_XNUM = 0xFFFF
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
IDENT = b"\x7fELF\x02\x01\x01" + bytes(9)
PAGE = 4096
#: struct elf_prstatus: pr_pid, pr_reg (struct user_regs_struct), the whole
_PID_AT, _REGS_AT, _PRSTATUS_SIZE = 32, 112, 336
_RAX, _RCX, _RDX, _RBX, _RSP, _RBP, _RSI, _RDI = range(8)
_ES, _CS, _SS, _DS, _FS, _GS = range(6)
#: version of the note "QEMU"
_QEMU_VERSION = 1


@dataclass(frozen=True)
class Load:
    """A PT_LOAD: ``offset`` is in the memory part of the file."""

    offset: int
    virtual: int
    physical: int
    size: int


def _note(name: bytes, kind: int, data: bytes) -> bytes:
    name += b"\0"
    return struct.pack("<III", len(name), len(data), kind) + _padded(name) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _prstatus(cpu: int, arch: Any) -> bytes:
    """gdb and crash call this a thread; its number is that of the CPU, from 1 on."""
    g, seg = arch.gpr, arch.seg
    regs = (
        g[15], g[14], g[13], g[12], g[_RBP], g[_RBX], g[11], g[10], g[9], g[8], g[_RAX], g[_RCX], g[_RDX],
        g[_RSI], g[_RDI], 0, arch.rip, seg[_CS].selector, arch.rflags, g[_RSP], seg[_SS].selector,
        seg[_FS].base, seg[_GS].base, seg[_DS].selector, seg[_ES].selector, seg[_FS].selector,
        seg[_GS].selector,
    )  # fmt: skip
    data = bytearray(_PRSTATUS_SIZE)
    struct.pack_into("<I", data, _PID_AT, cpu + 1)
    struct.pack_into(f"<{len(regs)}Q", data, _REGS_AT, *map(int, regs))
    return bytes(data)


def _qemu_state(arch: Any) -> bytes:
    g, seg = arch.gpr, arch.seg
    order = (_RAX, _RBX, _RCX, _RDX, _RSI, _RDI, _RSP, _RBP, *range(8, 16))
    words = [*(int(g[i]) for i in order), int(arch.rip), int(arch.rflags)]
    data = struct.pack(f"<{len(words)}Q", *words)
    order = (_CS, _DS, _ES, _FS, _GS, _SS)
    for each in (*(seg[i] for i in order), arch.ldtr, arch.tr, arch.gdtr, arch.idtr):
        data += struct.pack("<IIIIQ", each.selector, each.limit, int(each.attr) << 8, 0, each.base)
    data += struct.pack("<6Q", arch.cr0, 0, arch.cr2, arch.cr3, arch.cr4, arch.kernel_gs_base)
    return struct.pack("<II", _QEMU_VERSION, len(data) + 8) + data


def notes(archs: list[Any]) -> bytes:
    """Of all CPUs (``struct cpu_arch``), in order."""
    return b"".join(_note(b"CORE", NT_PRSTATUS, _prstatus(cpu, arch)) for cpu, arch in enumerate(archs)) + (
        b"".join(_note(b"QEMU", 0, _qemu_state(arch)) for arch in archs)
    )


def head(archs: list[Any], loads: list[Load]) -> bytes:
    """All that stands before the memory, which begins at its end, on a page."""
    text, count = notes(archs), len(loads) + 1
    many = count >= PN_XNUM
    sections_at = _EHDR.size + _PHDR.size * count
    notes_at = sections_at + (_SHDR.size if many else 0)
    memory_at = -(-(notes_at + len(text)) // PAGE) * PAGE
    header = _EHDR.pack(
        IDENT, ET_CORE, EM_X86_64, 1, 0, _EHDR.size, sections_at if many else 0, 0, _EHDR.size, _PHDR.size,
        PN_XNUM if many else count, _SHDR.size if many else 0, int(many), 0,
    )  # fmt: skip
    parts = [header, _PHDR.pack(PT_NOTE, 0, notes_at, 0, 0, len(text), len(text), 0)]
    parts += [
        _PHDR.pack(PT_LOAD, 0, memory_at + load.offset, load.virtual, load.physical, load.size, load.size, 0)
        for load in loads
    ]
    if many:
        parts.append(_SHDR.pack(0, 0, 0, 0, 0, 0, 0, count, 0, 0))
    return b"".join([*parts, text]).ljust(memory_at, b"\0")
