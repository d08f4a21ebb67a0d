"""The commit point of a migration: one durable record that says to whom a VM belongs from now on.

Until it is there the source owns the VM, afterwards whoever the transfer gives it to. It is made
exclusively, so of "released" and "aborted" the first one holds, whoever asks and however often. Where the
VM has writable disks blockd writes it, beside one of them; a VM without any has it in a folder that the
coordinator names and both sides reach.
"""

from __future__ import annotations

import os
import re
from typing import Literal

import msgspec

from coordinator.contract.durable import Folder, seal, unseal
from coordinator.contract.errors import RecordError

_KIND = "decision"
_TRANSFER = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``epoch`` is the one that ends: the next owner has a higher one."""

    transfer: str
    verdict: Literal["released", "aborted"]
    epoch: int
    #: of the leases that pass, all or none
    tokens: tuple[str, ...] = ()
    vm: str = ""
    uuid: str = ""


def check_transfer(transfer: str) -> None:
    """RecordError for an identifier that could not be part of a file's name."""
    if not _TRANSFER.fullmatch(transfer):
        raise RecordError(f"transfer {transfer!r}: an identifier is up to 64 letters, digits, - and _")


def path_of(folder: str, transfer: str) -> str:
    """Where the decision of a VM without leases lies."""
    check_transfer(transfer)
    return os.path.join(folder, f"transfer-{transfer}")


def decide(path: str, wanted: Decision, folder_type: type[Folder] = Folder) -> Decision:
    """Write the decision unless there is one, and return the one that holds. OSError when it could not be
    written; ``decided`` then tells whether it is there all the same."""
    check_transfer(wanted.transfer)
    folder, name = folder_type(os.path.dirname(path)), os.path.basename(path)
    if folder.create(name, seal(_KIND, msgspec.json.encode(wanted))):
        return wanted
    found = decided(path, folder_type)
    if found is None:
        raise RecordError(f"{path}: was taken away while it was being decided")
    return found


def decided(path: str, folder_type: type[Folder] = Folder) -> Decision | None:
    """What has been decided, durably, or None. RecordError when the record is damaged."""
    folder = folder_type(os.path.dirname(path))
    data = folder.read(os.path.basename(path))
    if data is None:
        return None
    folder.sync()  # it may be younger than its writer's last fsync, and we are about to rely on it
    try:
        return msgspec.json.decode(unseal(_KIND, data), type=Decision)
    except (msgspec.MsgspecError, RecordError) as error:
        raise RecordError(f"{path}: {error}") from None


def forget(path: str, folder_type: type[Folder] = Folder) -> None:
    """Remove a decision on which nothing depends any more."""
    folder_type(os.path.dirname(path)).remove(os.path.basename(path))
