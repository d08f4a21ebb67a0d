"""A bare 64-bit machine for programs without devices: code in, registers in, run until HLT, registers out.

Its memory is identity-mapped by 2 MiB pages, CPL 0; interrupts off. For the engine's own tests, the
differential tests and for measuring. compile_c() makes a freestanding binary whose
`long entry(long a, long b)` is called.
"""

from __future__ import annotations

import hashlib
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from coordinator.contract.segment import Segment
from tests.vcpu.guest import REGISTERS, Region
from vcpu._core import ffi, lib

PAGE_TABLES = 0x1000
GDT = 0x8000
STACK = 0x80000
CODE = 0x100000
UNLIMITED = 1 << 40

CFLAGS = [
    "-O2",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-fno-pic",
    "-fno-pie",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables",
    "-mno-red-zone",
]
LINKER_SCRIPT = f"""SECTIONS {{ . = {CODE:#x}; .text : {{ *(.start) *(.text*) }} .rodata : {{ *(.rodata*) }}
 .data : {{ *(.data*) }}
 .bss : {{ *(.bss*) *(COMMON) BYTE(0) }} /DISCARD/ : {{ *(.note*) *(.comment*) *(.eh_frame*) }} }}"""
START = '__asm__(".section .start,\\"ax\\"\\n call entry\\n hlt\\n .text\\n");\n'

_compiled: dict[str, bytes] = {}


def compile_c(source: str, *flags: str) -> bytes:
    """Flat binary for CODE; entry() is called with rdi, rsi and its result is in rax at the HLT."""
    key = hashlib.sha256(repr((source, flags)).encode()).hexdigest()
    if key not in _compiled:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder)
            (base / "a.c").write_text(START + source)
            (base / "a.ld").write_text(LINKER_SCRIPT)
            subprocess.run(
                [
                    "gcc",
                    *CFLAGS,
                    *flags,
                    "-Wl,-T,a.ld,--build-id=none,--no-warn-rwx-segments",
                    "a.c",
                    "-o",
                    "a.elf",
                ],
                cwd=base,
                check=True,
            )
            subprocess.run(["objcopy", "-O", "binary", "a.elf", "a.bin"], cwd=base, check=True)
            _compiled[key] = (base / "a.bin").read_bytes()
    return _compiled[key]


class Flat:
    """One vCPU of a machine with `ram` bytes (at most 1 GiB)."""

    def __init__(
        self, ram: int = 16 << 20, vcpus: int = 1, segment: Segment | None = None, index: int = 0
    ) -> None:
        """With `segment`: another vCPU of a machine that exists, its memory left as it is."""
        if segment is None:
            self.segment = Segment.create(vcpus=vcpus, ram=ram)
            at = self.segment.guest_offset
            self.segment.publish_map([Region(0, ram, 3, at, at)])
            self.segment.start_time()
        else:
            self.segment = segment
        self.cpu = lib.core_create(self.segment.fd, index, ffi.NULL)
        assert self.cpu != ffi.NULL, ffi.string(lib.core_error()).decode()
        self.block = lib.core_block(self.cpu)
        self.arch: Any = self.block.arch
        self.stack = STACK + index * 0x1000
        if segment is None:
            self.clear()
        else:
            self.reset()

    def clear(self) -> None:
        """Empty memory with page tables in it, and reset()."""
        self.write(0, bytes(self.segment.ram_size))
        pages = [i << 21 | 0x87 for i in range(self.segment.ram_size >> 21)]
        entries = [PAGE_TABLES + 0x1000 | 7, *[0] * 511, PAGE_TABLES + 0x2000 | 7, *[0] * 511, *pages]
        self.write(PAGE_TABLES, struct.pack(f"<{len(entries)}Q", *entries))
        self.reset()

    def close(self) -> None:
        lib.core_destroy(self.cpu)

    def write(self, gpa: int, data: bytes) -> None:
        self.segment.dma_write(gpa, data)

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.segment.dma_read(gpa, size))

    def reset(self) -> None:
        """64-bit mode at CODE, all registers 0 but RSP."""
        lib.core_power_on(self.cpu)
        arch = self.arch
        arch.cr0, arch.cr3, arch.cr4, arch.efer = 0x80000033, PAGE_TABLES, 0x620, 0xD00
        for i, attr in enumerate((0xC093, 0xA09B, 0xC093, 0xC093, 0xC093, 0xC093)):
            seg = arch.seg[i]
            seg.base, seg.limit, seg.attr, seg.selector = 0, 0xFFFFFFFF, attr, 0x08 if i == 1 else 0x10
        for i in range(16):
            arch.gpr[i] = 0
        arch.gpr[REGISTERS["rsp"]] = self.stack
        arch.activity = lib.ACT_RUNNING  # also of an AP
        arch.rip = CODE
        lib.core_halt_exits(self.cpu, 1)
        lib.core_state_changed(self.cpu)

    def set(self, **registers: int) -> None:
        """rax... r15, rip, rflags."""
        for name, value in registers.items():
            if name in REGISTERS:
                self.arch.gpr[REGISTERS[name]] = value & (1 << 64) - 1
            else:
                setattr(self.arch, name, value)
        lib.core_state_changed(self.cpu)

    def get(self, name: str) -> int:
        return int(self.arch.gpr[REGISTERS[name]] if name in REGISTERS else getattr(self.arch, name))

    def run(self, code: bytes = b"", budget: int = UNLIMITED, at: int = CODE, **registers: int) -> int:
        """Loads code, if any; runs from `at` until HLT or the budget's end. The exit; EXIT_DEBUG: HLT."""
        if code:
            self.write(at, code)
        self.set(rip=at, **registers)
        return int(lib.core_run(self.cpu, budget))

    @property
    def instructions(self) -> int:
        """Retired since the machine was made."""
        return int(self.block.instructions)
