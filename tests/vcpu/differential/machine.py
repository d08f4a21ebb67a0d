"""The two sides: the oracle process on the host's CPU, and a vCPU of ours in a machine that looks the same
to user mode."""

from __future__ import annotations

import functools
import mmap
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import cffi
import numpy as np

from coordinator.contract.segment import Segment
from tests.vcpu.guest import Region, descriptor, gate
from vcpu._core import ffi as core_ffi
from vcpu._core import lib

FOLDER = Path(__file__).parent
BATCH = 256
CODE_LINEAR, CODE_SIZE, DATA_LINEAR, DATA_SIZE, READONLY = 0x20000000, 0x2000, 0x30000000, 0x4000, 0x2000
# Selectors as Linux has them, and those of the oracle's LDT
USER32, USER_DATA, USER64, LDT_CODE16, LDT_DATA = 0x23, 0x2B, 0x33, 0x07, 0x0F
FS_BASE, GS_BASE = DATA_LINEAR + 0x100, DATA_LINEAR - 0x40
FX_MXCSR, FX_ST, FX_XMM, FX_END = 24, 32, 160, 416
# What the host lets us ask (oracle.c)
HOST_LDT, HOST_FSGSBASE = 1, 2


@functools.cache
def layout() -> cffi.FFI:
    ffi = cffi.FFI()
    text = (FOLDER / "oracle.h").read_text()
    ffi.cdef(re.sub(r"(?s:/\*.*?\*/)|(?m:^#(?!define).*$)", "", text))
    return ffi


