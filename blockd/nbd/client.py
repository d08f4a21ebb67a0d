"""A client of one export, for many threads at once, that outlives its connection.

Source: NBD protocol, "Transmission phase", "Ordering of messages and writes".

Each thread sends its own requests. One of the threads that wait receives for all (it *leads*), and hands
that on when its own requests are done: no thread exists for the client, and a single request costs no
switch between threads. Where nobody leads, a sender that the server keeps waiting takes in replies. The
leader also connects again when the connection is lost: the whole handshake, then the writes that are not
durable yet, then what was unanswered, both in their old order.

What bounds a request: ``reconnect_delay`` seconds for a server that cannot be reached, ``answer_timeout``
seconds for one that is silent, and MOST_ATTEMPTS connections for one that never answers it. After that
it fails with EIO. A server that breaks the protocol fails all that is in flight at once.
"""

from __future__ import annotations

import errno
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable

from blockd import handout
from blockd.nbd.replies import Replies, Request, Violation
from blockd.nbd.unflushed import Unflushed
from blockd.nbd.uri import Address
from blockd.nbd.wire import Lost, Wire
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import REQUEST, REQUEST_MAGIC, Command, TransmissionFlag
from coordinator.contract.nbd_handshake import (
    LARGEST_MINIMUM,
    ClientHandshake,
    ExportInfo,
    Secure,
    TryAgain,
    Wanted,
)
from coordinator.contract.tls import client_context

log = logging.getLogger(__name__)

#: a handshake must have been finished by then
HANDSHAKE_SECONDS = 10.0
#: pauses between two attempts to connect: the first, and the longest
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0
#: pause of a sender that can do nothing, while another thread takes in what has come
LEADER_SECONDS = 0.001
#: connections that one request is sent on before it fails
MOST_ATTEMPTS = 8

_JOURNALED = frozenset({Command.WRITE, Command.WRITE_ZEROES})


class Call:
    """Requests that one thread waits for."""

    def __init__(self, count: int) -> None:
        self.outstanding = count
        #: set when there is something to do for the thread: all is done, or it is to lead
        self.turn = threading.Event()


