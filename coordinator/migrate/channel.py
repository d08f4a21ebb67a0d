"""The data connections of a migration: guest memory, and whether the other side lives.

Each begins with a token that the control channel has handed out (door.py). They stay open until the end:
their closing is how a killed peer is noticed at once, and keep-alive how one that cannot be reached is.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from coordinator.contract.errors import MigrationError
from coordinator.migrate.uri import Uri

#: bytes that the kernel is asked to hold for one connection and direction
BUFFER = 4 << 20
#: how long a peer may be unreachable, seconds
SILENCE = 20
#: how long a connection may take to come about, seconds
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Tls:
    """``hostname`` is what the target's certificate must be for."""

    context: ssl.SSLContext
    hostname: str | None = None


class Distrust(MigrationError):
    """The target's certificate does not do."""


def reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or 'failed').replace('_', ' ').lower()}"
    return error.strerror or str(error)


def prepare(sock: socket.socket) -> None:
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
    prepare(sock)
    try:
        if tls is not None:
            sock = tls.context.wrap_socket(sock, server_hostname=tls.hostname)
        sock.sendall(token)
    except OSError as error:
        sock.close()
        kind = Distrust if isinstance(error, ssl.SSLCertVerificationError) else MigrationError
        raise kind(f"{uri}: guest memory: {reason(error)}") from None
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


async def side_by_side(jobs: Sequence[Callable[[], None]], abandon: Callable[[], None]) -> None:
    """Run jobs in threads. When one fails, or we are cancelled, ``abandon`` makes the others end; in any case
    none runs any more afterwards. Others go on meanwhile, however long a thread takes to end."""
    pool = ThreadPoolExecutor(len(jobs))
    work = [asyncio.wrap_future(pool.submit(job)) for job in jobs]
    try:
        done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_EXCEPTION)
        for one in done:
            one.result()
    except BaseException:
        abandon()
        raise
    finally:
        while not all(one.done() for one in work):
            with contextlib.suppress(asyncio.CancelledError):  # they have descriptors that are closed next
                await asyncio.wait(work)
        for one in work:
            one.exception()  # those that abandon() has brought about are of no interest
        pool.shutdown(wait=False)


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
