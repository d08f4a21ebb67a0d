"""The data connections of a migration: guest memory, and whether the other side lives.

Each begins with a token that the control channel has handed out. They stay open until the end: their closing
is how a killed peer is noticed at once, and keep-alive how one that cannot be reached is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from coordinator.contract.errors import MigrationError
from coordinator.migrate.uri import Uri

log = logging.getLogger(__name__)

TOKEN = 32
#: bytes that the kernel is asked to hold for one connection and direction
BUFFER = 4 << 20
#: how long a peer may be unreachable, seconds
SILENCE = 20
#: how long a connection may take to come about, seconds
CONNECT_SECONDS = 10.0
PATH_SUFFIX = ".ram"


@dataclass(frozen=True)
class Tls:
    """``hostname`` is what the target's certificate must be for."""

    context: ssl.SSLContext
    hostname: str | None = None


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or 'failed').replace('_', ' ').lower()}"
    return error.strerror or str(error)


def _prepare(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENCE // 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENCE // 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE * 1000)


def _connect(uri: Uri, port: int, path: str, token: bytes, tls: Tls | None) -> socket.socket:
    try:
        if uri.kind == "tcp":
            sock = socket.create_connection((uri.host, port), CONNECT_SECONDS)
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(CONNECT_SECONDS)
            sock.connect(path)
    except OSError as error:
        raise MigrationError(f"{uri}: guest memory: {error.strerror or error}") from None
    _prepare(sock)
    try:
        if tls is not None:
            sock = tls.context.wrap_socket(sock, server_hostname=tls.hostname)
        sock.sendall(token)
    except OSError as error:
        sock.close()
        raise MigrationError(f"{uri}: guest memory: {_reason(error)}") from None
    sock.settimeout(None)
    return sock


async def connect(
    uri: Uri, port: int, path: str, token: bytes, count: int, tls: Tls | None
) -> list[socket.socket]:
    """``count`` connections to where the target listens for them; blocking sockets, for threads."""
    socks: list[socket.socket] = []
    try:
        for _ in range(count):
            socks.append(await asyncio.to_thread(_connect, uri, port, path, token, tls))
    except BaseException:
        close(socks)
        raise
    return socks


class Door:
    """Where the target waits for the connections of one transfer."""

    def __init__(self, uri: Uri, port: int = 0) -> None:
        """``port``: 0 for any; MigrationError when nobody can listen there."""
        self.token = os.urandom(TOKEN)
        self.port, self.path = 0, ""
        try:
            if uri.kind == "tcp":
                family = socket.AF_INET6 if ":" in uri.host else socket.AF_INET
                self._listener = socket.create_server((uri.host, port), family=family)
                self.port = self._listener.getsockname()[1]
            else:
                self.path = uri.path + PATH_SUFFIX
                self._listener = socket.socket(socket.AF_UNIX)
                os.fchmod(self._listener.fileno(), 0o600)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path)
                self._listener.bind(self.path)
                self._listener.listen()
        except OSError as error:
            raise MigrationError(f"{uri}: guest memory: cannot listen: {error.strerror}") from None
        self._listener.setblocking(False)

    async def admit(self, count: int, tls: Tls | None) -> list[socket.socket]:
        """As many connections as were announced, each with the token; others are closed."""
        loop = asyncio.get_running_loop()
        socks: list[socket.socket] = []
        try:
            while len(socks) < count:
                plain, _ = await loop.sock_accept(self._listener)
                sock = await asyncio.to_thread(self._greet, plain, tls)
                if sock is not None:
                    socks.append(sock)
        except BaseException:
            close(socks)
            raise
        return socks

    def _greet(self, plain: socket.socket, tls: Tls | None) -> socket.socket | None:
        """The connection, if whoever made it may."""
        sock = plain
        try:
            plain.settimeout(CONNECT_SECONDS)
            _prepare(plain)
            if tls is not None:
                sock = tls.context.wrap_socket(plain, server_side=True)
            given = b""
            while len(given) < TOKEN and (piece := sock.recv(TOKEN - len(given))):
                given += piece
            if hmac.compare_digest(given, self.token):
                sock.settimeout(None)
                return sock
        except OSError as error:
            log.warning("migration: a connection was turned away: %s", _reason(error))
        sock.close()
        return None

    def close(self) -> None:
        self._listener.close()
        if self.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


async def side_by_side(jobs: Sequence[Callable[[], None]], abandon: Callable[[], None]) -> None:
    """Run jobs in threads. When one fails, or we are cancelled, ``abandon`` makes the others end; in any case
    none runs any more afterwards."""
    pool = ThreadPoolExecutor(len(jobs))
    try:
        await asyncio.gather(*(asyncio.wrap_future(pool.submit(job)) for job in jobs))
    except BaseException:
        abandon()
        raise
    finally:
        pool.shutdown()


def cut(socks: Sequence[socket.socket]) -> None:
    """End the connections under whoever works with them."""
    for sock in socks:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # an SSLSocket's own would go on in plain


def close(socks: Sequence[socket.socket]) -> None:
    for sock in socks:
        sock.close()


async def gone(sock: socket.socket) -> None:
    """Returns when the other side has closed a connection on which nothing is to come."""
    loop = asyncio.get_running_loop()
    closed: asyncio.Future[None] = loop.create_future()
    fd = sock.fileno()

    def readable() -> None:
        loop.remove_reader(fd)
        if not closed.done():
            closed.set_result(None)

    loop.add_reader(fd, readable)
    try:
        await closed
    finally:
        loop.remove_reader(fd)
