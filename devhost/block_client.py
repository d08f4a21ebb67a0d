"""The device host's block client: NBD requests whose data moves straight from and to guest RAM.

Source: NBD protocol, "Transmission phase". Only simple replies are asked for, so that every reply
is 16 bytes and, for a read, exactly the data that was asked for.

The owner's event loop polls ``fileno()`` for input, and for output while ``wants_write``, and calls
``on_readable`` and ``on_writable``. Requests go out at once, as many as the owner likes, and a
``Completion`` with the request's cookie says that one is done. A server may serve them in any order
("Ordering of messages and writes"), so one that overlaps an unfinished one, where either changes
data, is held back: requests that overlap end as if made one after the other.
There are no callbacks: what is in flight is data, which can be saved.

The views of a request are read or written until its completion. When the connection is lost
``on_readable`` raises BlockError, and nothing that was in flight is forgotten: ``reconnect`` makes the
whole handshake again and sends it again in the old order; ``fail_pending`` gives it up.
"""

from __future__ import annotations

import errno
import itertools
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import (
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Command,
    CommandFlag,
    TransmissionFlag,
    host_errno,
)
from coordinator.contract.nbd_handshake import ClientHandshake, ExportInfo, TryAgain

#: buffers in one system call (UIO_MAXIOV of Linux)
MAX_BUFFERS = 1024
#: pause between two attempts to connect, in seconds
RETRY_SECONDS = 0.01
#: where data goes that nobody waits for any more; written over and over, never read
_SCRATCH = memoryview(bytearray(64 << 10))
#: bytes that the kernel is asked to hold for this connection
SOCKET_BUFFER = 1 << 20


class Completion(NamedTuple):
    """A request is done: ``errno`` is 0, or why it failed."""

    cookie: int
    errno: int


class Request(NamedTuple):
    """A request in flight."""

    cookie: int
    command: Command
    flags: int
    offset: int
    length: int
    views: tuple[memoryview, ...]

    def conflicts(self, other: Request) -> bool:
        """Do they overlap, so that their order can be told from the data?"""
        return (
            self.offset < other.offset + other.length
            and other.offset < self.offset + self.length
            and not (self.command is Command.READ and other.command is Command.READ)
        )


