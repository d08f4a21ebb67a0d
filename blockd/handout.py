"""What the sandbox does not let the block daemon have by itself, asked of the coordinator: media that are put
in while the machine runs, to be read, and TCP connections to NBD servers. The coordinator hands out what
the user has named (coordinator/handout.py) as a descriptor.

Each request has a connection of its own, so that threads need not wait for one another.
"""

from __future__ import annotations

import errno
import os
import socket

from coordinator.contract import handout

#: the coordinator's socket; empty where there is no sandbox
_path = ""


def use(path: str) -> None:
    """From now on what we may not open is asked for there."""
    global _path
    _path = path


def in_use() -> bool:
    return bool(_path)


def open_readable(file: str) -> int:
    """A descriptor of a file; OSError."""
    return _ask(handout.OpenFile(file), None)


def connected(host: str, port: int, seconds: float) -> socket.socket:
    """A TCP connection; OSError."""
    if not in_use():
        return socket.create_connection((host, port), seconds)
    sock = socket.socket(fileno=_ask(handout.Connect(host, port, seconds), seconds))
    sock.settimeout(seconds)
    return sock


def _ask(request: handout.OpenFile | handout.Connect, seconds: float | None) -> int:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(seconds)
        try:
            sock.connect(_path)
        except OSError:  # nobody is there to hand anything out
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None
        sock.send(handout.encode(request))
        data, fds, _, _ = socket.recv_fds(sock, handout.MOST, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            raise OSError(errno.EPIPE, "the coordinator gives no answer")
        refusal = handout.answers.decode(data)
        if fds:
            return fds[0]
        raise OSError(refusal.errno or errno.EIO, refusal.error or os.strerror(errno.EIO))
