"""QMP commands about the phases of drives, all our own (``x-``): aim at one, and how long each has lasted.

Events: X_PHASE_REACHED and X_PHASE_MISSED, see PhaseReached and PhaseMissed in contract/messages.py.
"""

from __future__ import annotations

from typing import Any

from coordinator.contract import messages
from coordinator.contract.drives import DrivePhase
from coordinator.contract.errors import ConfigError
from coordinator.machine import Vm


async def arm(vm: Vm, device: str, phase: str, nth: int = 1, timeout: int = 60_000, hold: int = 5_000) -> None:
    """Times are milliseconds of the guest."""
    words = [known.value for known in DrivePhase]
    if phase not in words:
        raise ConfigError(f"Parameter 'phase' does not accept value '{phase}' (known: {', '.join(words)})")
    if min(nth, timeout, hold) < 1:
        raise ConfigError("nth, timeout and hold are numbers from 1 on")
    for host in vm.hosts:
        command = messages.ArmPhase(
            serial=vm.next_serial(),
            drive=device,
            phase=DrivePhase(phase),
            nth=nth,
            timeout_ms=timeout,
            hold_ms=hold,
        )
        await vm.command(host, command)


async def disarm(vm: Vm) -> None:
    for host in vm.hosts:
        await vm.command(host, messages.DisarmPhase(serial=vm.next_serial()))


async def query(vm: Vm, reset: bool = False) -> list[dict[str, Any]]:
    """A list as of QueryPhases."""
    found: list[dict[str, Any]] = []
    for host in vm.hosts:
        found += await vm.command(host, messages.QueryPhases(serial=vm.next_serial(), reset=reset))
    return found
