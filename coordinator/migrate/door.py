"""Where the target waits for the data connections of one transfer.

Whoever connects is greeted beside the others, so one who says nothing keeps nobody waiting; there are few of
them at a time, and each has little time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from coordinator.contract.errors import MigrationError
from coordinator.migrate import channel
from coordinator.migrate.channel import Tls
from coordinator.migrate.link import free_path
from coordinator.migrate.uri import Uri

log = logging.getLogger(__name__)

TOKEN = 32
PATH_SUFFIX = ".ram"
#: connections that may be on their way through the door; when one more comes the oldest has to leave
MOST = 32

T = TypeVar("T")


class Door:
    """Listens from the beginning to ``close``."""

    def __init__(self, uri: Uri, port: int = 0) -> None:
        """``port``: 0 for any; MigrationError when nobody can listen there."""
        self.token = os.urandom(TOKEN)
        self.port, self.path = 0, ""
        #: told why a connection was turned away, in a few words
        self.on_turned_away: Callable[[str], None] = lambda reason: None
        self._greetings: list[asyncio.Task[None]] = []
        self._admitted: list[socket.socket] = []
        self._wanted = 0
        self._full: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            if uri.kind == "tcp":
                family = socket.AF_INET6 if ":" in uri.host else socket.AF_INET
                self._listener = socket.create_server((uri.host, port), family=family)
                self.port = self._listener.getsockname()[1]
            else:
                self.path = uri.path + PATH_SUFFIX
                free_path(uri, PATH_SUFFIX)
                self._listener = socket.socket(socket.AF_UNIX)
                os.fchmod(self._listener.fileno(), 0o600)
                self._listener.bind(self.path)
                self._listener.listen()
        except OSError as error:
            raise MigrationError(f"{uri}: guest memory: cannot listen: {error.strerror}") from None
        self._listener.setblocking(False)

    async def admit(self, count: int, tls: Tls | None) -> list[socket.socket]:
        """As many connections as were announced, each with the token; others are closed. Blocking sockets,
        for threads."""
        self._wanted = count
        accepting = asyncio.ensure_future(self._accept(tls))
        try:
            await asyncio.wait({self._full, accepting}, return_when=asyncio.FIRST_COMPLETED)
            if not self._full.done():
                accepting.result()
        except BaseException:
            self._wanted = 0
            raise
        finally:
            accepting.cancel()
            for greeting in self._greetings:
                greeting.cancel()
            await asyncio.gather(accepting, *self._greetings, return_exceptions=True)
            channel.close(self._admitted[self._wanted :])
        for sock in self._admitted[:count]:
            sock.setblocking(True)
        return self._admitted[:count]

    async def _accept(self, tls: Tls | None) -> None:
        loop = asyncio.get_running_loop()
        while True:
            plain, _ = await loop.sock_accept(self._listener)
            self._greetings = [greeting for greeting in self._greetings if not greeting.done()]
            if len(self._greetings) >= MOST:
                self._greetings.pop(0).cancel()
            greeting = asyncio.ensure_future(self._greet(plain, tls))
            greeting.add_done_callback(partial(_close_unless_greeted, plain))
            self._greetings.append(greeting)

    async def _greet(self, plain: socket.socket, tls: Tls | None) -> None:
        """Let it in, if whoever made it may come."""
        sock = plain
        try:
            async with asyncio.timeout(channel.CONNECT_SECONDS):
                plain.setblocking(False)
                channel.prepare(plain)
                if tls is not None:
                    sock = wrapped = tls.context.wrap_socket(
                        plain, server_side=True, do_handshake_on_connect=False
                    )
                    await _when_ready(wrapped, wrapped.do_handshake)
                given, piece = b"", b"-"
                while len(given) < TOKEN and piece:
                    piece = await _when_ready(sock, partial(sock.recv, TOKEN - len(given)))
                    given += piece
            if hmac.compare_digest(given, self.token):
                self._admitted.append(sock)
                if len(self._admitted) == self._wanted:
                    self._full.set_result(None)
                return
        except OSError as error:  # also that it took too long
            why = channel.reason(error) if str(error) else "it said nothing"
            log.warning("migration: a connection was turned away: %s", why)
            self.on_turned_away(why)
        except asyncio.CancelledError:
            sock.close()
            raise
        sock.close()

    def close(self) -> None:
        self._listener.close()
        if self.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def _close_unless_greeted(plain: socket.socket, greeting: asyncio.Task[None]) -> None:
    if greeting.cancelled():  # perhaps before it began
        plain.close()


async def _when_ready(sock: socket.socket, step: Callable[[], T]) -> T:
    """What a step on a non-blocking socket gives, when the peer has done its part."""
    loop = asyncio.get_running_loop()
    while True:
        ready: asyncio.Future[None] = loop.create_future()
        fd = sock.fileno()
        try:
            return step()
        except (BlockingIOError, ssl.SSLWantReadError):
            loop.add_reader(fd, _wake, ready)
        except ssl.SSLWantWriteError:
            loop.add_writer(fd, _wake, ready)
        try:
            await ready
        finally:
            loop.remove_reader(fd)
            loop.remove_writer(fd)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
