"""What the command line of ``atoll nbd`` asks for."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.contract.config import Export


@dataclass(frozen=True)
class TlsCredentials:
    """A folder with certificates: see tls.py."""

    folder: str
    verify_peer: bool = True


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    export: Export | None
    sockets: tuple[str, ...]
    #: (host, port)
    addresses: tuple[tuple[str, int], ...]
    #: clients at once; 0 for any number
    clients: int = 1
    persistent: bool = False
    credentials: TlsCredentials | None = None
    #: the name that the server's certificate must bear, when listing
    hostname: str | None = None
    pid_file: str | None = None
    verbose: bool = False
