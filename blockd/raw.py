"""Raw images: a file or block device whose bytes are the disk's bytes.

System calls: preadv2(2), pwritev2(2), fallocate(2), lseek(2) with SEEK_DATA, posix_fadvise(2).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator

from blockd.batch import READ_ONLY, Direct, DirectFile
from blockd.hostfile import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    open_file,
)
from blockd.hostfile import fallocate as _fallocate
from blockd.image import Buffer, Extent, Image
from blockd.locks import lock_image
from coordinator.contract.errors import BlockError

log = logging.getLogger(__name__)

#: source of zeroes where the file system cannot make them
_ZEROES = memoryview(bytes(1 << 20))


class RawImage(Image):
    """A raw image. ``granularity`` is the sector of the drive that will use it.

    A file whose size is no multiple of it is an error, because its last bytes could not be
    reached; with ``pad`` (a CD-ROM, which is never written) they are followed by zeroes.
    """

    format = "raw"
    #: a write that begins below is for ``write`` alone to judge
    judged_below = 0

    def __init__(
        self,
        file: str,
        read_only: bool = False,
        granularity: int = 512,
        pad: bool = False,
        locked: bool = True,
    ) -> None:
        """Open and, if ``locked``, lock; BlockError in one line when that cannot be."""
        self.file = file
        self.read_only = read_only
        self._fd = open_file(file, read_only)
        try:
            self._stored = _stored_size(self._fd, file)
            rest = self._stored % granularity
            if rest and not pad:
                raise BlockError(
                    f"{file}: size {self._stored} is not a multiple of {granularity} bytes "
                    f"({granularity - rest} more would make it one)",
                    errno.EINVAL,
                )
            self.size = self._stored + (granularity - rest if rest else 0)
            if locked and not lock_image(self._fd, file, not read_only):
                log.warning("%s: its file system has no locks; nothing keeps a second writer away", file)
        except BaseException:
            os.close(self._fd)
            raise

    def read_into(self, offset: int, view: memoryview) -> None:
        done = os.preadv(self._fd, (view,), offset)
        while done < len(view):
            got = os.preadv(self._fd, (view[done:],), offset + done)
            if got == 0:
                # the padding behind the end, or a file that somebody has truncated
                if offset + done < self._stored:
                    raise OSError(errno.EIO, f"{self.file}: is shorter than it was")
                view[done:] = bytes(len(view) - done)
                return
            done += got

    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        flags = os.RWF_DSYNC if fua else 0
        done = os.pwritev(self._fd, (data,), offset, flags)
        if done < len(data):
            rest = memoryview(data)
            while done < len(rest):
                done += os.pwritev(self._fd, (rest[done:],), offset + done, flags)

    def direct(self) -> Direct | None:
        return DirectFile(self._fd, READ_ONLY if self.read_only else self.judged_below)

    def flush(self) -> None:
        if not self.read_only:
            os.fdatasync(self._fd)

    def trim(self, offset: int, length: int) -> None:
        try:
            _fallocate(self._fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise

    def write_zeroes(self, offset: int, length: int, unmap: bool, fast: bool, fua: bool = False) -> None:
        mode = (FALLOC_FL_PUNCH_HOLE if unmap else FALLOC_FL_ZERO_RANGE) | FALLOC_FL_KEEP_SIZE
        try:
            _fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or fast:
                raise
            end = offset + length
            while offset < end:
                piece = min(end - offset, len(_ZEROES))
                self.write(offset, _ZEROES[:piece])
                offset += piece
        if fua:
            self.flush()

    def copy_to(self, target: RawImage, offset: int, length: int) -> int:
        """Let the kernel copy bytes to the same place in another image; how many it did. OSError where it
        cannot, among others EXDEV and EOPNOTSUPP."""
        done = os.copy_file_range(self._fd, target._fd, length, offset, offset)
        if not done and offset < self._stored:
            raise OSError(errno.EIO, f"{self.file}: is shorter than it was")
        return done or length  # the padding

    def prefetch(self, offset: int, length: int) -> None:
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        end = offset + length
        while offset < end:
            data = min(self._seek(offset, os.SEEK_DATA, end), end)
            if data > offset:
                yield Extent(data - offset, hole=True, zero=True)
            if data < end:
                hole = min(self._seek(data, os.SEEK_HOLE, end), end)
                yield Extent(hole - data, hole=False, zero=False)
                data = hole
            offset = data

    def _seek(self, offset: int, whence: int, end: int) -> int:
        """The next data or hole; ``end`` when there is none (a hole reaches to the end of the file)."""
        try:
            return os.lseek(self._fd, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end
            if error.errno == errno.EINVAL:  # a device that does not know: all of it is data
                return offset if whence == os.SEEK_DATA else end
            raise

    def resize(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        self._stored = self.size = size

    def close(self) -> None:
        os.close(self._fd)


def _stored_size(fd: int, file: str) -> int:
    """Bytes in the file or block device."""
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            kind = "a directory" if stat.S_ISDIR(mode) else "no file and no block device"
            raise BlockError(f"{file}: is {kind}", errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL)
        size = os.lseek(fd, 0, os.SEEK_END)
        if size:
            os.pread(fd, 1, 0)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise BlockError(f"{file}: cannot be read: {reason}", error.errno or errno.EIO) from None
    return size
