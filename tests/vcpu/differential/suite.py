"""Runs cases on both sides, compares, and keeps account of what was covered."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.vcpu.differential import special, values
from tests.vcpu.differential.encode import Encoder, Instance, sequence, sequential
from tests.vcpu.differential.machine import (
    BATCH,
    CODE_SIZE,
    DATA_LINEAR,
    DATA_SIZE,
    FS_BASE,
    GS_BASE,
    HOST_FSGSBASE,
    HOST_LDT,
    Lost,
    Oracle,
    Ours,
    core_ffi,
    layout,
)
from tests.vcpu.differential.shapes import BP, MODES, PF, STATE_BYTES, Shape, shapes

NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16)))
VISIBLE = 0x254FD5  # RFLAGS that are compared: status, DF, TF, IF, NT, RF, AC, ID
USER_TOP = (1 << 47) - 4096  # Linux reports P for addresses from here on, whatever is there
CPUINFO = {"SSE3": "pni", "SSE4.1": "sse4_1", "SSE4.2": "sse4_2", "RDRND": "rdrand"}


def host_flags() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next(line for line in lines if line.startswith("flags")).split(":")[1].split())


def fill(case: Any, instance: Instance) -> None:
    """A struct test_case from an instance."""
    before = case.before
    before.gpr = instance.gpr
    before.rip, before.rflags = instance.rip, instance.rflags
    before.cs, before.ss = instance.cs, instance.stack_segment
    before.ds = before.es = instance.data_segment
    before.fs = before.gs = 0
    before.fs_base, before.gs_base = FS_BASE, GS_BASE
    fx = instance.fx or values.PLAIN_FX
    layout().memmove(before.fx, fx, len(fx))
    patches = instance.patches[: len(case.patch)]
    for i, patch in enumerate(case.patch):
        patch.size = 0
        if i < len(patches):
            patch.at, patch.size = patches[i][0], len(patches[i][1])
            layout().memmove(patch.bytes, patches[i][1], patch.size)
    code = instance.code[: CODE_SIZE - instance.code_at]
    case.code_at, case.code_size = instance.code_at, len(code)
    layout().memmove(case.code, code, len(code))


def _words(instance: Instance, host: Any, ours: Any, vector: int) -> Iterator[str]:
    """Differences of registers."""
    width = values.MASK64 if instance.shape.bits == 64 and host.cs == instance.cs else 0xFFFFFFFF
    for i, name in enumerate(NAMES):
        if (host.gpr[i] ^ ours.gpr[i]) & width:
            yield f"{name}: host {host.gpr[i]:#x}, ours {ours.gpr[i]:#x}"
    for name in ("rip", "cs", "ss", "ds", "es", "fs", "gs"):
        if getattr(host, name) != getattr(ours, name):
            yield f"{name}: host {getattr(host, name):#x}, ours {getattr(ours, name):#x}"
    for name in ("fs", "gs"):  # a null selector clears the base on Intel's CPUs only
        base = f"{name}_base"
        changed = host.fs | host.gs or instance.shape.row.mnemonic.endswith("BASE")
        if changed and getattr(host, base) != getattr(ours, base):
            yield f"{base}: host {getattr(host, base):#x}, ours {getattr(ours, base):#x}"
    undefined = instance.undefined if vector == BP else instance.undefined_midway
    differ = (host.rflags ^ ours.rflags) & VISIBLE & ~(undefined | special.undefined_flags(instance))
    if differ:
        yield f"rflags: host {host.rflags:#x}, ours {ours.rflags:#x}, differ in {differ:#x}"


def _fault(instance: Instance, case: Any, vector: int, error: int, cr2: int) -> Iterator[str]:
    ignore = 1 if vector == PF and case.cr2 >= USER_TOP else 0
    if case.vector != vector or (case.error ^ error) & ~ignore:
        yield f"exception: host {case.vector} ({case.error:#x}), ours {vector} ({error:#x})"
    # Which byte of a long operand is named, and in which order CMPS, RETF and IRET read, is the CPU's choice
    chosen = instance.shape.row.mnemonic in {*STATE_BYTES, "CMPS", "RETF", "IRET"}
    if vector == case.vector == PF and case.cr2 != cr2 and not chosen:
        yield f"cr2: host {case.cr2:#x}, ours {cr2:#x}"


def _memory(instance: Instance, case: Any, ours: Ours, vector: int) -> Iterator[str]:
    # Below a stack pointer that a fault left alone the hosts may have stored: Intel's the return address of
    # a call whose target is bad, any the first items of several
    if vector != BP and instance.shape.row.mnemonic in ("CALL", "CALLF", "ENTER", "PUSHA"):
        return
    mine, host = core_ffi.buffer(ours.data, DATA_SIZE)[:], layout().buffer(case.data)[:]
    if mine != host:
        at = next(i for i in range(DATA_SIZE) if mine[i] != host[i])
        there, here = host[at : at + 16].hex(" "), mine[at : at + 16].hex(" ")
        yield f"memory at {DATA_LINEAR + at:#x}: host {there}, ours {here}"


def _vectors(instance: Instance, host: Any, ours: Any, mmx_fault: bool) -> Iterator[str]:
    """Differences of x87, MMX and XMM; neither FOP nor the pointers, which depend on the maker and on what
    is unmasked."""
    a, b = layout().buffer(host.fx)[:], layout().buffer(ours.fx)[:]
    parts = [("mxcsr", 24, 28), *((f"xmm{i}", 160 + 16 * i, 176 + 16 * i) for i in range(16))]
    # An MMX instruction that faults has on some hosts already made the x87 registers MMX registers
    if not mmx_fault:
        parts += [
            ("fcw", 0, 2),
            ("fsw", 2, 4),
            ("ftw", 4, 5),
            *((f"st{i}", 32 + 16 * i, 42 + 16 * i) for i in range(8)),
        ]
    for name, begin, end in parts:
        if a[begin:end] != b[begin:end]:
            yield f"{name}: host {a[begin:end][::-1].hex()}, ours {b[begin:end][::-1].hex()}"


def describe(instance: Instance) -> str:
    registers = " ".join(f"{name}={value:x}" for name, value in zip(NAMES, instance.gpr, strict=True))
    return (
        f"{instance.shape.key}\n"
        f"  [{instance.code.hex(' ')}] at {instance.rip:#x}, rflags {instance.rflags:#x}, operand at "
        f"{instance.target:#x}, ds {instance.data_segment:#x}, ss {instance.stack_segment:#x}\n  {registers}"
    )


@dataclass
class Coverage:
    """Which vectors the cases of each shape and each row ended with."""

    by_shape: dict[str, set[int]] = field(default_factory=dict)
    by_row: dict[str, set[int]] = field(default_factory=dict)
    vectors: dict[int, int] = field(default_factory=dict)
    cases: int = 0

    def note(self, shape: Shape, vector: int) -> None:
        self.by_shape.setdefault(shape.key, set()).add(vector)
        self.by_row.setdefault(shape.row.key, set()).add(vector)
        self.vectors[vector] = self.vectors.get(vector, 0) + 1
        self.cases += 1

    def missing(self, wanted: Iterable[Shape]) -> list[str]:
        """What was not reached, a line each."""
        lines: list[str] = []
        rows: dict[str, frozenset[int]] = {}
        for shape in wanted:
            if not self.by_shape.get(shape.key, set()) & shape.ends:
                seen = sorted(self.by_shape.get(shape.key, ()))
                lines.append(f"{shape.key}: never ended as it should, only with {seen}")
            rows[shape.row.key] = rows.get(shape.row.key, frozenset()) | shape.faults
        for key, faults in rows.items():
            absent = faults - self.by_row.get(key, set())
            if absent:
                lines.append(f"{key}: exceptions not raised: {sorted(absent)}")
        return lines


class Suite:
    """Both sides and the shapes that this host can be asked about."""

    def __init__(self, only: str = "") -> None:
        self.oracle, self.ours = Oracle(), Ours()
        flags = host_flags()
        modes = MODES if self.oracle.features & HOST_LDT else (64,)
        everything = shapes(modes)
        self.shapes = [shape for shape in everything if only in shape.key and self._known(shape, flags)]
        self.lacking = sorted({shape.row.key for shape in everything if not self._known(shape, flags)})
        self.coverage = Coverage()
        self._after = layout().new("struct state *")
        self._sequences = [
            [s for s in self.shapes if s.bits == bits and s.row.source in sources and sequential(s)]
            for bits in modes
            for sources in (("integer.tab",), ("sse.tab", "integer.tab"), ("x87.tab",), ("sse.tab",))
        ]

    def _known(self, shape: Shape, flags: frozenset[str]) -> bool:
        name = shape.row.values.get("cpuid", "")
        if name == "FSGSBASE" and not self.oracle.features & HOST_FSGSBASE:
            return False
        return not name or CPUINFO.get(name, name.lower()) in flags

    def close(self) -> None:
        self.oracle.close()
        self.ours.close()

    def instance(self, seed: int, number: int) -> Instance:
        """Case `number` of a seed: first each shape as it should go, then with a fault, then at random."""
        turn, index = divmod(number, len(self.shapes))
        aim = ("plain", "fault", "")[min(turn, 2)]
        return Encoder(self.shapes[index], random.Random(f"{seed}:{number}"), aim).build()

    def several(self, seed: int, number: int) -> Instance:
        """Sequence `number` of a seed."""
        choices = [shapes for shapes in self._sequences if shapes]
        return sequence(choices[number % len(choices)], random.Random(f"{seed}:several:{number}"))

    def run(self, instances: list[Instance], count: bool = True) -> list[tuple[int, str]]:
        """Index and description of each that differs."""
        for case, instance in zip(self.oracle.cases, instances, strict=False):
            fill(case, instance)
        self.oracle.run(len(instances))
        different = []
        for index, instance in enumerate(instances):
            case = self.oracle.cases[index]
            lines = self._compare(instance, case)
            if count:
                self.coverage.note(instance.shape, case.vector)
            if lines:
                different.append((index, "\n    ".join([describe(instance), *lines])))
        return different

    def _compare(self, instance: Instance, case: Any) -> list[str]:
        after = self._after
        try:
            vector, error = self.ours.run(case, after)
        except Lost as lost:
            self.ours.close()
            self.ours = Ours()
            return [f"ours: {lost}"]
        cr2 = self.ours.arch.cr2
        mmx_fault = vector != BP and instance.shape.row.source != "x87.tab"
        return [
            *_fault(instance, case, vector, error, cr2),
            *_words(instance, case.after, after, vector),
            *_memory(instance, case, self.ours, vector),
            *_vectors(instance, case.after, after, mmx_fault),
        ]

    def batches(
        self, seed: int, begin: int, end: int, sequences: bool = False
    ) -> Iterator[list[tuple[int, str]]]:
        """Runs cases begin to end - 1 of a seed; yields what differs, by number, a batch at a time."""
        make = self.several if sequences else self.instance
        for first in range(begin, end, BATCH):
            instances = [make(seed, number) for number in range(first, min(first + BATCH, end))]
            yield [(first + index, text) for index, text in self.run(instances, not sequences)]
