"""The counters of a machine as one document: for ``-stats``, the demo's table and the tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

from coordinator.contract.counters import host_counters, pin_counters, vcpu_counters
from coordinator.machine import Vm


def collect(vm: Vm, wall_seconds: float) -> dict[str, Any]:
    """``accesses`` and ``roundtrips`` by device name, ``interrupts`` by vector, ``pins`` by IOAPIC pin."""
    segment = vm.segment
    assert segment is not None
    vcpus = [vcpu_counters(segment, i) for i in range(segment.vcpus)]
    accesses: dict[str, Counter[str]] = {}
    interrupts: Counter[str] = Counter()
    for counters in vcpus:
        for device, row in counters.pop("accesses").items():
            accesses.setdefault(device, Counter()).update(row)
        for vector, count in counters.pop("vectors").items():
            interrupts[f"{vector:#04x}"] += count
        counters["seconds_running"] = counters.pop("run_ns") / 1e9
        counters["seconds_halted"] = counters.pop("halt_ns") / 1e9
    host = host_counters(segment, 0)
    return {
        "name": vm.machine.name,
        "wall_seconds": wall_seconds,
        "vcpus": vcpus,
        "accesses": accesses,
        "roundtrips": host.pop("roundtrips"),
        "devhost": host,
        "interrupts": interrupts,
        "pins": pin_counters(segment),
    }
