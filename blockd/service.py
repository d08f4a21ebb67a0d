"""The block daemon at work: one thread waits for clients, commands and signals; clients are served
by threads of their own (see nbd/server.py)."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from blockd.export import ExportTable
from blockd.nbd.server import Limits, Server
from coordinator.contract import messages
from coordinator.contract.errors import AtollError, BlockError, MessageError

log = logging.getLogger(__name__)

BACKLOG = 64
_LONGEST_PATH = 107  # sun_path of unix(7), without its final zero


class ControlSocket(Protocol):
    """The island's end of the control channel, as coordinator/contract/island.py has it."""

    socket: zmq.Socket[Any]

    def receive(self) -> messages.AnyCommand | None: ...

    def answer(self, command: messages.Command, value: Any = None, error: str | None = None) -> None: ...


def listen_unix(path: str) -> socket.socket:
    """A listening socket that only its owner can reach. What a dead process left at ``path`` is
    replaced; BlockError when a living one listens there, or something else lies there."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        text = f"{path}: is too long for a socket (more than {_LONGEST_PATH} bytes)"
        raise BlockError(text, errno.ENAMETOOLONG)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: there is no moment at which others could connect
        if not _bind(listener, path):
            _remove_stale(path)
            if not _bind(listener, path):
                raise BlockError(f"{path}: is in use by another process", errno.EADDRINUSE)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno or 0)
        raise BlockError(f"{path}: cannot listen: {reason}", error.errno or errno.EIO) from None
    except BlockError:
        listener.close()
        raise
    return listener


def _bind(listener: socket.socket, path: str) -> bool:
    """False when the path exists."""
    try:
        listener.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if stat.S_ISSOCK(os.lstat(path).st_mode):  # a plain file refuses, too
                os.unlink(path)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise


class Service:
    """Exports, the sockets they are reached at, and the commands that change them."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.exports = ExportTable()
        self._server = Server(self.exports, limits)
        self._listeners: list[tuple[socket.socket, str]] = []
        self._quit = False
        self._errors: list[str] = []
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._commands: dict[type, Callable[[Any], Any]] = {
            messages.OpenExport: self._open_export,
            messages.CloseExport: self._close_export,
            messages.QueryExports: self._query_exports,
            messages.Quit: self._end,
        }

    def listen(self, path: str) -> None:
        """Serve NBD at a UNIX socket, too."""
        self._listeners.append((listen_unix(path), path))

    def end_on_signal(self, *numbers: int) -> None:
        """Let these signals end ``run`` in order. Only from the main thread."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, self._on_signal)

    def stop(self) -> None:
        """Let ``run`` end in order; from any thread."""
        self._quit = True
        os.write(self._wake_write, b"\0")

    def run(self, control: ControlSocket | None = None) -> None:
        """Serve until told to end; then finish requests, flush and close. Errors of the last flush are a
        BlockError."""
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        for listener, _ in self._listeners:
            poller.register(listener, zmq.POLLIN)
        if control is not None:
            poller.register(control.socket, zmq.POLLIN)
        while not self._quit:
            ready = dict(poller.poll())
            if self._wake_read in ready:
                os.read(self._wake_read, 64)
            for listener, _ in self._listeners:
                if listener.fileno() in ready:
                    self._server.accept(listener)
            if control is not None:
                # a ZeroMQ socket signals edges: take what is there, whatever woke us
                self._obey(control)
        self.close()

    def close(self) -> None:
        """End connections, retire exports, remove sockets; BlockError when a flush failed, also when that
        was in an earlier call."""
        for listener, path in self._listeners:
            listener.close()
            if os.path.exists(path):
                os.unlink(path)
        self._listeners.clear()
        self._server.end_all()
        self._errors += self.exports.close_all()
        if self._errors:
            raise BlockError("; ".join(self._errors))

    def _on_signal(self, number: int, frame: object) -> None:
        self._quit = True

    # ---- commands --------------------------------------------------------------------------------
    def _obey(self, control: ControlSocket) -> None:
        while not self._quit:
            try:
                command = control.receive()
            except MessageError as error:
                log.error("%s", error)
                continue
            if command is None:
                return
            handler = self._commands.get(type(command))
            if handler is None:
                control.answer(command, error=f"blockd does not know the command {type(command).__name__}")
                continue
            try:
                control.answer(command, handler(command))
            except AtollError as error:
                control.answer(command, error=str(error))

    def _open_export(self, command: messages.OpenExport) -> dict[str, Any]:
        """A new export, or another medium under a name that is served already."""
        return self.exports.open(command.export).describe()

    def _close_export(self, command: messages.CloseExport) -> None:
        self.exports.close(command.id)

    def _query_exports(self, command: messages.QueryExports) -> list[dict[str, Any]]:
        return self.exports.describe()

    def _end(self, command: messages.Quit) -> None:
        """Answered when all is durable."""
        self._quit = True
        self.close()