class BlockClient:
    """A client of one export at a UNIX socket. Time is handed in, for tests."""

    def __init__(
        self,
        path: str,
        export: str,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = path
        self.export = export
        self._clock = clock
        self._wait = wait
        self._where = f"NBD server at {path}"
        self._sock: socket.socket | None = None
        self._info = ExportInfo(0, TransmissionFlag(0))
        self._cookies = itertools.count(1)
        #: in the order in which they were made
        self._pending: dict[int, Request] = {}
        #: cookies of those among them that wait for an older one, in the same order
        self._held: deque[int] = deque()
        self._out: deque[memoryview] = deque()
        self._head = memoryview(bytearray(SIMPLE_REPLY.size))
        self._head_got = 0  # bytes of the next reply's header that have arrived
        self._reading: Request | None = None  # the read whose data is arriving
        self._into: list[memoryview] = []  # where the rest of its data goes
        self._done: list[Completion] = []
        self._broken: str | None = None

    # ---- connection ------------------------------------------------------------------------------
    def connect(self, seconds: float = 10.0) -> None:
        """Connect and shake hands, trying again while the server is not there or is going away.
        BlockError when that has not succeeded within ``seconds`` of wall time, or cannot."""
        self._sock, self._info = self._shake_hands(seconds)

    def drop(self) -> None:
        """The connection is of no use any more; what is pending stays."""
        self._close_socket()
        self._broken = self._broken or "not connected"

    def reconnect(self, seconds: float = 10.0) -> None:
        """After the connection was lost: the whole handshake again, and what is pending sent again in
        its order. BlockError if the export is not what it was. ``fileno`` changes."""
        self.drop()
        self._go_on(*self._shake_hands(seconds))

    def try_reconnect(self, seconds: float) -> bool:
        """The same, once: False when no server is there, or it goes away, or says nothing for ``seconds``."""
        self.drop()
        try:
            sock, info = self._attempt(self._clock() + seconds)
        except PermissionError as error:
            raise BlockError(f"{self._where}: cannot connect: {error.strerror}", errno.EACCES) from None
        except (OSError, TryAgain):
            return False
        self._go_on(sock, info)
        return True

    def _go_on(self, sock: socket.socket, info: ExportInfo) -> None:
        if info != self._info:
            sock.close()
            what = f"{self._info.size} bytes became {info.size}, flags {self._info.flags:#x} {info.flags:#x}"
            raise BlockError(f"{self._where}: export {self.export!r} has changed: {what}", errno.ESTALE)
        self._sock = sock
        self._broken = self._reading = None
        self._head_got = 0
        self._out.clear()
        self._held = deque(self._pending)
        self._release()
        self._send()

    def _shake_hands(self, seconds: float) -> tuple[socket.socket, ExportInfo]:
        deadline = self._clock() + seconds
        while True:
            try:
                return self._attempt(deadline)
            except (OSError, TryAgain) as error:
                if isinstance(error, PermissionError) or self._clock() + RETRY_SECONDS >= deadline:
                    reason = getattr(error, "strerror", None) or str(error)
                    raise BlockError(f"{self._where}: cannot connect: {reason}", errno.ECONNREFUSED) from None
                self._wait(RETRY_SECONDS)

    def _attempt(self, deadline: float) -> tuple[socket.socket, ExportInfo]:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(deadline - self._clock(), RETRY_SECONDS))
            sock.connect(self.path)
            info = ClientHandshake(sock, self._where, deadline, self._clock).run(self.export)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        except BaseException:
            sock.close()
            raise
        return sock, info

    def close(self) -> None:
        """Say good-bye as far as it can be said without waiting. Pending requests are forgotten."""
        if self._sock is not None and self._broken is None and not self._out:
            try:
                self._sock.send(REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))
            except OSError:
                pass
        self._close_socket()
        self._forget()

    def _close_socket(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def fileno(self) -> int:
        """The socket to poll; another one after ``reconnect``."""
        if self._sock is None:
            raise BlockError(f"{self._where}: not connected", errno.ENOTCONN)
        return self._sock.fileno()

    # ---- the export ------------------------------------------------------------------------------
    @property
    def size(self) -> int:
        """Bytes."""
        return self._info.size

    @property
    def max_length(self) -> int:
        """Bytes in one read or write."""
        return self._info.max_payload

    @property
    def read_only(self) -> bool:
        return self._has(TransmissionFlag.READ_ONLY)

    @property
    def can_flush(self) -> bool:
        return self._has(TransmissionFlag.SEND_FLUSH)

    @property
    def can_fua(self) -> bool:
        return self._has(TransmissionFlag.SEND_FUA)

    @property
    def can_trim(self) -> bool:
        return self._has(TransmissionFlag.SEND_TRIM)

    @property
    def can_write_zeroes(self) -> bool:
        return self._has(TransmissionFlag.SEND_WRITE_ZEROES)

    def _has(self, flag: TransmissionFlag) -> bool:
        return bool(self._info.flags & flag)

    # ---- requests --------------------------------------------------------------------------------
    # Each returns its cookie. BlockError, and nothing is sent, when the export cannot do it: EINVAL past
    # the end, EPERM when it is read-only, EOPNOTSUPP. A lost connection shows in on_readable alone.
    def read(self, offset: int, views: Sequence[memoryview]) -> int:
        """Fill the writable views, in order, from ``offset`` bytes on."""
        return self._submit(Command.READ, offset, views)

    def write(self, offset: int, views: Sequence[memoryview], fua: bool = False) -> int:
        """Write the views, in order. ``fua``: done means durable."""
        flags = 0
        if fua:
            self._require(self.can_fua, "FUA")
            flags = int(CommandFlag.FUA)
        self._require_writable()
        return self._submit(Command.WRITE, offset, views, flags)

    def flush(self) -> int:
        """Make durable what has been completed."""
        self._require(self.can_flush, "flush")
        return self._send_request(Command.FLUSH, 0, 0, 0, ())

    def trim(self, offset: int, length: int) -> int:
        """``length`` bytes are not needed any more."""
        self._require_writable()
        self._require(self.can_trim, "trim")
        self._require_inside(offset, length)
        return self._send_request(Command.TRIM, 0, offset, length, ())

    def write_zeroes(self, offset: int, length: int) -> int:
        """Make ``length`` bytes zero."""
        self._require_writable()
        self._require(self.can_write_zeroes, "write zeroes")
        self._require_inside(offset, length)
        return self._send_request(Command.WRITE_ZEROES, 0, offset, length, ())

    def _submit(self, command: Command, offset: int, views: Iterable[memoryview], flags: int = 0) -> int:
        parts = tuple(view.cast("B") for view in views if len(view))
        length = sum(map(len, parts))
        self._require_inside(offset, length)
        if length > self.max_length:
            text = f"{self._where}: {length} bytes in one request, {self.max_length} are allowed"
            raise BlockError(text, errno.EINVAL)
        return self._send_request(command, flags, offset, length, parts)

    def _require(self, able: bool, what: str) -> None:
        if not able:
            raise BlockError(f"{self._where}: export {self.export!r} has no {what}", errno.EOPNOTSUPP)

    def _require_writable(self) -> None:
        if self.read_only:
            raise BlockError(f"{self._where}: export {self.export!r} is read-only", errno.EPERM)

    def _require_inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            text = f"{self._where}: request of {length} bytes at {offset} is past the end ({self.size})"
            raise BlockError(text, errno.EINVAL)

    def _send_request(
        self, command: Command, flags: int, offset: int, length: int, views: tuple[memoryview, ...]
    ) -> int:
        request = Request(next(self._cookies), command, flags, offset, length, views)
        self._pending[request.cookie] = request
        self._held.append(request.cookie)
        self._release()
        self._send()
        return request.cookie

    def cancel(self, cookie: int) -> None:
        """Nobody waits for this request any more: its views are not touched after this returns. A write
        still reaches the export, with the data that the views have now. The completion comes all the same."""
        request = self._pending.get(cookie)
        if request is None:
            return
        views: tuple[memoryview, ...] = ()
        if request.command is Command.READ:
            if request is self._reading:
                self._into = _discard(sum(map(len, self._into)))
            views = tuple(_discard(request.length))
        elif request.command is Command.WRITE:
            self._out = deque(memoryview(bytes(view)) for view in self._out)
            views = (memoryview(b"".join(request.views)),)
        self._pending[cookie] = request._replace(views=views)

    # ---- completions -----------------------------------------------------------------------------
    @property
    def pending(self) -> tuple[Request, ...]:
        """What is in flight or held back, oldest first."""
        return tuple(self._pending.values())

    @property
    def wants_write(self) -> bool:
        """Requests wait for room in the socket."""
        return bool(self._out) and self._broken is None

    def on_writable(self) -> None:
        """Send what waits for room."""
        self._send()

    def on_readable(self) -> list[Completion]:
        """Take in what has arrived, without waiting; the requests that are done by it.

        BlockError when the connection is lost or the server breaks the protocol. Requests completed
        before that are returned first, and the error comes with the next call; the socket stays
        readable until then.
        """
        self._receive()
        if self._done:
            done, self._done = self._done, []
            return done
        if self._broken is not None:
            raise BlockError(f"{self._where}: {self._broken}", errno.ECONNRESET)
        return []

    def drain(self, seconds: float) -> list[Completion]:
        """Wait until nothing is in flight; all completions since the last call of ``on_readable``.
        BlockError when the connection is lost, or ETIMEDOUT after ``seconds`` of wall time; what was
        completed until then is left for ``on_readable``."""
        deadline = self._clock() + seconds
        poller = select.poll()
        poller.register(self.fileno())
        while self._pending and self._broken is None:
            poller.modify(self.fileno(), select.POLLIN | (select.POLLOUT if self._out else 0))
            left = deadline - self._clock()
            if left <= 0:
                raise BlockError(f"{self._where}: no answer within {seconds} s", errno.ETIMEDOUT)
            for _, event in poller.poll(left * 1000):
                if event & select.POLLOUT:
                    self._send()
                if event & ~select.POLLOUT:
                    self._receive()
        if self._pending:
            raise BlockError(f"{self._where}: {self._broken}", errno.ECONNRESET)
        done, self._done = self._done, []
        return done

    def fail_pending(self) -> list[Completion]:
        """Give up what is in flight after the connection was lost: all of it completes with EIO."""
        if self._broken is None:
            self._break("given up")
        done = self._done + [Completion(cookie, errno.EIO) for cookie in self._pending]
        self._done = []
        self._forget()
        return done

    def _forget(self) -> None:
        self._pending.clear()
        self._held.clear()
        self._out.clear()

    # ---- the wire --------------------------------------------------------------------------------
    def _release(self) -> None:
        """Queue the requests held back, up to the first that conflicts with an older unfinished one."""
        while self._held:
            request = self._pending[self._held[0]]
            for older in self._pending.values():
                if older is request:
                    break
                if request.conflicts(older):
                    return
            self._held.popleft()
            self._queue(request)

    def _queue(self, request: Request) -> None:
        header = REQUEST.pack(
            REQUEST_MAGIC, request.flags, request.command, request.cookie, request.offset, request.length
        )
        self._out.append(memoryview(header))
        if request.command is Command.WRITE:
            self._out.extend(request.views)

    def _send(self) -> None:
        out = self._out
        while out and self._broken is None and self._sock is not None:
            try:
                sent = self._sock.sendmsg(itertools.islice(out, MAX_BUFFERS))
            except BlockingIOError:
                return
            except OSError as error:
                self._break(error.strerror or str(error))
                return
            while sent:
                first = out[0]
                if sent < len(first):
                    out[0] = first[sent:]
                    break
                sent -= len(first)
                out.popleft()

    def _receive(self) -> None:
        """Take in whole and partial replies until there is nothing to be had, or to be expected."""
        while self._broken is None and self._sock is not None:
            try:
                got = self._sock.recvmsg_into(self._expected())[0]
            except BlockingIOError:
                return
            except OSError as error:
                self._break(error.strerror or str(error))
                return
            if not got:
                self._break("the server closed the connection")
                return
            self._arrived(got)
            if self._out:
                self._send()
            if not self._pending:
                return

    def _expected(self) -> list[memoryview]:
        """Where the next bytes go. When a single read is in flight its data can only follow its header
        directly, so one call receives both."""
        if self._reading is not None:
            return self._into[:MAX_BUFFERS]
        buffers = [self._head[self._head_got :]]
        if self._head_got == 0 and len(self._pending) == 1:
            request = next(iter(self._pending.values()))
            if request.command is Command.READ:
                buffers += request.views[: MAX_BUFFERS - 1]
        return buffers

    def _arrived(self, got: int) -> None:
        """``got`` bytes have landed where they were expected."""
        request = self._reading
        if request is None:
            missing = len(self._head) - self._head_got
            if got < missing:
                self._head_got += got
                return
            self._head_got = 0
            got -= missing
            request = self._take_header(got)
            if request is None:
                return
            self._reading, self._into = request, list(request.views)
        whole = 0
        for view in self._into:
            if got < len(view):
                break
            got -= len(view)
            whole += 1
        del self._into[:whole]
        if self._into:
            self._into[0] = self._into[0][got:]
        else:
            self._reading = None
            self._complete(request, 0)

    def _take_header(self, behind: int) -> Request | None:
        """A header is whole, and ``behind`` bytes came with it. The read whose data follows, or None."""
        magic, error, cookie = SIMPLE_REPLY.unpack(self._head)
        request = self._pending.get(cookie)
        if magic != SIMPLE_REPLY_MAGIC:
            self._break(f"reply without its magic number ({magic:#x})")
        elif request is None:
            self._break(f"reply to a request that was not made (cookie {cookie:#x})")
        elif error and behind:
            self._break("data behind an error reply")
        elif error or request.command is not Command.READ or not request.length:
            self._complete(request, host_errno(error) if error else 0)
        else:
            return request
        return None

    def _complete(self, request: Request, number: int) -> None:
        del self._pending[request.cookie]
        self._done.append(Completion(request.cookie, number))
        if self._held:
            self._release()

    def _break(self, reason: str) -> None:
        """The connection is of no use any more. Shutting it down leaves it readable, so the owner comes
        to hear of it."""
        self._broken = reason
        if self._sock is not None:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def _discard(length: int) -> list[memoryview]:
    """Views for ``length`` bytes that nobody will look at."""
    whole, rest = divmod(length, len(_SCRATCH))
    return [_SCRATCH] * whole + ([_SCRATCH[:rest]] if rest else [])
