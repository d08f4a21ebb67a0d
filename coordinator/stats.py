"""The counters of a machine, read from the segment: for ``-stats``, the demo's table and the tests."""

from __future__ import annotations

from typing import Any

from coordinator.contract.segment import Segment
from coordinator.machine import Vm

CLASSES = ("sync", "posted", "shadow", "time", "memory", "nobody")


def collect(vm: Vm, wall_seconds: float) -> dict[str, Any]:
    """All counters as plain data; accesses and round trips by device name."""
    assert vm.segment is not None
    return {"name": vm.machine.name, "wall_seconds": wall_seconds, **snapshot(vm.segment)}


def snapshot(segment: Segment) -> dict[str, Any]:
    names = segment.device_names()
    accesses: dict[str, dict[str, int]] = {}
    vcpus = []
    interrupts: dict[str, int] = {}
    for i in range(segment.vcpus):
        block = segment.vcpu(i)
        for device, row in enumerate(block.accesses):
            for access_class, count in enumerate(row):
                if count:
                    by_class = accesses.setdefault(names.get(device, f"device{device}"), dict.fromkeys(CLASSES, 0))
                    by_class[CLASSES[access_class]] += count
        for vector, count in enumerate(block.vectors):
            if count:
                interrupts[f"{vector:#x}"] = interrupts.get(f"{vector:#x}", 0) + count
        vcpus.append(
            {
                "instructions": block.instructions,
                "seconds_running": block.run_ns / 1e9,
                "seconds_halted": block.halt_ns / 1e9,
                "blocks_translated": block.blocks_translated,
                "blocks_dropped": block.blocks_dropped,
                "tlb_fills": block.tlb_fills,
            }
        )
    roundtrips = {names.get(d, f"device{d}"): n for d, n in enumerate(segment.roundtrips(0)) if n}
    return {"vcpus": vcpus, "accesses": accesses, "roundtrips": roundtrips, "interrupts": interrupts}
