"""The terminal, or whatever standard input and output are, as a character device.

Source: termios(3). Output is written by a thread, so that a reader that does not read - a stopped
terminal, a pager - holds up neither the monitor nor the end of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import termios
import threading

from coordinator.chardev import READ_SIZE, Chardev
from coordinator.chardev_spec import ChardevSpec

#: output kept for a reader that does not read, bytes; beyond that it is lost
KEPT = 64 << 20
#: how long the end waits for such a reader, seconds
LAST_OUTPUT_SECONDS = 2.0


class StdioDevice(Chardev):
    """Raw while it is ours; Ctrl-C is the guest's where Ctrl-a x ends (mux), else it ends the machine."""

    def __init__(self, spec: ChardevSpec, stdin: int = 0, stdout: int = 1) -> None:
        super().__init__(spec)
        self._in, self._out = stdin, stdout
        self._saved: list[object] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._output: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        # bytes handed over and bytes written, each counted by one thread
        self._queued = self._written = 0
        self._writer: threading.Thread | None = None

    async def open(self) -> None:
        self._make_raw()
        self._writer = threading.Thread(target=self._write_all, name="terminal-output", daemon=True)
        self._writer.start()
        if self.frontend:
            self.frontend.connected(self)
        try:
            asyncio.get_running_loop().add_reader(self._in, self._readable)
        except PermissionError:  # a regular file is always readable and has no events
            self._reader = asyncio.create_task(self._read_file())
        except OSError:
            pass  # standard input is closed

    def _make_raw(self) -> None:
        if not os.isatty(self._in):
            return
        self._saved = termios.tcgetattr(self._in)
        raw = termios.tcgetattr(self._in)
        raw[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR
                    | termios.IGNCR | termios.ICRNL | termios.IXON)  # fmt: skip
        raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
        if self.spec.mux:
            raw[3] &= ~termios.ISIG
        termios.tcsetattr(self._in, termios.TCSANOW, raw)

    # ---- input -----------------------------------------------------------------------------------
    def _readable(self) -> None:
        try:
            data = os.read(self._in, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # the terminal has been hung up
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._in)
        elif self.frontend:
            self.frontend.received(self, data)

    async def _read_file(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._in, READ_SIZE):
                if self.frontend:
                    self.frontend.received(self, data)
                    await self.frontend.room()

    # ---- output ----------------------------------------------------------------------------------
    def write(self, data: bytes) -> None:
        if self._queued - self._written < KEPT:
            self._queued += len(data)
            self._output.put(bytes(data))

    def _write_all(self) -> None:
        """The writing thread: until the end is asked for, or nobody can read any more."""
        while (data := self._output.get()) is not None:
            view = memoryview(data)
            while view:
                try:
                    view = view[os.write(self._out, view) :]
                except BlockingIOError:
                    os.set_blocking(self._out, True)
                except OSError:
                    break  # the reader is gone; the guest goes on
            self._written += len(data)

    async def close(self) -> None:
        with contextlib.suppress(ValueError, OSError):
            asyncio.get_running_loop().remove_reader(self._in)
        if self._reader is not None:
            self._reader.cancel()
        if self._writer is not None:
            self._output.put(None)
            await asyncio.to_thread(self._writer.join, LAST_OUTPUT_SECONDS)
            self._writer = None
        if self._saved is not None:
            with contextlib.suppress(termios.error):  # hung up
                termios.tcsetattr(self._in, termios.TCSANOW, self._saved)  # type: ignore[arg-type]
            self._saved = None
