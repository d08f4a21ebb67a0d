"""Register declarations: one table a device drives decode, access class, traces and docs.

    registers = RegisterMap(
        Register("LSR", 5, read=Access.SHADOW, doc="16550D 8.6.3"),
        Register("THR", 0, read=Access.SYNC, write=Access.POSTED, doc="..."),
    )

The classes are those of the design (see ``enum access_class`` in segment.h): SYNC is a round trip;
a POSTED write is applied in order without waiting; a SHADOW read is answered from the segment with
what ``Device.peek`` last said - unless a posted write of the same *hazard* is unapplied, when it
becomes a round trip; a TIME read is a pure function of guest time.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass


class Access(enum.IntEnum):
    """Access classes, numbered as ``enum access_class``."""

    SYNC = 0
    POSTED = 1
    SHADOW = 2
    TIME = 3


@dataclass(frozen=True)
class TimeSource:
    """A counter that is ``((guest_ns - offset) * mul / div) & mask`` while it runs, else ``frozen``."""

    mul: int
    div: int
    mask: int


@dataclass(frozen=True)
class Register:
    """One register (or a run of ``span`` bytes that behave alike).

    ``offset`` is in bytes from the start of the device's port or memory range. ``widths`` are the
    access sizes it takes in one go; wider accesses are split into its largest width. ``hazard``
    names the group of posted writes that can change a shadow: a posted register with a hazard
    marks it, a shadow register with it looks at it.
    """

    name: str
    offset: int
    span: int = 1
    widths: tuple[int, ...] = (1,)
    read: Access = Access.SYNC
    write: Access = Access.SYNC
    hazard: str | None = None
    #: reads give what was last written and writing has no further effect: a posted write of the value that
    #: the shadow holds already marks no hazard
    plain: bool = False
    #: time register: name of the device's time source, and bytes into its value
    time_source: str | None = None
    shift: int = 0
    doc: str = ""

    def __post_init__(self) -> None:
        if self.read is Access.POSTED or self.write in (Access.SHADOW, Access.TIME):
            raise ValueError(f"register {self.name}: impossible access class")
        if (self.read is Access.TIME) != (self.time_source is not None):
            raise ValueError(f"register {self.name}: a time register has a source, others have none")


class RegisterMap:
    """The registers of one range of one device, by offset."""

    def __init__(self, *registers: Register, size: int | None = None) -> None:
        self.registers = registers
        end = max((r.offset + r.span for r in registers), default=0)
        #: bytes the range covers
        self.size = size if size is not None else end
        self._by_offset: dict[int, Register] = {}
        for register in registers:
            for offset in range(register.offset, register.offset + register.span):
                if offset in self._by_offset:
                    raise ValueError(f"registers {register.name} and {self._by_offset[offset].name} overlap")
                self._by_offset[offset] = register

    def __iter__(self) -> Iterator[Register]:
        return iter(self.registers)

    def at(self, offset: int) -> Register | None:
        """The register that covers ``offset``, or None."""
        return self._by_offset.get(offset)

    def name(self, offset: int) -> str:
        """For traces: ``LSR`` or ``+0x13``."""
        register = self.at(offset)
        return register.name if register else f"+{offset:#x}"
