"""Character devices of the host: where a serial port or a monitor has its other end.

A ``Chardev`` has one frontend (a serial port, a monitor, the mux of both). It tells the frontend of
a peer that comes and goes and of bytes that arrive; the frontend writes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Protocol

from coordinator.chardev_spec import ChardevSpec
from coordinator.contract.errors import ConfigError

log = logging.getLogger(__name__)

#: bytes kept for a peer that does not read. Beyond that a serial line loses bytes; a monitor's
#: connection, whose messages would be torn, is cut
BACKLOG = 1 << 20
CUT_BACKLOG = 16 << 20
READ_SIZE = 65536
CLOSE_SECONDS = 1.0
RETRY_SECONDS = 0.1


class Frontend(Protocol):
    """What sits at a character device."""

    def connected(self, device: Chardev) -> None: ...

    def received(self, device: Chardev, data: bytes) -> None: ...

    def disconnected(self, device: Chardev) -> None: ...

    async def room(self) -> None:
        """Returns when the frontend can take more input; a device that can wait does so."""


class Chardev:
    """Base: a device that swallows everything (``null``)."""

    def __init__(self, spec: ChardevSpec) -> None:
        self.spec = spec
        self.frontend: Frontend | None = None
        #: may lose output to a peer that does not read
        self.lossy = True

    async def open(self) -> None:
        """Open files and sockets; ConfigError names what cannot be."""

    async def wait(self) -> None:
        """Wait for the first client where the user asked for it."""

    def write(self, data: bytes) -> None: ...

    async def close(self) -> None:
        """Let go of everything; harmless where it was never opened."""


class FileDevice(Chardev):
    """Output into a file. What does not fit is lost, which is said once."""

    _fd: int | None = None
    _failed = False

    async def open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if self.spec.append else os.O_TRUNC)
        try:
            self._fd = os.open(self.spec.path, flags, 0o666)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write {self.spec.path}: {getattr(error, 'strerror', error)}") from None
        if self.frontend:
            self.frontend.connected(self)

    def write(self, data: bytes) -> None:
        if self._fd is None:
            return
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            self._failed = False
        except OSError as error:
            if not self._failed:
                print(f"atoll run: {self.spec.path}: {error.strerror}; output is lost", file=sys.stderr)
            self._failed = True

    async def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class SocketDevice(Chardev):
    """A UNIX or TCP socket, as client or as server. A server has one client at a time, others wait."""

    def __init__(self, spec: ChardevSpec) -> None:
        super().__init__(spec)
        self._listener: socket.socket | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._first = asyncio.Event()
        self._work: asyncio.Task[None] | None = None

    async def open(self) -> None:
        spec = self.spec
        try:
            if spec.server:
                self._listener = _listen(spec)
                self._work = asyncio.create_task(self._accept(self._listener))
            else:
                connect = (
                    asyncio.open_unix_connection(spec.path)
                    if spec.path
                    else asyncio.open_connection(spec.host, spec.port)
                )
                self._work = asyncio.create_task(self.serve(*await connect))
        except (OSError, ValueError) as error:
            verb = "listen on" if spec.server else "connect to"
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"cannot {verb} {spec.where}: {reason}") from None

    async def wait(self) -> None:
        if self.spec.server and self.spec.wait and not self._first.is_set():
            print(f"atoll run: waiting for a connection on {self.spec.where}", file=sys.stderr, flush=True)
            await self._first.wait()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
                streams = await asyncio.open_connection(sock=client)
            except OSError as error:  # the client has gone, or we are short of descriptors
                log.info("%s: %s", self.spec.where, error)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            await self.serve(*streams)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One client, to its end."""
        self._writer = writer
        self._first.set()
        try:
            if self.frontend:
                self.frontend.connected(self)
            while data := await reader.read(READ_SIZE):
                if self.frontend:
                    self.frontend.received(self, data)
                    await self.frontend.room()
        except OSError:
            pass  # the peer has gone in its own way
        finally:
            self._writer = None
            if self.frontend:
                self.frontend.disconnected(self)
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()

    def write(self, data: bytes) -> None:
        if self._writer is None or self._writer.is_closing():
            return
        waiting = self._writer.transport.get_write_buffer_size()
        if waiting < (BACKLOG if self.lossy else CUT_BACKLOG):
            self._writer.write(data)
        elif not self.lossy:
            self._writer.transport.abort()

    async def close(self) -> None:
        writer = self._writer
        if writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), CLOSE_SECONDS)
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), CLOSE_SECONDS)
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            if self.spec.path:
                with contextlib.suppress(OSError):
                    os.unlink(self.spec.path)


def _listen(spec: ChardevSpec) -> socket.socket:
    if spec.path:
        _remove_stale_socket(spec.path)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(spec.path)
            listener.listen()
        except OSError:
            listener.close()
            raise
    else:
        listener = socket.create_server((spec.host, spec.port))
    listener.setblocking(False)
    return listener


def _remove_stale_socket(path: str) -> None:
    """A socket file nobody listens on is in the way of the next start; anything else is refused."""
    file = Path(path)
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} is in the way and is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            file.unlink()
            return
        except BlockingIOError:
            pass  # somebody listens and is busy
    raise ConfigError(f"{path} is in use by another process; choose another path")


def make(spec: ChardevSpec) -> Chardev:
    """The device that a specification describes."""
    from coordinator.terminal import StdioDevice

    devices: dict[str, type[Chardev]] = {
        "null": Chardev, "file": FileDevice, "stdio": StdioDevice, "socket": SocketDevice
    }  # fmt: skip
    return devices[spec.kind](spec)
