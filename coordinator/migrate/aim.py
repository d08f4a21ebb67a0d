"""Stopping a machine while a drive stands in a chosen phase: ``migrate-set-parameters
x-aim=DRIVE=PHASE[:NTH]``.

A drive is caught at an access whose reply is kept back until its vCPU has been called out of the guest, so
nothing may come between the catch and the stop: the migration waits for it, not whoever asks for one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from coordinator.contract import messages
from coordinator.contract.drives import DrivePhase
from coordinator.contract.errors import ConfigError
from coordinator.machine import Vm

#: for how long the guest runs on for a phase that does not come, ms of the guest
PATIENCE_MS = 5_000


@dataclass(frozen=True)
class Aim:
    """At the ``nth`` time that the drive enters the phase from now on."""

    drive: str
    phase: DrivePhase
    nth: int = 1

    @staticmethod
    def parse(text: str) -> Aim | None:
        """DRIVE=PHASE[:NTH], empty for none; ConfigError names the phases."""
        if not text:
            return None
        drive, _, rest = text.rpartition("=")
        word, colon, number = rest.partition(":")
        words = [phase.value for phase in DrivePhase]
        if not drive or word not in words or (colon and not _counts(number)):
            raise ConfigError(f"x-aim {text}: is not DRIVE=PHASE[:NTH] with one of {', '.join(words)}")
        return Aim(drive, DrivePhase(word), int(number or 1))


def _counts(text: str) -> bool:
    """A number from 1 on, of a size that can be waited for."""
    return text.isascii() and text.isdigit() and 1 <= int(text[:7]) and len(text) <= 6


@asynccontextmanager
async def caught(vm: Vm, aim: Aim) -> AsyncIterator[bool]:
    """Whether the drive stands there, or did not come there in time. It is let go at the end, if it has not
    gone on before."""
    news: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def listen(name: str, data: dict[str, Any]) -> None:
        if name in ("X_PHASE_REACHED", "X_PHASE_MISSED") and not news.done():
            news.set_result(name == "X_PHASE_REACHED")

    vm.on_event.append(listen)
    try:
        for host in vm.hosts:
            arm = messages.ArmPhase(
                serial=vm.next_serial(), drive=aim.drive, phase=aim.phase, nth=aim.nth, timeout_ms=PATIENCE_MS
            )
            await vm.command(host, arm)
        yield await news
    finally:
        vm.on_event.remove(listen)
        if vm.state == "running":
            for host in vm.hosts:
                await vm.command(host, messages.DisarmPhase(serial=vm.next_serial()))
