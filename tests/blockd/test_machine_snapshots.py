"""Snapshots of several images at once with a machine's state: all or none, whatever fails or is killed, and
QEMU's tools find no fault."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from blockd import files
from blockd.export import ExportTable
from blockd.hostfile import HostFile
from blockd.lease.manager import LeasedExports
from blockd.lease.record import Owner
from blockd.machine_snapshots import MachineSnapshots
from blockd.opening import open_qcow2
from blockd.qcow2 import snapshots
from coordinator.contract import messages
from coordinator.contract.config import Export, LeasePolicy
from coordinator.contract.errors import BlockError
from tests.blockd.qcow2.conftest import tmp_path
from tests.blockd.qcow2.crashing import no_corruption
from tests.blockd.qcow2.support import make, qemu_check, read
from tests.support.tools import run_tool

__all__ = ["tmp_path"]

SIZE = 1 << 20
#: (cluster size, version, refcount bits), more of the image, bytes of state: less than a cluster, none behind
#: the last one, several L2 tables
KINDS: list[tuple[tuple[int, int, int], dict[str, Any], int]] = [
    ((65536, 3, 16), {}, 5 << 20),
    ((65536, 3, 16), {"extended_l2": True}, (5 << 20) + 1),
    ((4096, 2, 16), {}, (6 << 20) + 77),
    ((512, 3, 8), {}, 300_001),
    ((1 << 21, 3, 64), {}, 9 << 20),
    ((16384, 3, 16), {"extended_l2": True}, 16384),
]
IMAGES = ("a", "b", "c")
CHANGES = ("write", "zero", "resize", "sync")


class Daemon:
    """Three exports under leases, and what the coordinator does."""

    def __init__(self, folder: Path, shape: tuple[int, int, int] = (4096, 3, 16), **more: Any) -> None:
        self.folder = folder
        self.files = {name: str(folder / f"{name}.qcow2") for name in IMAGES}
        for file in self.files.values():
            if not os.path.exists(file):
                make(Path(file), SIZE, shape, **more)
        self.exports = LeasedExports(ExportTable(), Owner("00000000-0000-0000-0000-000000000001", "vm"))
        self.exports.open_all(
            [Export(name, file, format="qcow2", lease=LeasePolicy.TAKE) for name, file in self.files.items()]
        )
        self.snapshots = MachineSnapshots(self.exports)

    def close(self) -> None:
        self.snapshots.close()
        assert self.exports.close_all() == []

    def write(self, text: bytes) -> None:
        for name in IMAGES:
            self.exports.table.named(name).image.write(30_000, disk(name, text)[30_000:50_000])

    def disks(self) -> dict[str, bytes]:
        return {name: read(self.exports.table.named(name).image) for name in IMAGES}

    @contextlib.contextmanager
    def peer(self, work: Callable[[socket.socket], object]) -> Iterator[str]:
        """What the coordinator does at its end of the connection."""
        path = str(self.folder / "state")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()

            def accept() -> None:
                with contextlib.suppress(OSError):
                    sock, _ = listener.accept()
                    with sock:
                        work(sock)

            thread = threading.Thread(target=accept)
            thread.start()
            try:
                yield path
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join()
                os.unlink(path)

    def store(self, state: bytes) -> None:
        with self.peer(lambda sock: sock.sendall(state)) as path:
            assert self.snapshots.store("b", path) == len(state)

    def create(self, tag: str, replace: bool = False) -> None:
        command = messages.CreateSnapshots(
            serial=1, tag=tag, images=IMAGES, vmstate="b", date_ns=1_700_000_000_000_000_001,
            clock_ns=5_250_000_000, replace=replace,
        )  # fmt: skip
        self.snapshots.table()[messages.CreateSnapshots](command)

    def fetch(self, tag: str) -> bytes:
        found = bytearray()

        def take(sock: socket.socket) -> None:
            while piece := sock.recv(1 << 20):
                found.extend(piece)

        with self.peer(take) as path:
            size = self.snapshots.fetch("b", tag, path)
            sending = self.snapshots._sending
            assert sending is not None
            sending[0].join()
        assert len(found) == size
        return bytes(found)

    def names(self) -> dict[str, list[str]]:
        return {row["id"]: [each["name"] for each in row["snapshots"]] for row in self.snapshots.query()}


def disk(name: str, text: bytes) -> bytes:
    content = bytearray(SIZE)
    content[30_000:50_000] = (name.encode() + text).ljust(20, b".") * 1000
    return bytes(content)


def listed(file: str) -> list[str]:
    told = run_tool("qemu-img", "snapshot", "-l", file).splitlines()[2:]
    return [line[10:27].strip() for line in told]


# ---- content --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("shape", "more", "size"), KINDS)
def test_a_state_is_kept_and_disks_go_back(
    tmp_path: Path, shape: tuple[int, int, int], more: dict[str, Any], size: int
) -> None:
    state = random.Random(size).randbytes(1 << 16) * (size // (1 << 16) + 1)
    state = state[:size]
    daemon = Daemon(tmp_path, shape, **more)
    daemon.write(b"old")
    daemon.store(state)
    daemon.create("one")
    daemon.write(b"new")
    daemon.store(state[::-1])
    daemon.create("two")
    assert daemon.fetch("one") == state
    assert daemon.fetch("two") == state[::-1]
    daemon.snapshots.apply("one", IMAGES)
    assert daemon.disks() == {name: disk(name, b"old") for name in IMAGES}
    daemon.write(b"later")
    assert daemon.fetch("one") == state
    rows = {row["id"]: row for row in daemon.snapshots.query()}
    assert [each["size"] for each in rows["b"]["snapshots"]] == [size, size]
    assert [each["size"] for each in rows["a"]["snapshots"]] == [0, 0]
    assert {row["refusal"] for row in rows.values()} == {None}
    daemon.close()
    for name, file in daemon.files.items():
        qemu_check(file)
        assert listed(file) == ["one", "two"]
        for tag, text in (("one", b"old"), ("two", b"new")):
            plain = tmp_path / "plain"
            run_tool("qemu-img", "convert", "-l", f"snapshot.name={tag}", "-O", "raw", file, str(plain))
            assert plain.read_bytes() == disk(name, text)
    file = daemon.files["b"]
    assert "00:00:05.250" in run_tool("qemu-img", "snapshot", "-l", file)
    run_tool("qemu-img", "snapshot", "-d", "one", file)
    qemu_check(file)
    run_tool("qemu-img", "snapshot", "-a", "two", file)
    qemu_check(file)
    again = Daemon(tmp_path)
    assert again.fetch("two") == state[::-1]
    again.snapshots.delete("two", IMAGES)
    again.snapshots.delete("one", IMAGES)  # which "b" has no more
    assert again.names() == {name: [] for name in IMAGES}
    again.close()
    for file in daemon.files.values():
        qemu_check(file)


def test_a_disk_that_grows_over_a_state_is_zero_there(tmp_path: Path) -> None:
    """QEMU leaves the state behind the active disk when it applies a snapshot."""
    daemon = Daemon(tmp_path)
    daemon.store(b"secret" * 100_000)
    daemon.create("one")
    daemon.close()
    file = daemon.files["b"]
    run_tool("qemu-img", "snapshot", "-a", "one", file)
    image = open_qcow2(file)
    image.resize(64 << 20)
    assert not any(read(image, SIZE))
    image.close()
    qemu_check(file)


def test_a_snapshot_makes_room_for_one_of_its_name(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    for text in (b"first", b"second"):
        daemon.write(text)
        daemon.store(text)
        daemon.create("tag", replace=True)
    assert daemon.names() == {name: ["tag"] for name in IMAGES}
    assert daemon.fetch("tag") == b"second"
    daemon.write(b"third")
    daemon.snapshots.apply("tag", IMAGES)
    assert daemon.disks() == {name: disk(name, b"second") for name in IMAGES}
    daemon.close()
    for file in daemon.files.values():
        qemu_check(file)


# ---- refusals -------------------------------------------------------------------------------------------
def test_what_cannot_is_refused_by_name(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    raw = tmp_path / "d.img"
    raw.write_bytes(bytes(SIZE))
    free = make(tmp_path / "e.qcow2", SIZE)
    wide = str(tmp_path / "f.qcow2")
    data = f"data_file={tmp_path / 'f.data'}"
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", data, wide, str(SIZE))
    exports = [
        Export("d", str(raw), lease=LeasePolicy.TAKE),
        Export("e", free, format="qcow2"),
        Export("f", wide, format="qcow2", lease=LeasePolicy.TAKE),
    ]
    daemon.exports.open_all(exports)
    refusals = {row["id"]: row["refusal"] for row in daemon.snapshots.query(["d", "e", "f"])}
    assert refusals == {
        "d": f"{raw}: a raw image has no snapshots",
        "e": f"{free}: is not written under a lease",
        "f": f"{wide}: has an external data file, so it can have no snapshots",
    }
    daemon.store(b"state")
    for name, why in refusals.items():
        command = messages.CreateSnapshots(
            serial=1, tag="x", images=(*IMAGES, name), vmstate="b", date_ns=0, clock_ns=0
        )
        daemon.store(b"state")
        with pytest.raises(BlockError) as caught:
            daemon.snapshots.table()[messages.CreateSnapshots](command)
        assert str(caught.value) == why
    with pytest.raises(BlockError, match="no machine state has been stored in b"):
        daemon.create("x")
    with pytest.raises(BlockError, match="there is no snapshot 'x'"):
        daemon.snapshots.apply("x", IMAGES)
    with pytest.raises(BlockError, match="there is no snapshot 'x'"):
        daemon.fetch("x")
    assert daemon.names() == {name: [] for name in (*IMAGES, "d", "e", "f")}
    daemon.close()
    for file in daemon.files.values():
        qemu_check(file)


def test_narrow_refcounts_take_all_back(tmp_path: Path) -> None:
    """Refcounts of one bit cannot count a second reference."""
    make(tmp_path / "c.qcow2", SIZE, (4096, 3, 1))
    daemon = Daemon(tmp_path)
    daemon.write(b"old")
    daemon.store(b"state")
    with pytest.raises(BlockError, match=r"c\.qcow2: refcounts of 1 bits are too narrow"):
        daemon.create("x")
    assert daemon.names() == {name: [] for name in IMAGES}
    daemon.close()
    for file in daemon.files.values():
        qemu_check(file)


def test_without_its_lease_nothing_is_changed(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.store(b"state")
    run_tool("rm", *[str(path) for path in tmp_path.iterdir() if path.name.startswith("a.qcow2.lease")])
    with pytest.raises(BlockError, match="lease"):
        daemon.create("x")
    assert daemon.names() == {name: [] for name in IMAGES}
    daemon.snapshots.close()
    daemon.exports.close_all()
    for file in daemon.files.values():
        qemu_check(file, leaks_allowed=True)


@pytest.mark.parametrize("size", [1 << 62, (1 << 64) - 1])
def test_a_state_that_cannot_be_there(tmp_path: Path, size: int) -> None:
    daemon = Daemon(tmp_path)
    daemon.store(b"state")
    daemon.create("x")
    daemon.close()
    data = bytearray(Path(daemon.files["b"]).read_bytes())
    at = int.from_bytes(data[64:72], "big") + 40  # "Snapshots": extra data, size of the VM state
    data[at : at + 8] = size.to_bytes(8, "big")
    Path(daemon.files["b"]).write_bytes(data)
    daemon = Daemon(tmp_path)
    with pytest.raises(BlockError, match="is not there"):
        daemon.fetch("x")
    daemon.close()


# ---- faults ---------------------------------------------------------------------------------------------
class Faulty(HostFile):
    """Any image's file; a change fails when it is its turn."""

    left: int | None = None

    def _turn(self) -> None:
        if Faulty.left is not None:
            Faulty.left -= 1
            if Faulty.left == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, offset: int, data: Any) -> None:
        self._turn()
        super().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        self._turn()
        super().zero(offset, length)

    def resize(self, size: int) -> None:
        self._turn()
        super().resize(size)


