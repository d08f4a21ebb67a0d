"""Handing the leases of a VM to another host, all or none.

    source                                      destination
    held --prepare--> transferring              awaited (images inactive)
         <--abort---      | release: one decision record, the commit point
                        gone                    --grant--> held, with the next epoch

Every step may be asked for twice, and answers as the first time. A step that fails leaves what was before,
or something that asking again, or abort, goes on from.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable
from typing import Any

from blockd.lease.judge import abandoned, decision_of, decision_path
from blockd.lease.lease import Claim, Lease, new_record, proven_free
from blockd.lease.manager import LeasedExports, active
from blockd.lease.record import Record
from blockd.lease.slot import Found, Raced, Slot
from coordinator.contract.decision import Decision, check_transfer, decide, decided, forget
from coordinator.contract.errors import BlockError, RecordError

log = logging.getLogger(__name__)


class _Outgoing:
    """A transfer that is being prepared, or is prepared."""

    def __init__(self, transfer: str, path: str, leases: dict[str, Lease]) -> None:
        self.transfer = transfer
        self.path = path
        self.leases = leases
        self.epoch = max(lease.record.epoch for lease in leases.values())


    @property
    def doubtful(self) -> bool:
        """May a decision have been written?"""
        return any(lease.doubtful for lease in self.leases.values())

    def doubt(self, doubtful: bool) -> None:
        for lease in self.leases.values():
            lease.doubtful = doubtful


class Source:
    """The side that gives."""

    def __init__(self, exports: LeasedExports) -> None:
        self._exports = exports
        self._outgoing: _Outgoing | None = None
        self._aborted: set[str] = set()
        #: what release has answered
        self._released: dict[str, dict[str, Any]] = {}

    def take_over(self, gone: Iterable[dict[str, Any]]) -> None:
        """Transfers that a predecessor has released: see successor.py."""
        self._released |= {answer["transfer"]: answer for answer in gone}

    def prepare(self, transfer: str, images: Iterable[str] = ()) -> dict[str, Any]:
        """Drain and close the exports of all leased images (``images`` may name them, which must be all), and
        mark their leases. The answer has the epoch that ``release`` is to name and the place of the
        decision."""
        _check(transfer)
        if transfer in self._aborted or transfer in self._released:
            raise BlockError(f"transfer {transfer} has ended", errno.ESTALE)
        outgoing = self._outgoing
        if outgoing is not None and outgoing.transfer != transfer:
            raise BlockError(f"transfer {outgoing.transfer} is under way", errno.EBUSY)
        if outgoing is None:
            outgoing = self._outgoing = self._begin(transfer, set(images))
        try:
            for ident, lease in outgoing.leases.items():
                self._mark(ident, lease, outgoing)
        except (BlockError, OSError) as error:
            self._fall_back(outgoing)
            text = getattr(error, "strerror", None) or str(error)
            raise BlockError(f"transfer {transfer}: {text}", error.errno or 5) from None
        rows = [self._exports.row(ident) for ident in outgoing.leases]
        return {"transfer": transfer, "epoch": outgoing.epoch, "decision": outgoing.path, "images": rows}

    def _begin(self, transfer: str, images: set[str]) -> _Outgoing:
        exports = self._exports
        for ident, wanted in exports.wanted.items():
            if exports.leases[ident] is None:
                why = "is waiting for its lease" if wanted.inactive else "has no lease"
                raise BlockError(f"{wanted.file}: {why}, so it cannot be handed over", errno.ENOLCK)
        if images and images != set(exports.leases):
            names = ", ".join(sorted(exports.leases)) or "none"
            raise BlockError(f"all leased images are handed over together ({names})", errno.EINVAL)
        leases = {ident: lease for ident, lease in exports.leases.items() if lease is not None}
        if not leases:
            raise BlockError("no image is leased", errno.ENOENT)
        leases = dict(sorted(leases.items(), key=lambda item: item[1].slot.image))
        first = next(iter(leases.values())).slot
        path = f"{first.image}.transfer-{transfer}"
        try:
            os.lstat(path)
        except FileNotFoundError:
            return _Outgoing(transfer, path, leases)
        except OSError as error:  # too long a name
            raise BlockError(f"{path}: {error.strerror}", error.errno or errno.EIO) from None
        raise BlockError(f"{path}: there has been a transfer of this name", errno.EEXIST)

    def _mark(self, ident: str, lease: Lease, outgoing: _Outgoing) -> None:
        if lease.record.state == "transferring":
            return
        lease.check()
        if ident in self._exports.table.names():
            self._exports.table.close(ident)
        path = os.path.relpath(outgoing.path, lease.slot.folder.path)
        lease.change(state="transferring", transfer=outgoing.transfer, decision=path)

    def _fall_back(self, outgoing: _Outgoing) -> None:
        """After a failure: as before, as far as that can be; what cannot is tried again by abort."""
        try:
            self._restore(outgoing)
        except BlockError as error:
            log.error("%s", error)
        else:
            self._outgoing = None

    def release(self, transfer: str, epoch: int) -> dict[str, Any]:
        """The commit point. After an error nothing is decided as far as we know, and it may be asked again;
        abort finds out for certain."""
        if transfer in self._released:
            if self._released[transfer]["epoch"] != epoch:
                raise _stale(transfer, epoch, self._released[transfer]["epoch"])
            return self._released[transfer]
        outgoing = self._named(transfer)
        if outgoing.epoch != epoch:
            raise _stale(transfer, epoch, outgoing.epoch)
        for lease in outgoing.leases.values():
            if lease.record.state != "transferring":
                raise BlockError(f"transfer {transfer} is not prepared", errno.EINVAL)
            _checked(lease)
        outgoing.doubt(True)
        found = self._decide(outgoing, "released")
        if found.verdict != "released":
            raise BlockError(f"transfer {transfer} has been aborted", errno.ESTALE)
        return self._finish(outgoing)

    def _decide(self, outgoing: _Outgoing, verdict: Any) -> Decision:
        owner, folder_type = self._exports.owner, self._exports.folder_type
        tokens = tuple(lease.record.token for lease in outgoing.leases.values())
        wanted = Decision(outgoing.transfer, verdict, outgoing.epoch, tokens, owner.vm, owner.uuid)
        try:
            return decide(outgoing.path, wanted, folder_type)
        except OSError as error:
            failure = error
        try:
            found = decided(outgoing.path, folder_type)
        except (OSError, RecordError):
            found = None
        if found is not None:
            return found
        text = f"transfer {outgoing.transfer}: the decision cannot be written: {failure.strerror or failure}"
        raise BlockError(text, failure.errno or errno.EIO)

    def _finish(self, outgoing: _Outgoing) -> dict[str, Any]:
        """The images are another's."""
        for ident, lease in outgoing.leases.items():
            lease.pass_on()
            del self._exports.leases[ident], self._exports.wanted[ident]
        answer = {"transfer": outgoing.transfer, "epoch": outgoing.epoch, "decision": outgoing.path}
        self._released[outgoing.transfer] = answer
        self._outgoing = None
        return answer

    def abort(self, transfer: str) -> None:
        """Give everything back: exports are open again when this returns. Refused after the commit point."""
        _check(transfer)
        if transfer in self._released:
            raise _too_late(transfer)
        outgoing = self._outgoing
        if outgoing is None or outgoing.transfer != transfer:
            self._aborted.add(transfer)  # a prepare that comes late is refused
            return
        doubtful = outgoing.doubtful
        if doubtful and self._decide(outgoing, "aborted").verdict == "released":
            self._finish(outgoing)
            raise _too_late(transfer)
        self._restore(outgoing)
        outgoing.doubt(False)
        self._aborted.add(transfer)
        self._outgoing = None
        if doubtful:
            _forget(outgoing.path, self._exports)

    def _restore(self, outgoing: _Outgoing) -> None:
        """Leases held, exports open; BlockError names all that could not be."""
        errors = []
        for ident, lease in outgoing.leases.items():
            try:
                if lease.record.state == "transferring":
                    lease.change(state="held", transfer="", decision="")
                if ident not in self._exports.table.names():
                    self._exports.open_export(self._exports.wanted[ident], lease)
            except (BlockError, OSError) as error:
                text = getattr(error, "strerror", None) or str(error)
                errors.append(text if lease.file in text else f"{lease.file}: {text}")
        if errors:
            raise BlockError("; ".join(errors))

    def _named(self, transfer: str) -> _Outgoing:
        if self._outgoing is None or self._outgoing.transfer != transfer:
            raise BlockError(f"no transfer {transfer} is prepared here", errno.ESTALE)
        return self._outgoing


