"""A vCPU's record: a program that is stopped anywhere goes on in another machine as if nothing had been."""

from __future__ import annotations

import contextlib
import random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from coordinator.contract.errors import RecordError
from coordinator.contract.layout import struct_get
from coordinator.contract.state import pack, unpack
from tests.vcpu.flat import CODE, Flat, compile_c
from vcpu import state
from vcpu._core import ffi, lib
from vcpu.state import CpuRecord

#: integer, string, x87 and SSE work with values in flight in all of them; its result depends on each step
PROGRAM = """
static double table[64];
static unsigned char bytes[512];
long entry(long a, long b)
{
    double sum = 1.5;
    long double deep = 0.25L;
    unsigned long x = (unsigned long)a | 1;
    for (int i = 0; i < 400; i++) {
        x ^= x << 13; x ^= x >> 7; x ^= x << 17;
        table[i & 63] = sum;
        sum = sum * 0.75 + (double)(x & 0xffff);
        deep = deep * 0.5L + (long double)i / 3.0L;
        __builtin_memset(bytes, (int)x, 64 + (x & 255));
        bytes[i] += (unsigned char)(long)deep;
        if (x & 1) sum -= table[(i + 7) & 63];
    }
    long r = (long)sum ^ (long)(deep * 1000) ^ (long)x;
    for (int i = 0; i < 512; i++) r = r * 31 + bytes[i];
    return r + b;
}
"""


def core(flat: Flat) -> Any:
    """What state.py needs of a Core."""
    return SimpleNamespace(handle=flat.cpu, arch=flat.arch, block=flat.block)


def moved(flat: Flat) -> Flat:
    """The same in another segment and another core."""
    other = Flat()
    other.write(0, flat.read(0, flat.segment.ram_size))
    other.segment.stop_time()
    time = flat.segment.header.time
    flat.segment.stop_time()
    other.segment.set_time(int(time.guest_ns), int(time.wall_ns), int(time.tsc_khz))
    state.load(core(other), 0, state.save(core(flat), 0))
    other.segment.start_time()
    flat.segment.start_time()
    lib.core_halt_exits(other.cpu, 1)
    return other


def arch(flat: Flat) -> dict[str, Any]:
    return struct_get(ffi, flat.arch, state.OMITTED)


def run_whole(code: bytes) -> tuple[int, bytes]:
    flat = Flat()
    flat.run(code, rdi=12345, rsi=7)
    result = flat.get("rax"), flat.read(CODE, 1 << 20)
    flat.close()
    return result


def test_stopped_anywhere_it_goes_on_elsewhere() -> None:
    code = compile_c(PROGRAM)
    expected = run_whole(code)
    rng = random.Random(4)
    for _ in range(12):
        flat = Flat()
        flat.run(code, budget=rng.randrange(1, 9000), rdi=12345, rsi=7)
        for _ in range(rng.randrange(3)):
            lib.core_run(flat.cpu, rng.randrange(1, 3000))
        other = moved(flat)
        assert arch(other) == arch(flat)
        lib.core_run(other.cpu, 1 << 40)
        assert (other.get("rax"), other.read(CODE, 1 << 20)) == expected
        flat.close()
        other.close()


def well_formed() -> CpuRecord:
    flat = Flat()
    record = unpack(state.save(core(flat), 0)["vcpu"], CpuRecord)
    flat.close()
    return record


def test_interrupts_that_are_posted_travel() -> None:
    flat = Flat()
    flat.block.posted_nmi = flat.block.posted_init = 1
    flat.block.posted_sipi = 0x99
    flat.block.extint_level = 1
    flat.block.posted_irr[1], flat.block.posted_tmr[3] = 1 << 40, 5
    for activity in range(4):
        flat.arch.activity = activity
        records = state.save(core(flat), 0)
        other = Flat()
        state.load(core(other), 0, records)
        assert state.save(core(other), 0) == records
        assert other.block.posted_irr[1] == 1 << 40 and other.block.posted_sipi == 0x99
        assert other.arch.activity == activity
        other.close()
    flat.close()


