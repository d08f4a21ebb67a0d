"""The files that images lie in: of this host, or an export of an NBD server, which looks like one."""

from __future__ import annotations

from collections.abc import Callable

from blockd.hostfile import HostFile
from coordinator.contract.nbd import is_network_name

#: how a file is opened: (path, read-only) -> file; tests hand in files that fail
OpenFile = Callable[[str, bool], HostFile]


def open_file(file: str, read_only: bool = False, unsafe: bool = False) -> HostFile:
    """The file that an image lies in. With ``unsafe`` it is never made durable."""
    if is_network_name(file):
        from blockd.nbd.file import NbdFile  # the client, sockets and TLS are slow to import

        return NbdFile(file, read_only, unsafe)
    return HostFile(file, read_only, unsafe)


def unsafe_file(file: str, read_only: bool) -> HostFile:
    """A file that is worthless when half made."""
    return open_file(file, read_only, unsafe=True)
