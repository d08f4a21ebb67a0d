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


class RegisterState(Record, frozen=True, kw_only=True):
    """What the host sees of a drive at the registers, and its power state."""

    current: FiveBytes
    previous: FiveBytes
    device: U8
    status: U8
    error: U8
    intrq: bool
    power: str


class DriveState(RegisterState, frozen=True, kw_only=True):
    """What both kinds of drive have, see drive.py. ``buffer`` is the data of the command, ``position`` the
    cursor of the host in it, ``burst_end`` the end of the DRQ block; ``offset`` and ``remaining`` count
    bytes of the medium; ``begun``: a direct transfer has moved data. A request in flight is phase "medium":
    it is issued again after loading."""

    phase: str
    opcode: U8
    request: str
    use_dma: bool
    to_host: bool
    direct: bool
    begun: bool
    buffer: bytes
    position: U63
    burst_end: U63
    offset: U63
    remaining: U63


class AtaState(DriveState, frozen=True, kw_only=True):
    """``multiple`` sectors a DRQ block (0: off); ``heads`` and ``sectors`` of the current translation."""

    kind = "ide-hd"

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


class UnitState(Part, frozen=True, kw_only=True):
    """A CD-ROM drive between commands. ``attention`` and ``events`` are queues."""

    sense: SenseState
    attention: tuple[str, ...]
    events: tuple[U8, ...]
    tray_open: bool
    prevent: Annotated[int, Meta(ge=0, le=3)]
    retries: U8
    recovery: U8
    current_lba: U32
    transfer_mode: U8


class AtapiState(DriveState, frozen=True, kw_only=True):
    """``packet`` holds the ``packet_filled`` bytes that came in; ``shape``: fields of READ CD."""

    kind = "ide-cd"

    unit: UnitState
    packet: Annotated[bytes, Meta(min_length=12, max_length=12)]
    packet_filled: Annotated[int, Meta(ge=0, le=12)]
    byte_limit: U16
    shape: U8


class PioState(Part, frozen=True, kw_only=True):
    """Of the old record: the PIO buffer while DRQ is set. ``then`` says what it is, see old_record.py; the
    last four are of a data phase."""

    buffer: bytes
    position: U63
    end: U63
    then: str
    byte_limit: U16
    offset: U63
    remaining: U63
    shape: U8


class OldAtapiState(RegisterState, frozen=True, kw_only=True):
    """Version 0 of the record, which knows nothing of a packet command but its PIO buffer."""

    kind = "ide-cd"
    version = 0

    unit: UnitState
    pio: PioState | None


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
    """One IDE channel: control register, line level, bus master; records of drives 0 and 1 (or None), each
    packed with a kind and version of its own."""

    kind = "ide-channel"

    control: U8
    selected: Annotated[int, Meta(ge=0, le=1)]
    line: bool
    master: BusMasterState
    drives: tuple[bytes | None, bytes | None]
