"""The device contract: what a chip is, and what it may touch.

chip != wiring != host. A chip class knows registers, pins and time. It does no ZeroMQ, opens no
files and reads no host clock; all that is handed in:

* ``clock``  - guest time and timers (`contract.clock`)
* ``pin``    - an output line: ``pin.set(level)``; repeated levels are harmless
* ``dma``    - guest memory, for bus masters
* host side  - a drive, a terminal, a socket, behind a small Protocol of the chip's own

Wiring (devhost/pc.py) gives it ports, addresses and pins. So each chip is tested with a
ManualClock, a list for a pin and no process.

The contract of a chip:

* ``read`` and ``write`` never raise on guest input: an access that real hardware ignores is
  ignored, reads of nothing give all ones.
* ``peek`` has no side effect; it gives the value of a SHADOW register. The bus stores it in the
  segment after every event of the device.
* ``pause()`` - stop producing work, hold what comes in; ``paused()`` says whether draining is done.
* ``save()`` between events gives all state, also in the middle of a command; ``load()`` into a
  fresh, equally wired device makes it go on alike (pins and timers included).
* ``reset(hard)`` - hard: power-on or system reset.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import msgspec

from coordinator.contract.errors import RecordError
from coordinator.contract.registers import RegisterMap, TimeSource
from coordinator.contract.state import Record


class Pin(Protocol):
    """An output line of a chip."""

    def set(self, level: bool) -> None:
        """Drive the line. Pins carry levels; an edge is a level that changes twice."""
        ...


class ListPin:
    """A pin for tests: keeps every change."""

    def __init__(self) -> None:
        self.level = False
        self.changes: list[bool] = []

    def set(self, level: bool) -> None:
        if level != self.level:
            self.level = level
            self.changes.append(level)

    @property
    def pulses(self) -> int:
        """How often the line rose."""
        return sum(self.changes)


class Dma(Protocol):
    """Guest memory for bus masters. Addresses are guest-physical; holes read as ones and swallow writes."""

    def read(self, gpa: int, length: int) -> bytes: ...

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Store, then mark dirty and code pages - always in that order."""
        ...

    def span(self, gpa: int, length: int) -> memoryview | None:
        """A writable view of contiguous RAM for receiving straight into guest memory, or None."""
        ...

    def written(self, gpa: int, length: int) -> None:
        """Say that bytes have landed through a ``span``."""
        ...


class Device(ABC):
    """A chip. ``ranges`` maps a range's name to its registers; most chips have one, named ``main``."""

    #: device type as in docs/devices.md and in records
    kind: ClassVar[str]
    ranges: ClassVar[dict[str, RegisterMap]]
    time_sources: ClassVar[dict[str, TimeSource]] = {}

    @abstractmethod
    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        """The guest reads ``width`` bytes at ``offset``."""

    @abstractmethod
    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        """The guest writes."""

    def peek(self, offset: int, range_name: str = "main") -> int | None:
        """Value of a SHADOW register, without side effects. None: a read has an effect now, so it is to be
        a round trip."""
        raise NotImplementedError(f"{self.kind} declares a shadow register but has no peek")

    def read_string(self, offset: int, width: int, count: int, range_name: str = "main") -> bytes:
        """REP INS: ``count`` items of one port, little-endian."""
        items = (self.read(offset, width, range_name).to_bytes(width, "little") for _ in range(count))
        return b"".join(items)

    def write_string(self, offset: int, width: int, data: bytes, range_name: str = "main") -> None:
        """REP OUTS."""
        for at in range(0, len(data), width):
            self.write(offset, width, int.from_bytes(data[at : at + width], "little"), range_name)

    def time_state(self, source: str) -> tuple[bool, int, int]:
        """(running, offset_ns, frozen value) of a time source; the bus stores it after every event."""
        raise NotImplementedError(f"{self.kind} has no time source {source}")

    @abstractmethod
    def reset(self, hard: bool = True) -> None: ...

    def pause(self) -> None:  # noqa: B027 - most devices need none
        """Stop producing work; the default is for devices that never do any by themselves."""

    def paused(self) -> bool:
        return True

    def resume(self) -> None:  # noqa: B027
        """Undo ``pause``."""

    #: bytes that a committed record may take
    record_room: ClassVar[int] = 16 << 10

    @abstractmethod
    def save(self) -> Record: ...

    @abstractmethod
    def load(self, record: Record) -> None: ...

    def checkpoint(self) -> Any:
        """All state, as what MessagePack can hold, for a successor in this host: made at each event, so it is
        to cost little."""
        return self.save()

    def restore(self, checkpoint: bytes) -> None:
        """Go on from an encoded ``checkpoint``. RecordError."""
        try:
            record = msgspec.msgpack.decode(checkpoint, type=type(self.save()))
        except msgspec.MsgspecError as error:
            raise RecordError(f"committed record of {self.kind}: {error}") from None
        self.load(record)
