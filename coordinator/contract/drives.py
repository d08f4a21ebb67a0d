"""What a migration may do with a drive's command under way, and the names of the places where it can stand.

Used by the device host, the command line, QMP and the laboratory alike, so each word is written once.
"""

from __future__ import annotations

import enum

import msgspec

from coordinator.contract.errors import UsageError

#: longest drain that can be asked for, ms
MAX_DRAIN_MS = 600_000


class DrivePhase(enum.Enum):
    """Where a drive stands, as the guest could tell at the registers. The values are stable names."""

    #: no command, no interrupt
    IDLE = "idle"
    #: SRST is asserted
    RESET = "reset"
    #: the command has ended; its interrupt has not been read
    INTERRUPT_PENDING = "interrupt-pending"
    #: PACKET was taken, no byte of the packet has come
    PACKET_AWAITED = "packet-awaited"
    #: 1 to 11 bytes of the packet have come
    PACKET_PARTIAL = "packet-partial"
    #: the legacy window: the whole packet is there, and bus-master DMA has not begun
    PACKET_COMPLETE = "packet-complete"
    #: a disk's DMA command was taken, and bus-master DMA has not begun
    DMA_AWAITED = "dma-awaited"
    #: a block request whose data goes through the PRD table is due or in flight
    DMA_TRANSFER = "dma-transfer"
    #: part of the data has moved; the bus master was stopped or has no descriptors left
    DMA_STALLED = "dma-stalled"
    #: a block request for a PIO or buffered command is due or in flight
    MEDIUM = "medium"
    #: FLUSH CACHE is due or in flight
    FLUSH = "flush"
    #: DRQ: the host reads a block
    PIO_IN = "pio-in"
    #: DRQ: the host writes a block
    PIO_OUT = "pio-out"
    #: loaded from an old record without the command; the choice is made when the machine starts
    INCOMPLETE = "incomplete"
    #: the command was dropped: DRQ stays, no DMA will come, a reset ends it
    LOST = "lost"


class Stream(enum.Enum):
    """What the source puts into a CD-ROM drive's record."""

    FULL = "full"
    V0 = "v0"


class Incomplete(enum.Enum):
    """What the destination makes of a ``v0`` record whose DMA command is missing."""

    RESTART = "restart"
    ERROR = "error"
    DROP = "drop"


class DrivePolicy(msgspec.Struct, frozen=True):
    """Of one drive: ``drain_ms`` is how long the guest may run on for commands to end, None: not at all."""

    stream: Stream = Stream.FULL
    drain_ms: int | None = None
    incomplete: Incomplete = Incomplete.ERROR


#: driver -> property -> words that it takes. A disk has no v0: a write left behind would be lost data.
PROPERTIES: dict[str, dict[str, tuple[str, ...]]] = {
    "ide-cd": {
        "migrate-stream": tuple(word.value for word in Stream),
        "migrate-drain": ("off",),
        "migrate-incomplete": tuple(word.value for word in Incomplete),
    },
    "ide-hd": {"migrate-stream": (Stream.FULL.value,), "migrate-drain": ("off",)},
}


def set_property(policy: DrivePolicy, driver: str, name: str, value: str) -> DrivePolicy:
    """The policy with one property changed; UsageError names the choices. ``driver``: ide-cd or ide-hd."""
    known = PROPERTIES.get(driver)
    if known is None:
        raise UsageError(f"{driver}: choose one of {', '.join(PROPERTIES)}")
    words = known.get(name)
    if words is None:
        raise UsageError(f"{driver}.{name}: choose one of {', '.join(known)}")
    if name == "migrate-drain":
        return msgspec.structs.replace(policy, drain_ms=_drain(driver, value))
    if value not in words:
        raise UsageError(f"{driver}.{name}={value}: choose one of {', '.join(words)}")
    if name == "migrate-stream":
        return msgspec.structs.replace(policy, stream=Stream(value))
    return msgspec.structs.replace(policy, incomplete=Incomplete(value))


def _drain(driver: str, value: str) -> int | None:
    if value == "off":
        return None
    if value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= MAX_DRAIN_MS:
        return int(value)
    raise UsageError(f"{driver}.migrate-drain={value}: choose off, or milliseconds from 1 to {MAX_DRAIN_MS}")


def properties(driver: str, policy: DrivePolicy) -> dict[str, str]:
    """The policy as properties of a driver, the way ``set_property`` takes them."""
    values = {
        "migrate-stream": policy.stream.value,
        "migrate-drain": "off" if policy.drain_ms is None else str(policy.drain_ms),
        "migrate-incomplete": policy.incomplete.value,
    }
    return {name: values[name] for name in PROPERTIES[driver]}
