"""Connections: one thread each, from the greeting to the last reply.

A thread a connection, because file and socket calls release the interpreter lock: a slow
fdatasync of one client does not hold up another, and each client's requests stay in order.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass

from blockd.export import Counters, Export, ExportTable
from blockd.nbd.handshake import Handshake, Hangup, Terms
from blockd.nbd.transmission import Transmission

log = logging.getLogger(__name__)

#: bytes that the kernel is asked to hold for one connection and direction
SOCKET_BUFFER = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What clients may cost."""

    connections: int = 128
    #: clients beyond that wait until one leaves, rather than being turned away
    queue: bool = False
    #: a handshake, that of TLS with it, must have been finished by then
    handshake_seconds: float = 10.0
    #: how long a client may leave its last replies unread when its session is being ended
    farewell_seconds: float = 2.0


class Connection:
    """One client, and its session once it has chosen an export."""

    def __init__(self, server: Server, sock: socket.socket, number: int) -> None:
        self.counters = Counters()
        self._server = server
        self._sock = sock
        self._export: Export | None = None
        self._transmission: Transmission | None = None
        self._lock = threading.Lock()
        self._stopping = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"client-{number}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def peer_gone(self) -> bool:
        poller = select.poll()
        poller.register(self._sock, select.POLLRDHUP)
        return bool(poller.poll(0))

    def end(self) -> None:
        """Finish the request being served, discard the rest, and wait for that."""
        self.interrupt()
        if self._done.wait(self._server.limits.farewell_seconds):
            return
        self._shut(socket.SHUT_RDWR)  # a client that does not read its replies
        self._done.wait()

    def interrupt(self) -> None:
        """Begin no further request; does not wait."""
        with self._lock:
            self._stopping = True
            if self._transmission is not None:
                self._transmission.stopping = True
        self._shut(socket.SHUT_RD)

    def _shut(self, how: int) -> None:
        try:
            # of the connection below TLS: SSLSocket.shutdown would have what follows sent in plain
            socket.socket.shutdown(self._sock, how)
        except OSError:
            pass  # the client was faster

    def _run(self) -> None:
        try:
            server = self._server
            seconds = server.limits.handshake_seconds
            agreed = Handshake(
                self._sock, server.exports, self._join, seconds, server.terms, self._replace
            ).run()
            transmission = Transmission(agreed, self.counters)
            with self._lock:
                transmission.stopping = self._stopping
                self._transmission = transmission
            transmission.run()
        except Hangup as reason:
            log.info("%s: %s", self._thread.name, reason)
        except Exception:
            log.exception("%s: connection closed by an error of ours", self._thread.name)
        finally:
            if self._export is not None:
                self._export.leave(self)
            self._say_goodbye()
            self._sock.close()
            self._done.set()
            self._server.forget(self, negotiated=self._transmission is not None)

    def _replace(self, sock: socket.socket) -> None:
        """TLS begins: Hangup when the connection was told to end while the old socket was given up."""
        with self._lock:
            self._sock = sock
            if self._stopping:
                raise Hangup("the server ends")

    def _say_goodbye(self) -> None:
        """A client behind TLS is told that this is the end ("TLS support"), and not waited for."""
        if isinstance(self._sock, ssl.SSLSocket):
            try:
                self._sock.settimeout(0)
                self._sock.unwrap()
            except (OSError, ValueError):
                pass  # it has left, was not that far yet, or does not answer at once

    def _join(self, export: Export) -> bool:
        if not export.join(self):
            return False
        self._export = export
        return True


class Server:
    """All connections, whatever socket they came by."""

    def __init__(
        self,
        exports: ExportTable,
        limits: Limits | None = None,
        terms: Terms | None = None,
        left: Callable[[bool, bool], None] = lambda negotiated, last: None,
    ) -> None:
        """``left`` is called by a client's thread when it ends: had it chosen an export, was it the last?"""
        self.exports = exports
        self.limits = limits or Limits()
        self.terms = terms or Terms()
        self._left = left
        self._lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._number = 0

    @property
    def full(self) -> bool:
        """Is it better not to accept anybody now?"""
        return self.limits.queue and len(self._connections) >= self.limits.connections

    def accept(self, listener: socket.socket) -> None:
        """Take the client that waits at a listening socket."""
        try:
            sock, _ = listener.accept()
        except OSError as error:
            log.warning("accept: %s", error)
            return
        with self._lock:
            full = len(self._connections) >= self.limits.connections
            self._number += 1
            connection = Connection(self, sock, self._number)
            if not full:
                self._connections.add(connection)
        if full:
            log.warning("client refused: %d are connected", self.limits.connections)
            sock.close()
            return
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.start()

    def forget(self, connection: Connection, negotiated: bool) -> None:
        with self._lock:
            self._connections.discard(connection)
            last = not self._connections
        self._left(negotiated, last)

    def end_all(self) -> None:
        """End every connection, also those still in their handshake."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.interrupt()
        for connection in connections:
            connection.end()
