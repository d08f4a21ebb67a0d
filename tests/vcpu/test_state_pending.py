"""What is pending when a vCPU is saved comes where it is loaded, at the guest time at which it was due: APIC
timers (SDM vol. 3 section 11.5.4), breakpoints behind MOV SS (section 6.8.3). Guest time is set by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from coordinator.contract.errors import RecordError
from coordinator.contract.state import pack, unpack
from tests.vcpu.guest import DATA, DATA32, DB, RAM, TF, Guest
from tests.vcpu.test_apic import (
    CURRENT,
    DEADLINE_MODE,
    EOI,
    INITIAL,
    LVT_TIMER,
    PERIODIC,
    TIMER,
    TSC_DEADLINE,
    at_time,
    guest,
    rdmsr,
    read,
    run,
    value_of,
    write,
    wrmsr,
)
from vcpu import state
from vcpu.state import CpuRecord, CpuRecord1

__all__ = ["guest"]

Make = Callable[..., Guest]


def core(guest: Guest) -> Any:
    """What state.py needs of a Core."""
    return SimpleNamespace(handle=guest.cpu, arch=guest.arch, block=guest.block)


def saved(guest: Guest) -> bytes:
    return state.save(core(guest), 0)["vcpu"]


def moved(make: Make, guest: Guest, record: bytes | None = None) -> Guest:
    """In another segment, where guest time stands at what it was."""
    other = make(guest.mode)
    other.write(0, guest.segment.dma_read(0, RAM))
    other.segment.stop_time()
    other.segment.set_time(guest.segment.guest_now(), 0)
    state.load(core(other), 0, {"vcpu": record or saved(guest)})
    other.labels = guest.labels
    return other


# ---- APIC timers ---------------------------------------------------------------------------------------
ARMED = {
    "one-shot": TIMER + write(LVT_TIMER, 0x40) + write(INITIAL, 5000),
    "periodic": TIMER + write(LVT_TIMER, PERIODIC | 0x40) + write(INITIAL, 5000),
    "deadline": DEADLINE_MODE + wrmsr(TSC_DEADLINE, 5000),
}


@pytest.mark.parametrize("kind", ARMED)
def test_an_armed_timer_fires_at_its_time(make_guest: Make, guest: Guest, kind: str) -> None:
    """Not before, and once; a periodic one at its next multiple again."""
    run(guest, ARMED[kind] + "sti")
    at_time(guest, 3000)
    here = moved(make_guest, guest)
    if kind == "deadline":
        run(here, rdmsr(TSC_DEADLINE) + "sti")
        assert here.rax == 5000
    else:
        run(here, read(CURRENT) + "sti")
        assert here.rax == 2000
    at_time(here, 4999)
    here.resume()
    assert here.done
    at_time(here, 5000)
    here.resume()
    assert here.vector == 0x40
    run(here, write(EOI, 0) + "sti\n nop\n nop")
    assert here.done
    for now, due in ((9999, False), (10_000, kind == "periodic")):
        at_time(here, now)
        here.resume()
        assert (here.vector == 0x40) == due


@pytest.mark.parametrize("kind", ARMED)
def test_a_timer_that_ran_out_while_the_machine_stood(make_guest: Make, guest: Guest, kind: str) -> None:
    """Where guest time goes ahead at load: at once, and missed periods are one interrupt."""
    run(guest, ARMED[kind] + "sti")
    here = moved(make_guest, guest)
    here.segment.set_time(17_500, 0)
    here.resume()
    assert here.vector == 0x40
    run(here, write(EOI, 0) + "sti\n nop\n nop")
    assert here.done
    assert value_of(here, CURRENT) == (2500 if kind == "periodic" else 0)


@pytest.mark.parametrize("kind", ARMED)
def test_the_timer_wakes_a_halted_vcpu_where_it_was_loaded(
    make_guest: Make, guest: Guest, kind: str
) -> None:
    """With time running there: nothing but the loaded deadline ends HLT."""
    run(guest, ARMED[kind] + "sti\n 1: hlt\n jmp 1b", budget=len(ARMED[kind].splitlines()) + 1)
    here = moved(make_guest, guest)
    here.segment.start_time()
    assert here.resume(50) == guest.block.exit_reason and here.vector == 0x40
    assert here.segment.guest_now() >= 5000


# ---- breakpoints ---------------------------------------------------------------------------------------
def behind_mov_ss(make_guest: Make) -> Guest:
    """Stopped behind MOV SS that has read a watched byte: the trap waits for the next instruction."""
    guest = make_guest("legacy")
    guest.put(DATA, DATA32, 2)
    guest.set(dr1=DATA, dr7=0x400 | 1 << 2 | 3 << 20)
    guest.run(f"mov ss, [{DATA}]\nshadow: inc ecx\nbehind: inc edx", budget=1)
    assert guest.rip == guest.labels["shadow"]
    return guest


def test_a_breakpoint_that_was_met_behind_mov_ss(make_guest: Make) -> None:
    here = moved(make_guest, behind_mov_ss(make_guest))
    here.resume()
    assert here.vector == DB and here.dr(6) == 0xFFFF0FF2
    assert here.stack()[0] == here.labels["behind"] and (here.rcx, here.rdx) == (1, 0)


def test_single_step_behind_mov_ss(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.set(rflags=2 | TF)
    guest.run(f"mov ss, [{DATA}]\nshadow: inc ecx\nbehind: nop", budget=0)
    guest.put(DATA, DATA32, 2)
    guest.resume(1)
    assert guest.rip == guest.labels["shadow"]
    here = moved(make_guest, guest)
    here.resume()
    assert here.vector == DB and here.stack()[0] == here.labels["behind"]


def test_version_1_still_loads(make_guest: Make) -> None:
    """It says nothing of a breakpoint, so there is none."""
    guest = behind_mov_ss(make_guest)
    record = unpack(saved(guest), CpuRecord)
    old = CpuRecord1(**{name: getattr(record, name) for name in CpuRecord1.__struct_fields__})
    here = moved(make_guest, guest, pack(old))
    here.resume()
    assert here.done and (here.rcx, here.rdx) == (1, 1)


@pytest.mark.parametrize("hit", [16, -1, 1 << 14])
def test_breakpoints_that_cannot_be(make_guest: Make, hit: int) -> None:
    guest = make_guest("legacy")
    wrong = msgspec.structs.replace(unpack(saved(guest), CpuRecord), debug_hit=hit)
    with pytest.raises(RecordError, match="breakpoints"):
        moved(make_guest, guest, pack(wrong))
