"""Where the commit point of a machine without writable disks lies: in the user's state folder.

``~/.local/state/atoll/released/`` (or below ``$XDG_STATE_HOME``). The record
(coordinator/contract/decision.py) is there, whole, or it is not; so a source that was killed has either
released its guest or has not, and nobody has to guess. Where there are writable disks, it lies with their
leases (blockd/lease).
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from coordinator.contract import decision
from coordinator.contract.decision import Decision
from coordinator.contract.errors import MigrationError, RecordError

log = logging.getLogger(__name__)


def folder() -> Path:
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "atoll" / "released"


def place(transfer: str) -> Path:
    """Where the record of this transfer is, if it has been made."""
    return Path(decision.path_of(str(folder()), transfer))


def release(transfer: str, epoch: int, machine: str, uuid: str) -> None:
    """Make the record. MigrationError means that it was not made, and, since none can be made later, that the
    guest stays. It counts as soon as its name can be seen, durable or not: a crash of this host, which could
    lose it, leaves nobody here to run the guest, either."""
    path = place(transfer)
    found: Decision | None
    wanted = Decision(transfer, "released", epoch, vm=machine, uuid=uuid)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = decision.decide(str(path), wanted)
    except (OSError, RecordError) as error:
        found = _look(path)
        if found is None and os.path.lexists(path):
            log.warning("%s: %s", path, error)
            return
        if found is None:
            reason = getattr(error, "strerror", None) or error
            raise MigrationError(f"{path}: {reason}; the guest stays here") from None
    if found.verdict != "released":
        raise MigrationError(f"{path}: has been taken back; the guest stays here")


def _look(path: Path) -> Decision | None:
    """What has been decided, as far as can be told."""
    try:
        return decision.decided(str(path))
    except (OSError, RecordError):
        return None


def read(path: Path) -> Decision:
    """A record of a released machine; MigrationError where there is none."""
    try:
        found = decision.decided(str(path))
    except OSError as error:
        raise MigrationError(f"{path}: {error.strerror}") from None
    except RecordError as error:
        raise MigrationError(str(error)) from None
    if found is None or found.verdict != "released":
        raise MigrationError(f"{path}: says of no machine that it was released")
    return found


def seen(place: str | Path) -> bool:
    """Whether there is a record of a release, as far as can be told."""
    found = _look(Path(place))
    return found is not None and found.verdict == "released"


def forget(transfer: str) -> None:
    """The target runs and knows it: nobody will ask any more."""
    with contextlib.suppress(OSError):
        decision.forget(str(place(transfer)))
