"""What a lease says. A record never changes; another one with the next serial number takes its place."""

from __future__ import annotations

from typing import Literal

import msgspec

from coordinator.contract.durable import seal, unseal
from coordinator.contract.errors import RecordError

_KIND = "lease"


class Owner(msgspec.Struct, frozen=True):
    """The VM that asks."""

    uuid: str
    vm: str


class Identity(msgspec.Struct, frozen=True):
    """A process on a host."""

    #: name of the host, its machine ID and boot ID, where it has them
    host: str
    machine: str
    boot: str
    #: PID, the namespace in which it has that number, start time in clock ticks
    namespace: int
    pid: int
    started: int

    def is_process(self, other: Identity) -> bool:
        """Is it the same one? Hosts that have booted apart differ in their boot IDs."""
        mine, theirs = ((each.boot, each.namespace, each.pid, each.started) for each in (self, other))
        return mine == theirs


class Record(Identity, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One state of one lease, with the block daemon that holds it."""

    #: of this record; the highest one counts
    serial: int
    #: grows with every owner
    epoch: int
    #: held; or transferring: handed over once the decision record says so
    state: Literal["held", "transferring"]
    #: random, the same as long as one process holds the lease
    token: str
    uuid: str
    vm: str
    #: of the image
    inode: int
    #: the transfer that is under way, or that brought the lease here
    transfer: str = ""
    #: path of the decision record, as seen from the image's folder
    decision: str = ""

    def holder(self) -> str:
        """For messages."""
        return f"VM '{self.vm}' on host {self.host} (pid {self.pid}, epoch {self.epoch})"


def encode(record: Record) -> bytes:
    return seal(_KIND, msgspec.json.encode(record))


def decode(data: bytes) -> Record | None:
    """None for what is damaged, or of a version that is not known here."""
    try:
        return msgspec.json.decode(unseal(_KIND, data), type=Record)
    except (msgspec.MsgspecError, RecordError):
        return None
