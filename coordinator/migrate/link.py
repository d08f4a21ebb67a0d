"""The control channel of a migration: ZeroMQ with CURVE, a DEALER at the source and a ROUTER at the target.

It reconnects by itself, so a message may be late, lost or come twice; what is said (messages.py) allows for
that. Whether the other side lives is told by the data connections, not by this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
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
#: a message larger than this is dropped with its connection (a part is the largest that we send)
LARGEST = 96 << 20


def _prepare(socket: zmq.Socket[Any]) -> None:
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.IPV6, 1)
    socket.set(zmq.MAXMSGSIZE, LARGEST)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


class Dialer:
    """The source's end."""

    def __init__(self, uri: Uri) -> None:
        self.uri = uri
        pair = keys.own()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        _prepare(self._socket)
        self._socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.curve_publickey, self._socket.curve_secretkey = pair.public, pair.secret
        self._socket.curve_serverkey = keys.of_host(uri.host, uri.local)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        self._turned_away = asyncio.ensure_future(self._watch())
        self._socket.connect(uri.endpoint)

    async def _watch(self) -> None:
        """Returns when the target does not know our key."""
        await recv_monitor_message(self._monitor)

    async def send(self, message: msgspec.Struct) -> None:
        await self._socket.send(encode(message))

    async def receive(self, transfer: str) -> messages.AnyOfTarget:
        """The next message of this transfer."""
        while True:
            coming = asyncio.ensure_future(self._socket.recv())
            await asyncio.wait({coming, self._turned_away}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                place = keys.folder() / "key.pub"
                text = f"copy {place} to its peers folder, named after this host"
                raise MigrationError(f"{self.uri}: does not know our key; {text}")
            with contextlib.suppress(MessageError):
                message = messages.of_target.decode(coming.result())
                if message.transfer == transfer:
                    return message

    def redirect(self, uri: Uri) -> None:
        """Go on with the same target at another address."""
        self._socket.disconnect(self.uri.endpoint)
        self.uri = uri
        self._socket.connect(uri.endpoint)

    def close(self) -> None:
        self._turned_away.cancel()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.term()


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
        self._peer = b""
        try:
            self.also(uri)
        except MigrationError:
            self.close()
            raise

    def also(self, uri: Uri) -> None:
        """Listen at one more address; MigrationError when that cannot be."""
        before = os.umask(0o177)
        try:
            self._socket.bind(uri.endpoint)
        except zmq.ZMQError as error:
            raise MigrationError(f"{uri}: cannot listen: {error.strerror}") from None
        finally:
            os.umask(before)

    @property
    def port(self) -> int:
        """The TCP port, also where 0 was asked for."""
        return int(str(self._socket.get_string(zmq.LAST_ENDPOINT)).rpartition(":")[2])

    def callback(self, domain: str, key: bytes) -> bool:
        """ZAP asks whether a peer may come in."""
        return self.uri.insecure or key in self._allowed

    async def receive(self) -> messages.AnyOfSource:
        """The next message. Whoever said it is who ``send`` answers."""
        while True:
            peer, *frames = await self._socket.recv_multipart()
            try:
                message = messages.of_source.decode(frames[-1] if frames else b"")
            except MessageError as error:
                log.warning("migration: %s", error)
                continue
            self._peer = peer
            return message

    async def send(self, message: msgspec.Struct) -> None:
        """To whom spoke last; lost if that one is gone, and it asks again when it is back."""
        with contextlib.suppress(zmq.ZMQError):
            await self._socket.send_multipart((self._peer, encode(message)))

    def close(self) -> None:
        self._socket.close(0)
        self._zap.stop()
        self._context.term()
        if self.uri.kind == "unix":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.uri.path)
