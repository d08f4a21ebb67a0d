"""What is said of an island that has died: how, in which state, and the end of its log.

The state is in the segment, which outlives every island.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.contract.counters import EXIT_NAMES
from coordinator.islands import Island

if TYPE_CHECKING:
    from coordinator.crew import Crew


def describe(crew: Crew, island: Island) -> str:
    """One line."""
    parts = [island.epitaph(), _last_state(crew, island.role)]
    if words := island.last_words():
        parts.append(f"its log ends: {words}")
    return "; ".join(part for part in parts if part)


def _last_state(crew: Crew, role: str) -> str:
    segment = crew.segment
    if segment is None:
        return ""
    if role.startswith("vcpu"):
        block = segment.vcpu(int(role[4:]))
        arch, reason = block.arch, block.exit_reason
        name = EXIT_NAMES[reason] if reason < len(EXIT_NAMES) else str(reason)
        return (
            f"RIP={arch.rip:016x} CR3={arch.cr3:016x} RFLAGS={arch.rflags:08x} last exit: {name}"
            f" after {block.instructions} instructions"
        )
    if role.startswith("devhost"):
        host = segment.host(int(role[7:]))
        return (
            f"{host.sync_served} accesses answered, {host.posted_served} posted writes applied,"
            f" {host.dma_bytes} bytes of DMA"
        )
    images = ", ".join(f"{drive.id}={drive.file}" for drive in crew.machine.drives if drive.file is not None)
    return f"images: {images or 'none'}"