class Destination:
    """The side that takes."""

    def __init__(self, exports: LeasedExports) -> None:
        self._exports = exports
        #: what grant has answered
        self._granted: dict[str, tuple[int, list[dict[str, Any]]]] = {}

    def check(self, transfer: str) -> list[dict[str, Any]]:
        """Before the commit point: are all awaited images those of this transfer? So nothing can be missing
        afterwards for want of a shared folder."""
        _check(transfer)
        rows = []
        for ident, wanted in self._awaited().items():
            slot = Slot(wanted.file, self._exports.folder_type)
            record = _top(wanted.file, slot, transfer)[-1].record
            assert record is not None
            path = decision_path(slot, record)
            if not os.path.isdir(os.path.dirname(path)):
                raise BlockError(f"{path}: the folder of the decision is not to be found here", errno.ENOENT)
            rows.append({"id": ident, "file": wanted.file, "epoch": record.epoch, "token": record.token})
        return rows

    def grant(self, transfer: str, epoch: int) -> list[dict[str, Any]]:
        """Take the leases that were released, all or none, and open the images again, now to be written. May
        be asked again after an error. One row an image, as ``LeasedExports.row`` has it."""
        _check(transfer)
        if transfer in self._granted:
            if self._granted[transfer][0] != epoch:
                raise _stale(transfer, epoch, self._granted[transfer][0])
            return self._granted[transfer][1]
        awaited = self._awaited()
        slots = {ident: Slot(wanted.file, self._exports.folder_type) for ident, wanted in awaited.items()}
        claims = [Claim(ident, wanted.file) for ident, wanted in awaited.items()]
        taken: dict[str, tuple[Lease, Record]] = {}
        try:
            path = self._check_decision(transfer, epoch, slots)
            with proven_free(claims) as free:
                highest = max(epoch, *(_epoch(slot) for slot in slots.values()))
                for claim, _ in free:
                    taken[claim.id] = self._take(claim.id, slots[claim.id], transfer, highest + 1)
            for ident, (lease, _) in taken.items():
                self._exports.open_export(active(awaited[ident]), lease)
        except (BlockError, OSError) as error:
            for ident, (lease, before) in reversed(taken.items()):
                self._put_back(ident, lease, before)
            text = getattr(error, "strerror", None) or str(error)
            raise BlockError(f"transfer {transfer}: {text}", error.errno or errno.EIO) from None
        for ident, (lease, _) in taken.items():
            self._exports.leases[ident] = lease
            self._exports.wanted[ident] = active(awaited[ident])
        _forget(path, self._exports)
        rows = [self._exports.row(ident) for ident in taken]
        self._granted[transfer] = (epoch, rows)
        return rows

    def _awaited(self) -> dict[str, Any]:
        awaited = {ident: wanted for ident, wanted in self._exports.wanted.items() if wanted.inactive}
        if not awaited:
            raise BlockError("no image is waiting for its lease", errno.ENOENT)
        return awaited

    def _check_decision(self, transfer: str, epoch: int, slots: dict[str, Slot]) -> str:
        """Released, to this epoch, and exactly these images; returns where the decision lies."""
        records: dict[str, Record] = {}
        for ident, slot in slots.items():
            record = _top(slot.image, slot, transfer)[-1].record
            assert record is not None
            records[ident] = record
        slot, record = next((slots[ident], record) for ident, record in records.items())
        path, decision = decision_path(slot, record), decision_of(slot, record)
        if decision is None:
            raise BlockError("the source has not released its images", errno.EAGAIN)
        if decision.verdict != "released":
            raise BlockError("the source has taken its images back", errno.ESTALE)
        if decision.transfer != transfer or decision.epoch != epoch:
            raise _stale(transfer, epoch, decision.epoch)
        if len(decision.tokens) != len(records):
            text = f"{len(decision.tokens)} images are handed over, and {len(records)} are waited for here"
            raise BlockError(text, errno.EINVAL)
        for ident, record in records.items():
            if record.state == "transferring" and record.token not in decision.tokens:
                raise BlockError(f"{slots[ident].image}: is not among the images released", errno.EINVAL)
        return path

    def _take(self, ident: str, slot: Slot, transfer: str, epoch: int) -> tuple[Lease, Record]:
        wanted = self._exports.wanted[ident]
        seen = _top(wanted.file, slot, transfer)
        before = seen[-1].record
        assert before is not None
        more = {"transfer": transfer, "decision": before.decision}
        record = new_record(self._exports.owner, slot, epoch, before.serial + 1, **more)
        try:
            slot.advance(seen, record)
        except Raced:
            raise BlockError(f"{wanted.file}: another destination is taking it", errno.EAGAIN) from None
        return Lease(wanted.file, slot, record), before

    def _put_back(self, ident: str, lease: Lease, before: Record) -> None:
        """So that the grant can be asked for again."""
        wanted = self._exports.wanted[ident]
        try:
            self._exports.open_export(wanted, None)  # retires what was opened for writing
            if before.state == "transferring":
                fields = {name: getattr(before, name) for name in before.__struct_fields__}
                del fields["serial"]
                lease.change(**fields)
        except (BlockError, OSError) as error:
            log.error("%s: %s", wanted.file, error)
        lease.pass_on()