def prepared(folder: Path) -> Daemon:
    """One whole snapshot, disks that have gone on since."""
    daemon = Daemon(folder)
    daemon.write(b"old")
    daemon.store(b"state" * 2000)
    daemon.create("one")
    daemon.write(b"new")
    return daemon


def _save(daemon: Daemon) -> None:
    daemon.store(b"STATE" * 2000)
    daemon.create("two")


def _replace(daemon: Daemon) -> None:
    daemon.store(b"STATE" * 2000)
    daemon.create("one", replace=True)


WORK: dict[str, Callable[[Daemon], None]] = {
    "create": _save,
    "replace": _replace,
    "apply": lambda daemon: daemon.snapshots.apply("one", IMAGES),
    "delete": lambda daemon: daemon.snapshots.delete("one", IMAGES),
}


@pytest.mark.parametrize("what", WORK)
def test_a_change_that_fails_takes_all_back(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "HostFile", Faulty)
    failed = 0
    for turn in itertools.count():
        folder = tmp_path / str(turn)
        folder.mkdir()
        daemon = prepared(folder)
        before = daemon.names(), daemon.disks(), daemon.fetch("one")
        Faulty.left = turn
        try:
            WORK[what](daemon)
        except BlockError as error:
            assert str(folder) in str(error)
            Faulty.left = None
            assert (daemon.names(), daemon.disks(), daemon.fetch("one")) == before
            failed += 1
        done, Faulty.left = Faulty.left is not None and Faulty.left >= 0, None
        daemon.write(b"more")
        daemon.close()
        for file in daemon.files.values():
            qemu_check(file, leaks_allowed=True)
        if done:
            break
    assert failed > 10


