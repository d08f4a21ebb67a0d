"""The commit point of a machine without writable disks: one durable record, "released", in the user's state
folder.

``~/.local/state/atoll/released/TRANSFER`` (or below ``$XDG_STATE_HOME``). It is there, whole, or it is not;
so a source that was killed has either released its guest or has not, and nobody has to guess. Where there are
writable disks, the record lies with their leases (blockd/leases.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from coordinator.contract.errors import MigrationError


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``epoch``: of the source, which the target's must be greater than."""

    transfer: str
    machine: str
    uuid: str
    epoch: int


def folder() -> Path:
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "atoll" / "released"


def record(decision: Decision) -> Path:
    """Make the decision. MigrationError means that it was not made."""
    place = folder() / decision.transfer
    fresh = place.with_suffix(".new")
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(decision) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, place)
        _sync_folder(place.parent)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise MigrationError(f"{place}: {error.strerror}; the guest stays here") from None
    return place


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(place: Path) -> Decision:
    """MigrationError where there is none."""
    try:
        return msgspec.json.decode(place.read_bytes(), type=Decision)
    except OSError as error:
        raise MigrationError(f"{place}: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise MigrationError(f"{place}: is no record of a released machine: {error}") from None


def forget(transfer: str) -> None:
    """The target runs and knows it: nobody will ask any more."""
    (folder() / transfer).unlink(missing_ok=True)
