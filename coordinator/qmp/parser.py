"""A stream of JSON objects from a peer that is not trusted.

Objects may be split over reads, or share one; a syntax error is reported once and the rest of its
line is dropped. Limits: 1 MiB and 256 levels an object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

LONGEST = 1 << 20
DEEPEST = 256


class JsonError(Exception):
    """What is wrong, for the peer."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise JsonError("JSON parse error, duplicate key")
    return result


def _constant(name: str) -> Any:
    raise JsonError(f"JSON parse error, invalid keyword '{name}'")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError("JSON parse error, number out of range")
    return value


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite)


class Parser:
    """``feed`` yields objects, and JsonError values for what was no JSON."""

    def __init__(self) -> None:
        self._buffer = b""
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[Any]:
        self._buffer += data
        while True:
            if self._skipping and not self._skip_line():
                return
            self._buffer = self._buffer.lstrip(b" \t\r\n")
            if not self._buffer:
                return
            try:
                value, used = self._decode()
            except JsonError as error:
                yield error
                self._skipping = True
                continue
            if used == 0:
                return
            self._buffer = self._buffer[used:]
            yield value

    def _skip_line(self) -> bool:
        _, newline, rest = self._buffer.partition(b"\n")
        self._buffer = rest
        self._skipping = not newline
        return bool(newline)

    def _decode(self) -> tuple[Any, int]:
        """One value and the bytes it took; 0 bytes when more have to come."""
        head = self._buffer[:LONGEST]
        try:
            text = head.decode()
        except UnicodeDecodeError as error:
            if error.end < len(head) or len(head) - error.start > 3 or head[error.start] >= 0xF8:
                raise JsonError("JSON parse error, invalid UTF-8") from None
            text = head[: error.start].decode()
        if _too_deep(text):
            raise JsonError("JSON parse error, nested too deep")
        try:
            value, used = _decoder.raw_decode(text)
        except json.JSONDecodeError as error:
            if len(self._buffer) >= LONGEST:
                raise JsonError("JSON parse error, message too long") from None
            if "\n" in text[error.pos :].rstrip("\n \r\t"):
                raise JsonError("JSON parse error, invalid syntax") from None
            if "\n" in text[error.pos :] and not text.lstrip().startswith(("{", "[")):
                raise JsonError("JSON parse error, expecting value") from None
            if (
                error.pos < len(text.rstrip())
                and "\n" in text[error.pos :]
                and "Unterminated" not in error.msg
            ):
                raise JsonError("JSON parse error, invalid syntax") from None
            return None, 0
        except ValueError:  # an integer of thousands of digits
            raise JsonError("JSON parse error, number out of range") from None
        return value, len(text[:used].encode())


def _too_deep(text: str) -> bool:
    """An upper bound of the nesting: brackets in strings count too, which only matters for odd strings."""
    return text.count("[") + text.count("{") > DEEPEST and _depth(text) > DEEPEST


def _depth(text: str) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                in_string = False
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > DEEPEST:
                break
        elif char in "]}":
            depth -= 1
    return deepest
