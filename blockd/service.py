"""The block daemon at work: one thread waits for clients, commands and signals; clients are served
by threads of their own (see nbd/server.py)."""

from __future__ import annotations

import collections
import errno
import logging
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import zmq

from blockd.export import ExportTable
from blockd.identity import identify
from blockd.lease.manager import LeasedExports
from blockd.lease.record import Owner
from blockd.lease.successor import released
from blockd.lease.transfer import Destination, Source
from blockd.machine_snapshots import MachineSnapshots
from blockd.nbd.handshake import Terms
from blockd.nbd.listen import Listener, listen_tcp, listen_unix
from blockd.nbd.server import Limits, Server
from coordinator.contract import config, messages
from coordinator.contract.errors import AtollError, BlockError, MessageError

log = logging.getLogger(__name__)

class ControlSocket(Protocol):
    """The island's end of the control channel, as coordinator/contract/island.py has it."""

    socket: zmq.Socket[Any]

    def receive(self) -> messages.AnyCommand | None: ...

    def answer(self, command: messages.Command, value: Any = None, error: str | None = None) -> None: ...

    def notify(self, notice: messages.LeaseLost) -> None: ...


class Service:
    """Exports, the sockets they are reached at, and the commands that change them."""

    def __init__(
        self,
        limits: Limits | None = None,
        terms: Terms | None = None,
        persistent: bool = True,
        owner: Owner | None = None,
    ) -> None:
        """Without ``persistent`` the service ends when the last client leaves. ``owner``: the VM in whose
        name leases are taken."""
        self.exports = ExportTable()
        self.leased = LeasedExports(self.exports, owner or Owner("", "blockd"))
        self.leased.on_loss = self._lease_lost
        self._losses: collections.deque[messages.LeaseLost] = collections.deque()
        self._source = source = Source(self.leased)
        destination = Destination(self.leased)
        self._snapshots = MachineSnapshots(self.leased)
        self._server = Server(self.exports, limits, terms, self._client_left)
        self._persistent = persistent
        self._listeners: list[Listener] = []
        self._quit = False
        self._errors: list[str] = []
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._commands: dict[type, Callable[[Any], Any]] = {
            messages.OpenExport: self._open_export,
            messages.CloseExport: self._close_export,
            messages.ResizeExport: self._resize_export,
            messages.QueryExports: self._query_exports,
            messages.IdentifyExport: self._identify,
            messages.AcquireLeases: self._acquire_leases,
            messages.QueryLeases: lambda command: self.leased.describe(),
            messages.PrepareTransfer: lambda command: source.prepare(command.transfer, command.images),
            messages.ReleaseTransfer: lambda command: source.release(command.transfer, command.epoch),
            messages.AbortTransfer: lambda command: source.abort(command.transfer),
            messages.CheckTransfer: lambda command: destination.check(command.transfer),
            messages.GrantTransfer: lambda command: destination.grant(command.transfer, command.epoch),
            messages.Ping: lambda command: None,
            messages.Quit: self._end,
            **self._snapshots.table(),
        }

    def take_over(self, exports: Iterable[config.Export]) -> None:
        """Open what a predecessor of this machine has served, but for what it has handed over to another."""
        exports = list(exports)
        gone = released(exports, self.leased.owner.uuid)
        self._source.take_over(gone.values())
        self.leased.open_all(export for export in exports if export.id not in gone)
        for export in self.exports.all():
            export.inherited = True

    def listen(self, path: str) -> None:
        """Serve NBD at a UNIX socket, too."""
        self._listeners.append(listen_unix(path))

    def listen_tcp(self, host: str, port: int) -> int:
        """Serve NBD at a TCP port, too, at every address of ``host``; the port, which matters for 0."""
        listeners = listen_tcp(host, port)
        self._listeners += listeners
        taken: int = listeners[0].sock.getsockname()[1]
        return taken

    def listen_at(self, listeners: list[Listener]) -> None:
        """Serve NBD at sockets that listen already, too."""
        self._listeners += listeners

    def end_on_signal(self, *numbers: int) -> None:
        """Let these signals end ``run`` in order. Only from the main thread."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, self._on_signal)

    def stop(self) -> None:
        """Let ``run`` end in order; from any thread."""
        self._quit = True
        self._wake()

    def run(self, control: ControlSocket | None = None) -> None:
        """Serve until told to end; then finish requests, flush and close. Errors of the last flush are a
        BlockError."""
        poller = zmq.Poller()
        poller.register(self._wake_read, zmq.POLLIN)
        if control is not None:
            poller.register(control.socket, zmq.POLLIN)
        while not self._quit:
            for listener in self._listeners:  # those who would be too many wait in its queue
                poller.register(listener.sock, 0 if self._server.full else zmq.POLLIN)
            ready = dict(poller.poll())
            if self._wake_read in ready:
                os.read(self._wake_read, 64)
            for listener in self._listeners:
                if listener.sock.fileno() in ready:
                    self._server.accept(listener.sock)
            if control is not None:
                # a ZeroMQ socket signals edges: take what is there, whatever woke us
                self._obey(control)
                while self._losses:
                    control.notify(self._losses.popleft())
        self.close()

    def close(self) -> None:
        """End connections, retire exports, remove sockets; BlockError when a flush failed, also when that
        was in an earlier call."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        self._server.end_all()
        self._snapshots.close()
        self._errors += self.leased.close_all()
        if self._errors:
            raise BlockError("; ".join(self._errors))

    def _client_left(self, negotiated: bool, last: bool) -> None:
        """By the thread of a connection."""
        if negotiated and last and not self._persistent:
            self._quit = True
        self._wake()

    def _lease_lost(self, ident: str, text: str) -> None:
        """By whatever thread was about to write."""
        self._losses.append(messages.LeaseLost(ident, text))
        self._wake()

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # it has been woken often enough

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
        return self.leased.open_all([command.export])[0].describe()

    def _acquire_leases(self, command: messages.AcquireLeases) -> list[dict[str, Any]]:
        return [export.describe() for export in self.leased.open_all(command.exports)]

    def _close_export(self, command: messages.CloseExport) -> None:
        self.leased.close(command.id)

    def _resize_export(self, command: messages.ResizeExport) -> dict[str, Any]:
        """Sessions that are there keep the size they were told; new ones see the new one."""
        export = self.exports.named(command.id)
        export.resize(command.size)
        return export.describe()

    def _identify(self, command: messages.IdentifyExport) -> dict[str, Any]:
        """Which medium an export is."""
        image = self.exports.named(command.id).image
        try:
            return identify(image)
        except OSError as error:
            text = f"{image.file}: cannot be read: {error.strerror or error}"
            raise BlockError(text, error.errno or errno.EIO) from None

    def _query_exports(self, command: messages.QueryExports) -> list[dict[str, Any]]:
        return self.exports.describe()

    def _end(self, command: messages.Quit) -> None:
        """Answered when all is durable."""
        self._quit = True
        self.close()