class Oracle:
    """Cases of a batch are filled in through `cases`, then run(count)."""

    def __init__(self, batch: int = BATCH) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name)
        program, shared = path / "oracle", path / "cases"
        subprocess.run(
            [
                "gcc",
                "-O2",
                "-Wall",
                "-Wextra",
                "-fno-stack-protector",
                "-o",
                str(program),
                str(FOLDER / "oracle.c"),
            ],
            check=True,
        )
        size = layout().sizeof("struct test_case") * batch
        with open(shared, "w+b") as file:
            os.ftruncate(file.fileno(), size)
            self._map = mmap.mmap(file.fileno(), size)
        self.cases: Any = layout().from_buffer(f"struct test_case[{batch}]", self._map)
        self.process = subprocess.Popen(
            [str(program), str(shared), str(batch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.features = self._word()

    def _word(self) -> int:
        assert self.process.stdout
        data = self.process.stdout.read(4)
        if len(data) < 4:
            raise RuntimeError(f"the oracle ended: {self.process.wait()}")
        return int.from_bytes(data, "little")

    def run(self, count: int) -> None:
        assert self.process.stdin
        self.process.stdin.write(struct.pack("<I", count))
        self.process.stdin.flush()
        self._word()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


TABLES, GDT, LDT, IDT, TSS, HANDLERS, CODE_GPA, DATA_GPA, STACK = (
    0x1000,
    0x8000,
    0x8800,
    0x9000,
    0xA000,
    0xB000,
    0x10000,
    0x20000,
    0x30000,
)
RAM = 1 << 20
BUDGET, EXIT_DEBUG = 100_000, 6
LDT_SELECTOR, TSS_SELECTOR = 0x80, 0x90
SUPERVISOR = 0xFFFFFF8000000000  # where the upper half begins for the machine's own pages; gpa 0


def background() -> bytes:
    """What the data pages hold before a case; oracle.c has the same formula."""
    return bytes((i * 37 >> 3 ^ i) & 0xFF for i in range(DATA_SIZE))


class Lost(Exception):
    """The case did not end in an exception's handler; the machine is of no use any more."""


class Ours:
    """A vCPU in user mode; each exception leads to a HLT of its own, with which the case ends."""

    def __init__(self) -> None:
        self.segment = Segment.create(vcpus=1, ram=RAM)
        at = self.segment.guest_offset
        self.segment.publish_map([Region(0, RAM, 3, at, at)])
        self.segment.start_time()
        self.cpu = lib.core_create(self.segment.fd, 0, core_ffi.NULL)
        assert self.cpu != core_ffi.NULL, core_ffi.string(lib.core_error()).decode()
        self.arch: Any = lib.core_block(self.cpu).arch
        self.ram = self.segment.ram
        self.data = core_ffi.cast("uint8_t *", self.ram.ctypes.data + DATA_GPA)
        self.gpr = core_ffi.buffer(self.arch.gpr)
        self.fpr = np.frombuffer(core_ffi.buffer(self.arch.fpu.fpr), np.uint8).reshape(8, 16)
        self.xmm = np.frombuffer(core_ffi.buffer(self.arch.vec), np.uint8).reshape(32, 64)[:16, :16]
        self.background = background()
        self.order = [np.array([(top + i) & 7 for i in range(8)]) for top in range(8)]
        lib.core_power_on(self.cpu)
        self.arch.xcr0 = 3
        self._memory()
        self._registers()
        lib.core_halt_exits(self.cpu, 1)

    def close(self) -> None:
        lib.core_destroy(self.cpu)

    def _put(self, gpa: int, *values: int) -> None:
        self.segment.dma_write(gpa, struct.pack(f"<{len(values)}Q", *values))

    def _memory(self) -> None:
        user = 7
        self._put(TABLES, TABLES + 0x1000 | user)
        self._put(TABLES + 0x1000, TABLES + 0x2000 | user)
        # the first 2 MiB once more, in the upper half, for the handlers
        self._put(TABLES + (SUPERVISOR >> 39 & 511) * 8, TABLES + 0x5000 | 3)
        self._put(TABLES + 0x5000 + (SUPERVISOR >> 30 & 511) * 8, TABLES + 0x6000 | 3)
        self._put(TABLES + 0x6000 + (SUPERVISOR >> 21 & 511) * 8, 0x83)
        for linear, gpa, size, table in (
            (CODE_LINEAR, CODE_GPA, CODE_SIZE, 0x3000),
            (DATA_LINEAR, DATA_GPA, DATA_SIZE, 0x4000),
        ):
            self._put(TABLES + 0x2000 + 8 * (linear >> 21), TABLES + table | user)
            for offset in range(0, size, 4096):
                rights = 5 if linear == DATA_LINEAR and offset == READONLY else 7
                self._put(
                    TABLES + table + 8 * (offset >> 12),
                    gpa + offset | rights | (1 << 63 if linear == DATA_LINEAR else 0),
                )
        flat = 0xFFFFF
        for selector, value in (
            (0x08, descriptor(0, flat, 0xC09B)),
            (0x10, descriptor(0, flat, 0xA09B)),
            (0x18, descriptor(0, flat, 0xC093)),
            (USER32, descriptor(0, flat, 0xC0FB)),
            (USER_DATA, descriptor(0, flat, 0xC0F3)),
            (USER64, descriptor(0, flat, 0xA0FB)),
            (LDT_SELECTOR, descriptor(LDT, 0xF, 0x82)),
            (TSS_SELECTOR, descriptor(TSS, 0x67, 0x8B)),
        ):
            self._put(GDT + (selector & ~7), value)
        self._put(
            LDT, descriptor(CODE_LINEAR, 0xFFFF, 0x00FB), descriptor(DATA_LINEAR, DATA_SIZE - 1, 0x00F3)
        )
        for vector in range(256):
            at = SUPERVISOR + HANDLERS + vector
            self._put(IDT + 16 * vector, gate(0x10, at, 0xE, dpl=3 if vector in (3, 4) else 0), at >> 32)
        self.segment.dma_write(HANDLERS, b"\xf4" * 256)
        self.segment.dma_write(TSS + 4, struct.pack("<Q", SUPERVISOR + STACK))
        self.segment.dma_write(TSS + 0x66, struct.pack("<H", 0x68))
        self.segment.dma_write(CODE_GPA, b"\xcc" * CODE_SIZE)
        self.segment.dma_write(DATA_GPA, self.background)

    def _registers(self) -> None:
        arch = self.arch
        arch.gdtr.base, arch.gdtr.limit = SUPERVISOR + GDT, 0x9F
        arch.idtr.base, arch.idtr.limit = SUPERVISOR + IDT, 0xFFF
        for reg, selector, base, limit, attr in (
            (arch.ldtr, LDT_SELECTOR, SUPERVISOR + LDT, 0xF, 0x82),
            (arch.tr, TSS_SELECTOR, SUPERVISOR + TSS, 0x67, 0x8B),
        ):
            reg.selector, reg.base, reg.limit, reg.attr = selector, base, limit, attr
        # PG AM WP NE ET MP PE; OSXSAVE FSGSBASE OSXMMEXCPT OSFXSR PGE PAE; NXE LMA LME SCE
        arch.cr0, arch.cr3, arch.cr4, arch.efer = 0x80050033, TABLES, 0x506A0 | 0x600, 0xD01

    def _segment(self, index: int, selector: int, base: int = 0) -> None:
        seg = self.arch.seg[index]
        values = {
            USER32: (0, 0xFFFFFFFF, 0xC0FB),
            USER_DATA: (0, 0xFFFFFFFF, 0xC0F3),
            USER64: (0, 0xFFFFFFFF, 0xA0FB),
            LDT_CODE16: (CODE_LINEAR, 0xFFFF, 0x00FB),
            LDT_DATA: (DATA_LINEAR, DATA_SIZE - 1, 0x00F3),
        }
        seg.selector = selector
        seg.base, seg.limit, seg.attr = values.get(selector, (base, 0, 0))

    def run(self, case: Any, after: Any) -> tuple[int, int]:
        """Runs the case; the state behind it goes to `after`. Returns (vector, error code); data is in the
        guest's memory."""
        arch, before = self.arch, case.before
        core_ffi.memmove(self.data, self.background, DATA_SIZE)
        for patch in case.patch:
            if patch.size:
                core_ffi.memmove(self.data + patch.at, layout().buffer(patch.bytes), patch.size)
        self.segment.dma_write(CODE_GPA + case.code_at, layout().buffer(case.code)[0 : case.code_size])
        core_ffi.memmove(self.gpr, layout().buffer(before.gpr), 128)
        arch.rip, arch.rflags, arch.cpl = before.rip, before.rflags, 3
        for index, selector in (
            (0, before.es),
            (1, before.cs),
            (2, before.ss),
            (3, before.ds),
            (4, before.fs),
            (5, before.gs),
        ):
            self._segment(index, selector)
        arch.seg[4].base, arch.seg[5].base = before.fs_base, before.gs_base
        arch.inhibit = 0
        self._load_fpu(np.frombuffer(layout().buffer(before.fx), np.uint8))
        lib.core_state_changed(self.cpu)
        exit = lib.core_run(self.cpu, BUDGET)
        self.segment.dma_write(CODE_GPA + case.code_at, b"\xcc" * case.code_size)
        vector = arch.rip - SUPERVISOR - HANDLERS - 1
        if exit != EXIT_DEBUG or not 0 <= vector < 256:
            raise Lost(f"exit {exit} at {arch.rip:#x}")
        core_ffi.memmove(layout().buffer(after.gpr), self.gpr, 128)
        stack = arch.gpr[4] - SUPERVISOR
        error = 0
        if stack == STACK - 48:
            (error,) = struct.unpack("<Q", self.ram[stack : stack + 8].tobytes())
            stack += 8
        after.rip, after.cs, after.rflags, after.gpr[4], after.ss = struct.unpack(
            "<5Q", self.ram[stack : stack + 40].tobytes()
        )
        after.ds, after.es, after.fs, after.gs = (arch.seg[i].selector for i in (3, 0, 4, 5))
        after.fs_base, after.gs_base = arch.seg[4].base, arch.seg[5].base
        self._store_fpu(np.frombuffer(layout().buffer(after.fx), np.uint8))
        return vector, error

    def _load_fpu(self, fx: Any) -> None:
        fpu = self.arch.fpu
        fpu.cw, fpu.sw, fpu.tag_valid, fpu.fop, fpu.mxcsr = struct.unpack_from("<HHBxH16xI", fx)
        fpu.fip = fpu.fdp = fpu.fcs = fpu.fds = 0
        self.fpr[self.order[fpu.sw >> 11 & 7]] = fx[FX_ST:FX_XMM].reshape(8, 16)
        self.xmm[:] = fx[FX_XMM:FX_END].reshape(16, 16)

    def _store_fpu(self, fx: Any) -> None:
        fpu = self.arch.fpu
        fx[0:8] = np.frombuffer(struct.pack("<HHBxH", fpu.cw, fpu.sw, fpu.tag_valid, fpu.fop), np.uint8)
        fx[FX_MXCSR : FX_MXCSR + 4] = np.frombuffer(struct.pack("<I", fpu.mxcsr), np.uint8)
        fx[FX_ST:FX_XMM] = self.fpr[self.order[fpu.sw >> 11 & 7]].reshape(128)
        fx[FX_XMM:FX_END] = self.xmm.reshape(256)
