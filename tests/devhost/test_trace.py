"""-trace: which accesses, and how a line reads."""

from __future__ import annotations

import pytest

from devhost.trace import Tracer


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("pic",), ["pic_read", "pic_write"]),
        (("*_write",), ["pic_write", "ide1_write"]),
        (("ide*", "pic_read"), ["pic_read", "ide1_write"]),
        (("rtc",), []),
    ],
)
def test_patterns(patterns: tuple[str, ...], expected: list[str]) -> None:
    lines: list[str] = []
    tracer = Tracer(patterns, lambda: 0, lines.append)
    for device, write in (("pic", False), ("pic", True), ("ide1", True)):
        tracer(device, "X", 1, b"\0", write)
    assert [line.split()[1] for line in lines] == expected


def test_lines() -> None:
    lines: list[str] = []
    tracer = Tracer(("*",), lambda: 1_500_000_000, lines.append)
    tracer("ide0", "Data", 2, b"\x34\x12", False)
    tracer("ide0", "Data", 2, bytes(range(32)), True)
    assert lines == [
        "1.500000 ide0_read Data 16 bits: 0x1234",
        "1.500000 ide0_write Data 16 bits: 32 bytes 00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f",
    ]
