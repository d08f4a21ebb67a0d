"""Loss of power, replayed: a log of all that was done to files, and files as a disk may then have them.

What was written to a file is on the disk for certain once a sync has ended that began afterwards. Of
what came later, any sectors may be there, in any order.
"""

from __future__ import annotations

import random
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from blockd.batch import Batch, Direct
from blockd.hostfile import HostFile
from blockd.opening import open_below
from blockd.qcow2.image import Qcow2Image

SECTOR = 512


class Entry(NamedTuple):
    kind: str
    file: str
    offset: int
    #: what was written, or how many bytes were zeroed; for a sync, the length of the log as it began
    what: bytes | int


@dataclass
class PowerLog:
    """Opens files whose changes it keeps. ``deaf`` names functions whose syncs are not to count ("*" for
    all of them); ``late`` those whose syncs come behind the write that follows them."""

    deaf: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    entries: list[Entry] = field(default_factory=list)
    #: lengths of the log where a sync was left out or put off
    spoilt: list[int] = field(default_factory=list)
    #: functions that have called for a sync
    callers: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    postponed: Entry | None = None

    def open(self, file: str, read_only: bool) -> HostFile:
        return _LoggedFile(file, read_only, self)

    def add(self, entry: Entry) -> None:
        with self.lock:
            self.entries.append(entry)
            if self.postponed is not None and entry.kind != "sync":
                self.entries.append(self.postponed)
                self.postponed = None

    def __len__(self) -> int:
        with self.lock:
            return len(self.entries)

    def lose(self, moment: int, files: dict[str, bytes], rnd: random.Random) -> dict[str, bytearray]:
        """The files as the disk may have them when power goes at that length of the log."""
        result = {name: bytearray(data) for name, data in files.items()}
        done = self.entries[:moment]
        for name, data in result.items():
            mine = [(number, entry) for number, entry in enumerate(done) if entry.file == name]
            durable = max((int(e.what) for _, e in mine if e.kind == "sync"), default=0)
            for number, entry in mine:
                _apply(data, entry, None if number < durable else rnd)
        return result


class _LoggedFile(HostFile):
    def __init__(self, file: str, read_only: bool, log: PowerLog) -> None:
        super().__init__(file, read_only)
        self._log = log
        self._name = Path(file).name

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().write(offset, data)
        self._log.add(Entry("write", self._name, offset, bytes(data)))

    def zero(self, offset: int, length: int) -> None:
        super().zero(offset, length)
        self._log.add(Entry("zero", self._name, offset, length))

    def resize(self, size: int) -> None:
        super().resize(size)
        self._log.add(Entry("resize", self._name, size, 0))

    def sync(self) -> None:
        begin = len(self._log)
        super().sync()
        caller = sys._getframe(1).f_code.co_name
        self._log.callers.add(caller)
        entry = Entry("sync", self._name, 0, begin)
        if caller in self._log.late:
            self._log.postponed = entry
            self._log.spoilt.append(begin)
        elif self._log.deaf & {"*", caller}:
            self._log.spoilt.append(begin)
        else:
            self._log.add(entry)


class LoggedImage(Qcow2Image):
    """An image whose short way for plain requests is logged, too."""

    def __init__(self, file: str, log: PowerLog) -> None:
        self._log = log
        super().__init__(file, open_file=log.open, open_below=open_below)

    def direct(self) -> Direct | None:
        inner = super().direct()
        return None if inner is None else _LoggedDirect(self, inner, self._log)


class _LoggedDirect:
    def __init__(self, image: Qcow2Image, inner: Direct, log: PowerLog) -> None:
        self._image, self._inner, self._log = image, inner, log

    def serve(self, batch: Batch) -> None:
        self._inner.serve(batch)
        data, c, segment = self._image.data, batch.c, 0
        for number in range(c.done):
            for _ in range(c.requests[number].segments):
                where = c.segments[segment]
                segment += 1
                if c.requests[number].writes:
                    # read back: nobody else writes there, and what was sent twice is there the last time
                    content = data.read(where.host, where.length)
                    self._log.add(Entry("write", Path(data.file).name, where.host, content))


def _apply(data: bytearray, entry: Entry, rnd: random.Random | None) -> None:
    """One change to the file as it is on the disk; with ``rnd``, some of its sectors are lost."""
    kind, _, offset, what = entry
    if kind == "sync":
        return
    if kind == "resize":
        if rnd is None or rnd.random() < 0.5:
            del data[offset:]
            data.extend(bytes(offset - len(data)))
        return
    content = what if isinstance(what, bytes) else bytes(min(what, max(0, len(data) - offset)))
    if len(data) < offset + len(content):
        data.extend(bytes(offset + len(content) - len(data)))
    if rnd is None:
        data[offset : offset + len(content)] = content
        return
    chance = rnd.choice([0.1, 0.5, 0.9])
    at = 0
    while at < len(content):
        stop = min(len(content), at + SECTOR - (offset + at) % SECTOR)
        if rnd.random() < chance:
            data[offset + at : offset + stop] = content[at:stop]
        at = stop
