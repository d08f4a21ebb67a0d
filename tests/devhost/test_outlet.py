"""Batches of output: order within a port, sizes, nothing sent twice."""

from __future__ import annotations

import msgspec

from coordinator.contract.messages import DebugOutput, SerialOutput, TraceLines
from devhost.outlet import MOST_BYTES, MOST_LINES, Outlet


class Control:
    def __init__(self) -> None:
        self.sent: list[msgspec.Struct] = []

    def notify(self, notice: msgspec.Struct) -> None:
        self.sent.append(notice)


def test_nothing_leaves_before_it_is_flushed() -> None:
    control = Control()
    outlet = Outlet(control)
    for byte in b"ab":
        outlet.serial(1, bytes([byte]))
        outlet.debug(0x402, bytes([byte]))
        outlet.trace(f"line {byte}")
    assert control.sent == []
    outlet.flush()
    assert control.sent == [
        SerialOutput(index=1, data=b"ab"),
        DebugOutput(port=0x402, data=b"ab"),
        TraceLines(lines=("line 97", "line 98")),
    ]
    outlet.flush()
    assert len(control.sent) == 3


def test_a_full_batch_leaves_at_once() -> None:
    control = Control()
    outlet = Outlet(control)
    outlet.serial(0, bytes(MOST_BYTES))
    outlet.debug(0xE9, bytes(MOST_BYTES))
    for number in range(MOST_LINES):
        outlet.trace(str(number))
    assert [type(notice) for notice in control.sent] == [SerialOutput, DebugOutput, TraceLines]
