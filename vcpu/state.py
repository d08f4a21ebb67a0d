"""A vCPU's whole state as a record: architectural registers, local APIC, interrupts that are posted and not
taken.

The fields of ``struct cpu_arch`` (segment.h) are named there. Deadlines are guest time, so a stopped clock
loses nothing.
"""

from __future__ import annotations

from typing import Any

from coordinator.contract.errors import RecordError
from coordinator.contract.layout import struct_get, struct_set
from coordinator.contract.state import Record, pack, unpack_any
from vcpu._core import ffi, lib
from vcpu.core import Core

#: in struct cpu_arch for speed or alignment only
OMITTED = frozenset({"zero", "vec_align"})
#: words of struct vcpu_block that others write: what has been sent to this vCPU and not taken yet
POSTED = ("posted_nmi", "posted_init", "posted_sipi", "posted_kick", "extint_level")
POSTED_BITS = ("posted_irr", "posted_tmr")
#: what the loader must not believe: an index into our own tables
ACTIVITIES = range(4)
#: what no guest can bring about, so that nobody relies on it: bits of MXCSR up to FTZ (SDM vol. 1 section
#: 11.6.6), and XCR0 with x87 always, SSE, nothing else (section 13.3)
MXCSR_BITS, XCR0_VALUES = 0xFFFF, (0b01, 0b11)
#: CPUID words that a guest chooses its code by: (leaf, subleaf, register), and which of their bits are state,
#: not features
FEATURES = {
    (0x1, 0, "eax"): 0,
    (0x1, 0, "ecx"): 1 << 27,  # OSXSAVE
    (0x1, 0, "edx"): 1 << 9,  # APIC, while it is enabled
    (0x6, 0, "eax"): 0,
    (0x7, 0, "ebx"): 0,
    (0x7, 0, "ecx"): 0,
    (0x7, 0, "edx"): 0,
    (0xD, 0, "eax"): 0,
    (0xD, 0, "ecx"): 0,
    (0xD, 1, "eax"): 0,
    (0x40000001, 0, "eax"): 0,
    (0x40000010, 0, "ebx"): 0,
    (0x80000001, 0, "ecx"): 0,
    (0x80000001, 0, "edx"): 1 << 9,
    (0x80000008, 0, "eax"): 0,
    (0x80000008, 0, "ebx"): 0,
    (0x80000021, 0, "eax"): 0,
}


class CpuRecord1(Record, frozen=True):
    """Version 1. ``arch`` is ``struct cpu_arch`` by name, ``posted`` the words above, ``pdpte`` the PAE
    page-directory pointers as loaded with CR3, ``lint0`` the PIC's request as last seen."""

    kind = "vcpu"

    index: int
    arch: dict[str, Any]
    posted: dict[str, int]
    posted_bits: dict[str, list[int]]
    pdpte: list[int]
    lint0: bool


class CpuRecord(CpuRecord1, frozen=True):
    """``debug_hit``: DR6 bits of breakpoints that were met and wait behind MOV SS (SDM vol. 3 section 6.8.3);
    version 1 lost them."""

    version = 2

    debug_hit: int


def save(core: Core, index: int) -> dict[str, bytes]:
    """The record of a vCPU that is outside of ``run``."""
    hidden = ffi.new("struct core_hidden *")
    lib.core_hidden_get(core.handle, hidden)
    record = CpuRecord(
        index=index,
        arch=struct_get(ffi, core.arch, OMITTED),
        posted={name: int(getattr(core.block, name)) for name in POSTED},
        posted_bits={name: list(getattr(core.block, name)) for name in POSTED_BITS},
        pdpte=list(hidden.pdpte),
        lint0=bool(hidden.lint0_seen),
        debug_hit=int(hidden.debug_hit),
    )
    return {"vcpu": pack(record)}


def load(core: Core, index: int, records: dict[str, bytes]) -> None:
    """Go on from what ``save`` gave; RecordError, with the vCPU as it was, where that does not fit."""
    if records.keys() != {"vcpu"}:
        raise RecordError(f"vcpu{index}: records {', '.join(sorted(records))}; one is wanted, named vcpu")
    record = unpack_any(records["vcpu"], CpuRecord, CpuRecord1)
    if record.index != index:
        raise RecordError(f"vcpu{index}: the record is of vCPU {record.index}")
    arch = ffi.new("struct cpu_arch *")
    struct_set(ffi, arch[0], record.arch, f"vcpu{index}", OMITTED)
    if arch.activity not in ACTIVITIES or arch.cpl > 3 or arch.cpl != arch.seg[2].attr >> 5 & 3:
        raise RecordError(f"vcpu{index}: activity {arch.activity} or privilege level {arch.cpl} cannot be")
    if arch.fpu.mxcsr & ~MXCSR_BITS or arch.xcr0 not in XCR0_VALUES:
        raise RecordError(f"vcpu{index}: MXCSR {arch.fpu.mxcsr:#x} or XCR0 {arch.xcr0:#x} cannot be")
    debug_hit = record.debug_hit if isinstance(record, CpuRecord) else 0
    if debug_hit not in range(16):
        raise RecordError(f"vcpu{index}: breakpoints {debug_hit:#x} cannot be")
    words = _words(record, index)
    ffi.memmove(ffi.addressof(core.arch), arch, ffi.sizeof("struct cpu_arch"))
    for name, value in words.items():
        setattr(core.block, name, value)
    hidden = ffi.new("struct core_hidden *")
    hidden.pdpte, hidden.lint0_seen, hidden.debug_hit = record.pdpte, record.lint0, debug_hit
    lib.core_loaded(core.handle, hidden)


def _words(record: CpuRecord1, index: int) -> dict[str, int | list[int]]:
    """The posted words, all of them in range."""
    words: dict[str, int | list[int]] = {**record.posted, **record.posted_bits}
    fits = (
        record.posted.keys() == set(POSTED)
        and record.posted_bits.keys() == set(POSTED_BITS)
        and all(0 <= value < 1 << 32 for value in record.posted.values())
        and all(len(bits) == 4 for bits in (*record.posted_bits.values(), record.pdpte))
        and all(0 <= word < 1 << 64 for bits in (*record.posted_bits.values(), record.pdpte) for word in bits)
    )
    if not fits:
        raise RecordError(f"vcpu{index}: the words of posted interrupts do not fit")
    return words


def features(core: Core) -> dict[str, int]:
    """The words of FEATURES, by names like "1.ecx" and "d.1.eax" (a subleaf is named where it counts)."""
    result = {}
    for (leaf, subleaf, register), state in FEATURES.items():
        words = ffi.new("uint32_t[4]")
        lib.core_cpuid(core.handle, leaf, subleaf, words)
        name = f"{leaf:x}.{subleaf}.{register}" if leaf == 0xD else f"{leaf:x}.{register}"
        result[name] = words[("eax", "ebx", "ecx", "edx").index(register)] & ~state
    return result
