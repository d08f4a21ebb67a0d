"""Differential tests from the command line."""

from __future__ import annotations

import argparse
import collections
import random
import sys
import time
from typing import Any

from tests.vcpu.differential import generate, sides, undefined
from tests.vcpu.differential.sides import CODE_LINEAR, DATA_LINEAR, USER_DATA, layout


def fill(case: Any, instance: generate.Instance) -> None:
    before = case.before
    for i in range(16):
        before.gpr[i] = instance.gpr[i]
    before.rip = (0 if instance.shape.bits == 16 else CODE_LINEAR) + instance.code_at
    before.rflags = instance.rflags
    before.cs, before.ss, before.ds, before.es = instance.cs, USER_DATA, instance.ds, instance.ds
    before.fs = before.gs = 0
    before.fs_base, before.gs_base = generate.FS_BASE, generate.GS_BASE
    layout().memmove(before.fx, instance.fx, len(instance.fx))
    for i in range(3):
        case.patch[i].size = 0
    for i, (at, data) in enumerate(instance.patches[:3]):
        patch = case.patch[i]
        patch.at, patch.size = at, len(data)
        layout().memmove(patch.bytes, data, len(data))
    code = instance.code[:sides.CODE_SIZE - instance.code_at]
    case.code_at, case.code_size = instance.code_at, len(code)
    layout().memmove(case.code, code, len(code))


def plain_fx() -> bytes:
    fx = bytearray(512)
    fx[0:2] = b"\x7f\x03"
    fx[24:28] = b"\x80\x1f\0\0"
    return bytes(fx)


NAMES = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
MASK64 = (1 << 64) - 1
VISIBLE = 0x10000 | 0x40000 | 0xFD5


def compare(instance: generate.Instance, case: Any, ours: sides.Ours, after: Any, vector: int, error: int) -> list[str]:
    out = []
    host = case.after
    width = MASK64 if instance.shape.bits == 64 else 0xFFFFFFFF
    for i in range(16):
        if (host.gpr[i] ^ after.gpr[i]) & width:
            out.append(f"{NAMES[i]} host {host.gpr[i]:#x} ours {after.gpr[i]:#x}")
    if host.rip != after.rip:
        out.append(f"rip host {host.rip:#x} ours {after.rip:#x}")
    # Linux reports P for kernel addresses whatever is there
    ignore = 1 if vector == 14 and case.cr2 >= (1 << 47) - 4096 else 0
    if case.vector != vector or (case.error ^ error) & ~ignore:
        out.append(f"vector host {case.vector} ({case.error:#x}) ours {vector} ({error:#x})")
    # Which byte of a long operand is named is the hosts' choice
    shift = 12 if instance.shape.row.mnemonic in generate.STATE_SIZES else 0
    if vector == 14 and case.vector == 14 and case.cr2 >> shift != ours.arch.cr2 >> shift and instance.shape.row.mnemonic != "CMPS":
        out.append(f"cr2 host {case.cr2:#x} ours {ours.arch.cr2:#x}")
    mask = VISIBLE & ~(instance.undefined or undefined.flags(instance))
    if (host.rflags ^ after.rflags) & mask:
        out.append(f"rflags host {host.rflags:#x} ours {after.rflags:#x} differ {(host.rflags ^ after.rflags) & mask:#x}")
    mine = sides.core_ffi.buffer(sides.core_ffi.cast("char *", ours.data_address), sides.DATA_SIZE)[:]
    theirs = layout().buffer(case.data)[:]
    # Intel's CPUs store the return address before they find that the target is not canonical, AMD's manual says #GP before;
    # ENTER has pushed before it finds that the last word cannot be written
    if mine != theirs and not (vector != 3 and instance.shape.row.mnemonic in ("CALL", "ENTER", "PUSHA")):
        at = next(i for i in range(sides.DATA_SIZE) if mine[i] != theirs[i])
        out.append(f"data at {DATA_LINEAR + at:#x} host {theirs[at:at + 16].hex(' ')} ours {mine[at:at + 16].hex(' ')}")
    a, b = layout().buffer(host.fx)[:416], layout().buffer(after.fx)[:416]
    row = instance.shape.row
    # An MMX instruction that faults has on the hosts seen already made the x87 registers MMX registers
    if row.source == "sse.tab" and "x87" in row.words and vector != 3:
        a, b = a[24:28] + a[160:], b[24:28] + b[160:]
        if a != b:
            out.append(f"xmm\n   host {a.hex()}\n   ours {b.hex()}")
    elif a[32:] != b[32:] or a[:6] != b[:6] or a[24:28] != b[24:28]:
        out.append(f"fx\n   host {a.hex()}\n   ours {b.hex()}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--source", default="integer.tab")
    parser.add_argument("-k", default="")
    parser.add_argument("--seq", action="store_true")
    parser.add_argument("-v", type=int, default=2)
    args = parser.parse_args()
    oracle, ours = sides.Oracle(), sides.Ours()
    after = layout().new("struct state *")
    shapes = [s for s in generate.shapes(args.bits) if s.row.source == args.source and args.k in s.key]
    if args.seq:
        shapes = [s for s in shapes if s.prefix == "" and s.row.mnemonic not in generate.STRINGS | generate.STACK | {
            "XLAT", "DIV", "IDIV", "JMP", "LOOP", "LOOPE", "LOOPNE", "JCXZ", "UD2", "UD1", "UD0", "CMPXCHG16B", "STD"}
            and not (s.row.mnemonic[0] == "B" and s.row.mnemonic[1] == "T" and s.row.operands[1].kind == "G" and s.form == "m") and (s.form != "m" or not s.row.mnemonic == "LEA")]
    print(len(shapes), "shapes")
    fails: dict[str, int] = collections.Counter()
    vectors: dict[int, int] = collections.Counter()
    began = time.monotonic()
    fx = plain_fx()
    done = 0
    while done < args.n:
        batch = []
        for i in range(sides.BATCH):
            shape = shapes[(done + i) % len(shapes)]
            if args.seq:
                instance = generate.sequence(shapes, random.Random(f"{args.seed}:{done + i}"))
            else:
                instance = generate.Encoder(shape, random.Random(f"{args.seed}:{done + i}")).build()
            instance.fx = instance.fx or fx
            fill(oracle.cases[i], instance)
            batch.append(instance)
        oracle.run(len(batch))
        for i, instance in enumerate(batch):
            case = oracle.cases[i]
            try:
                vector, error = ours.run(case, after)
            except RuntimeError as e:
                difference = [str(e)]
                ours.close()
                ours = sides.Ours()
            else:
                difference = compare(instance, case, ours, after, vector, error)
            vectors[case.vector] += 1
            if difference:
                fails[instance.shape.key] += 1
                if fails[instance.shape.key] <= args.v:
                    print(f"== {instance.shape.key} case {done + i} [{instance.code.hex(' ')}] flags {instance.rflags:#x}")
                    print("   " + " ".join(f"{NAMES[j]}={instance.gpr[j]:x}" for j in range(16)), f"target {instance.target or 0:x} at {instance.code_at:x} ds {instance.ds:x}")
                    for line in difference:
                        print("  ", line)
                    sys.stdout.flush()
        done += len(batch)
    print(done, "cases", time.monotonic() - began, "s", "vectors", dict(vectors))
    rows: dict[str, int] = collections.Counter()
    for key, n in fails.items():
        rows[key] += n
    print(len(fails), "shapes differ")
    for key, n in sorted(rows.items()):
        print(f"{n:5} {key}")


if __name__ == "__main__":
    main()
