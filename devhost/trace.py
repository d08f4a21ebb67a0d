"""``-trace``: a line for each access to the devices that were asked for."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from functools import cache

from coordinator.contract.clock import NS_PER_S

#: of a string access so many bytes are shown
SHOWN = 16


class Tracer:
    """``Bus.trace``. A pattern matches a device's name, or that with _read or _write behind it; ``now`` is
    guest time, ``emit`` takes the lines."""

    def __init__(self, patterns: Sequence[str], now: Callable[[], int], emit: Callable[[str], None]) -> None:
        self._now, self._emit = now, emit

        @cache
        def wanted(device: str, event: str) -> bool:
            return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in (device, event))

        self._wanted = wanted

    def __call__(self, device: str, register: str, width: int, data: bytes, write: bool) -> None:
        event = f"{device}_{'write' if write else 'read'}"
        if not self._wanted(device, event):
            return
        if len(data) <= width:
            value = f"{int.from_bytes(data, 'little'):#x}"
        else:
            value = f"{len(data)} bytes {data[:SHOWN].hex(' ')}"
        self._emit(f"{self._now() / NS_PER_S:.6f} {event} {register} {8 * width} bits: {value}")
