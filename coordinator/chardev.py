"""Character devices of the host: where a serial port or a monitor has its other end.

A ``Chardev`` has one frontend (a serial port, a monitor, the mux of both). It tells the frontend of
a peer that comes and goes and of bytes that arrive; the frontend writes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import sys
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from coordinator.cli.options import KeyValues, nearest
from coordinator.contract.errors import ConfigError, UsageError

KINDS = ("stdio", "file", "socket", "null")
#: bytes kept for a peer that does not read; more are dropped, as a serial line would
BACKLOG = 1 << 20


@dataclass(frozen=True)
class ChardevSpec:
    """A character device as the command line names it."""

    kind: str
    id: str = ""
    path: str = ""
    host: str = ""
    port: int = 0
    server: bool = False
    #: wait for the first client before the guest runs
    wait: bool = False
    append: bool = False
    #: shares the terminal with the monitor (mon:stdio)
    mux: bool = False

    @classmethod
    def from_properties(cls, kv: KeyValues) -> ChardevSpec:
        """-chardev BACKEND,id=ID,..."""
        kind = kv.choice("backend", KINDS, "null")
        server = kv.flag("server")
        spec = cls(
            kind=kind, id=kv.need("id"), path=kv.take("path") or "", host=kv.take("host") or "127.0.0.1",
            port=kv.number("port", 0, 0, 65535), server=server, wait=kv.flag("wait", server),
            append=kv.flag("append"), mux=kv.flag("mux"),
        )
        kv.ignore("signal", "logfile", "nodelay", "reconnect", "telnet", "ipv4", "ipv6")
        kv.done(("backend", "id", "path", "host", "port", "server", "wait", "append", "mux"))
        if kind == "socket" and not spec.path and not spec.port:
            raise UsageError(f"-chardev socket,id={spec.id}: needs path= or host= and port=")
        if kind == "file" and not spec.path:
            raise UsageError(f"-chardev file,id={spec.id}: needs path=")
        return spec


def parse_device(option: str, text: str, chardevs: dict[str, ChardevSpec] | None = None) -> ChardevSpec:
    """The short form of -serial, -monitor and -qmp: ``unix:PATH,server=on,wait=off`` and the like."""
    kind, colon, rest = text.partition(":")
    if text in ("null", "none", "vc") or kind == "vc":
        return ChardevSpec("null")
    if text == "stdio":
        return ChardevSpec("stdio")
    if text == "mon:stdio":
        return ChardevSpec("stdio", mux=True)
    if kind == "file" and rest:
        return ChardevSpec("file", path=rest)
    if kind == "chardev" and rest:
        if not chardevs or rest not in chardevs:
            raise UsageError(f"-{option} {text}: there is no -chardev id={rest} before it")
        return chardevs[rest]
    if kind in ("unix", "tcp") and rest:
        kv = KeyValues(option, rest, implied="where")
        where = kv.need("where")
        server = kv.flag("server")
        wait = kv.flag("wait", server)
        kv.ignore("nodelay", "reconnect")
        kv.done(("server", "wait"))
        if kind == "unix":
            return ChardevSpec("socket", path=where, server=server, wait=wait)
        host, _, port = where.rpartition(":")
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise UsageError(f"-{option} {text}: say tcp:HOST:PORT")
        return ChardevSpec("socket", host=host or "127.0.0.1", port=int(port), server=server, wait=wait)
    known = ("stdio", "mon:stdio", "file:", "unix:", "tcp:", "chardev:", "null", "none")
    raise UsageError(f"-{option} {text}: unknown device; the nearest known one is {nearest(text, known)}")


class Frontend(Protocol):
    """What sits at a character device."""

    def connected(self, device: Chardev) -> None: ...

    def received(self, device: Chardev, data: bytes) -> None: ...

    def disconnected(self, device: Chardev) -> None: ...


class Chardev:
    """Base: a device that swallows everything (``null``)."""

    def __init__(self, spec: ChardevSpec) -> None:
        self.spec = spec
        self.frontend: Frontend | None = None

    async def open(self) -> None:
        """Open files and sockets; ConfigError names what cannot be."""

    async def wait(self) -> None:
        """Wait for the first client where the user asked for it."""

    def write(self, data: bytes) -> None: ...

    def hang_up(self) -> None:
        """Drop the peer of a socket."""

    async def close(self) -> None: ...


class FileDevice(Chardev):
    """Output into a file."""

    async def open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_APPEND if self.spec.append else os.O_TRUNC)
        try:
            self._fd = os.open(self.spec.path, flags, 0o666)
        except OSError as error:
            raise ConfigError(f"{self.spec.path}: {error.strerror}") from None

    def write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            print(f"atoll run: {self.spec.path}: {error.strerror}; output is lost", file=sys.stderr)

    async def close(self) -> None:
        os.close(self._fd)


class StdioDevice(Chardev):
    """The terminal, in raw mode while it is ours. Output keeps the order and waits for a slow reader."""

    async def open(self) -> None:
        self._in, self._out = 0, 1
        self._saved: list[object] | None = None
        if os.isatty(self._in):
            self._saved = termios.tcgetattr(self._in)
            raw = termios.tcgetattr(self._in)
            raw[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR
                        | termios.IGNCR | termios.ICRNL | termios.IXON)
            raw[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN)
            if self.spec.mux:
                raw[3] &= ~termios.ISIG  # Ctrl-C is the guest's; Ctrl-a x ends
            termios.tcsetattr(self._in, termios.TCSANOW, raw)
        with contextlib.suppress(OSError, PermissionError):  # a closed or regular-file stdin has no events
            asyncio.get_running_loop().add_reader(self._in, self._readable)
        if self.frontend:
            self.frontend.connected(self)

    def _readable(self) -> None:
        data = os.read(self._in, 4096)
        if not data:
            asyncio.get_running_loop().remove_reader(self._in)
        elif self.frontend:
            self.frontend.received(self, data)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._out, view) :]
            except BlockingIOError:
                os.set_blocking(self._out, True)
            except OSError:
                return  # the reader is gone; the guest goes on

    async def close(self) -> None:
        with contextlib.suppress(ValueError, OSError, PermissionError):
            asyncio.get_running_loop().remove_reader(self._in)
        if self._saved is not None:
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]


class SocketDevice(Chardev):
    """A UNIX or TCP socket, as server (one client at a time) or client."""

    _server: asyncio.AbstractServer | None = None
    _writer: asyncio.StreamWriter | None = None

    def __init__(self, spec: ChardevSpec) -> None:
        super().__init__(spec)
        self._first = asyncio.Event()
        self._reader_task: asyncio.Task[None] | None = None

    @property
    def _where(self) -> str:
        return self.spec.path or f"{self.spec.host}:{self.spec.port}"

    async def open(self) -> None:
        spec = self.spec
        try:
            if spec.server and spec.path:
                _remove_stale_socket(spec.path)
                self._server = await asyncio.start_unix_server(self._accept, spec.path)
            elif spec.server:
                self._server = await asyncio.start_server(self._accept, spec.host, spec.port)
            else:
                connect = (asyncio.open_unix_connection(spec.path) if spec.path
                           else asyncio.open_connection(spec.host, spec.port))
                reader, writer = await connect
                self._reader_task = asyncio.create_task(self._accept(reader, writer))
        except OSError as error:
            verb = "listen on" if spec.server else "connect to"
            raise ConfigError(f"cannot {verb} {self._where}: {error.strerror or error}") from None

    async def wait(self) -> None:
        if self.spec.server and self.spec.wait and not self._first.is_set():
            print(f"atoll run: waiting for a connection on {self._where}", file=sys.stderr, flush=True)
            await self._first.wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:
            writer.close()
            return
        self._writer = writer
        self._first.set()
        if self.frontend:
            self.frontend.connected(self)
        try:
            while data := await reader.read(65536):
                if self.frontend:
                    self.frontend.received(self, data)
        except ConnectionError:
            pass
        finally:
            self._writer = None
            if self.frontend:
                self.frontend.disconnected(self)
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()

    def write(self, data: bytes) -> None:
        if self._writer is not None and self._writer.transport.get_write_buffer_size() < BACKLOG:
            self._writer.write(data)

    def hang_up(self) -> None:
        if self._writer is not None:
            self._writer.close()

    async def close(self) -> None:
        writer = self._writer
        if writer is not None:
            with contextlib.suppress(ConnectionError, TimeoutError):
                await asyncio.wait_for(writer.drain(), 1.0)
            writer.close()
        if self._server is not None:
            self._server.close()
            if self.spec.path:
                with contextlib.suppress(OSError):
                    os.unlink(self.spec.path)
        if self._reader_task is not None:
            self._reader_task.cancel()


def _remove_stale_socket(path: str) -> None:
    """A socket file nobody listens on is in the way of the next start; anything else is refused."""
    import socket

    file = Path(path)
    if not file.exists():
        return
    if not stat.S_ISSOCK(file.stat().st_mode):
        raise ConfigError(f"{path} is in the way and is not a socket; remove it or choose another path")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        file.unlink()
    except BlockingIOError:
        raise ConfigError(f"{path} is in use by another process; choose another path") from None
    else:
        raise ConfigError(f"{path} is in use by another process; choose another path")
    finally:
        probe.close()


DEVICES: dict[str, type[Chardev]] = {"null": Chardev, "file": FileDevice, "stdio": StdioDevice, "socket": SocketDevice}


def make(spec: ChardevSpec) -> Chardev:
    return DEVICES[spec.kind](spec)
