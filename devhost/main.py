"""Entry point of a device-host process."""

from __future__ import annotations

import logging

from coordinator.contract import messages
from coordinator.contract.config import DevhostConfig
from coordinator.contract.errors import AtollError
from coordinator.contract.island import enter
from coordinator.contract.segment import Segment
from devhost.commands import Commands
from devhost.pc import Pc
from devhost.service import Service

log = logging.getLogger(__name__)


def main(config: DevhostConfig) -> None:
    """Serve until told to quit, or until the coordinator dies."""
    enter(f"devhost{config.index}", config.vm, config.parent, config.log)
    service = Service(config, Segment.attach(config.segment_fd))
    try:
        service.handle = Commands(Pc(service, config.machine)).handle
    except AtollError as error:
        service.channel.notify(messages.Failed(error=str(error)))
        service.channel.flush()
        raise
    service.run()
