"""Processes on several hosts, played in one: each has a name, a life, and file operations that can stop.

What a process knows of itself and of others comes from the operating system; here from ``Actor`` and
``World``. Everything else is the real code on real files: an actor that is killed gets no further than the
file operation before which it was killed, and the kernel takes its locks.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blockd import locks
from blockd.export import ExportTable
from blockd.export_image import open_image
from blockd.image import Image
from blockd.lease import host, judge, lease, manager
from blockd.lease.lease import Lease
from blockd.lease.manager import LeasedExports
from blockd.lease.record import Identity, Owner
from blockd.lease.slot import Slot
from blockd.lease.transfer import Destination, Source
from coordinator.contract.config import Export, LeasePolicy
from coordinator.contract.durable import Folder

SIZE = 4096
TAKE, BREAK, AWAIT = LeasePolicy.TAKE, LeasePolicy.BREAK, LeasePolicy.AWAIT
_now = threading.local()


class Killed(BaseException):
    """SIGKILL has come: nothing of the actor runs any more."""


class Actor:
    """A block daemon on a host."""

    def __init__(self, world: World, machine: str, vm: str = "vm") -> None:
        self.world = world
        self.machine = machine
        self.boot = world.boots[machine]
        world.pids += 1
        self.pid = world.pids
        self.alive = True
        self.held: set[str] = set()
        #: open ones
        self.images: list[Image] = []
        #: all that it has had
        self.leases: list[Lease] = []
        #: called with the name of each file operation before it is done
        self.before: Callable[[str], None] = lambda step: None
        self.exports = LeasedExports(ExportTable(), Owner("00000000-0000-0000-0000-000000000001", vm), Steps)
        self.source = Source(self.exports)
        self.destination = Destination(self.exports)
        world.actors.append(self)

    def identity(self) -> Identity:
        return Identity(self.machine, self.machine + "-id", self.boot, 1, self.pid, self.pid * 10)

    def do(self, what: Callable[[], Any], kill_before: int | None = None) -> Any:
        """Run something as this actor; ``kill_before``: the file operation that it does not live to see."""
        assert self.alive
        left = kill_before

        def count(step: str) -> None:
            nonlocal left
            if left is not None:
                if left == 0:
                    self.alive = False
                    raise Killed
                left -= 1

        before, self.before = self.before, count if kill_before is not None else self.before
        try:
            with self.acting():
                return what()
        except Killed:
            self.bury()
            raise
        finally:
            self.before = before

    @contextmanager
    def acting(self) -> Iterator[None]:
        outer, _now.actor = getattr(_now, "actor", None), self
        try:
            yield
        finally:
            _now.actor = outer

    def open(self, files: dict[str, str], policy: LeasePolicy = TAKE) -> list[Any]:
        return self.exports.open_all([Export(i, f, lease=policy) for i, f in files.items()])

    def kill(self) -> None:
        self.alive = False
        self.bury()

    def bury(self) -> None:
        """The kernel closes a dead process's files."""
        for image in list(self.images):
            image.close()
        with self.acting():
            for lease in self.leases:
                lease.pass_on()
        self.leases.clear()
        self.exports.table = ExportTable()

    def writes(self, ident: str) -> bool:
        """Would a client's write be done now?"""
        export = self.exports.table.find(ident) if self.alive else None
        if export is None or not ident:
            return False
        try:
            self.do(lambda: export.image.write(0, b"w" * 512))
        except OSError:
            return False
        return True


class World:
    """Hosts that share a folder. ``locking``: "shared" OFD locks reach all hosts, "local" ones only their
    own, "none" is a file system without."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, locking: str = "shared") -> None:
        self.boots = {"one": "boot-one-1", "two": "boot-two-1"}
        self.actors: list[Actor] = []
        self.pids = 100
        self.locking = locking
        real_lock = locks._lock

        def lock(fd: int, file: str, writable: bool) -> bool:
            if self.locking == "none":
                return False
            if self.locking == "local":
                base = 1000 * (1 + sorted(self.boots).index(current().machine))
                monkeypatch.setattr(locks, "HELD_BASE", base + 100)
                monkeypatch.setattr(locks, "UNSHARED_BASE", base + 200)
            return real_lock(fd, file, writable)

        def started(pid: int) -> int | None:
            return next((a.pid * 10 for a in self.actors if a.pid == pid and a.alive), None)

        def opened(wanted: Export) -> Image:
            image, images = open_image(wanted), current().images
            close = image.close

            def closed() -> None:
                images.remove(image)
                close()

            image.close = closed  # type: ignore[method-assign]
            images.append(image)
            return image

        make_lease = Lease.__init__

        def made(lease: Lease, *arguments: Any) -> None:
            make_lease(lease, *arguments)
            current().leases.append(lease)

        monkeypatch.setattr(Lease, "__init__", made)
        monkeypatch.setattr(manager, "open_image", opened)
        monkeypatch.setattr(locks, "_lock", lock)
        monkeypatch.setattr(host, "this_process", lambda: current().identity())
        monkeypatch.setattr(host, "started", started)
        for module in (judge, lease):
            monkeypatch.setattr(module, "held", _Held())

    def reboot(self, machine: str) -> None:
        for actor in self.actors:
            if actor.machine == machine and actor.alive:
                actor.kill()
        self.boots[machine] += "+"

    def end(self) -> None:
        """All are killed, and forgotten."""
        for actor in self.actors:
            actor.kill()
        self.actors.clear()

    def writers(self, ident: str) -> list[Actor]:
        return [actor for actor in self.actors if actor.writes(ident)]


@contextmanager
def hosts(locking: str) -> Iterator[tuple[World, Path]]:
    """A world and the folder that it shares, for a test that makes many."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=memory) as folder:
        world = World(patch, locking)
        try:
            yield world, Path(folder)
        finally:
            world.end()


def current() -> Actor:
    actor: Actor = _now.actor
    return actor


class _Held:
    """``judge.held`` of whoever acts."""

    def add(self, token: str) -> None:
        current().held.add(token)

    def discard(self, token: str) -> None:
        current().held.discard(token)

    def __contains__(self, token: str) -> bool:
        return token in current().held


class Steps(Folder):
    """Each file operation asks its actor first."""

    def names(self) -> list[str]:
        return _stepped("names", lambda: super(Steps, self).names())

    def read(self, name: str) -> bytes | None:
        return _stepped("read", lambda: super(Steps, self).read(name))

    def draft(self, data: bytes) -> Any:
        return _stepped("draft", lambda: super(Steps, self).draft(data))

    def publish(self, draft: Any, name: str) -> None:
        return _stepped("publish", lambda: super(Steps, self).publish(draft, name))

    def remove(self, name: str) -> None:
        return _stepped("remove", lambda: super(Steps, self).remove(name))

    def sync(self) -> None:
        return _stepped("sync", lambda: super(Steps, self).sync())


def _stepped(step: str, operation: Callable[[], Any]) -> Any:
    actor = current()
    if not actor.alive:
        raise Killed
    actor.before(step)
    if not actor.alive:
        raise Killed
    return operation()


def make_files(folder: Path, *names: str) -> dict[str, str]:
    files = {}
    for name in names:
        path = folder / f"{name} disk.img"
        path.write_bytes(bytes(SIZE))
        files[name] = str(path)
    return files


def litter(folder: Path) -> list[str]:
    """What lies beside the images."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".img"))


def top(file: str) -> Any:
    """The record that counts."""
    return Slot(file).look()[-1].record
