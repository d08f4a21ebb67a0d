"""Where a machine goes to or comes from: migration URIs in QEMU's spelling."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path

from coordinator.contract.errors import MigrationError, UsageError

FORMS = "tcp:HOST:PORT, unix:PATH, file:PATH"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Uri:
    """``kind`` is "tcp", "unix" or "file"; ``insecure`` lets a listener off the host take peers without keys.
    """

    kind: str
    host: str = ""
    port: int = 0
    path: str = ""
    insecure: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}" if self.kind == "tcp" else f"{self.kind}:{self.path}"

    def resolved(self) -> Uri:
        """With the host as an address, of IPv4 where it has one; MigrationError where it has none."""
        if self.kind != "tcp":
            return self
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise MigrationError(f"{self}: {getattr(error, 'strerror', None) or 'is no host'}") from None
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)
        return replace(self, host=str(found[0][4][0]))

    @property
    def endpoint(self) -> str:
        """Of the control channel, as ZeroMQ names it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp://{host}:{self.port}" if self.kind == "tcp" else f"ipc://{self.path}"

    @property
    def local(self) -> bool:
        """Cannot be reached from another host."""
        if self.kind != "tcp" or self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse(text: str, option: str = "migrate") -> Uri:
    """UsageError names the forms there are. A path is made absolute; a missing host is loopback."""
    kind, _, rest = text.partition(":")
    if kind in ("unix", "file") and rest:
        return Uri(kind, path=str(Path(rest).absolute()))
    if kind == "tcp":
        where, *words = rest.split(",")
        host, _, port = where.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if (
            port.isascii()
            and port.isdigit()
            and 0 <= int(port) < 65536
            and set(words) <= {"insecure=on", "insecure=off"}
        ):
            return Uri("tcp", host=host or LOOPBACK, port=int(port), insecure="insecure=on" in words)
    raise UsageError(f"{option} {text}: is not one of {FORMS}")