# ---- kills ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", WORK)
def test_killed_at_each_change(tmp_path: Path, what: str) -> None:
    """Each disk is whole, and a state is never listed without the disks that belong to it."""
    pristine = tmp_path / "pristine"
    pristine.mkdir()
    daemon = prepared(pristine)
    daemon.close()
    seen = set()
    for turn in itertools.count():
        folder = tmp_path / str(turn)
        shutil.copytree(pristine, folder)
        killed = _killed(folder, what, turn)
        states = []
        for name in IMAGES:
            file = str(folder / f"{name}.qcow2")
            no_corruption(file)
            states.append(content_of(file, name))
        new = {"create": "two", "replace": "one", "delete": "one"}.get(what)
        if new is not None and new in states[1][0]:  # "b" has the machine's state
            assert all(new in tags for tags, _ in states)
        if tuple(states) not in seen:
            for name in IMAGES:
                qemu_check(str(folder / f"{name}.qcow2"), leaks_allowed=True)
        seen.add(tuple(states))
        if not killed:
            break
    assert len(seen) > 1 + (what == "apply") or what == "replace"


def content_of(file: str, name: str) -> tuple[tuple[str, ...], bytes]:
    """The tags of an image's snapshots, and which of the two contents it has."""
    image = open_qcow2(file, read_only=True, locked=False)
    try:
        tags = tuple(each.name for each in snapshots.load(image.host, image.header))
        found = read(image)
    finally:
        image.close()
    return tags, next(text for text in (b"old", b"new") if found == disk(name, text))


def _killed(folder: Path, what: str, turn: int) -> bool:
    """Does the work in a process that ends by SIGKILL at its change number ``turn``."""
    pid = os.fork()
    if pid == 0:
        try:
            daemon = Daemon(folder)
            counter = itertools.count()
            for name in CHANGES:
                setattr(HostFile, name, _deadly(getattr(HostFile, name), counter, turn))
            WORK[what](daemon)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def _deadly(method: Callable[..., None], counter: itertools.count[int], last: int) -> Callable[..., None]:
    def wrapped(file: HostFile, *arguments: Any) -> None:
        if next(counter) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        method(file, *arguments)

    return wrapped
