"""The committed state of a device host, and its output ring, from Python (state.c has the protocol)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from coordinator.contract._segment import ffi, lib
from coordinator.contract.errors import SegmentError

#: an output frame is not larger than this, bytes
MOST_OUTPUT: int = lib.SEG_OUTPUT_ROOM // 4


class StateArea:
    """The host's end. Records are bytes by name; ``put`` takes effect with ``commit``."""

    def __init__(self, header: Any, host: int) -> None:
        self._header, self._host = header, host
        self._length = ffi.new("uint64_t *")

    @property
    def commits(self) -> int:
        """How many there have been."""
        offset = self._header.state_offset + self._header.state_stride * self._host
        return int(ffi.cast("struct state_area *", ffi.cast("char *", self._header) + offset).seq)

    def slot(self, name: str, room: int) -> int:
        """The slot of record ``name``, which is up to ``room`` bytes; SegmentError where there is no room."""
        slot = int(lib.state_slot(self._header, self._host, name.encode(), room))
        if slot < 0:
            raise SegmentError(f"device host {self._host} has no room for the committed state of {name}")
        return slot

    def put(self, slot: int, record: bytes) -> None:
        if lib.state_put(self._header, self._host, slot, record, len(record)):
            raise SegmentError(f"a committed record of {len(record)} bytes is longer than its slot")

    def commit(self) -> None:
        """What was put is the state from now on, all of it."""
        lib.state_commit(self._header, self._host)

    def recover(self) -> int:
        """For a successor: forget what was not committed. Returns how many commits there have been."""
        return int(lib.state_recover(self._header, self._host))

    def get(self, slot: int) -> bytes | None:
        """The committed record."""
        record = lib.state_get(self._header, self._host, slot, self._length)
        return None if record == ffi.NULL else bytes(ffi.buffer(record, self._length[0]))


class Output:
    """Frames from a device host to the coordinator; both ends."""

    def __init__(self, header: Any, host: int) -> None:
        self._header, self._host = header, host
        self._frame: Any = None

    def put(self, at: int, frame: bytes) -> int | None:
        """Write a frame at byte ``at``, unseen; returns the byte behind it, or None while there is no
        room."""
        if not lib.output_put(self._header, self._host, at, frame, len(frame)):
            return None
        return at + 4 + len(frame)

    def show(self, head: int) -> bool:
        """Let the coordinator see all below ``head``; True: it is to be told."""
        return bool(lib.output_show(self._header, self._host, head))

    def take(self) -> Iterator[bytes]:
        """The coordinator: every frame there is."""
        if self._frame is None:
            self._frame = ffi.new("uint8_t[]", lib.SEG_OUTPUT_ROOM)
        while (length := lib.output_take(self._header, self._host, self._frame)) >= 0:
            yield bytes(ffi.buffer(self._frame, length))
