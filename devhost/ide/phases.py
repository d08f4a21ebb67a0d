"""Where a command can stand, and what is kept about a block request in flight."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Protocol

from coordinator.contract.device import Dma
from coordinator.contract.errors import RecordError
from devhost.ide.backend import Buffer
from devhost.ide.busmaster import BusMaster, Plan
from devhost.ide.records import DriveState

#: bytes read or written at once for PIO and buffered DMA: a multiple of all sector sizes
CHUNK = 64 * 1024
#: largest single request aimed at guest memory
REQUEST_LIMIT = 4 * 1024 * 1024
#: more separate regions than this go through one bounce buffer instead
MAX_REGIONS = 512
#: largest buffer a record may bring: a chunk of 2,048-byte sectors grown to raw sectors
MAX_BUFFER = CHUNK * 2


class Phase(enum.Enum):
    """Where a command stands."""

    IDLE = "idle"
    PACKET = "packet"  # ATAPI: waits for the rest of the command packet
    PIO_IN = "pio-in"  # DRQ, the host reads a block
    PIO_OUT = "pio-out"  # DRQ, the host writes a block
    DMA_WAIT = "dma-wait"  # the drive asks for DMA, the bus master is not running or out of descriptors
    MEDIUM = "medium"  # BSY, a block request is due or in flight
    INCOMPLETE = "incomplete"  # ATAPI: loaded from an old record without the command, see old_record.py


class Request(enum.Enum):
    """What the command does with the medium."""

    NONE = "none"
    READ = "read"
    WRITE = "write"
    VERIFY = "verify"  # read and forget
    FLUSH = "flush"


class Power(enum.Enum):
    """ATA/ATAPI-6 6.11."""

    ACTIVE = "active"
    IDLE = "idle"
    STANDBY = "standby"
    SLEEP = "sleep"


class Bus(Protocol):
    """What a drive sees of its channel."""

    dma: Dma
    master: BusMaster

    def interrupt_changed(self) -> None: ...


@dataclass(slots=True)
class Flight:
    """A request under way: ``copies`` are bounce buffers by region, ``residue`` bytes short of a sector."""

    cookie: int
    length: int
    plan: Plan | None = None
    data: bytearray = field(default_factory=bytearray)
    copies: list[tuple[int, int, Buffer | None]] = field(default_factory=list)
    residue: bytes = b""


def check_state(state: DriveState, sector: int, medium: int) -> tuple[Phase, Request, Power]:
    """Phase, request and power of a record; RecordError where its cursors do not fit together.

    ``sector`` and ``medium`` are the sizes of a sector and of the medium in bytes.
    """
    try:
        phase, request, power = Phase(state.phase), Request(state.request), Power(state.power)
    except ValueError as error:
        raise RecordError(f"record of an IDE drive: {error}") from None
    data = len(state.buffer)
    fits = data <= MAX_BUFFER and state.position <= data and state.burst_end <= data
    if request in (Request.NONE, Request.FLUSH):
        fits &= not state.remaining and not state.direct
    else:
        fits &= state.offset + state.remaining <= medium
        fits &= state.to_host == (request is not Request.WRITE)
    if phase in (Phase.PIO_IN, Phase.PIO_OUT):
        fits &= state.position < state.burst_end and state.to_host == (phase is Phase.PIO_IN)
    elif state.direct:
        fits &= state.remaining > 0 and data < sector and not (data and state.to_host)
    elif phase is Phase.INCOMPLETE:
        fits &= request is Request.NONE and not data
    elif phase is Phase.DMA_WAIT:
        fits &= state.position < data
    elif phase is Phase.MEDIUM:
        fits &= request is Request.FLUSH or state.remaining > 0
        fits &= request is not Request.WRITE or 0 < data <= state.remaining and data % sector == 0
    if not fits or not state.direct and (state.offset | state.remaining) % sector:
        raise RecordError("record of an IDE drive: a cursor is past its data or the medium")
    return phase, request, power