def _top(file: str, slot: Slot, transfer: str) -> tuple[Found, ...]:
    """The records of an image that this transfer is about to bring here, or that we could not put back, or a
    predecessor of ours that has died."""
    try:
        seen = slot.look()
    except OSError as error:
        raise BlockError(f"{file}: cannot look for leases: {error.strerror}", error.errno or 5) from None
    record = seen[-1].record if seen else None
    if record is None or record.transfer != transfer:
        has = f"is leased to {record.holder()}" if record is not None else "has no lease"
        raise BlockError(f"{file}: is not part of transfer {transfer} ({has})", errno.ESTALE)
    if record.state == "held" and not abandoned(record, locked=False):
        raise BlockError(f"{file}: is leased to {record.holder()}", errno.EAGAIN)
    return seen


def _epoch(slot: Slot) -> int:
    return max(found.record.epoch for found in slot.look() if found.record is not None)


def _checked(lease: Lease) -> None:
    try:
        lease.check()
    except OSError as error:
        raise BlockError(error.strerror or str(error), error.errno or errno.EIO) from None


def _check(transfer: str) -> None:
    try:
        check_transfer(transfer)
    except RecordError as error:
        raise BlockError(str(error), errno.EINVAL) from None


def _stale(transfer: str, epoch: int, right: int) -> BlockError:
    return BlockError(f"transfer {transfer}: epoch {epoch} is stale (it is {right})", errno.ESTALE)


def _too_late(transfer: str) -> BlockError:
    return BlockError(f"transfer {transfer} is released; its images are the destination's", errno.EPERM)


def _forget(path: str, exports: LeasedExports) -> None:
    """A decision that nothing depends on; where it cannot be removed it does no harm."""
    try:
        forget(path, exports.folder_type)
    except OSError as error:
        log.warning("%s: cannot be removed: %s", path, error.strerror)
