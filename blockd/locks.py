"""Locks on image files that QEMU's programs respect, and that respect theirs.

QEMU's protocol (documented with its block layer, "Image locking"): an image has permissions that
a user holds, and permissions that it does not let others hold. For each permission held there is a
shared open-file-description lock on byte 100 + its number, for each one not shared a lock on byte
200 + its number. After taking its own locks a user looks whether somebody's lock on the opposite byte
stands against it. Locks end with the open file, so a killed process leaves none.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct

from coordinator.contract.errors import BlockError

HELD_BASE = 100
UNSHARED_BASE = 200

#: struct flock of fcntl(2) on 64-bit Linux: type, whence, start, length, pid (must be 0 for OFD locks)
_FLOCK = struct.Struct("@hhqqi0q")
#: answers of file systems that have no such locks
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class Permission(enum.IntEnum):
    """Numbers of QEMU's block permissions (bit positions of BLK_PERM_*)."""

    CONSISTENT_READ = 0
    WRITE = 1
    WRITE_UNCHANGED = 2
    RESIZE = 3


#: what somebody with this permission wants, for the message
_VERB = {
    Permission.CONSISTENT_READ: "reads",
    Permission.WRITE: "writes",
    Permission.WRITE_UNCHANGED: "rewrites",
    Permission.RESIZE: "resizes",
}

READER = (frozenset({Permission.CONSISTENT_READ}), frozenset({Permission.WRITE, Permission.RESIZE}))
WRITER = (
    frozenset({Permission.CONSISTENT_READ, Permission.WRITE}),
    frozenset({Permission.WRITE, Permission.RESIZE}),
)


def lock_image(fd: int, file: str, writable: bool, leased: bool = True) -> bool:
    """Lock an open image file for a reader or for the only writer, until ``fd`` is closed. With ``leased``
    a writer respects the lease of another process, too.

    False when the file system has no locks. BlockError with EAGAIN when another process stands
    against it; ``fd`` must then be closed, which gives back what had been taken.
    """
    locked = _lock(fd, file, writable)
    if writable and leased:
        from blockd.lease.judge import respect  # slow to import, and readers need none of it

        respect(file, locked)
    return locked


def _lock(fd: int, file: str, writable: bool) -> bool:
    held, unshared = WRITER if writable else READER
    try:
        for permission in held:
            _take(fd, HELD_BASE + permission)
        for permission in unshared:
            _take(fd, UNSHARED_BASE + permission)
        for permission in held:
            if _taken_by_other(fd, UNSHARED_BASE + permission):
                use = "written" if permission is Permission.WRITE else "read"
                raise BlockError(f"{file}: is locked: another process does not let it be {use}", errno.EAGAIN)
        for permission in unshared:
            if _taken_by_other(fd, HELD_BASE + permission):
                raise BlockError(f"{file}: is locked: another process {_VERB[permission]} it", errno.EAGAIN)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        number = error.errno or errno.EIO
        raise BlockError(f"{file}: cannot be locked: {os.strerror(number)}", number) from None
    return True


def _take(fd: int, byte: int) -> None:
    """A shared lock on one byte; nobody takes an exclusive one, so it does not wait or fail."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))


def _taken_by_other(fd: int, byte: int) -> bool:
    """Would an exclusive lock on the byte fail? Nothing is taken, and our own lock does not count."""
    probe = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    lock_type: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe))[0]
    return lock_type != fcntl.F_UNLCK
