"""Taking write leases, all or none, holding one, giving it back."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from blockd.hostfile import open_file
from blockd.lease import host
from blockd.lease.judge import abandoned, decision_of, decision_path, held, obstacle, refusal, respect_slot
from blockd.lease.record import Owner, Record, encode
from blockd.lease.slot import Found, Raced, Slot
from blockd.locks import lock_image
from coordinator.contract.decision import forget
from coordinator.contract.durable import Folder
from coordinator.contract.errors import BlockError

log = logging.getLogger(__name__)

#: a lease that changes all the time is not taken
TRIES = 5
#: no record can be kept in this folder, whoever asks
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


class Claim(NamedTuple):
    """An image that is to be leased; ``id`` is the caller's."""

    id: str
    file: str
    #: also from a holder that may live
    by_force: bool = False


class Lease:
    """A lease that this process holds. Its record is held open, so that a look whether it still has its name
    costs one system call."""

    def __init__(self, file: str, slot: Slot, record: Record) -> None:
        self.file = file
        self.slot = slot
        self.record = record
        #: it may have been released, so that giving it back leaves the record where it is
        self.doubtful = False
        #: called once, with a line for the user, by the thread that finds out
        self.on_loss: Callable[[str], None] = lambda text: None
        self._token = record.token
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._fd = self._open()
        held.add(record.token)

    def _open(self) -> int:
        return os.open(self.slot.path(self.record.serial), os.O_RDONLY | os.O_CLOEXEC)

    @property
    def lost(self) -> bool:
        return self._lost is not None

    def glance(self) -> None:
        """PermissionError when the lease is seen to be gone; a network file system may show it late."""
        try:
            if self._lost is None and os.fstat(self._fd).st_nlink:
                return
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        self._refuse()

    def check(self) -> None:
        """PermissionError when the lease is gone, by the folder itself."""
        data = self.slot.folder.read(self.slot.name(self.record.serial)) if self._lost is None else None
        if data != encode(self.record):
            self._refuse()

    def covers(self, file: str) -> None:
        """BlockError when a name does not lead any more to the image that was leased."""
        real = os.path.realpath(file)
        if real != self.slot.image or os.stat(real).st_ino != self.record.inode:
            raise BlockError(f"{file}: is not the file any more that was leased", errno.ESTALE)

    def _refuse(self) -> None:
        with self._lock:
            if self._lost is None:
                self._lost = f"{self.file}: the lease is lost ({self._successor()}); nothing more is written"
                log.error("%s", self._lost)
                self.on_loss(self._lost)
        raise PermissionError(errno.EPERM, self._lost)

    def _successor(self) -> str:
        with contextlib.suppress(OSError):
            found = self.slot.look()
            if found and (record := found[-1].record) is not None:
                return f"it is {record.holder()}'s now"
        return "its record was removed"

    def change(self, **fields: Any) -> None:
        """Another state under the same token. OSError: it is what it was; PermissionError: it is lost."""
        for _ in range(TRIES):
            self.check()
            seen = self.slot.look()
            claims = [found.record for found in seen if found.serial > self.record.serial]
            if any(claim is None or not abandoned(claim, locked=False) for claim in claims):
                continue  # it will be taken back, or made good
            if self.record not in [found.record for found in seen]:
                continue
            record = msgspec.structs.replace(self.record, serial=seen[-1].serial + 1, **fields)
            try:
                self.slot.advance(seen, record)
            except Raced:
                continue
            self.record = record
            old, self._fd = self._fd, self._open()
            os.close(old)
            return
        raise BlockingIOError(errno.EAGAIN, "another process is about to take the lease")

    def give_back(self) -> None:
        """Nobody holds the lease any more, and nothing of it is left."""
        if not self.lost and not self.doubtful:
            self.slot.take_back(Found(self.record.serial, encode(self.record), self.record))
        self.pass_on()

    def pass_on(self) -> None:
        """The lease is another's: we forget it."""
        held.discard(self._token)
        self._lost = self._lost or f"{self.file}: the lease was given up"
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


# ---- taking ---------------------------------------------------------------------------------------------
def new_record(owner: Owner, slot: Slot, epoch: int, serial: int, **more: Any) -> Record:
    return Record(
        serial=serial, epoch=epoch, state="held", token=secrets.token_hex(16), uuid=owner.uuid, vm=owner.vm,
        inode=os.stat(slot.image).st_ino,
        **msgspec.structs.asdict(host.this_process()), **more,
    )  # fmt: skip


