"""What a hostile or clumsy client sends: hardware-cases item 19; JSON by RFC 8259."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.qmp.parser import DEEPEST, LONGEST, JsonError, Parser


def feed(*pieces: bytes) -> list[Any]:
    parser = Parser()
    return [value for piece in pieces for value in parser.feed(piece)]


def kinds(values: list[Any]) -> list[str]:
    return ["error" if isinstance(value, JsonError) else "value" for value in values]


@pytest.mark.parametrize("text", [b'{"a": 1}', b'{"a": 1}\r\n', b'  {"a"\n:\n1}', b'\n\n{"a":1}\n\n'])
def test_one_object(text: bytes) -> None:
    assert feed(text) == [{"a": 1}]
    assert feed(*(bytes([byte]) for byte in text)) == [{"a": 1}]


def test_many_in_one_read() -> None:
    assert feed(b'{"a":1}{"b":2} {"c":3}\n{"d":') == [{"a": 1}, {"b": 2}, {"c": 3}]


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans() | st.none())), st.data())
@settings(deadline=None, max_examples=50)
def test_any_cut(objects: list[dict[str, Any]], data: st.DataObject) -> None:
    text = "\n".join(json.dumps(value, ensure_ascii=data.draw(st.booleans())) for value in objects)
    raw = text.encode(errors="surrogatepass") + b"\n"
    try:
        raw.decode()
    except UnicodeDecodeError:
        return
    at = data.draw(st.integers(0, len(raw)))
    assert feed(raw[:at], raw[at:]) == objects


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b'{"a": "\xff"}',
        b"\xc0\x80",
        b"{]",
        b"nonsense",
        b'{"a": 1,}',
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"1" * 5000 + b"}",
        b"[" * (DEEPEST + 1),
        b'{"a":' * (DEEPEST + 1),
        b"[" * 100_000,
    ],
)
def test_an_error_is_told_once_and_the_next_line_counts(line: bytes) -> None:
    found = feed(line + b'\n{"good": 1}\n')
    assert kinds(found) == ["error", "value"] and found[-1] == {"good": 1}
    assert "\n" not in str(found[0])


def test_as_deep_as_is_allowed() -> None:
    text = b"[" * DEEPEST + b"]" * DEEPEST
    assert kinds(feed(text + b"\n")) == ["value"]
    assert kinds(feed(b'{"brackets": "' + b"[" * 1000 + b'"}\n')) == ["value"]


def test_a_line_of_11_megabytes() -> None:
    """One error, and no more kept than the limit."""
    parser, found = Parser(), []
    piece = b'{"a": "' + b"x" * 65536
    for _ in range(11 * 16):
        found += list(parser.feed(piece))
        piece = b"x" * 65536
        assert len(parser._buffer) <= LONGEST + 65536
    found += list(parser.feed(b'"}\n{"good": 1}\n'))
    assert kinds(found) == ["error", "value"] and "too long" in str(found[0])


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_noise_raises_nothing(noise: bytes) -> None:
    parser = Parser()
    list(parser.feed(noise))
    list(parser.feed(b"\n"))


def test_values_that_are_no_objects_are_values_too() -> None:
    assert feed(b"[1]\n") == [[1]]
