"""Start state of a boot without firmware (messages.LoadCpu)."""

from __future__ import annotations

from typing import Any

from coordinator.contract.errors import ConfigError

#: what vCPUs other than the first get: all but where to start
SHARED = ("mtrr_",)
GPRS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)
ES, CS, SS, DS, FS, GS = range(6)
#: attributes as in struct seg_reg: present, accessed; code readable, data writable; granularity 4 KiB
CODE64, CODE32, DATA32 = 0xA09B, 0xC09B, 0xC093
TSS32_BUSY = 0x008B
FLAT = 0xFFFF_FFFF
#: selectors of the boot protocols (Linux x86 boot protocol 1.13: CS 10h, DS 18h) and of our 32-bit code
SELECTOR_CODE64, SELECTOR_DATA, SELECTOR_CODE32 = 0x10, 0x18, 0x20
CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_WP, CR0_PG = 0x1, 0x2, 0x10, 0x20, 0x10000, 0x8000_0000
CR4_PAE = 0x20
EFER_LME, EFER_LMA = 0x100, 0x400


def load(arch: Any, mode: str, registers: dict[str, int]) -> None:
    """Write ``registers`` into ``struct cpu_arch`` of a vCPU in its power-on state.

    ``mode``: "long" (64-bit, paging on), "flat32" (protected mode without paging), or "wait": an
    application processor, which only gets what firmware sets on every processor.
    """
    for name, value in registers.items():
        if mode != "wait" or name.startswith(SHARED):
            _set(arch, name, value)
    if mode == "long":
        _segments(arch, SELECTOR_CODE64, CODE64)
        arch.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG
        arch.cr4 = CR4_PAE
        arch.efer = EFER_LME | EFER_LMA
    elif mode == "flat32":
        _segments(arch, SELECTOR_CODE32, CODE32)
        arch.cr0 = CR0_PE | CR0_ET
    elif mode != "wait":
        raise ConfigError(f"no start mode {mode!r}")


def _set(arch: Any, name: str, value: int) -> None:
    if name in GPRS:
        arch.gpr[GPRS.index(name)] = value
    elif name in ("rip", "rflags", "cr3", "mtrr_def_type"):
        setattr(arch, name, value)
    elif name in ("gdt_base", "gdt_limit", "idt_base", "idt_limit"):
        setattr(arch.gdtr if name.startswith("gdt") else arch.idtr, name[4:], value)
    elif name == "mtrr_fixed":
        for index in range(len(arch.mtrr_fixed)):
            arch.mtrr_fixed[index] = value
    elif name.startswith("mtrr_fixed") and name[10:].isdigit():
        arch.mtrr_fixed[int(name[10:])] = value
    elif name.startswith(("mtrr_base", "mtrr_mask")) and name[9:].isdigit():
        getattr(arch, name[:9])[int(name[9:])] = value
    else:
        raise ConfigError(f"no register {name!r} to start with")


def _segments(arch: Any, code_selector: int, code: int) -> None:
    for index in (ES, SS, DS, FS, GS):
        _segment(arch.seg[index], SELECTOR_DATA, DATA32)
    _segment(arch.seg[CS], code_selector, code)
    _segment(arch.ldtr, 0, 0)
    _segment(arch.tr, 0, TSS32_BUSY)
    arch.cpl = 0


def _segment(register: Any, selector: int, attributes: int) -> None:
    register.selector, register.attr = selector, attributes
    register.base, register.limit = 0, FLAT if attributes & 0x8000 else 0xFFFF
