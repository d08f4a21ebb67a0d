"""One vCPU in this process with a bare guest: memory and mode set from Python, a snippet of code run.

Every exception and interrupt has a handler of its own that is an endless jump, so a test sees at
rip which vector was taken, and on the stack what was pushed. Numbers in tests come from the SDM.

Guest-physical = linear (identity pages), below 2 MiB::

    1000  GDT        2000  IDT       3000  TSS (3800: 16-bit TSS, 3C00: second TSS)
    4000  handlers, 16 bytes a vector
    8000  code       A000  data      C000  scratch
    20000 top of the stack of ring 0; 28000: IST1; 30000: rings 1-3
    40000 page tables
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.contract.segment import Segment
from vcpu._core import ffi, lib

GDT, IDT, TSS, TSS16, TSS2, HANDLERS, CODE, DATA, SCRATCH = (
    0x1000,
    0x2000,
    0x3000,
    0x3800,
    0x3C00,
    0x4000,
    0x8000,
    0xA000,
    0xC000,
)
STACK0, STACK_IST, STACK3, TABLES = 0x20000, 0x28000, 0x30000, 0x40000
RAM = 4 << 20

# Selectors
CODE32, DATA32, CODE64, CODE16, DATA16 = 0x08, 0x10, 0x18, 0x20, 0x28
USER_CODE32, USER_DATA, USER_CODE64 = 0x33, 0x3B, 0x43
TSS_SELECTOR, LDT_SELECTOR, FREE = 0x48, 0x58, 0x68  # FREE: the first of eight unused slots

# CR0, CR4, EFER, RFLAGS
PE, ET, NE, WP, AM, PG = 1, 0x10, 0x20, 1 << 16, 1 << 18, 1 << 31
DE, PSE, PAE, PGE, OSFXSR, FSGSBASE, PCIDE, SMEP, SMAP = (
    8,
    0x10,
    0x20,
    0x80,
    0x200,
    1 << 16,
    1 << 17,
    1 << 20,
    1 << 21,
)
SCE, LME, LMA, NXE = 1, 0x100, 0x400, 0x800
CF, ZF, TF, IF, OF, NT, RF, VM, AC = 1, 0x40, 0x100, 0x200, 0x800, 0x4000, 0x10000, 0x20000, 0x40000
IOPL3 = 0x3000

SEGMENTS = {name: i for i, name in enumerate(("es", "cs", "ss", "ds", "fs", "gs"))}
REGISTERS = {
    name: i
    for i, name in enumerate(
        ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
    )
}
DE_, DB, NMI, BP, OVERFLOW, BR, UD, NM, DF, TS, NP, SS_, GP, PF, MF, AC_ = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    10,
    11,
    12,
    13,
    14,
    16,
    17,
)

# Snippets of 64-bit code; str.format() takes the index (and value)
MSR_READ = "mov ecx, {:#x}\n rdmsr\n shl rdx, 32\n or rax, rdx\n"
MSR_WRITE = "mov ecx, {:#x}\n mov rax, {:#x}\n mov rdx, rax\n shr rdx, 32\n wrmsr\n"


def descriptor(base: int, limit: int, attr: int) -> int:
    """attr: bits 40-55 of a descriptor, as `struct seg_reg` has it; limit in units of the granularity."""
    return (
        limit & 0xFFFF
        | (base & 0xFFFFFF) << 16
        | (attr & 0xF0FF) << 40
        | (limit >> 16 & 0xF) << 48
        | (base >> 24 & 0xFF) << 56
    )


def gate(selector: int, offset: int, kind: int, dpl: int = 0, present: bool = True, extra: int = 0) -> int:
    """A 32-bit gate, or the lower half of a long mode one; extra: IST or parameter count."""
    return (
        offset & 0xFFFF
        | selector << 16
        | extra << 32
        | (kind | dpl << 5 | present << 7) << 40
        | (offset >> 16 & 0xFFFF) << 48
    )


@dataclass(frozen=True)
class Region:
    """A region of the memory map."""

    gpa: int
    size: int
    flags: int
    read_offset: int
    write_offset: int
    host: int = 0
    device: int = 0
    first_reg: int = 0
    regs: int = 0


def assemble(source: str, origin: int = CODE, bits: int = 64) -> tuple[bytes, dict[str, int]]:
    """GNU as, Intel syntax; machine code as placed at origin, and its labels."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "a.s").write_text(f".intel_syntax noprefix\n.code{bits}\n{source}\n")
        subprocess.run(["as", "--64", "-o", "a.o", "a.s"], cwd=base, check=True)
        subprocess.run(
            [
                "ld",
                "-m",
                "elf_x86_64",
                f"-Ttext={origin:#x}",
                "-e",
                f"{origin:#x}",
                "--no-warn-rwx-segments",
                "-o",
                "a.elf",
                "a.o",
            ],
            cwd=base,
            check=True,
        )
        subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "a.elf", "a.bin"], cwd=base, check=True)
        names = subprocess.run(["nm", "a.elf"], cwd=base, check=True, capture_output=True, text=True).stdout
        labels = {
            line.split()[2]: int(line.split()[0], 16) for line in names.splitlines() if len(line.split()) == 3
        }
        return (base / "a.bin").read_bytes(), labels


