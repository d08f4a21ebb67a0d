"""State of a channel and its drives as records; every field is checked when it is loaded."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from coordinator.contract.state import Record

U8 = Annotated[int, Meta(ge=0, le=0xFF)]
U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
U63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
FiveBytes = tuple[U8, U8, U8, U8, U8]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A piece of a record."""


class DriveState(Part, frozen=True, kw_only=True):
    """What both kinds of drive have, see drive.py. ``buffer`` is the data of the command, ``position`` the
    cursor of the host in it, ``burst_end`` the end of the DRQ block; ``offset`` and ``remaining`` count
    bytes of the medium. A request in flight is phase "medium": it is issued again after loading."""

    current: FiveBytes
    previous: FiveBytes
    device: U8
    status: U8
    error: U8
    intrq: bool
    phase: str
    opcode: U8
    request: str
    use_dma: bool
    to_host: bool
    direct: bool
    buffer: bytes
    position: U63
    burst_end: U63
    offset: U63
    remaining: U63
    power: str


class AtaState(DriveState, frozen=True, kw_only=True, tag="ata"):
    """``multiple`` sectors a DRQ block (0: off); ``heads`` and ``sectors`` of the current translation."""

    multiple: Annotated[int, Meta(ge=0, le=128)]
    heads: Annotated[int, Meta(ge=1, le=16)]
    sectors: Annotated[int, Meta(ge=1, le=255)]
    transfer_mode: U8
    write_cache: bool
    look_ahead: bool


class SenseState(Part, frozen=True, kw_only=True):
    """Sense data not yet fetched (SPC-3 4.5)."""

    key: U8
    asc: U8
    ascq: U8
    information: U32 | None


class AtapiState(DriveState, frozen=True, kw_only=True, tag="atapi"):
    """``packet`` holds the ``packet_filled`` bytes that came in; ``attention`` and ``events`` are queues."""

    packet: Annotated[bytes, Meta(min_length=12, max_length=12)]
    packet_filled: Annotated[int, Meta(ge=0, le=12)]
    byte_limit: U16
    shape: U8
    sense: SenseState
    attention: tuple[str, ...]
    events: tuple[U8, ...]
    tray_open: bool
    prevent: Annotated[int, Meta(ge=0, le=3)]
    retries: U8
    recovery: U8
    current_lba: U32
    transfer_mode: U8


class BusMasterState(Part, frozen=True, kw_only=True):
    """Registers and PRD cursor, see busmaster.py."""

    command: U8
    status: U8
    pointer: U32
    descriptor: U32
    address: U63
    left: Annotated[int, Meta(ge=0, le=0x10000)]
    last: bool


class ChannelRecord(Record, frozen=True, kw_only=True):
    """One IDE channel: control register, line level, bus master, drives 0 and 1 (or None)."""

    kind = "ide-channel"

    control: U8
    selected: Annotated[int, Meta(ge=0, le=1)]
    line: bool
    master: BusMasterState
    drives: tuple[AtaState | AtapiState | None, AtaState | AtapiState | None]