@pytest.mark.parametrize(
    "change",
    [
        {"index": 1},
        {"posted": {}},
        {"posted": dict.fromkeys(state.POSTED, 1 << 32)},
        {"posted": dict.fromkeys(state.POSTED, -1)},
        {"posted_bits": dict.fromkeys(state.POSTED_BITS, [0, 0, 0])},
        {"pdpte": [0] * 5},
        {"arch": {}},
    ],
)
def test_a_record_that_does_not_fit_changes_nothing(change: dict[str, Any]) -> None:
    flat = Flat()
    before = state.save(core(flat), 0)
    blob = pack(msgspec.structs.replace(well_formed(), **change))
    with pytest.raises(RecordError):
        state.load(core(flat), 0, {"vcpu": blob})
    assert state.save(core(flat), 0) == before
    flat.close()


@pytest.mark.parametrize("field", ["activity", "cpl"])
def test_fields_that_cannot_be(field: str) -> None:
    flat = Flat()
    record = well_formed()
    wrong = msgspec.structs.replace(record, arch={**record.arch, field: 4})
    with pytest.raises(RecordError, match="cannot be"):
        state.load(core(flat), 0, {"vcpu": pack(wrong)})
    flat.close()


@pytest.mark.parametrize(
    ("mxcsr", "xcr0"),
    [(1 << 16, 1), (0xFFFFFFFF, 3), (0x1F80, 0), (0x1F80, 2), (0x1F80, 7), (0x1F80, 1 << 63)],
)
def test_registers_that_hold_what_no_guest_can_put_there(mxcsr: int, xcr0: int) -> None:
    flat = Flat()
    before, record = state.save(core(flat), 0), well_formed()
    fpu = {**record.arch["fpu"], "mxcsr": mxcsr}
    wrong = msgspec.structs.replace(record, arch={**record.arch, "fpu": fpu, "xcr0": xcr0})
    with pytest.raises(RecordError, match="cannot be"):
        state.load(core(flat), 0, {"vcpu": pack(wrong)})
    assert state.save(core(flat), 0) == before
    flat.close()


#: every form of what a hostile stream may say of a register, segment or APIC word
EDGES = (0, 1, 0xFFF, 0xFFFF, 1 << 31, 0xFFFFFFFF, (1 << 47) - 1, 1 << 47, 1 << 63, (1 << 64) - 1)
#: fld st; fadd; fwait; fnclex; addps; stmxcsr; push, pop, pushf, popf; cpuid; rdtsc; xgetbv; str; hlt
TOUCHES_ALL = "d9c0 dcc1 9b dbe2 0f58c1 50 0fae1c24 58 9c 9d 31c9 0fa2 0f31 31c9 0f01d0 0f00c8 f4"


def spoilt(rng: random.Random, value: Any) -> Any:
    if isinstance(value, int):
        return rng.choice((*EDGES, rng.getrandbits(64), value ^ 1 << rng.randrange(16)))
    if isinstance(value, bytes):
        return rng.randbytes(len(value))
    at = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[at] = spoilt(rng, value[at])
    return changed


def test_a_hostile_record_is_refused_or_runs() -> None:
    """To whatever end; were it a fault of the host's, this process would end."""
    rng, record = random.Random(4), well_formed()
    loaded = 0
    for _ in range(100):
        arch = record.arch
        for name in rng.choices(("seg", "fpu", "apic", "cr0", "cr3", "cr4", "efer", "rflags", *arch), k=3):
            arch = {**arch, name: spoilt(rng, arch[name])}
        arch = {**arch, "activity": 0, "cpl": arch["seg"][2]["attr"] >> 5 & 3}
        pdpte = [rng.choice(EDGES) for _ in range(4)]
        flat = Flat()
        lib.core_halt_exits(flat.cpu, 1)
        flat.write(CODE, bytes.fromhex(TOUCHES_ALL))
        with contextlib.suppress(RecordError):
            blob = pack(msgspec.structs.replace(record, arch=arch, pdpte=pdpte))
            state.load(core(flat), 0, {"vcpu": blob})
            loaded += 1
            flat.arch.rip = CODE
            for _ in range(3):
                lib.core_run(flat.cpu, 50)
            state.save(core(flat), 0)
        flat.close()
    assert loaded > 40


def test_every_field_must_be_there() -> None:
    flat = Flat()
    record = well_formed()
    for name in record.arch:
        fields = {key: value for key, value in record.arch.items() if key != name}
        with pytest.raises(RecordError, match=name):
            state.load(core(flat), 0, {"vcpu": pack(msgspec.structs.replace(record, arch=fields))})
    for records in ({}, {"vcpu": b"junk"}, {"vcpu": pack(record), "more": b""}):
        with pytest.raises(RecordError):
            state.load(core(flat), 0, records)
    flat.close()
