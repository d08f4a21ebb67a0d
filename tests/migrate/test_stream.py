"""Parts of a stream: everything that a file or a peer could have wrong."""

from __future__ import annotations

import io
import struct

import msgspec
import pytest

from coordinator.contract.errors import MigrationError
from coordinator.migrate import stream
from coordinator.migrate.stream import Part

HEADER = struct.Struct("<8sHHQ8s")


class Value(msgspec.Struct, forbid_unknown_fields=True):
    a: int
    b: str


GOOD = stream.encode(Part.STATE, Value(5, "x"))


def refused(data: bytes, kind: Part = Part.STATE) -> str:
    """The same from a file and from a frame."""
    with pytest.raises(MigrationError) as read:
        stream.read(io.BytesIO(data), kind, Value, "here")
    with pytest.raises(MigrationError) as decoded:
        stream.decode(data, kind, Value, "here")
    assert str(read.value).startswith("here: ") and "\n" not in str(read.value)
    assert str(decoded.value).startswith("here: ")
    return str(read.value)


def changed(data: bytes, **fields: object) -> bytes:
    names = ("magic", "version", "kind", "length", "digest")
    values = dict(zip(names, HEADER.unpack(data[: HEADER.size]), strict=True))
    return HEADER.pack(*(values | fields).values()) + data[HEADER.size :]


def test_round_trip() -> None:
    assert stream.decode(GOOD, Part.STATE, Value, "") == Value(5, "x")
    assert stream.read(io.BytesIO(GOOD + b"more"), Part.STATE, Value, "") == Value(5, "x")


def test_every_bit() -> None:
    for at in range(len(GOOD)):
        for bit in range(8):
            data = bytearray(GOOD)
            data[at] ^= 1 << bit
            refused(bytes(data))


def test_truncated_at_any_byte() -> None:
    for length in range(len(GOOD)):
        assert "ends" in refused(GOOD[:length])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"magic": b"QEVM\0\0\0\3"}, "is no migration stream of Atoll"),
        ({"version": 0}, "is stream version 0; this build knows 1 to 1"),
        ({"version": 2}, "is stream version 2; this build knows 1 to 1"),
        ({"version": 65535}, "is stream version 65535"),
        ({"kind": Part.RAM}, "has part 3 where its state should be"),
        ({"kind": 99}, "has part 99"),
        ({"length": 2**63}, "its state claims 9223372036854775808 bytes"),
        ({"length": stream.LONGEST + 1}, "claims"),
        ({"digest": bytes(8)}, "wrong checksum"),
    ],
)
def test_headers(fields: dict[str, object], why: str) -> None:
    assert why in refused(changed(GOOD, **fields))


def test_order_of_parts() -> None:
    assert "has part 2 where its description should be" in refused(GOOD, Part.DESCRIPTION)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91" * 10_000,
        msgspec.msgpack.encode({"a": 1}),
        msgspec.msgpack.encode({"a": "x", "b": "x"}),
        msgspec.msgpack.encode({"a": 1, "b": "x", "c": 1}),
        b"\x82\xa1a\x01\xa1b\xa2\xff\xff",
    ],
)
def test_payloads_that_are_whole_and_no_value(payload: bytes) -> None:
    assert "does not parse" in refused(
        changed(GOOD, length=len(payload), digest=stream._digest(payload))[: HEADER.size] + payload
    )
