"""Records: the state of a device as named, versioned data.

A record is a frozen ``msgspec.Struct`` with a ``kind`` and a ``version``. Loading rejects what is
unknown, missing or left over. State in the middle of a command is an enum and a cursor, never a
callback; a timer is saved as its deadline in guest time.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import msgspec

from coordinator.contract.codec import encode
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
    data = msgspec.Raw(encode(record))
    return encode(Envelope(type(record).kind, type(record).version, data))


def unpack(blob: bytes, record_type: type[R]) -> R:
    """Decode what ``pack`` made; RecordError names what does not fit."""
    return unpack_any(blob, record_type)


def unpack_any(blob: bytes, *record_types: type[R]) -> R:
    """The same where one kind has several versions: ``record_types`` are those this build loads."""
    kind = record_types[0].kind
    try:
        envelope = msgspec.msgpack.decode(blob, type=Envelope)
    except msgspec.MsgspecError as error:
        raise RecordError(f"record of {kind}: no envelope: {error}") from None
    if envelope.kind != kind:
        raise RecordError(f"record of {envelope.kind!r} where {kind!r} is wanted")
    by_version = {record_type.version: record_type for record_type in record_types}
    record_type = by_version.get(envelope.version)
    if record_type is None:
        known = " and ".join(map(str, sorted(by_version)))
        raise RecordError(f"record of {kind}: version {envelope.version}, this build knows {known}")
    try:
        return msgspec.msgpack.decode(envelope.data, type=record_type)
    except msgspec.MsgspecError as error:
        raise RecordError(f"record of {kind}: {error}") from None
