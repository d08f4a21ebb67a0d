"""A file of the host as image formats use it: whole reads and writes, zeroes, and durability.

System calls: preadv2(2), pwritev2(2), fallocate(2), fdatasync(2), ftruncate(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator

from blockd import handout
from blockd.locks import lock_image
from coordinator.contract.errors import BlockError

#: what is the same for two names of one file
Identity = tuple[int | str, ...]

#: linux/falloc.h
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

#: source of zeroes where the file system cannot make them
_ZEROES = memoryview(bytes(1 << 20))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), which the os module has without its mode."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _open(file: str, access: int) -> int:
    try:
        return os.open(file, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        if access != os.O_RDONLY or not handout.in_use():
            raise
        return handout.open_readable(file)  # a medium that has come since the sandbox was closed


class NotWritable(BlockError):
    """It was to be written, and cannot be."""


@contextlib.contextmanager
def read_only_hint(option: str) -> Iterator[None]:
    """What cannot be written is told with the option of the caller's that asks for less."""
    try:
        yield
    except NotWritable as error:
        raise NotWritable(f"{error} ({option} asks for less)", error.errno) from None


def open_file(file: str, read_only: bool) -> int:
    """A descriptor, or BlockError in one line. O_NONBLOCK so that a FIFO does not hang, and is refused
    afterwards."""
    access = os.O_RDONLY if read_only else os.O_RDWR
    try:
        fd = _open(file, access)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        if not read_only and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise NotWritable(f"{file}: cannot be opened for writing: {reason}", error.errno) from None
        raise BlockError(f"{file}: cannot be opened: {reason}", error.errno or errno.EIO) from None
    except ValueError:
        raise BlockError(f"{file!r}: is no file name", errno.EINVAL) from None
    fcntl.fcntl(fd, fcntl.F_SETFL, access)
    return fd


class HostFile:
    """One open file. ``unsafe`` makes ``sync`` do nothing: for files that are worthless when half made.

    Once a sync has failed, pages that never reached the disk look clean to the kernel; so from then
    on every sync fails.
    """

    def __init__(self, file: str, read_only: bool = False, unsafe: bool = False) -> None:
        """BlockError when it cannot be opened, or is neither a file nor a block device."""
        self.file = file
        self.read_only = read_only
        self.unsafe = unsafe
        self.fd = open_file(file, read_only)
        self._sync_failed = False
        mode = os.fstat(self.fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            os.close(self.fd)
            kind = "a directory" if stat.S_ISDIR(mode) else "no file and no block device"
            raise BlockError(f"{file}: is {kind}", errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL)
        self._resizable = stat.S_ISREG(mode)

    def size(self) -> int:
        return os.lseek(self.fd, 0, os.SEEK_END)

    def lock(self, writable: bool) -> bool:
        """Lock for a reader or the only writer until it is closed; False where there are no locks."""
        return lock_image(self.fd, self.file, writable)

    def identity(self) -> Identity:
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes, zeroes behind the end of the file."""
        data = os.pread(self.fd, length, offset)
        if len(data) == length:
            return data
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view``, with zeroes behind the end of the file."""
        done = os.preadv(self.fd, (view,), offset)
        while done < len(view):
            got = os.preadv(self.fd, (view[done:],), offset + done)
            if got == 0:
                view[done:] = bytes(len(view) - done)
                return
            done += got

    def prefetch(self, offset: int, length: int) -> None:
        """The bytes will be read soon."""
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        done = os.pwritev(self.fd, (data,), offset)
        if done < len(data):
            rest = memoryview(data)
            while done < len(rest):
                done += os.pwritev(self.fd, (rest[done:],), offset + done)

    def zero(self, offset: int, length: int) -> None:
        """Make the bytes zero, with a hole where that can be; the size does not change."""
        try:
            fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            end = min(offset + length, self.size())
            while offset < end:
                piece = min(end - offset, len(_ZEROES))
                self.write(offset, _ZEROES[:piece])
                offset += piece

    def reserve(self, offset: int, length: int) -> None:
        """Give the bytes space on the disk; what they read as does not change."""
        fallocate(self.fd, 0, offset, length)

    def resize(self, size: int) -> None:
        """Nothing is done to a block device, which must be large enough as it is."""
        if self._resizable:
            os.ftruncate(self.fd, size)

    def sync(self) -> None:
        """Everything written so far survives loss of power when this returns."""
        if self.unsafe or self.read_only:
            return
        if self._sync_failed:
            raise OSError(
                errno.EIO, f"{self.file}: an earlier flush failed, and data may be lost"
            )
        try:
            os.fdatasync(self.fd)
        except OSError:
            self._sync_failed = True
            raise

    def close(self) -> None:
        os.close(self.fd)
