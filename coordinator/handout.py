"""Hands the block daemon what its sandbox keeps from it: files of media that came later, and connections to
NBD servers - those that the user has named and no others, and to the block daemon's process alone.

A thread of its own: name servers and network file systems take their time, and the coordinator's loop does
not wait.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import logging
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from blockd.nbd import uri
from coordinator.contract import handout
from coordinator.contract.config import Drive
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import is_network_name

log = logging.getLogger(__name__)

#: how long a client may take to say what it wants, seconds
PATIENCE = 5.0
#: struct ucred: pid, uid, gid
_UCRED = struct.Struct("3i")


@dataclass
class Grants:
    """What may be handed out. Only grows: an image that was taken out may still be read to its end."""

    files: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    servers: set[tuple[str, int]] = field(default_factory=set)

    def add(self, drive: Drive) -> None:
        """The image of a drive, what may lie below it, and its servers."""
        for place in drive.backing_allowed:
            if place == "*":
                self.folders.add("/")
            elif is_network_name(place):
                self._add_server(place)
            else:
                real = os.path.realpath(place)
                self.folders.add(real if os.path.isdir(real) else os.path.dirname(real))
        if drive.file is None:
            return
        if is_network_name(drive.file):
            self._add_server(drive.file)
            return
        real = os.path.realpath(drive.file)
        self.files.add(real)
        if drive.format != "raw":
            self.folders.add(os.path.dirname(real))

    def _add_server(self, name: str) -> None:
        try:
            address = uri.parse(name)
        except BlockError:
            return  # it is said when the export is opened
        if address.socket is None:
            self.servers.add((address.host, address.port))

    def has_file(self, real: str) -> bool:
        if real in self.files:
            return True
        return any(os.path.commonpath((real, folder)) == folder for folder in tuple(self.folders))

    def has_server(self, host: str, port: int) -> bool:
        return (host, port) in self.servers or "/" in self.folders


class Handout:
    """The socket and its threads. ``client`` tells the process that is served; it is asked in the loop."""

    def __init__(self, path: str, client: Callable[[], int]) -> None:
        self.grants = Grants()
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.fchmod(self._listener.fileno(), 0o600)
        self._listener.bind(path)
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._serve, name="handout", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # which ends accept()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(sock,), name="handout client", daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with sock:
            try:
                sock.settimeout(PATIENCE)
                pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
                fd = self._do(sock.recv(handout.MOST), pid)
            except (OSError, msgspec.MsgspecError) as error:
                number = getattr(error, "errno", None) or errno.EINVAL
                self._say(sock, handout.Answer(number, getattr(error, "strerror", None) or str(error)))
                return
            try:
                self._say(sock, handout.Answer(), fd)
            finally:
                os.close(fd)

    def _say(self, sock: socket.socket, answer: handout.Answer, *fds: int) -> None:
        try:
            socket.send_fds(sock, [handout.encode(answer)], fds)
        except OSError as error:
            log.info("handout: the block daemon is gone: %s", error.strerror)

    def _served(self) -> int:
        """In the loop: there no process is half started, so one that asks at once is known."""
        future: concurrent.futures.Future[int] = concurrent.futures.Future()
        try:
            self._loop.call_soon_threadsafe(lambda: future.set_result(self._client()))
            return future.result(PATIENCE)
        except (RuntimeError, TimeoutError):  # the machine is ending
            return -1

    def _do(self, packet: bytes, pid: int) -> int:
        if pid != self._served():
            log.error("handout: process %d, which is not the block daemon, is turned away", pid)
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        match handout.requests.decode(packet):
            case handout.OpenFile(file=file):
                return self._open(file)
            case handout.Connect(host=host, port=port, seconds=seconds):
                if not self.grants.has_server(host, port):
                    log.error("handout: %s:%d is not among the servers that drives name", host, port)
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                return socket.create_connection((host, port), seconds).detach()

    def _open(self, file: str) -> int:
        """Looked at after it is open: what a name means may change in between."""
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            real = os.readlink(f"/proc/self/fd/{fd}")
            mode = os.fstat(fd).st_mode
            if not (self.grants.has_file(real) and (stat.S_ISREG(mode) or stat.S_ISBLK(mode))):
                log.error("handout: %s is not among the images of drives", file)
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except BaseException:
            os.close(fd)
            raise
        return fd
