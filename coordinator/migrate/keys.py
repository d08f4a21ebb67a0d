"""Who may migrate a machine to whom: CURVE keys in the user's configuration folder.

``~/.config/atoll/migration/`` (or below ``$XDG_CONFIG_HOME``) holds ``key`` (secret) and ``key.pub``, made at
first use, and ``peers/HOST.pub``: the public keys of other hosts, copied there by the user. A process of the
same user on the same host has the same pair, so migration on one host needs no step. Source: CurveZMQ (RFC
26), ZAP (RFC 27).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from coordinator.contract.errors import MigrationError

#: of a key in Z85, bytes
LENGTH = 40


def folder() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "atoll" / "migration"


@dataclass(frozen=True)
class Pair:
    """In Z85."""

    public: bytes
    secret: bytes


def own() -> Pair:
    """This user's pair, made when there is none; MigrationError where the folder cannot be used."""
    place = folder() / "key"
    try:
        if not place.exists():
            _make(place)
        secret = place.read_bytes().strip()
    except OSError as error:
        raise MigrationError(f"{place}: {error.strerror}") from None
    _check(secret, place)
    return Pair(zmq.curve_public(secret), secret)


def _make(place: Path) -> None:
    """Two processes may come here at once: the first one's key stays."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    (place.parent / "peers").mkdir(mode=0o700, exist_ok=True)
    public, secret = zmq.curve_keypair()
    fresh = place.with_name(f"key.{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(secret + b"\n")
    try:
        os.link(fresh, place)
        place.with_name("key.pub").write_bytes(public + b"\n")
    except FileExistsError:
        pass
    finally:
        fresh.unlink()


def _check(key: bytes, place: Path) -> None:
    try:
        z85.decode(key)
    except (ValueError, KeyError):
        key = b""
    if len(key) != LENGTH:
        raise MigrationError(f"{place}: is no key of {LENGTH} characters; remove it, and another is made")


def peers() -> dict[str, bytes]:
    """Public keys by host, as the user put them there."""
    found = {}
    for place in sorted((folder() / "peers").glob("*.pub")):
        try:
            key = place.read_bytes().strip()
        except OSError as error:
            raise MigrationError(f"{place}: {error.strerror}") from None
        _check(key, place)
        found[place.stem] = key
    return found


def of_host(host: str, local: bool) -> bytes:
    """The key of the machine that listens at ``host``; MigrationError says where it would have to be."""
    known = peers()
    if host in known:
        return known[host]
    if local:
        return own().public
    place = folder() / "peers" / f"{host}.pub"
    raise MigrationError(f"no key of {host} is known: copy its {folder() / 'key.pub'} to {place} here")
