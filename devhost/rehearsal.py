"""A standby does all that it will do when it takes over, in a segment of its own: what a process does for the
first time costs several times as much (late imports, pages that it shares with the fork server, caches).
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import msgspec

from coordinator.contract.config import DevhostConfig, Machine, Media, rehearsal_folder
from coordinator.contract.segment import Segment
from devhost.commands import Commands
from devhost.pc import Pc
from devhost.service import Service


def rehearse(config: DevhostConfig, waiting: Callable[[], bool]) -> None:
    """Be a device host that starts, and one that takes over from it, unless something is ``waiting``."""
    real = Segment.attach(config.segment_fd)
    header = real.header
    segment = Segment.create(
        vcpus=real.vcpus, ram=real.ram_size, vram=int(header.vram_size), rom=int(header.rom_size),
        hosts=int(header.hosts), tsc_khz=config.machine.tsc_khz,
    )  # fmt: skip
    for replaces in (False, True):
        if not waiting():
            _live(config, segment, replaces)
    segment.close()
    gc.collect()
    gc.freeze()


def _live(config: DevhostConfig, segment: Segment, replaces: bool) -> None:
    """To where a device host would say hello."""
    machine = _without_media(config.machine)
    folder = rehearsal_folder(config.runtime)
    config = msgspec.structs.replace(config, machine=machine, runtime=folder, replaces=replaces, fault="")
    service = Service(config, segment)
    service.handle = Commands(Pc(service, machine)).handle
    service.end_event()
    service.close()


def _without_media(machine: Machine) -> Machine:
    """They are the block daemon's."""
    drives = (drive for drive in machine.drives if drive.media is Media.CDROM)
    empty = tuple(msgspec.structs.replace(drive, file=None) for drive in drives)
    return msgspec.structs.replace(machine, drives=empty)
