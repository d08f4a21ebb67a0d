"""Sockets that clients come in by.

System calls: bind(2), unix(7), ipv6(7), getaddrinfo(3); sd_listen_fds(3) for sockets that are handed in.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import NamedTuple

from coordinator.contract.errors import BlockError

BACKLOG = 64
#: where there is no other machine: both loopback addresses, whatever /etc/hosts knows (RFC 6761, 6.3)
LOOPBACK = "localhost"
_LOOPBACK_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_LONGEST_PATH = 107  # sun_path of unix(7), without its final zero
#: sd_listen_fds(3): the first descriptor that is handed in
_FIRST_FD = 3
#: what a host without IPv6 (or IPv4) answers
_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


class Listener(NamedTuple):
    """A listening socket, non-blocking; ``path`` is to be removed at the end."""

    sock: socket.socket
    path: str | None = None

    def close(self) -> None:
        self.sock.close()
        if self.path is not None and os.path.exists(self.path):
            os.unlink(self.path)


def listen_unix(path: str) -> Listener:
    """A listening socket that only its owner can reach. What a dead process left at ``path`` is
    replaced; BlockError when a living one listens there, or something else lies there."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        text = f"{path}: is too long for a socket (more than {_LONGEST_PATH} bytes)"
        raise BlockError(text, errno.ENAMETOOLONG)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind: there is no moment at which others could connect
        if not _bind(listener, path):
            _remove_stale(path)
            if not _bind(listener, path):
                raise BlockError(f"{path}: is in use by another process", errno.EADDRINUSE)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno or 0)
        raise BlockError(f"{path}: cannot listen: {reason}", error.errno or errno.EIO) from None
    except BlockError:
        listener.close()
        raise
    return Listener(listener, path)


def listen_tcp(host: str, port: int) -> list[Listener]:
    """Sockets at all addresses of a name, IPv4 and IPv6; port 0 is any that is free, the same for all.
    BlockError when one is in use, or none of the addresses is this machine's."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    listeners: list[Listener] = []
    missing = errno.EADDRNOTAVAIL
    try:
        for family, address in _addresses(host):
            try:
                listeners.append(Listener(_bound(family, (address[0], port, *address[1:]))))
            except OSError as error:
                if error.errno not in _NO_FAMILY:
                    raise
                missing = error.errno
                continue
            port = listeners[0].sock.getsockname()[1]
        if not listeners:
            raise OSError(missing, os.strerror(missing))
    except OSError as error:
        for listener in listeners:
            listener.close()
        known = not isinstance(error, socket.gaierror)  # else its number is none of errno's
        number = error.errno if known and error.errno else errno.EINVAL
        raise BlockError(f"{where}: cannot listen: {error.strerror or error}", number) from None
    return listeners


def inherited() -> list[Listener]:
    """Listening sockets that the process was started with (sd_listen_fds(3)). BlockError when they are
    none."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        try:
            os.set_inheritable(fd, False)
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
        except OSError as error:
            text = f"descriptor {fd}, which LISTEN_FDS names: {error.strerror}"
            raise BlockError(text, error.errno or errno.EIO) from None
        found.append(Listener(sock))
    return found


def _addresses(host: str) -> list[tuple[int, tuple[str | int, ...]]]:
    """Families and addresses of a name, without the port that stands second in them. OSError when there are
    none."""
    if host == LOOPBACK:
        return [(family, (address,)) for family, address in _LOOPBACK_ADDRESSES]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError:
        raise OSError(errno.EINVAL, "it is no name") from None
    return list(dict.fromkeys((family, (at[0], *at[2:])) for family, _, _, _, at in found))


def _bound(family: int, address: tuple[str | int, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _bind(listener: socket.socket, path: str) -> bool:
    """False when the path exists."""
    try:
        listener.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at any more."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            if stat.S_ISSOCK(os.lstat(path).st_mode):  # a plain file refuses, too
                os.unlink(path)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
