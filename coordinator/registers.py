"""A vCPU's registers as text: names and arrangement are those of QEMU's monitor."""

from __future__ import annotations

from typing import Any

GPR = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
#: RFLAGS bits as QEMU prints them, SDM vol. 1 section 3.4.3
_FLAGS = (("D", 10), ("O", 11), ("S", 7), ("Z", 6), ("A", 4), ("P", 2), ("C", 0))


def _segment(name: str, seg: Any) -> str:
    return f"{name:<4}={seg.selector:04x} {seg.base:016x} {seg.limit:08x} {seg.attr << 8:08x}\n"


def describe(arch: Any) -> str:
    """All of ``struct cpu_arch``."""
    show = [0, 3, 1, 2, 6, 7, 5, 4, *range(8, 16)]
    text = ""
    for row in range(0, 16, 4):
        text += " ".join(f"{GPR[i].upper():<3}={arch.gpr[i]:016x}" for i in show[row : row + 4]) + "\n"
    letters = "".join(letter if arch.rflags >> bit & 1 else "-" for letter, bit in _FLAGS)
    halted = int(arch.activity == 1)
    text += f"RIP={arch.rip:016x} RFL={arch.rflags:08x} [{letters}]"
    text += f" CPL={arch.cpl} II={arch.inhibit} HLT={halted}\n"
    text += "".join(_segment(name.upper(), arch.seg[i]) for i, name in enumerate(SEGMENTS))
    text += _segment("LDT", arch.ldtr) + _segment("TR", arch.tr)
    for name in ("gdtr", "idtr"):
        table = getattr(arch, name)
        text += f"{name[:3].upper():<4}=     {table.base:016x} {table.limit:08x}\n"
    text += f"CR0={arch.cr0:08x} CR2={arch.cr2:016x} CR3={arch.cr3:016x} CR4={arch.cr4:08x}\n"
    text += " ".join(f"DR{i}={arch.dr[i]:016x}" for i in range(4)) + "\n"
    text += f"DR6={arch.dr[6]:016x} DR7={arch.dr[7]:016x}\n"
    text += f"EFER={arch.efer:016x}\n"
    fpu = arch.fpu
    text += f"FCW={fpu.cw:04x} FSW={fpu.sw:04x} FTW={fpu.tag_valid:02x} MXCSR={fpu.mxcsr:08x}\n"
    top = fpu.sw >> 11 & 7
    for i in range(0, 8, 2):
        pair = [(i + k, bytes(fpu.fpr[(top + i + k) & 7])[:10][::-1].hex()) for k in range(2)]
        text += " ".join(f"FPR{n}={value[4:]} {value[:4]}" for n, value in pair) + "\n"
    for i in range(0, 16, 2):
        text += (
            " ".join(f"XMM{n:02d}={arch.vec[n].q[1]:016x}{arch.vec[n].q[0]:016x}" for n in (i, i + 1)) + "\n"
        )
    return text
