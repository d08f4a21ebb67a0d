"""What a vCPU leaves in the segment when it is killed, and that another process can be the vCPU then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.contract import messages
from coordinator.contract._segment import ffi as segment_ffi
from coordinator.contract._segment import lib
from tests.system.machine import until
from tests.vcpu.test_process import Coordinator, folder  # noqa: F401 - a fixture
from vcpu._core import ffi
from vcpu._core import lib as core

#: RFLAGS, SDM vol. 1 section 3.4.3
CF, FIXED, PF, AF, ZF, SF, OF = 1, 2, 4, 0x10, 0x40, 0x80, 0x800


@pytest.fixture
def coordinator(folder: Path) -> Iterator[Coordinator]:  # noqa: F811
    made = Coordinator(folder)
    yield made
    made.close()


def kill(coordinator: Coordinator) -> None:
    coordinator.process.kill()
    coordinator.process.wait()
    coordinator.segment.break_locks(coordinator.process.pid)
    coordinator.segment.lost(0)


def last_rflags(coordinator: Coordinator) -> int:
    address = int(segment_ffi.cast("uintptr_t", coordinator.segment.vcpu(0)))
    return int(core.core_last_rflags(ffi.cast("struct vcpu_block *", address)))


@pytest.mark.parametrize(
    ("source", "flags"),
    [
        ("mov eax, 0xffffffff\n add eax, 1", ZF | PF | AF | CF),
        ("mov eax, 0x7fffffff\n add eax, 1", SF | OF | AF | PF),
        ("xor eax, eax\n sub eax, 1", SF | AF | PF | CF),
        ("stc\n mov eax, 0xff\n inc eax", AF | PF | CF),
        ("mov eax, 0x80000001\n shl eax, 1\n", CF | OF),
    ],
)
def test_killed_in_the_guest_flags_are_exact(coordinator: Coordinator, source: str, flags: int) -> None:
    """They are worked out lazily; the guest is in a loop that changes none, at its first byte."""
    labels = coordinator.load(f"{source}\n mov edx, 1\n loop: jmp loop")
    coordinator.do(messages.Run)
    until(lambda: coordinator.arch.gpr[2] == 1, "the loop")
    kill(coordinator)
    assert coordinator.segment.vcpu(0).place == lib.PLACE_GUEST
    assert coordinator.arch.rip == labels["loop"]
    undefined = AF if "shl" in source else 0
    assert last_rflags(coordinator) & ~undefined == FIXED | flags


def test_killed_while_stopped_everything_is_exact(coordinator: Coordinator) -> None:
    labels = coordinator.load("fninit\n fld1\n mov ebx, 7\n loop: jmp loop")
    coordinator.do(messages.Run)
    until(lambda: coordinator.arch.gpr[3] == 7, "the loop")
    coordinator.do(messages.Stop)
    kill(coordinator)
    block = coordinator.segment.vcpu(0)
    assert block.place == lib.PLACE_OUTSIDE and block.parked == 1
    assert block.arch.rip == labels["loop"] and last_rflags(coordinator) == block.arch.rflags
    # 1.0 as the processor keeps it (SDM vol. 1 section 4.2.2); top of stack is 7 after one push
    assert bytes(block.arch.fpu.fpr[7])[:10] == bytes.fromhex("0000000000000080ff3f")
    assert block.exit_log[(block.exits_noted - 1) % lib.SEG_EXIT_SLOTS].reason == lib.EXIT_CONTROL


def test_killed_in_an_access_the_instruction_is_known(coordinator: Coordinator) -> None:
    coordinator.map_port(0x60)
    labels = coordinator.load("fninit\n fldpi\n mov ecx, 5\n in: in al, 0x60\n loop: jmp loop")
    coordinator.do(messages.Run)
    request = coordinator.request()
    kill(coordinator)
    block = coordinator.segment.vcpu(0)
    last = block.exit_log[(block.exits_noted - 1) % lib.SEG_EXIT_SLOTS]
    assert block.place == lib.PLACE_ACCESS
    assert (last.reason, last.rip, last.addr, last.width, last.write) == (
        lib.EXIT_IO, labels["in"], 0x60, 1, 0,
    )  # fmt: skip
    assert block.arch.fpu.tag_valid == 0x80  # one register is full
    # another process asks with a serial that the device host has not answered
    coordinator.start()
    coordinator.load("in al, 0x60\n loop: jmp loop")
    coordinator.do(messages.Run)
    again = coordinator.request()
    assert again.serial > request.serial
    coordinator.reply(again, b"\x42")
    coordinator.do(messages.Stop)
    assert coordinator.arch.gpr[0] & 0xFF == 0x42


def test_killed_in_hlt_the_next_instruction_is_known(coordinator: Coordinator) -> None:
    labels = coordinator.load("cli\n fninit\n fld1\n hlt\n behind: jmp behind")
    coordinator.do(messages.Run)
    until(lambda: coordinator.segment.vcpu(0).place == lib.PLACE_ASLEEP, "HLT")
    kill(coordinator)
    block = coordinator.segment.vcpu(0)
    assert (block.arch.rip, block.arch.activity) == (labels["behind"], lib.ACT_HALTED)
    assert block.arch.fpu.tag_valid == 0x80
