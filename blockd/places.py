"""Which files the block daemon needs to see, from the exports that it starts with.

Media that come later are read only, and opened by the coordinator (handout.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from blockd.lease import host
from blockd.nbd import uri
from coordinator.contract.config import Export, Media
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import is_network_name
from coordinator.contract.sandbox import Access

#: whom the system trusts, and what its links lead to
AUTHORITIES = ("/etc/ssl", "/usr/lib/ssl", "/usr/share/ca-certificates")

Place = tuple[str | int, Access]


def places(runtime: str, exports: Sequence[Export]) -> list[Place]:
    """With what may be done there."""
    found: list[Place] = [
        (runtime, Access.SOCKETS),
        ("/proc", Access.READ),  # is the holder of a lease alive? Landlock keeps other processes' secrets
        (host.MACHINE, Access.READ),
    ]
    for export in exports:
        found += _of(export)
    return found


def _of(export: Export) -> Iterator[Place]:
    for allowed in export.backing_allowed:
        yield from _of_allowed(allowed)
    if is_network_name(export.file):
        yield from _certificates(export.file)
        return
    written = not (export.read_only or export.snapshot or export.load_snapshot) and export.media is Media.DISK
    yield export.file, Access.READ | Access.WRITE if written else Access.READ
    folder = os.path.dirname(os.path.realpath(export.file))
    if export.leased:
        yield folder, Access.READ | Access.WRITE | Access.NAMES
    elif export.format != "raw":
        # backing files, and an external data file
        yield folder, Access.READ | Access.WRITE if written else Access.READ
    elif written:
        yield folder, Access.READ  # leases of others


def _of_allowed(place: str) -> Iterator[Place]:
    """A backing file may itself lie above another one in its folder."""
    if place == "*":
        yield "/", Access.READ
    elif is_network_name(place):
        yield from _certificates(place)
    else:
        real = os.path.realpath(place)
        yield real if os.path.isdir(real) else os.path.dirname(real), Access.READ


def _certificates(name: str) -> Iterator[Place]:
    try:
        folder = uri.parse(name).certificates
    except BlockError:
        return  # it is said when the export is opened
    if folder is not None:
        yield folder, Access.READ
    elif uri.parse(name).tls:
        for path in AUTHORITIES:
            yield path, Access.READ
