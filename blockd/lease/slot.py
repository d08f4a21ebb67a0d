"""The lease records beside one image, ``IMAGE.lease-SERIAL``: the highest serial number counts.

Change is compare-and-swap, without locks. To follow record V one makes V+1 exclusively (durable.py), then
looks whether V is still there, unchanged, and only then removes V; else one takes V+1 back. As V is removed
before anything that follows V+1 can take V+1 away, a V that is still there after V+1 has been made proves
that no other V+1 has ever been in force. A process that stops anywhere leaves V, or V+1, or both, and
each one that it finds keeps the next process away until its holder is proven dead.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from typing import NamedTuple

from blockd.lease.record import Record, decode, encode
from coordinator.contract.durable import Folder

log = logging.getLogger(__name__)

SUFFIX = ".lease-"


class Raced(Exception):
    """Another process has changed the lease; look again."""


class Found(NamedTuple):
    """One record on the disk; ``record`` is None when it cannot be understood."""

    serial: int
    data: bytes
    record: Record | None


class Slot:
    """Where the lease of an image lies: beside the file itself, whatever symbolic links lead to it."""

    def __init__(self, image: str, folder_type: type[Folder] = Folder) -> None:
        self.image = os.path.realpath(image)
        self.folder = folder_type(os.path.dirname(self.image))
        self._base = os.path.basename(self.image) + SUFFIX
        self._pattern = re.compile(re.escape(self._base) + r"([1-9]\d{0,17})")

    def name(self, serial: int) -> str:
        return f"{self._base}{serial}"

    def path(self, serial: int) -> str:
        return self.folder.of(self.name(serial))

    def look(self) -> tuple[Found, ...]:
        """All records, the one that counts last; OSError."""
        found = []
        for name in self.folder.names():
            if match := self._pattern.fullmatch(name):
                data = self.folder.read(name)
                if data is not None:
                    found.append(Found(int(match[1]), data, decode(data)))
        return tuple(sorted(found))

    def advance(self, seen: tuple[Found, ...], record: Record) -> None:
        """Let ``record`` follow what was seen. Raced, or an OSError: the lease is what it was."""
        mine = Found(record.serial, encode(record), record)
        try:
            made = self.folder.create(self.name(mine.serial), mine.data)
        except OSError:
            self.take_back(mine)
            raise
        if not made:
            raise Raced
        try:
            now = self.look()
            if not _follows(mine, seen, now):
                raise Raced
            for old in seen:
                self.folder.remove(self.name(old.serial))
        except (OSError, Raced):
            self.take_back(mine)
            raise
        self._settle()

    def take_back(self, mine: Found) -> None:
        """Remove a record of ours, if it is there."""
        try:
            if self.folder.read(self.name(mine.serial)) == mine.data:
                self.folder.remove(self.name(mine.serial))
        except OSError as error:
            log.error("%s: cannot be removed: %s", self.path(mine.serial), error.strerror)
            return
        self._settle()

    def _settle(self) -> None:
        """What was removed and comes back after a loss of power has a dead holder, or a lower number."""
        try:
            self.folder.sync()
        except OSError as error:
            log.warning("%s: %s", self.folder.path, error.strerror)

    def aliases(self) -> tuple[list[str], int]:
        """Other names of the image in its folder, and how many it has elsewhere."""
        status = os.stat(self.image)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink < 2:
            return [], 0
        others = []
        for entry in os.scandir(self.folder.path):
            if entry.path != self.image and entry.inode() == status.st_ino:
                other = entry.stat(follow_symlinks=False)
                if (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino):
                    others.append(entry.path)
        return others, status.st_nlink - 1 - len(others)


def _follows(mine: Found, seen: tuple[Found, ...], now: tuple[Found, ...]) -> bool:
    others = [found for found in now if found.serial != mine.serial]
    if mine not in now or any(found not in seen for found in others):
        return False
    return not seen or seen[-1] in others
