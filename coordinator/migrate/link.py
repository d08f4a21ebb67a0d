"""The control channel of a migration: ZeroMQ with CURVE, a DEALER at the source and a ROUTER at the target.

It reconnects by itself, so a message may be late, lost or come twice; what is said (messages.py) allows for
that. Whether the other side lives is told by the data connections, not by this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import recv_monitor_message

from coordinator.contract.codec import encode
from coordinator.contract.errors import MessageError, MigrationError
from coordinator.migrate import keys, messages
from coordinator.migrate.uri import Uri

log = logging.getLogger(__name__)

RECONNECT_MS = 20
#: a peer that holds a dead connection for alive is told apart after so long, milliseconds
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 5000
#: for how long a target that is just starting may refuse to be connected to, seconds
REFUSED_SECONDS = 1.0
#: a message larger than this is dropped with its connection (a part is the largest that we send)
LARGEST = 96 << 20
#: what a Dialer learns of its connection, before it has one
_EVENTS = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
)


def _prepare(socket: zmq.Socket[Any]) -> None:
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.IPV6, 1)
    socket.set(zmq.MAXMSGSIZE, LARGEST)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


class Dialer:
    """The source's end. Its routing id is the transfer, so an answer finds it after a reconnection, too."""

    def __init__(self, uri: Uri, transfer: str) -> None:
        self.uri, self._transfer = uri, transfer
        #: a target has been met: from now on every failure to reach it passes by itself
        self.met = False
        pair = keys.own()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _prepare(self._socket)
        self._socket.set(zmq.ROUTING_ID, transfer.encode())
        self._socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.curve_publickey, self._socket.curve_secretkey = pair.public, pair.secret
        self._socket.curve_serverkey = keys.of_host(uri.host, uri.local)
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._inbox: asyncio.Queue[messages.AnyOfTarget] = asyncio.Queue()
        self._tasks = [asyncio.ensure_future(self._read())]
        #: why there is nobody to talk to
        self._nobody: asyncio.Task[str] = asyncio.ensure_future(self._watch())

    async def connect(self) -> None:
        """MigrationError where the address cannot be one."""
        await self._dial(self.uri)

    async def _dial(self, uri: Uri) -> None:
        place = await asyncio.to_thread(uri.resolved)
        try:
            self._socket.connect(place.endpoint)
        except zmq.ZMQError as error:
            raise MigrationError(f"{uri}: cannot be connected to: {error.strerror}") from None
        self._endpoint = place.endpoint

    async def _watch(self) -> str:
        """Returns when it is clear that no target will ever answer."""
        clock = asyncio.get_running_loop().time
        heard, until = False, None
        while until is None or clock() < until:
            try:
                async with asyncio.timeout_at(until):
                    event = (await recv_monitor_message(self._monitor))["event"]
            except TimeoutError:
                continue
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.met, until = True, None
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and not self.met:
                place = keys.folder() / "key.pub"
                return f"does not know our key; copy {place} to its peers folder, named after this host"
            elif not self.met:
                heard |= event != zmq.EVENT_CONNECT_RETRIED
                until = until or clock() + REFUSED_SECONDS
        if heard:
            return "who listens there is no machine that waits for another, or has another key"
        return "nobody listens there"

    async def _read(self) -> None:
        while True:
            frame = await self._socket.recv()
            with contextlib.suppress(MessageError):
                message = messages.of_target.decode(frame)
                if message.transfer == self._transfer:
                    self._inbox.put_nowait(message)

    async def send(self, message: msgspec.Struct) -> None:
        """Lost where there is no connection, nor an attempt at one."""
        with contextlib.suppress(zmq.Again):
            await self._socket.send(encode(message), zmq.DONTWAIT)

    async def receive(self) -> messages.AnyOfTarget:
        """The next message of this transfer. Nothing is lost when the wait is cancelled."""
        coming = asyncio.ensure_future(self._inbox.get())
        try:
            await asyncio.wait({coming, self._nobody}, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return coming.result()
        finally:
            coming.cancel()
        raise MigrationError(f"{self.uri}: {self._nobody.result()}")

    async def redirect(self, uri: Uri) -> None:
        """Go on with the same target at another address; MigrationError where that cannot be one."""
        before = self._endpoint
        await self._dial(uri)
        self.uri = uri
        if self._endpoint != before:
            self._socket.disconnect(before)

    async def close(self, linger_ms: int = 0) -> None:
        """``linger_ms``: how long what has been said may still be on its way."""
        for task in (*self._tasks, self._nobody):
            task.cancel()
        await asyncio.gather(*self._tasks, self._nobody, return_exceptions=True)
        self._hang_up(linger_ms)
        await asyncio.to_thread(self._context.term)

    def drop(self) -> None:
        """At once; after ``close`` it does nothing. A context whose sockets are open would hold up the end of
        this process."""
        if not self._socket.closed:
            for task in (*self._tasks, self._nobody):
                task.cancel()
            self._hang_up(0)

    def _hang_up(self, linger_ms: int) -> None:
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)


