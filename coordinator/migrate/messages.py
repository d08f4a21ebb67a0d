"""What source and target of a migration say to each other over the control channel.

One transfer has one ``transfer`` id and one ``epoch``; what comes with another is stale and dropped. A
message may be lost or come twice, so the source repeats what it wants an answer to (Offer; State with
Complete; Released), and the target answers again what it has answered before. Parts are those of stream.py.
"""

from __future__ import annotations

import msgspec

from coordinator.contract.codec import Codec

#: raised with every change here
PROTOCOL = 2


class Said(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base: ``transfer`` is drawn by the source for each attempt."""

    transfer: str


# ---- source -> target -----------------------------------------------------------------------------------
class Offer(Said, frozen=True, tag="offer"):
    """First of all. ``epoch`` is the source's, ``description`` a part; ``channels`` connections will bring
    guest memory, packed by ``compression`` ("none" or "zstd"), in TLS if ``tls``. ``runs``: (first page,
    pages) of what is in use by now, see ram.Ahead; ``stands``: the guest stands already, so that time counts.
    """

    protocol: int
    epoch: int
    description: bytes
    channels: int
    compression: str
    tls: bool
    runs: tuple[tuple[int, int], ...] = ()
    stands: bool = False


class LeasedImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A writable disk by its drive's id; ``token`` tells its lease from any other."""

    id: str
    epoch: int
    token: str


class Leases(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of all writable disks together, as PrepareTransfer told them."""

    epoch: int
    images: tuple[LeasedImage, ...]


class State(Said, frozen=True, tag="state"):
    """``state`` is a part. It comes while memory does, and can be loaded meanwhile."""

    state: bytes
    leases: Leases | None = None


class Complete(Said, frozen=True, tag="complete"):
    """Memory has been sent; ``normal`` and ``zero`` count the pages that all connections have brought."""

    normal: int
    zero: int


class Released(Said, frozen=True, tag="released"):
    """The commit point has passed: the source will not run again."""

    epoch: int


class Heard(Said, frozen=True, tag="heard"):
    """Running has come: nothing more will be asked."""


class Abort(Said, frozen=True, tag="abort"):
    """The source goes on; the target is to end. ``reason`` is one line."""

    reason: str


# ---- target -> source -----------------------------------------------------------------------------------
class Accepted(Said, frozen=True, tag="accepted"):
    """Connect to ``port`` (TCP) or ``path`` (UNIX) and begin with ``token``."""

    token: bytes
    port: int
    path: str


class TurnedAway(Said, frozen=True, tag="turned-away"):
    """A data connection was closed at the door, by whomever it was made. ``reason`` is one line."""

    reason: str


class Refused(Said, frozen=True, tag="refused"):
    """The target cannot take this machine. ``reason`` is one line."""

    reason: str


class Verified(Said, frozen=True, tag="verified"):
    """All is there and fits; counts as in Complete. The target does nothing more before Released or Abort."""

    normal: int
    zero: int


class Running(Said, frozen=True, tag="running"):
    """The answer to Released: the guest goes on here (or stands, if it stood)."""

    epoch: int


AnyOfSource = Offer | State | Complete | Released | Heard | Abort
AnyOfTarget = Accepted | TurnedAway | Refused | Verified | Running

of_source: Codec[AnyOfSource] = Codec(AnyOfSource)
of_target: Codec[AnyOfTarget] = Codec(AnyOfTarget)
