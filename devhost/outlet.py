"""What leaves the device host by the byte or by the line: serial output, debug ports, traces.

All of it goes to the coordinator in batches: when the host has nothing else to do, or when a batch
is large enough.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from coordinator.contract import messages

#: a batch that is sent at once: bytes of one port, lines of the trace
MOST_BYTES = 4096
MOST_LINES = 256


class Notifier(Protocol):
    """The control channel."""

    def notify(self, notice: msgspec.Struct) -> None: ...


class Outlet:
    """Collects; ``flush`` sends."""

    def __init__(self, control: Notifier) -> None:
        self._control = control
        self._serial: dict[int, bytearray] = {}
        self._debug: dict[int, bytearray] = {}
        self._lines: list[str] = []
        #: there may be something
        self._waits = False

    def serial(self, index: int, data: bytes) -> None:
        """Output of serial port ``index``."""
        self._waits = True
        buffer = self._serial.setdefault(index, bytearray())
        buffer += data
        if len(buffer) >= MOST_BYTES:
            self.flush()

    def debug(self, port: int, data: bytes) -> None:
        """Bytes written to debug port ``port``."""
        self._waits = True
        buffer = self._debug.setdefault(port, bytearray())
        buffer += data
        if len(buffer) >= MOST_BYTES:
            self.flush()

    def trace(self, line: str) -> None:
        """One line for the log of the whole machine."""
        self._waits = True
        self._lines.append(line)
        if len(self._lines) >= MOST_LINES:
            self.flush()

    def flush(self) -> None:
        """Send all that is there."""
        if not self._waits:
            return
        self._waits = False
        for index, buffer in self._serial.items():
            if buffer:
                self._control.notify(messages.SerialOutput(index=index, data=bytes(buffer)))
                buffer.clear()
        for port, buffer in self._debug.items():
            if buffer:
                self._control.notify(messages.DebugOutput(port=port, data=bytes(buffer)))
                buffer.clear()
        if self._lines:
            self._control.notify(messages.TraceLines(lines=tuple(self._lines)))
            self._lines.clear()
