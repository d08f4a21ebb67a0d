"""Entry point of a device-host process."""

from __future__ import annotations

import logging

import numpy.ma  # noqa: F401 - which NumPy imports late, and a sandbox does not let it

from coordinator.contract import messages
from coordinator.contract.config import DevhostConfig
from coordinator.contract.errors import AtollError
from coordinator.contract.island import become, enter
from coordinator.contract.sandbox import Access, Sandbox
from coordinator.contract.segment import Segment
from coordinator.contract.standby import Orders
from devhost.commands import Commands
from devhost.pc import Pc
from devhost.rehearsal import rehearse
from devhost.service import Service

log = logging.getLogger(__name__)


def places(config: DevhostConfig) -> list[tuple[str | int, Access]]:
    """What it needs to see while it gets ready: where its socket will be, and the card's ROM."""
    roms = [config.machine.vga_rom] if config.machine.vga_rom is not None else []
    return [(config.runtime, Access.SOCKETS), *((rom, Access.READ) for rom in roms)]


def main(config: DevhostConfig) -> None:
    """Serve until told to quit, or until the coordinator dies; as a standby, once it is needed."""
    sandbox = Sandbox("devhost", _role(config), config.sandbox, places(config))
    if config.order_fds:
        config = _stand_by(config, sandbox)
    else:
        enter(_role(config), config.vm, config.parent, config.log, sandbox)
    service = Service(config, Segment.attach(config.segment_fd))
    try:
        service.handle = Commands(Pc(service, config.machine)).handle
    except AtollError as error:
        service.channel.notify(messages.Failed(error=str(error)))
        service.channel.flush()
        raise
    sandbox.seal()
    service.run()


def _role(config: DevhostConfig) -> str:
    return f"devhost{config.index}"


def _stand_by(config: DevhostConfig, sandbox: Sandbox) -> DevhostConfig:
    """Get ready for whichever device host dies, and wait until one does."""
    enter("standby-devhost", config.vm, config.parent, config.log, sandbox)
    orders = Orders(config.order_fds[0])
    rehearse(config, orders.waiting)
    config, log_fd = orders.take(DevhostConfig)
    sandbox.name = _role(config)
    become(_role(config), config.vm, log_fd)
    return config