class Listener:
    """The target's end. A peer with an unknown key gets nothing."""

    def __init__(self, uri: Uri) -> None:
        """MigrationError when nobody can listen there, or everybody could come."""
        others = keys.peers()
        if not uri.local and not others and not uri.insecure:
            place = keys.folder() / "peers"
            raise MigrationError(
                f"{uri}: other hosts could reach it, and no key of one is in {place}; put one there, "
                "or say insecure=on"
            )
        pair = keys.own()
        self.uri = uri
        self._allowed = {pair.public, *others.values()}
        self._context = zmq.asyncio.Context()
        self._zap = AsyncioAuthenticator(self._context)
        self._zap.start()
        self._zap.configure_curve_callback("atoll", self)
        self._socket = self._context.socket(zmq.ROUTER)
        _prepare(self._socket)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.curve_publickey, self._socket.curve_secretkey = pair.public, pair.secret
        self._socket.curve_server = True
        self._socket.set(zmq.ZAP_DOMAIN, b"atoll")
        self._paths: list[str] = []
        try:
            self.also(uri)
        except MigrationError:
            self.close()
            raise

    def also(self, uri: Uri) -> None:
        """Listen at one more address; MigrationError when that cannot be."""
        place = uri.resolved()
        if uri.kind == "unix":
            free_path(uri)
        before = os.umask(0o177)
        try:
            self._socket.bind(place.endpoint)
        except zmq.ZMQError as error:
            raise MigrationError(f"{uri}: cannot listen: {error.strerror}") from None
        finally:
            os.umask(before)
        if uri.kind == "unix":
            self._paths.append(uri.path)

    @property
    def port(self) -> int:
        """The TCP port, also where 0 was asked for."""
        return int(str(self._socket.get_string(zmq.LAST_ENDPOINT)).rpartition(":")[2])

    def callback(self, domain: str, key: bytes) -> bool:
        """ZAP asks whether a peer may come in."""
        return self.uri.insecure or key in self._allowed

    async def receive(self) -> messages.AnyOfSource:
        """The next message."""
        while True:
            _, *frames = await self._socket.recv_multipart()
            try:
                return messages.of_source.decode(frames[-1] if frames else b"")
            except MessageError as error:
                log.warning("migration: %s", error)

    async def send(self, message: messages.Said) -> bool:
        """To the source of its transfer; False if that one is not there now, and will ask again."""
        try:
            await self._socket.send_multipart((message.transfer.encode(), encode(message)))
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        """At once, and once more does nothing."""
        if self._context.closed:
            return
        self._socket.close(0)
        self._zap.stop()
        self._context.term()
        for path in self._paths:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def free_path(uri: Uri, suffix: str = "") -> None:
    """Make room for a socket: what a dead process left goes, all else stays (to bind would remove whatever
    has the name). MigrationError where something is there."""
    path = uri.path + suffix
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise MigrationError(f"{uri}: cannot listen: {path} is there and is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            probe.connect(path)
        raise MigrationError(f"{uri}: cannot listen: somebody listens there")
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError as error:
        raise MigrationError(f"{uri}: cannot listen: {error.strerror}") from None
