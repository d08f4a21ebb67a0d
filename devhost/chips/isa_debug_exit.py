"""``-device isa-debug-exit,iobase=,iosize=``: a guest ends the machine with an exit status of its own.

A write of ``value`` ends it with status ``(value << 1) | 1``, as QEMU documents the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from coordinator.contract.device import Device
from coordinator.contract.registers import Register, RegisterMap
from coordinator.contract.state import Record

MAX_SIZE = 4


class IsaDebugExitRecord(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "isa_debug_exit"


class IsaDebugExit(Device):
    """Wiring maps the first ``iosize`` ports (1, 2 or 4). ``leave`` gets the status, 0 to 255."""

    kind = "isa_debug_exit"
    ranges = {"main": RegisterMap(Register("EXIT", 0, MAX_SIZE, (1, 2, 4)))}

    def __init__(self, leave: Callable[[int], None]) -> None:
        self._leave = leave

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        """Nothing is there to be read: zero, as QEMU gives it."""
        return 0

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        self._leave((value << 1 | 1) & 0xFF)

    def reset(self, hard: bool = True) -> None:
        pass

    def save(self) -> IsaDebugExitRecord:
        return IsaDebugExitRecord()

    def load(self, record: Record) -> None:
        assert isinstance(record, IsaDebugExitRecord)
