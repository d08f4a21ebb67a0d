"""A standby: a process that is ready for a role, and waits to be told to take it over.

The order is the configuration that it would have been started with, over a SOCK_SEQPACKET socket, with the
descriptors in it (fields named ``..._fd`` and ``..._fds``) and one for its log: unix(7), SCM_RIGHTS.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

Config = TypeVar("Config", bound=msgspec.Struct)

#: an order at most, bytes, and its descriptors
MOST = 192 << 10
MOST_FDS = 64


def _descriptors(config: msgspec.Struct) -> Iterator[tuple[str, int | tuple[int, ...]]]:
    for name in config.__struct_fields__:
        if name.endswith(("_fd", "_fds")):
            yield name, getattr(config, name)


def give(sock: socket.socket, config: msgspec.Struct, log_fd: int) -> None:
    """The coordinator: tell the standby at the other end. OSError when it is gone."""
    numbers: list[int] = []
    for _, value in _descriptors(config):
        numbers += (value,) if isinstance(value, int) else value
    socket.send_fds(sock, [msgspec.msgpack.encode(config)], [*numbers, log_fd])


class Orders:
    """The standby's end."""

    def __init__(self, fd: int) -> None:
        self._sock = socket.socket(fileno=fd)
        self._poller = select.poll()
        self._poller.register(self._sock, select.POLLIN)

    def waiting(self) -> bool:
        """There is one, so whatever is done meanwhile is to end."""
        return bool(self._poller.poll(0))

    def take(self, kind: type[Config]) -> tuple[Config, int]:
        """Wait for the order; the configuration, and a descriptor for the log. SystemExit when nobody is left
        who could give one."""
        frame, fds, _, _ = socket.recv_fds(self._sock, MOST, MOST_FDS, socket.MSG_CMSG_CLOEXEC)
        self._sock.close()
        if not frame:
            raise SystemExit(0)
        config = msgspec.msgpack.decode(frame, type=kind)
        *numbers, log_fd = fds
        changes: dict[str, Any] = {}
        for name, value in _descriptors(config):
            if isinstance(value, int):
                changes[name] = numbers.pop(0)
            else:
                changes[name], numbers = tuple(numbers[: len(value)]), numbers[len(value) :]
        return msgspec.structs.replace(config, **changes), log_fd
