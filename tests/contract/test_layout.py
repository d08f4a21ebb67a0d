"""C structs as named values: every field there and back, and everything that does not fit refused."""

from __future__ import annotations

import random
from typing import Any

import cffi
import pytest

from coordinator.contract.errors import RecordError
from coordinator.contract.layout import struct_get, struct_set

ffi = cffi.FFI()
ffi.cdef("""
struct part { uint16_t a; uint8_t pad0[2]; uint32_t b; };
struct all {
    uint8_t one; uint8_t pad1[3]; uint32_t four; uint64_t eight; uint8_t bytes[5]; uint64_t list[3];
    struct part part; struct part parts[2]; union { uint64_t q[2]; uint8_t b[16]; } both; uint64_t skipped;
};
""")
OMIT = frozenset({"skipped"})


def values(seed: int = 0) -> dict[str, Any]:
    rng = random.Random(seed)

    def part() -> dict[str, int]:
        return {"a": rng.randrange(1 << 16), "b": rng.randrange(1 << 32)}

    return {
        "one": rng.randrange(1 << 8),
        "four": rng.randrange(1 << 32),
        "eight": rng.choice((0, 2**64 - 1, rng.randrange(1 << 64))),
        "bytes": rng.randbytes(5),
        "list": [rng.randrange(1 << 64) for _ in range(3)],
        "part": part(),
        "parts": [part(), part()],
        "both": rng.randbytes(16),
    }


@pytest.mark.parametrize("seed", range(20))
def test_there_and_back(seed: int) -> None:
    struct = ffi.new("struct all *")
    struct.skipped = 7
    struct_set(ffi, struct[0], values(seed), "it", OMIT)
    assert struct_get(ffi, struct[0], OMIT) == values(seed)
    assert struct.skipped == 7 and bytes(struct.pad1) == bytes(3)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"one": 256}, "it.one: 256 is not a number below 0x100"),
        ({"one": -1}, "it.one: -1"),
        ({"one": True}, "it.one: True"),
        ({"eight": 1 << 64}, "it.eight"),
        ({"eight": 1.0}, "it.eight"),
        ({"four": None}, "it.four"),
        ({"bytes": b"1234"}, "it.bytes: wants 5 bytes"),
        ({"bytes": [1, 2, 3, 4, 5]}, "it.bytes: wants 5 bytes"),
        ({"list": [1, 2]}, "it.list: wants 3 values"),
        ({"list": [1, 2, 1 << 64]}, r"it.list\[2\]"),
        ({"list": b"123"}, "it.list: wants 3 values"),
        ({"part": {"a": 1}}, "it.part: fields on one side only: b"),
        ({"part": 5}, "it.part: fields on one side only: a, b"),
        ({"parts": [{"a": 1, "b": 2}, {"a": 1 << 16, "b": 2}]}, r"it.parts\[1\].a"),
        ({"both": bytes(15)}, "it.both: wants 16 bytes"),
        ({"skipped": 1}, "fields on one side only: skipped"),
        ({"more": 1}, "fields on one side only: more"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], text: str) -> None:
    with pytest.raises(RecordError, match=text):
        struct_set(ffi, ffi.new("struct all *")[0], values() | change, "it", OMIT)


@pytest.mark.parametrize("name", list(values()))
def test_a_field_that_is_missing(name: str) -> None:
    given = values()
    del given[name]
    with pytest.raises(RecordError, match=f"fields on one side only: {name}"):
        struct_set(ffi, ffi.new("struct all *")[0], given, "it", OMIT)


@pytest.mark.parametrize("whole", [None, 5, [], "x"])
def test_no_fields_at_all(whole: object) -> None:
    with pytest.raises(RecordError):
        struct_set(ffi, ffi.new("struct all *")[0], whole, "it", OMIT)
