"""Entry point of a device-host process."""

from __future__ import annotations

import logging

import numpy.ma  # noqa: F401 - which NumPy imports late, and a sandbox does not let it

from coordinator.contract import messages
from coordinator.contract.config import DevhostConfig
from coordinator.contract.errors import AtollError
from coordinator.contract.island import enter
from coordinator.contract.sandbox import Access, Sandbox
from coordinator.contract.segment import Segment
from devhost.commands import Commands
from devhost.pc import Pc
from devhost.service import Service

log = logging.getLogger(__name__)


def places(config: DevhostConfig) -> list[tuple[str | int, Access]]:
    """What it needs to see while it gets ready: where its socket will be, and the card's ROM."""
    roms = [config.machine.vga_rom] if config.machine.vga_rom is not None else []
    return [(config.runtime, Access.SOCKETS), *((rom, Access.READ) for rom in roms)]


def main(config: DevhostConfig) -> None:
    """Serve until told to quit, or until the coordinator dies."""
    role = f"devhost{config.index}"
    sandbox = Sandbox("devhost", role, config.sandbox, places(config))
    enter(role, config.vm, config.parent, config.log, sandbox)
    service = Service(config, Segment.attach(config.segment_fd))
    try:
        service.handle = Commands(Pc(service, config.machine)).handle
    except AtollError as error:
        service.channel.notify(messages.Failed(error=str(error)))
        service.channel.flush()
        raise
    sandbox.seal()
    service.run()
