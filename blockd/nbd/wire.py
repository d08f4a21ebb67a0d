"""A connected socket whose two directions are used by different threads, plain or by TLS.

A TLS connection is one object that two threads must not use at once (OpenSSL, "openssl-threads"), so the
socket does not block: a thread waits outside of the lock.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

#: bytes that the kernel is asked to hold for a connection and direction
SOCKET_BUFFER = 1 << 20


class Lost(Exception):
    """The connection is of no use any more; why, in one line."""


class Wire:
    """One thread may send and one receive at a time. ``silence``: seconds without any progress after which
    the peer is taken for dead."""

    def __init__(self, sock: socket.socket, silence: float) -> None:
        self._sock = sock
        self._silence = silence
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._lock = threading.Lock() if self._tls else nullcontext()
        self._reason = ""
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)

    def send(self, parts: Sequence[memoryview], meanwhile: Callable[[], None] | None = None) -> None:
        """Send all of ``parts``; Lost. ``meanwhile`` is called while something has arrived and nothing can be
        sent, for a peer may not go on before that is taken."""
        waiting = [part for part in parts if len(part)]
        while waiting:
            try:
                with self._lock:
                    sent = self._sock.send(waiting[0]) if self._tls else self._sock.sendmsg(waiting)
            except (BlockingIOError, ssl.SSLWantWriteError):
                events = self._wait(select.POLLOUT | (select.POLLIN if meanwhile else 0))
                if meanwhile is not None and events & select.POLLIN:
                    meanwhile()
                continue
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN)
                continue
            except OSError as error:
                raise self._lost(error.strerror or str(error)) from None
            while sent and sent >= len(waiting[0]):
                sent -= len(waiting.pop(0))
            if sent:
                waiting[0] = waiting[0][sent:]

    def receive_into(self, view: memoryview) -> int:
        """At least one byte, when there is one; Lost."""
        while True:
            try:
                with self._lock:
                    got = self._sock.recv_into(view)
            except (BlockingIOError, ssl.SSLWantReadError):
                self._wait(select.POLLIN)
                continue
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT)
                continue
            except OSError as error:
                raise self._lost(error.strerror or str(error)) from None
            if not got:
                raise self._lost("the server closed the connection")
            return got

    def _wait(self, events: int) -> int:
        poller = select.poll()
        poller.register(self._sock, events)
        deadline = time.monotonic() + self._silence
        while True:
            for _, ready in poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return ready
            if time.monotonic() >= deadline:
                raise self._lost(f"the server was silent for {self._silence:g} seconds")

    def _lost(self, reason: str) -> Lost:
        """The first reason is the real one: others follow from it."""
        self.shut(reason)
        return Lost(self._reason)

    def shut(self, reason: str) -> None:
        """Let every use of the wire end, from any thread."""
        self._reason = self._reason or reason
        try:
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # SSLSocket's would forget its keys first
        except OSError:
            pass

    def close(self) -> None:
        """With nobody in ``send`` or ``receive_into``."""
        self._sock.close()
