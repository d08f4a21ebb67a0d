"""A vCPU's registers for the monitor, read from the segment; of one that has died, from what it left."""

from __future__ import annotations

from typing import Any

from coordinator import registers
from coordinator.contract.errors import UsageError
from coordinator.machine import Vm
from coordinator.registers import GPR, SEGMENTS


def _arch(vm: Vm, cpu: int) -> Any:
    if (loss := vm.loss(cpu)) is not None:
        return loss.block.arch
    assert vm.segment is not None
    return vm.segment.vcpu(cpu).arch


def register(vm: Vm, cpu: int, name: str) -> int:
    """The value of ``rip``, ``rax``, ``cr3`` and so on."""
    arch = _arch(vm, cpu)
    name = name.lower()
    if name in GPR:
        return int(arch.gpr[GPR.index(name)])
    if name in ("pc", "eip"):
        name = "rip"
    if name in SEGMENTS:
        return int(arch.seg[SEGMENTS.index(name)].selector)
    if name in ("rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer"):
        return int(getattr(arch, name))
    raise UsageError(f"there is no register '${name}'")


def describe(vm: Vm, cpu: int) -> str:
    """All of them."""
    return registers.describe(_arch(vm, cpu))
