"""Names of exports: NBD URIs, and QEMU's older spelling.

Source: "The NBD Uniform Resource Indicator (URI) format", doc/uri.md of the NetworkBlockDevice project;
RFC 3986. ``tls-certificates`` is libnbd's, ``reconnect-delay`` QEMU's name for the same.
"""

from __future__ import annotations

import errno
import math
import re
from typing import NamedTuple
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit, urlunsplit

from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import is_network_name

#: assigned by IANA
PORT = 10809

#: seconds for which requests wait for a server that has gone away
RECONNECT_DELAY = 10.0
#: seconds of silence after which a server is taken for dead while it owes an answer
ANSWER_TIMEOUT = 90.0

#: scheme -> (TLS, UNIX socket)
_SCHEMES = {
    "nbd": (False, False),
    "nbds": (True, False),
    "nbd+unix": (False, True),
    "nbds+unix": (True, True),
}
_OLD_UNIX = re.compile(r"nbd:unix:(?P<socket>.+?)(:exportname=(?P<export>.*))?", re.DOTALL)
_OLD_TCP = re.compile(
    r"nbd:(\[(?P<six>[^\]]+)\]|(?P<host>[^:/\[]*)):(?P<port>\d+)(:exportname=(?P<export>.*))?", re.DOTALL
)


class Address(NamedTuple):
    """An export, how to reach it and how patient to be."""

    #: name as it was given
    name: str
    tls: bool
    #: path of a UNIX socket; None for TCP
    socket: str | None
    host: str = "localhost"
    port: int = PORT
    export: str = ""
    #: folder laid out as QEMU's tls-creds-x509 wants it; None for the authorities that the system trusts
    certificates: str | None = None
    #: the name that the server's certificate must have instead of ``host``
    tls_hostname: str | None = None
    reconnect_delay: float = RECONNECT_DELAY
    answer_timeout: float = ANSWER_TIMEOUT

    @property
    def server(self) -> str:
        """The server, for messages."""
        if self.socket is not None:
            return f"NBD server at {self.socket}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"NBD server at {host}:{self.port}"

    @property
    def identity(self) -> tuple[str, str, int, str]:
        """What is the same for two names of one export."""
        return ("nbd", self.socket or self.host.lower(), 0 if self.socket else self.port, self.export)

    def within(self, place: Address) -> bool:
        """Is this export at ``place``? A place without an export's name is the whole server."""
        mine, theirs = self.identity, place.identity
        return self.tls == place.tls and mine[:3] == theirs[:3] and theirs[3] in ("", mine[3])


def parse(name: str) -> Address:
    """BlockError in one line for what is no name of an export."""
    if "\0" in name:
        raise _bad(name, "has a zero byte in it")
    if re.match(r"nbd:(?!//)", name):
        return _parse_old(name)
    try:
        parts = urlsplit(name)
        port = parts.port
    except ValueError as error:
        raise _bad(name, str(error)) from None
    scheme = parts.scheme.lower()
    if scheme not in _SCHEMES:
        raise _bad(name, f"scheme {parts.scheme!r} is not supported ({', '.join(_SCHEMES)} are)")
    if parts.fragment:
        raise _bad(name, "has a fragment (write # as %23)")
    tls, unix = _SCHEMES[scheme]
    address = _with_parameters(Address(name, tls, None, export=_text(parts.path.removeprefix("/"))), parts)
    if unix:
        if address.socket is None:
            raise _bad(name, "names no socket (?socket=PATH)")
        if parts.netloc:
            raise _bad(name, "has a host, and a UNIX socket has none (write three slashes)")
        return address
    if address.socket is not None:
        raise _bad(name, f"has a socket; {parts.scheme}+unix:/// is that")
    if not parts.netloc:
        raise _bad(name, "names no host (write two slashes before it)")
    return address._replace(host=_text(parts.hostname or "localhost"), port=PORT if port is None else port)


def _with_parameters(address: Address, parts: SplitResult) -> Address:
    """What stands behind the question mark. uri.md: what is not understood should be diagnosed."""
    for key, value in parse_qsl(parts.query.replace("+", "%2B"), True, errors="surrogateescape"):
        if not value:
            raise _bad(address.name, f"{key} has no value")
        if key == "socket":
            address = address._replace(socket=value)
        elif key == "tls-certificates":
            address = address._replace(certificates=value)
        elif key == "tls-hostname":
            address = address._replace(tls_hostname=value)
        elif key == "reconnect-delay":
            address = address._replace(reconnect_delay=_seconds(address.name, key, value))
        elif key == "answer-timeout":
            address = address._replace(answer_timeout=_seconds(address.name, key, value))
        elif (key, value) not in (("tls-type", "x509"), ("tls-verify-peer", "1")):
            raise _bad(address.name, f"parameter {key}={value} is not supported")
    return address


def _seconds(name: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1e6:
        raise _bad(name, f"{key}={value} is no number of seconds")
    return number


def _parse_old(name: str) -> Address:
    """nbd:unix:PATH and nbd:HOST:PORT, each with :exportname=NAME or without."""
    match = _OLD_UNIX.fullmatch(name)
    if match is not None:
        return Address(name, False, match["socket"], export=match["export"] or "")
    match = _OLD_TCP.fullmatch(name)
    if match is None or int(match["port"]) > 65535:
        raise _bad(name, "is neither nbd:HOST:PORT nor nbd:unix:PATH (:exportname=NAME may follow)")
    host = match["six"] or match["host"] or "localhost"
    return Address(name, False, None, host, int(match["port"]), match["export"] or "")


def allowed_by(name: str, places: tuple[str, ...]) -> str | None:
    """The name to open for an export that an image names, when one of the user's places covers it. Whom to
    trust and how long to wait is then the user's word, not the image's."""
    if "*" in places:
        return name
    address = parse(name)
    for place in filter(is_network_name, places):
        known = parse(place)
        if address.within(known):
            return place if known.export == address.export else _with_export(place, address.export)
    return None


def _with_export(place: str, export: str) -> str:
    """The name of another export of a server, whose default export is ``place``."""
    if re.match(r"nbd:(?!//)", place):
        return f"{place.removesuffix(':exportname=')}:exportname={export}"
    path = "/" + quote(export, errors="surrogateescape")
    return urlunsplit(urlsplit(place)._replace(path=path))


def _text(quoted: str) -> str:
    return unquote(quoted, errors="surrogateescape")


def _bad(name: str, why: str) -> BlockError:
    return BlockError(f"{name!r}: {why}", errno.EINVAL)
