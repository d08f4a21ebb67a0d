"""Whose lease it is: what every writer of an image, ours or a tool, has to respect."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from blockd.lease import host
from blockd.lease.record import Record
from blockd.lease.slot import Found, Slot
from coordinator.contract.decision import Decision, decided
from coordinator.contract.errors import BlockError, RecordError

#: tokens of the leases that this process holds
held: set[str] = set()


def decision_path(slot: Slot, record: Record) -> str:
    """Where the decision of a transfer lies."""
    return os.path.normpath(os.path.join(slot.folder.path, record.decision))


def decision_of(slot: Slot, record: Record) -> Decision | None:
    """What has been decided; BlockError when it cannot be read."""
    path = decision_path(slot, record)
    try:
        return decided(path, type(slot.folder))
    except FileNotFoundError:  # not even the folder
        return None
    except (OSError, RecordError) as error:
        raise BlockError(f"{slot.image}: cannot read the decision of its transfer: {error}") from None


def obstacle(slot: Slot, found: Found, locked: bool) -> str | None:
    """What keeps us from writing because of this record; None when its holder is this process, or dead."""
    record = found.record
    if record is None:
        return f"its lease {slot.path(found.serial)} is damaged, or of another version"
    if record.token in held:
        return None
    decision = decision_of(slot, record) if record.state == "transferring" else None
    if decision is not None and decision.verdict == "released":
        return f"was handed over from {record.holder()} by transfer {record.transfer}, and not taken yet"
    return None if abandoned(record, locked) else f"is leased to {record.holder()}"


def ours(record: Record) -> bool:
    """Has this process made the record?"""
    return record.is_process(host.this_process())


def abandoned(record: Record, locked: bool) -> bool:
    """Does nobody hold it any more? One of ours that is not held could not be taken back."""
    if ours(record):
        return record.token not in held
    return host.is_dead(record, locked)


def respect(file: str, locked: bool) -> None:
    """BlockError when somebody holds a lease on an image that is about to be written. ``locked`` as in
    ``is_dead``."""
    slot = Slot(file)
    if not os.path.isfile(slot.image):
        return
    for each in _with_aliases(slot):
        respect_slot(file, each, locked)


def respect_slot(file: str, slot: Slot, locked: bool) -> None:
    try:
        seen = slot.look()
    except OSError as error:
        text = f"{file}: cannot look for leases in {slot.folder.path}: {error.strerror}"
        raise BlockError(text, error.errno or errno.EIO) from None
    for found in seen:
        what = obstacle(slot, found, locked)
        if what is not None:
            raise refusal(file, what)


def refusal(file: str, what: str) -> BlockError:
    return BlockError(
        f"{file}: {what}; if that is gone for good, lease=break or 'atoll img lease --break' takes it",
        errno.EAGAIN,
    )


def _with_aliases(slot: Slot) -> Iterator[Slot]:
    yield slot
    for other in slot.aliases()[0]:
        yield Slot(other, type(slot.folder))
