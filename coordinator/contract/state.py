"""Records: the state of a device as named, versioned data.

A record is a frozen ``msgspec.Struct`` with a ``kind`` and a ``version``. Loading rejects what is
unknown, missing or left over. State in the middle of a command is an enum and a cursor, never a
callback; a timer is saved as its deadline in guest time.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import msgspec

from coordinator.contract.errors import RecordError


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all records. A subclass sets ``kind`` and, from its second layout on, ``version``."""

    kind: ClassVar[str] = ""
    version: ClassVar[int] = 1


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a record travels: kind and version beside the encoded fields."""

    kind: str
    version: int
    data: msgspec.Raw


R = TypeVar("R", bound=Record)


def pack(record: Record) -> bytes:
    """Encode a record with its kind and version."""
    data = msgspec.Raw(msgspec.msgpack.encode(record))
    return msgspec.msgpack.encode(Envelope(type(record).kind, type(record).version, data))


def unpack(blob: bytes, record_type: type[R]) -> R:
    """Decode what ``pack`` made; RecordError names what does not fit."""
    try:
        envelope = msgspec.msgpack.decode(blob, type=Envelope)
    except msgspec.MsgspecError as error:
        raise RecordError(f"record of {record_type.kind}: no envelope: {error}") from None
    if envelope.kind != record_type.kind:
        raise RecordError(f"record of {envelope.kind!r} where {record_type.kind!r} is wanted")
    if envelope.version != record_type.version:
        raise RecordError(
            f"record of {envelope.kind}: version {envelope.version}, this build knows {record_type.version}"
        )
    try:
        return msgspec.msgpack.decode(envelope.data, type=record_type)
    except msgspec.MsgspecError as error:
        raise RecordError(f"record of {envelope.kind}: {error}") from None