class Guest:
    """See the module. Modes: real, protected (no paging), legacy (32-bit paging), pae, long, compat."""

    def __init__(self, mode: str = "real", cpl: int = 0) -> None:
        self.segment = Segment.create(vcpus=1, ram=RAM)
        flags = 3  # REGION_READ | REGION_WRITE
        at = self.segment.guest_offset
        self.segment.publish_map([Region(0, RAM, flags, at, at)])
        self.segment.start_time()
        self.cpu = lib.core_create(self.segment.fd, 0, ffi.NULL)
        assert self.cpu != ffi.NULL, ffi.string(lib.core_error()).decode()
        self.block = lib.core_block(self.cpu)
        self.arch: Any = self.block.arch
        self.ram = self.segment.ram
        self.labels: dict[str, int] = {}
        self.mode, self.bits = mode, {"real": 16, "long": 64}.get(mode, 32)
        lib.core_power_on(self.cpu)
        self._tables()
        self._state(cpl)

    def close(self) -> None:
        lib.core_destroy(self.cpu)

    # ---- memory ----
    def write(self, gpa: int, data: bytes) -> None:
        self.segment.dma_write(gpa, data)

    def read(self, gpa: int, size: int = 8) -> int:
        return int.from_bytes(self.segment.dma_read(gpa, size), "little")

    def put(self, gpa: int, value: int, size: int = 8) -> None:
        self.write(gpa, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

    def set_descriptor(self, selector: int, value: int, upper: int | None = None) -> None:
        self.put(GDT + (selector & 0xFFF8), value)
        if upper is not None:
            self.put(GDT + (selector & 0xFFF8) + 8, upper)

    def set_gate(self, vector: int, selector: int, offset: int, kind: int, **more: Any) -> None:
        if self.long:
            self.put(IDT + vector * 16, gate(selector, offset, kind, **more))
            self.put(IDT + vector * 16 + 8, offset >> 32)
        else:
            self.put(IDT + vector * 8, gate(selector, offset, kind, **more))

    # ---- set-up ----
    @property
    def long(self) -> bool:
        return self.mode in ("long", "compat")

    def _tables(self) -> None:
        flat, limit = 0xC000, 0xFFFFF
        for selector, value in (
            (CODE32, descriptor(0, limit, flat | 0x9B)),
            (DATA32, descriptor(0, limit, flat | 0x93)),
            (CODE64, descriptor(0, limit, 0xA09B)),
            (CODE16, descriptor(0, 0xFFFF, 0x9B)),
            (DATA16, descriptor(0, 0xFFFF, 0x93)),
            (USER_CODE32, descriptor(0, limit, flat | 0xFB)),
            (USER_DATA, descriptor(0, limit, flat | 0xF3)),
            (USER_CODE64, descriptor(0, limit, 0xA0FB)),
        ):
            self.set_descriptor(selector, value)
        self.set_descriptor(TSS_SELECTOR, descriptor(TSS, 0x7FF, 0x8B), 0)
        for vector in range(256):
            self.write(HANDLERS + vector * 16, b"\xeb\xfe")
            if self.mode == "real":
                self.put(IDT + vector * 4, HANDLERS + vector * 16, 4)
            else:
                self.set_gate(vector, CODE64 if self.long else CODE32, HANDLERS + vector * 16, 0xE, dpl=3)
        if self.long:
            for i, stack in enumerate((STACK0, STACK3 - 0x1000, STACK3 - 0x2000)):
                self.put(TSS + 4 + 8 * i, stack)
            self.put(TSS + 0x24, STACK_IST)
        else:
            self.put(TSS + 4, STACK0, 4)
            self.put(TSS + 8, DATA32, 4)
            self.put(TSS + 0x1C, TABLES, 4)  # CR3: a task switch reads and never writes it
        self.put(TSS + 0x66, 0x68, 2)
        self.write(TSS + 0x68, b"\xff" * 0x80)  # no port below 400h is allowed
        self._page_tables()

    def _page_tables(self) -> None:
        """Identity map of 2 MiB with 4 KiB pages, all rights; anything above is the tests' own."""
        leaf, upper = TABLES + 0x4000, 7
        width = 4 if self.mode == "legacy" else 8
        for i in range(512):
            self.put(leaf + i * width, i << 12 | 7, width)
        if self.mode == "legacy":
            self.put(TABLES, leaf | upper, 4)
        elif self.mode == "pae":
            self.put(TABLES, (TABLES + 0x1000) | 1)
            self.put(TABLES + 0x1000, leaf | upper)
        else:
            self.put(TABLES, (TABLES + 0x1000) | upper)
            self.put(TABLES + 0x1000, (TABLES + 0x2000) | upper)
            self.put(TABLES + 0x2000, leaf | upper)

    @property
    def entry_bytes(self) -> int:
        return 4 if self.mode == "legacy" else 8

    def pte(self, linear: int) -> int:
        """gpa of the leaf entry of a linear address below 2 MiB."""
        return TABLES + 0x4000 + (linear >> 12) * self.entry_bytes

    def get_pte(self, linear: int) -> int:
        return self.read(self.pte(linear), self.entry_bytes)

    def set_pte(self, linear: int, value: int) -> None:
        self.put(self.pte(linear), value, self.entry_bytes)

    def directory(self) -> int:
        """gpa of the entry above the leaves."""
        return {"legacy": TABLES, "pae": TABLES + 0x1000}.get(self.mode, TABLES + 0x2000)

    def load_segment(self, name: str, selector: int) -> None:
        """The descriptor cache, from the GDT."""
        raw = self.read(GDT + (selector & 0xFFF8))
        seg = self.arch.seg[SEGMENTS[name]]
        seg.selector = selector
        seg.base = raw >> 16 & 0xFFFFFF | raw >> 32 & 0xFF000000
        limit = raw & 0xFFFF | raw >> 32 & 0xF0000
        seg.attr = raw >> 40 & 0xF0FF
        seg.limit = limit << 12 | 0xFFF if seg.attr & 0x8000 else limit

    def _state(self, cpl: int) -> None:
        arch = self.arch
        arch.gdtr.base, arch.gdtr.limit = GDT, 0xFFF
        arch.idtr.base, arch.idtr.limit = IDT, 0xFFF
        arch.gpr[REGISTERS["rdx"]] = 0
        arch.cr0 = ET | NE
        arch.rip, arch.gpr[REGISTERS["rsp"]] = CODE, STACK3 if cpl else STACK0 - 0x800
        if self.mode == "real":
            arch.seg[SEGMENTS["cs"]].selector = arch.seg[SEGMENTS["cs"]].base = 0
            arch.gpr[REGISTERS["rsp"]] = 0x7F00
        else:
            arch.cr0 |= PE | (0 if self.mode == "protected" else PG | WP)
            arch.cr3 = TABLES
            arch.cr4 = {"legacy": PSE, "pae": PAE, "long": PAE, "compat": PAE}.get(self.mode, 0)
            arch.efer = LME | LMA | NXE if self.long else NXE if self.mode == "pae" else 0
            code = (USER_CODE64 if cpl else CODE64) if self.mode == "long" else USER_CODE32 if cpl else CODE32
            self.load_segment("cs", code)
            for name in ("ss", "ds", "es", "fs", "gs"):
                self.load_segment(name, USER_DATA if cpl else DATA32)
            tr = arch.tr
            tr.selector, tr.base, tr.limit, tr.attr = TSS_SELECTOR, TSS, 0x7FF, 0x8B
            arch.cpl = cpl
        self.changed()

    def changed(self) -> None:
        """After any write to arch."""
        lib.core_state_changed(self.cpu)

    # ---- running ----
    def set(self, **values: int) -> None:
        """Registers by name: rax... rip rflags cr0... efer, dr0..."""
        for name, value in values.items():
            if name in REGISTERS:
                self.arch.gpr[REGISTERS[name]] = value
            elif name[:2] == "dr":
                self.arch.dr[int(name[2:])] = value
            else:
                setattr(self.arch, name, value)
        self.changed()

    def __getattr__(self, name: str) -> int:
        if name in REGISTERS:
            return int(self.arch.gpr[REGISTERS[name]])
        if name in ("rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer", "cpl", "activity"):
            return int(getattr(self.arch, name))
        if name in SEGMENTS:
            return int(self.arch.seg[SEGMENTS[name]].selector)
        raise AttributeError(name)

    def dr(self, index: int) -> int:
        return int(self.arch.dr[index])

    def run(self, source: str, budget: int = 200, bits: int | None = None) -> int:
        """Assembles the snippet at CODE, with a jump to itself behind it, and runs; returns the exit."""
        code, self.labels = assemble(source + "\nend_of_code: jmp end_of_code\n", CODE, bits or self.bits)
        self.write(CODE, code)
        return int(lib.core_run(self.cpu, budget))

    def resume(self, budget: int = 200) -> int:
        return int(lib.core_run(self.cpu, budget))

    @property
    def done(self) -> bool:
        """Reached the end of the snippet."""
        return self.rip == self.labels["end_of_code"]

    @property
    def vector(self) -> int | None:
        """Of the handler in which the guest stands."""
        offset = self.rip - HANDLERS
        return offset >> 4 if 0 <= offset < 0x1000 and offset % 16 == 0 else None

    def stack(self, size: int | None = None) -> list[int]:
        """The eight topmost items of the stack."""
        size = size or (8 if self.long else 2 if self.mode == "real" else 4)
        at = self.rsp + self.arch.seg[SEGMENTS["ss"]].base * (not self.long)
        return list(
            struct.unpack(f"<8{ {2: 'H', 4: 'I', 8: 'Q'}[size] }", self.segment.dma_read(at, 8 * size))
        )