class Client:
    """The export at ``address``. Time is handed in, for tests."""

    def __init__(
        self,
        address: Address,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connect, once; BlockError in one line when that cannot be."""
        self._address = address
        self._clock = clock
        self._pause = pause
        self._lock = threading.Lock()
        #: held while bytes are sent, so that messages stay whole; taken before ``_lock``
        self._sending = threading.Lock()
        self._cookies = itertools.count(1)
        #: in the order in which they were made
        self._pending: dict[int, Request] = {}
        self._waiting: dict[Call, None] = {}
        self._leading = False
        #: what a sender met, for the next leader
        self._violation: Violation | None = None
        #: counts connections, made and lost, so that a request is sent once on each
        self._generation = 0
        self._unflushed = Unflushed()
        self._broken_promise = ""
        self._lost_at = 0.0
        self._not_before = 0.0  # no attempt to connect until then
        self._fruitless = 0  # connections in a row that brought no answer
        try:
            wire, self.info = self._shake_hands(clock() + HANDSHAKE_SECONDS)
        except (OSError, TryAgain) as error:
            number = getattr(error, "errno", None) or errno.ECONNREFUSED
            raise BlockError(f"{address.server}: cannot connect: {_reason(error)}", number) from None
        self._wire: Wire | None = wire
        self._replies = self._replies_on(wire, self.info)

    def has(self, flag: TransmissionFlag) -> bool:
        """Does the server offer it?"""
        return bool(self.info.flags & flag)

    # ---- requests --------------------------------------------------------------------------------
    def call(self, *requests: Request) -> None:
        """Make requests at once and wait for all; OSError of the first that failed."""
        call = Call(len(requests))
        for request in requests:
            request.done = lambda: self._one_less(call)
            self._submit(request)
        self._wait(call)
        for request in requests:
            if request.error:
                raise OSError(request.error, request.text or f"{self._address.server}: request failed")

    def flush(self) -> None:
        """Make durable what has been acknowledged; OSError. A server that has no flush is asked nothing."""
        if not self.has(TransmissionFlag.SEND_FLUSH):
            return
        request = Request(Command.FLUSH)
        self.call(request)
        with self._lock:
            self._unflushed.flushed(request.mark)
            promise, self._broken_promise = self._broken_promise, ""
        if promise:
            raise OSError(errno.EIO, f"{self._address.server}: {promise}")

    @property
    def should_flush(self) -> bool:
        """So much is not durable yet that it should be made so."""
        return self._unflushed.full

    def _submit(self, request: Request) -> None:
        with self._lock:
            request.cookie = next(self._cookies)
            request.mark = self._unflushed.last
            self._pending[request.cookie] = request
            wire, generation = self._wire, self._generation
        if wire is None:
            return  # whoever connects sends it
        with self._sending:
            if self._generation == generation:
                request.attempts = 1
                try:
                    self._send(wire, request, lambda: self._take_meanwhile(wire))
                except Lost:
                    pass  # the leader finds that out, too

    def _take_meanwhile(self, wire: Wire) -> None:
        """Take one reply while a request cannot be sent, unless somebody leads: a server that cannot get rid
        of its replies may take no more requests. Lost. The sender holds ``_sending``, so what is wrong is
        left to the next leader."""
        with self._lock:
            leading, self._leading = self._leading, True
        if leading:
            time.sleep(LEADER_SECONDS)
            return
        try:
            self._take()
        except Violation as reason:
            self._violation = reason
            wire.shut("given up")
        finally:
            self._hand_on()

    def _send(self, wire: Wire, request: Request, meanwhile: Callable[[], None] | None = None) -> None:
        header = REQUEST.pack(
            REQUEST_MAGIC, request.flags, request.command, request.cookie, request.offset, request.length
        )
        parts = [memoryview(header)]
        if request.command is Command.WRITE:
            assert request.view is not None
            parts.append(request.view)
        wire.send(parts, meanwhile)

    def _one_less(self, call: Call) -> None:
        """With the lock held."""
        call.outstanding -= 1
        if not call.outstanding:
            self._waiting.pop(call, None)
            call.turn.set()

    def _wait(self, call: Call) -> None:
        while True:
            with self._lock:
                if not call.outstanding:
                    return
                leading, self._leading = self._leading, True
                if leading:
                    call.turn.clear()
                    self._waiting[call] = None
            if leading:
                call.turn.wait()
                continue
            try:
                self._lead(call)
            finally:
                self._hand_on()

    def _hand_on(self) -> None:
        """Let one that waits lead."""
        with self._lock:
            self._leading = False
            if self._waiting:
                following = next(iter(self._waiting))
                del self._waiting[following]
                following.turn.set()

    # ---- leading ---------------------------------------------------------------------------------
    def _lead(self, call: Call) -> None:
        """Receive for all until ``call`` is done."""
        while call.outstanding:
            try:
                if self._wire is None:
                    self._connect_again()
                else:
                    self._take()
            except Lost as reason:
                self._drop()
                log.warning("%s: %s; connecting again", self._address.server, reason)
            except Violation as reason:
                self._drop()
                self._fail(errno.EIO, f"broke the protocol: {reason}")

    def _take(self) -> None:
        """Take one reply; Lost or Violation, also one that a sender met."""
        if self._violation is not None:
            raise self._violation
        self._replies.take()

    def _find(self, cookie: int) -> Request | None:
        return self._pending.get(cookie)

    def _finish(self, request: Request) -> None:
        """The reply to a request is whole."""
        with self._lock:
            del self._pending[request.cookie]
            if request.error:
                said = f": {request.text}" if request.text else ""
                command = request.command.name.lower().replace("_", " ")
                request.text = f"{self._address.server}: {command} failed{said}"
            elif request.command in _JOURNALED and self.has(TransmissionFlag.SEND_FLUSH):
                self._unflushed.add(request)
            self._fruitless = 0
            request.done()

    def _fail(self, number: int, reason: str, tired: bool = False) -> None:
        """Give up what is in flight; with ``tired`` only what has been sent too often."""
        with self._lock:
            given_up = [r for r in self._pending.values() if not tired or r.attempts >= MOST_ATTEMPTS]
            for request in given_up:
                del self._pending[request.cookie]
                request.error, request.text = number, f"{self._address.server}: {reason}"
                request.done()
        if given_up:
            log.error("%s: %s; %d requests failed", self._address.server, reason, len(given_up))

    def _drop(self) -> None:
        """The connection is of no use any more."""
        with self._lock:
            wire, self._wire = self._wire, None
            self._violation = None
            self._generation += 1
            self._lost_at = self._clock()
            self._fruitless += 1
        if wire is not None:
            wire.shut("given up")
            with self._sending:
                wire.close()

    # ---- connecting ------------------------------------------------------------------------------
    def _connect_again(self) -> None:
        """Until it succeeds, or all that is in flight has failed since the server's time is up."""
        self._fail(errno.EIO, f"gave no answer on {MOST_ATTEMPTS} connections", tired=True)
        deadline = self._lost_at + self._address.reconnect_delay
        pause = FIRST_PAUSE
        for _ in range(1, self._fruitless):
            pause = min(2 * pause, LONGEST_PAUSE)
        if self._fruitless > 1 and self._pending:
            self._pause(pause)
        while self._pending:
            now = self._clock()
            if now < self._not_before:
                self._fail(errno.EIO, "cannot be reached")
                return
            limit = max(LONGEST_PAUSE, min(HANDSHAKE_SECONDS, deadline - now))
            try:
                wire, info = self._shake_hands(now + limit)
                self._compare(wire, info)
                self._resume(wire, info)
                return
            except (OSError, TryAgain, BlockError) as error:
                reason = _reason(error).removeprefix(f"{self._address.server}: ")
            if self._clock() + pause >= deadline:
                self._not_before = self._clock() + LONGEST_PAUSE
                self._fail(errno.EIO, f"cannot connect again: {reason}")
                return
            self._pause(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _compare(self, wire: Wire, info: ExportInfo) -> None:
        old = self.info
        if (info.size, info.flags, info.minimum) != (old.size, old.flags, old.minimum):
            wire.close()
            what = f"{old.size} bytes became {info.size}, flags {old.flags:#x} {info.flags:#x}"
            raise BlockError(f"export {self._address.export!r} has changed: {what}", errno.ESTALE)
        if info.max_payload < old.max_payload:
            wire.close()
            raise BlockError(f"takes only {info.max_payload} bytes at once now", errno.ESTALE)

    def _resume(self, wire: Wire, info: ExportInfo) -> None:
        """Bring a new connection to where the old one was; Lost when it breaks, too."""
        with self._sending:
            with self._lock:
                self._wire, self._replies = wire, self._replies_on(wire, info)
                self._generation += 1
                repeated = self._unflushed.requests()
                unanswered = list(self._pending.values())
            for request in unanswered:
                request.begin()
                request.attempts += 1
            self._repeat(wire, info, repeated)
            for request in unanswered:
                self._send(wire, request, self._replies.take)
        log.warning("%s: connected again", self._address.server)

    def _repeat(self, wire: Wire, info: ExportInfo, requests: list[Request]) -> None:
        """Writes again, one after the other, for they may overlap."""
        sent: dict[int, Request] = {}
        replies = Replies(wire, info, sent.get, lambda request: sent.__delitem__(request.cookie))
        for request in requests:
            request.cookie = next(self._cookies)
            sent[request.cookie] = request
            self._send(wire, request)
            while sent:
                replies.take()
            if request.error:
                self._broken_promise = "an earlier write could not be repeated, and may be lost"

    def _replies_on(self, wire: Wire, info: ExportInfo) -> Replies:
        return Replies(wire, info, self._find, self._finish)

    def _shake_hands(self, deadline: float) -> tuple[Wire, ExportInfo]:
        """A connection in its transmission phase; OSError, TryAgain or BlockError."""
        address = self._address
        secure: Secure | None = None
        if address.tls:
            # a UNIX socket has no name that a certificate could have: its place says whose it is
            name = address.tls_hostname or (None if address.socket else address.host)
            context = client_context(address.certificates, name)

            def secure(sock: socket.socket) -> socket.socket:
                return context.wrap_socket(sock, server_hostname=name)

        sock = self._connect(deadline)
        handshake = ClientHandshake(sock, address.server, deadline, self._clock)
        try:
            info = handshake.run(address.export, Wanted(True, secure, LARGEST_MINIMUM))
        except BaseException:
            handshake.sock.close()
            raise
        return Wire(handshake.sock, address.answer_timeout), info

    def _connect(self, deadline: float) -> socket.socket:
        seconds = max(0.01, deadline - self._clock())
        if self._address.socket is None:
            sock = handout.connected(self._address.host, self._address.port, seconds)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            sock.connect(self._address.socket)
        except BaseException:
            sock.close()
            raise
        return sock

    def close(self) -> None:
        """Say good-bye. No other method may be running."""
        wire, self._wire = self._wire, None
        if wire is not None:
            try:
                wire.send([memoryview(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))])
            except Lost:
                pass
            wire.close()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