@contextlib.contextmanager
def proven_free(claims: Iterable[Claim]) -> Iterator[list[tuple[Claim, bool]]]:
    """Hold the image locks of all, in the order of their paths: then no process on this host writes them.
    With each claim whether its file system has locks. Block devices have no leases and are left out."""
    with contextlib.ExitStack() as stack:
        result: list[tuple[Claim, bool]] = []
        ids: dict[tuple[int, int], str] = {}
        for claim in sorted(claims, key=lambda each: os.path.realpath(each.file)):
            fd = open_file(claim.file, read_only=False)
            stack.callback(os.close, fd)
            status = os.fstat(fd)
            same = ids.setdefault((status.st_dev, status.st_ino), claim.id)
            if same != claim.id:
                raise BlockError(f"{claim.file}: {claim.id} and {same} are the same image", errno.EBUSY)
            if stat.S_ISREG(status.st_mode):
                result.append((claim, lock_image(fd, claim.file, writable=True, leased=False)))
        yield result


def acquire(
    claims: Iterable[Claim], owner: Owner, folder_type: type[Folder] = Folder
) -> dict[str, Lease | None]:
    """Take all leases or none, under one epoch; by id. BlockError says who stands against it. None for an
    image in a folder where no record can be kept, if its locks are there to protect it."""
    with proven_free(claims) as free:
        slots = [(claim, locked, Slot(claim.file, folder_type)) for claim, locked in free]
        taken: dict[str, Lease | None] = {}
        try:
            epoch = 1 + max((_last_epoch(claim.file, slot) for claim, _, slot in slots), default=0)
            for claim, locked, slot in slots:
                taken[claim.id] = _take_or_do_without(claim, locked, slot, owner, epoch)
        except BaseException:
            for lease in reversed(taken.values()):
                if lease is not None:
                    lease.give_back()
            raise
        return taken


def _last_epoch(file: str, slot: Slot) -> int:
    try:
        return max((found.record.epoch for found in slot.look() if found.record is not None), default=0)
    except OSError as error:
        raise BlockError(f"{file}: cannot look for leases: {error.strerror}", error.errno or 5) from None


def _take_or_do_without(claim: Claim, locked: bool, slot: Slot, owner: Owner, epoch: int) -> Lease | None:
    try:
        return _take(claim, locked, slot, owner, epoch)
    except OSError as error:
        text = f"{claim.file}: cannot keep a lease in {slot.folder.path}: {error.strerror or error}"
        if error.errno not in _NO_PLACE or not locked:
            raise BlockError(f"{text}; lease=off does without", error.errno or errno.EIO) from None
    log.warning("%s; only its locks keep a second writer away", text)
    return None


def _take(claim: Claim, locked: bool, slot: Slot, owner: Owner, epoch: int) -> Lease:
    for _ in range(TRIES):
        seen = slot.look()
        if not claim.by_force:
            for found in seen:
                what = obstacle(slot, found, locked)
                if what is not None:
                    raise refusal(claim.file, what)
        last = seen[-1] if seen else None
        above = last.record.epoch + 1 if last is not None and last.record is not None else 1
        serial = last.serial + 1 if last is not None else 1
        record = new_record(owner, slot, max(epoch, above), serial)
        try:
            slot.advance(seen, record)
        except Raced:
            continue
        lease = Lease(claim.file, slot, record)
        _forget_decisions(slot, seen)
        try:
            _check_aliases(claim, locked, slot)
        except BaseException:
            lease.give_back()
            raise
        return lease
    raise BlockError(f"{claim.file}: its lease is being changed by others; try again", errno.EAGAIN)


def _forget_decisions(slot: Slot, seen: tuple[Found, ...]) -> None:
    """A transfer of this image alone has come to nothing."""
    for found in seen:
        record = found.record
        if record is not None and record.state == "transferring":
            with contextlib.suppress(BlockError, OSError):
                decision = decision_of(slot, record)
                if decision is not None and decision.tokens == (record.token,):
                    forget(decision_path(slot, record), type(slot.folder))


def _check_aliases(claim: Claim, locked: bool, slot: Slot) -> None:
    """Hard links: whoever takes the image by another name does the same in the same order, so one of two sees
    the other. Names in other folders cannot be found; there only image locks help."""
    others, elsewhere = slot.aliases()
    if elsewhere and not locked:
        text = f"{claim.file}: has another name (hard link) in another folder, and its file system no locks"
        raise BlockError(text, errno.EMLINK)
    for other in others:
        respect_slot(claim.file, Slot(other, type(slot.folder)), locked)
