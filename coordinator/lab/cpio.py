"""Writes a cpio archive in the "newc" format, which the Linux kernel unpacks as its initramfs.

Format: kernel documentation, driver-api/early-userspace/buffer-format.
"""

import stat
from dataclasses import dataclass, field

MAGIC = b"070701"
TRAILER = "TRAILER!!!"


@dataclass
class Archive:
    """Entries in the order in which the kernel shall create them (folders before their files)."""

    _parts: list[bytes] = field(default_factory=list)
    _folders: set[str] = field(default_factory=set)
    _inode: int = 0

    def folder(self, path: str) -> None:
        """Adds a folder and those above it, unless there already."""
        if not path or path in self._folders:
            return
        self.folder(path.rpartition("/")[0])
        self._folders.add(path)
        self._entry(path, stat.S_IFDIR | 0o755)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Adds a regular file, owned by root."""
        self.folder(path.rpartition("/")[0])
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Adds a symbolic link."""
        self.folder(path.rpartition("/")[0])
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int) -> None:
        """Adds a character device."""
        self.folder(path.rpartition("/")[0])
        self._entry(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive; nothing may be added afterwards."""
        self._entry(TRAILER, 0)
        return b"".join(self._parts)

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        encoded = name.encode() + b"\0"
        numbers = (
            self._inode, mode, 0, 0, links, 0, len(data),  # inode, mode, uid, gid, nlink, mtime, filesize
            0, 0, *device, len(encoded), 0,                # dev, rdev, namesize (with its NUL), check
        )
        header = MAGIC + b"".join(b"%08X" % number for number in numbers)
        self._parts.append(_padded(header + encoded) + _padded(data))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
