"""Parts of a migration stream: what they are called, and how each is checked.

A part is a header and a payload in msgpack: magic, stream version, kind, length, and the first 8 bytes of the
payload's BLAKE2b. Over the network parts are frames of the control channel; in a file they follow one
another, with guest memory (ram.h) behind ``RAM`` and nothing behind ``END``.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from typing import BinaryIO, TypeVar

import msgspec

from coordinator.contract.errors import MigrationError

MAGIC = b"ATOLLMIG"
#: raised when parts or their order change; a reader takes its own and older ones
VERSION = 1
#: more is no part of ours, bytes
LONGEST = 64 << 20

_HEADER = struct.Struct("<8sHHQ8s")


class Part(enum.IntEnum):
    """Kinds, in the order in which they come."""

    DESCRIPTION = 1
    STATE = 2
    RAM = 3
    END = 4


T = TypeVar("T")


def _digest(payload: bytes) -> bytes:
    return hashlib.blake2b(payload, digest_size=8).digest()


def encode(kind: Part, value: object) -> bytes:
    """A part as bytes."""
    payload = msgspec.msgpack.encode(value)
    return _HEADER.pack(MAGIC, VERSION, kind, len(payload), _digest(payload)) + payload


def _length(header: bytes, kind: Part, where: str) -> tuple[int, bytes]:
    """Length and digest of the payload behind a header that must be of ``kind``."""
    if len(header) < _HEADER.size:
        raise MigrationError(f"{where}: ends before its {kind.name.lower()}")
    magic, version, found, length, digest = _HEADER.unpack(header)
    if magic != MAGIC:
        raise MigrationError(
            f"{where}: is no migration stream of Atoll (or is damaged) at its {kind.name.lower()}"
        )
    if not 1 <= version <= VERSION:
        raise MigrationError(f"{where}: is stream version {version}; this build knows 1 to {VERSION}")
    if found != kind:
        raise MigrationError(f"{where}: has part {found} where its {kind.name.lower()} should be")
    if length > LONGEST:
        raise MigrationError(f"{where}: its {kind.name.lower()} claims {length} bytes")
    return length, digest


def _parse(payload: bytes, length: int, digest: bytes, kind: Part, type_: type[T], where: str) -> T:
    if len(payload) != length:
        raise MigrationError(f"{where}: ends within its {kind.name.lower()}")
    if _digest(payload) != digest:
        raise MigrationError(f"{where}: its {kind.name.lower()} has a wrong checksum")
    try:
        return msgspec.msgpack.decode(payload, type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MigrationError(f"{where}: its {kind.name.lower()} does not parse: {error}") from None


def decode(part: bytes, kind: Part, type_: type[T], where: str) -> T:
    """What one part of this kind holds; MigrationError says what is wrong with it. ``where`` names its
    origin."""
    length, digest = _length(part[: _HEADER.size], kind, where)
    return _parse(part[_HEADER.size :], length, digest, kind, type_, where)


def read(file: BinaryIO, kind: Part, type_: type[T], where: str) -> T:
    """The next part of a file, which must be unbuffered where guest memory follows."""
    length, digest = _length(_read(file, _HEADER.size), kind, where)
    return _parse(_read(file, length), length, digest, kind, type_, where)


def _read(file: BinaryIO, n: int) -> bytes:
    """``n`` bytes, or fewer at the end."""
    pieces = []
    while n and (piece := file.read(n)):
        pieces.append(piece)
        n -= len(piece)
    return b"".join(pieces)
