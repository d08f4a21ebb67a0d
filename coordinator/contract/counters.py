"""What the processes of a machine counted, as plain dicts: monitor, tables and tests read these."""

from __future__ import annotations

from typing import Any

from coordinator.contract._segment import lib
from coordinator.contract.segment import Segment

ACCESS_NAMES = ("sync", "posted", "shadow", "time", "memory", "nobody")
EXIT_NAMES = ("none", "io", "control", "inta", "shutdown", "budget", "debug", "error")


def vcpu_counters(segment: Segment, index: int) -> dict[str, Any]:
    """Counters of one vCPU; ``accesses`` is by device name and access class, zeros left out."""
    block = segment.vcpu(index)
    accesses: dict[str, dict[str, int]] = {}
    for device in range(lib.SEG_MAX_DEVICES):
        row = {name: n for name, n in zip(ACCESS_NAMES, block.accesses[device], strict=True) if n}
        if row:
            accesses[segment.device_name(device) if device else "nobody"] = row
    return {
        "instructions": block.instructions,
        "run_ns": block.run_ns,
        "halt_ns": block.halt_ns,
        "blocks_translated": block.blocks_translated,
        "blocks_dropped": block.blocks_dropped,
        "tlb_fills": block.tlb_fills,
        "code_events": block.code_events_seen,
        "exits": {name: block.exits[i] for i, name in enumerate(EXIT_NAMES) if block.exits[i]},
        "accesses": accesses,
        "vectors": {vector: block.vectors[vector] for vector in range(256) if block.vectors[vector]},
    }


def host_counters(segment: Segment, index: int) -> dict[str, Any]:
    """Counters of one device host; ``roundtrips`` is by device name."""
    block = segment.host(index)
    return {
        "sync_served": block.sync_served,
        "posted_served": block.posted_served,
        "timer_fires": block.timer_fires,
        "dma_bytes": block.dma_bytes,
        "roundtrips": {
            segment.device_name(device): block.roundtrips[device]
            for device in range(lib.SEG_MAX_DEVICES)
            if block.roundtrips[device]
        },
    }


def pin_counters(segment: Segment) -> dict[int, int]:
    """Interrupts delivered by IOAPIC pin, zeros left out."""
    delivered = segment.fabric.delivered
    return {pin: delivered[pin] for pin in range(lib.SEG_IOAPIC_PINS) if delivered[pin]}
