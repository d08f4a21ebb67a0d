"""The commit point of a machine without writable disks: one durable record, "released", in the user's state
folder.

``~/.local/state/atoll/released/TRANSFER`` (or below ``$XDG_STATE_HOME``). It is there, whole, or it is not;
so a source that was killed has either released its guest or has not, and nobody has to guess. Where there are
writable disks, the record lies with their leases (blockd/leases.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import msgspec

from coordinator.contract.errors import MigrationError

log = logging.getLogger(__name__)


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``epoch``: of the source, which the target's must be greater than."""

    transfer: str
    machine: str
    uuid: str
    epoch: int


def folder() -> Path:
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "atoll" / "released"


def place(transfer: str) -> Path:
    """Where the record of this transfer is, if it has been made."""
    return folder() / transfer


def record(decision: Decision) -> None:
    """Make the decision. MigrationError means that it was not made.

    It is made as soon as its name can be seen. Where the name cannot be made durable after that, it stays
    made: a crash of this host, which would lose it, leaves nobody to run the guest here, either.
    """
    final = place(decision.transfer)
    fresh = final.with_suffix(".new")
    try:
        final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(decision) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(fresh, final)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise MigrationError(f"{final}: {error.strerror}; the guest stays here") from None
    try:
        _sync_folder(final.parent)
    except OSError as error:
        log.warning("%s: %s", final.parent, error.strerror)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: Path) -> Decision:
    """MigrationError where there is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Decision)
    except OSError as error:
        raise MigrationError(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise MigrationError(f"{path}: is no record of a released machine: {error}") from None


def forget(transfer: str) -> None:
    """The target runs and knows it: nobody will ask any more."""
    with contextlib.suppress(OSError):
        place(transfer).unlink()
