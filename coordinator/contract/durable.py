"""Small records on disk that are there whole or not at all, and that only one process can make.

A record gets its name by link(2), which fails where the name exists: that is the one step of ours that two
hosts on a shared file system cannot both do, and it needs no locks. What is linked has been made durable
before, so nobody ever finds half a record; a crash leaves no trace where the system has O_TMPFILE.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import zlib
from dataclasses import dataclass

from coordinator.contract.errors import RecordError

log = logging.getLogger(__name__)

#: more than any record of ours has
_MOST = 1 << 20
#: no O_TMPFILE here (open(2))
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOSYS)
#: no hard links here (link(2))
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS)
#: renameat2(2)
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class _Draft:
    """A file that is complete and has no name yet, or only a temporary one."""

    fd: int
    path: str | None


class Folder:
    """A folder with records in it. Tests hand in one whose steps fail or never return."""

    def __init__(self, path: str) -> None:
        self.path = path

    def names(self) -> list[str]:
        return os.listdir(self.path)

    def read(self, name: str) -> bytes | None:
        """All of a file; None where there is none."""
        try:
            fd = os.open(self.of(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            return os.read(fd, _MOST)
        finally:
            os.close(fd)

    def create(self, name: str, data: bytes) -> bool:
        """Make a file that survives loss of power when this returns; False where another one has the name.
        After an OSError it may be there or not."""
        draft = self.draft(data)
        try:
            self.publish(draft, name)
        except FileExistsError:
            if self.read(name) != data:  # else it is ours: a network file system asked twice
                return False
        finally:
            os.close(draft.fd)
            if draft.path is not None and os.path.lexists(draft.path):
                os.unlink(draft.path)
        self.sync()
        return True

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""
        try:
            os.unlink(self.of(name))
        except FileNotFoundError:
            pass

    def sync(self) -> None:
        """Names made and removed so far survive loss of power."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system whose folders need none
                raise
        finally:
            os.close(fd)

    def of(self, name: str) -> str:
        return os.path.join(self.path, name)

    # ---- steps of create -------------------------------------------------------------------------
    def draft(self, data: bytes) -> _Draft:
        """A durable file without its name."""
        draft = self._open_draft()
        try:
            done = 0
            while done < len(data):
                done += os.write(draft.fd, data[done:])
            os.fsync(draft.fd)
        except BaseException:
            os.close(draft.fd)
            if draft.path is not None:
                os.unlink(draft.path)
            raise
        return draft

    def _open_draft(self) -> _Draft:
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            return _Draft(os.open(self.path, flags | os.O_TMPFILE, 0o644), None)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        path = self.of(f".atoll-{secrets.token_hex(8)}")
        return _Draft(os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644), path)

    def publish(self, draft: _Draft, name: str) -> None:
        """Give it its name; FileExistsError where that is taken."""
        target = self.of(name)
        if draft.path is None:
            folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:  # with a descriptor it becomes linkat(2) with AT_SYMLINK_FOLLOW, as open(2) has it
                os.link(f"/proc/self/fd/{draft.fd}", target, src_dir_fd=folder)
            finally:
                os.close(folder)
            return
        try:
            os.link(draft.path, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _rename_exclusively(draft.path, target)


def _rename_exclusively(old: str, new: str) -> None:
    arguments = (_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE)
    if _libc.renameat2(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), new)


def seal(kind: str, payload: bytes) -> bytes:
    """A record as it lies on the disk: a line with its kind and checksum, then one line of payload."""
    return b"atoll %s 1 %08x\n%s\n" % (kind.encode(), zlib.crc32(payload), payload)


def unseal(kind: str, data: bytes) -> bytes:
    """The payload; RecordError when it is of another kind or version, or damaged."""
    head, _, rest = data.partition(b"\n")
    payload = rest.removesuffix(b"\n")
    if head != b"atoll %s 1 %08x" % (kind.encode(), zlib.crc32(payload)) or not payload:
        raise RecordError(f"no {kind} record of this version, or a damaged one")
    return payload
