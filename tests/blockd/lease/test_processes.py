"""Leases of real processes: block daemons with clients, and processes that are killed at each step."""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from blockd.export import ExportTable
from blockd.img import main as img
from blockd.lease.manager import LeasedExports
from blockd.lease.record import Owner
from blockd.lease.transfer import Destination, Source
from coordinator.contract import messages
from coordinator.contract.config import Export, LeasePolicy, nbd_socket
from coordinator.contract.durable import Folder
from coordinator.contract.errors import BlockError
from devhost.block_backend import NbdBackend
from devhost.block_client import BlockClient
from tests.blockd.lease.support import AWAIT, BREAK, TAKE, litter, make_files, top
from tests.blockd.qcow2.support import make, qemu_check, qemu_reads
from tests.blockd.test_process import SECONDS, Coordinator, Island, connected, read

MIB = 1 << 20


class Daemon:
    """A block daemon in the name of ``vm-1``, with its coordinator."""

    def __init__(self, runtime: Path, *exports: Export) -> None:
        runtime.mkdir()
        self.runtime = runtime
        self.coordinator = Coordinator(runtime)
        self.island = Island(runtime, *exports)
        self.hello = self.coordinator.notice()

    def ask(self, kind: type[messages.Command], **fields: Any) -> Any:
        answer = self.coordinator.ask(kind, **fields)
        assert answer.error is None, answer.error
        return answer.value

    def refuses(self, kind: type[messages.Command], **fields: Any) -> str:
        answer = self.coordinator.ask(kind, **fields)
        assert answer.error is not None and "\n" not in answer.error
        return answer.error

    def end(self) -> None:
        self.ask(messages.Quit)
        assert self.island.end() == 0

    def close(self) -> None:
        self.island.process.kill()
        self.island.end()
        self.coordinator.close()


@pytest.fixture
def daemons(runtime: Path) -> Iterator[list[Daemon]]:
    started: list[Daemon] = []
    yield started
    for daemon in started:
        daemon.close()


def write(client: BlockClient, offset: int, data: bytes) -> int:
    client.write(offset, [memoryview(bytearray(data))])
    return client.drain(SECONDS)[0].errno


def test_a_transfer_between_two_daemons(daemons: list[Daemon], runtime: Path, tmp_path: Path) -> None:
    file = make(tmp_path / "disk.qcow2", 4 * MIB)
    raw = make_files(tmp_path, "x")["x"]

    def exports(lease: LeasePolicy) -> list[Export]:
        return [Export("hd0", file, "qcow2", lease=lease), Export("hd1", raw, lease=lease)]

    source = Daemon(runtime / "s", *exports(TAKE))
    target = Daemon(runtime / "t", *exports(AWAIT))
    daemons += [source, target]
    assert [row["state"] for row in target.ask(messages.QueryLeases)] == ["awaited", "awaited"]
    here, there = connected(source.runtime, "hd0"), connected(target.runtime, "hd0")
    assert (there.read_only, there.size) == (here.read_only, here.size) == (False, 4 * MIB)
    assert write(here, MIB, b"s" * 70000) == 0
    assert write(there, 0, b"t" * 512) == 1  # EPERM
    told = source.ask(messages.PrepareTransfer, transfer="T")
    assert "has not released" in target.refuses(messages.GrantTransfer, transfer="T", epoch=told["epoch"])
    seen = target.ask(messages.CheckTransfer, transfer="T")
    assert {row["token"] for row in seen} == {row["token"] for row in told["images"]}
    source.ask(messages.ReleaseTransfer, transfer="T", epoch=told["epoch"])
    assert "is released" in source.refuses(messages.AbortTransfer, transfer="T")
    granted = target.ask(messages.GrantTransfer, transfer="T", epoch=told["epoch"])
    assert [(row["state"], row["epoch"]) for row in granted] == [("held", 2), ("held", 2)]
    again = connected(target.runtime, "hd0")
    assert read_at(again, MIB, 70000) == b"s" * 70000  # tables were read again
    assert write(again, 3 * MIB, b"t" * 512) == 0
    assert "has no export" in refused(source.runtime, "hd0")
    source.end()
    target.end()
    assert litter(tmp_path) == ["disk.qcow2"]
    qemu_check(file)
    expected = bytearray(4 * MIB)
    expected[MIB : MIB + 70000] = b"s" * 70000
    expected[3 * MIB : 3 * MIB + 512] = b"t" * 512
    qemu_reads(file, bytes(expected), tmp_path)


def read_at(client: BlockClient, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    client.read(offset, [memoryview(buffer)])
    assert [done.errno for done in client.drain(SECONDS)] == [0]
    return bytes(buffer)


def refused(runtime: Path, name: str) -> str:
    client = BlockClient(nbd_socket(str(runtime)), name, wait=lambda seconds: None)
    with pytest.raises(BlockError) as error:
        client.connect(0.1)
    return str(error.value)


def test_abort_and_a_client_that_comes_back(daemons: list[Daemon], runtime: Path, tmp_path: Path) -> None:
    file = make_files(tmp_path, "x")["x"]
    daemon = Daemon(runtime / "s", Export("hd0", file, lease=TAKE))
    daemons.append(daemon)
    client = connected(daemon.runtime, "hd0")
    assert write(client, 0, b"1" * 512) == 0
    daemon.ask(messages.PrepareTransfer, transfer="T")
    daemon.ask(messages.AbortTransfer, transfer="T")
    cookie = client.write(512, [memoryview(bytearray(b"2" * 512))])
    client.reconnect(SECONDS)
    assert [(done.cookie, done.errno) for done in client.drain(SECONDS)] == [(cookie, 0)]
    assert read(client, 1024) == b"1" * 512 + b"2" * 512
    daemon.end()
    assert litter(tmp_path) == []


def test_a_lost_lease_is_told(daemons: list[Daemon], runtime: Path, tmp_path: Path) -> None:
    file = make_files(tmp_path, "x")["x"]
    daemon = Daemon(runtime / "s", Export("hd0", file, lease=TAKE))
    daemons.append(daemon)
    client = connected(daemon.runtime, "hd0")
    (tmp_path / "x disk.img.lease-1").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").unlink()
    assert [write(client, 0, b"1" * 512) for _ in range(2)] == [1, 1]  # EPERM
    told = daemon.coordinator.notice()
    assert isinstance(told, messages.LeaseLost) and told.id == "hd0"
    assert told.error.startswith(f"{file}: the lease is lost (its record was removed)")
    assert daemon.ask(messages.QueryLeases)[0]["state"] == "lost"  # and it is told once


def test_the_device_host_sits_out_a_transfer(
    daemons: list[Daemon], runtime: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection ends while nothing is in flight, which is no news; the next request makes another, or
    fails."""
    caplog.set_level(logging.INFO)
    file = make_files(tmp_path, "x")["x"]
    daemon = Daemon(runtime / "s", Export("hd0", file, lease=TAKE))
    daemons.append(daemon)
    backend = NbdBackend(connected(daemon.runtime, "hd0"))
    done: list[tuple[int, int]] = []
    backend.completed = lambda cookie, number: done.append((cookie, number))

    def until(condition: Callable[[], bool]) -> None:
        while not condition():
            if backend.lost:
                backend.seek()
            else:
                assert select.select([backend.fileno()], [], [], SECONDS)[0], "nothing happens"
                backend.on_readable()

    daemon.ask(messages.PrepareTransfer, transfer="T")
    until(lambda: not backend.connected)
    assert not caplog.messages
    daemon.ask(messages.AbortTransfer, transfer="T")
    cookie = backend.write(0, [memoryview(bytearray(b"2" * 512))])
    assert done == []  # never from inside a request
    until(lambda: bool(done))
    assert done == [(cookie, 0)]
    daemon.ask(messages.PrepareTransfer, transfer="U")
    until(lambda: not backend.connected)
    failing = backend.flush()
    until(lambda: len(done) == 2)
    assert done[1] == (failing, errno.EIO)
    daemon.ask(messages.AbortTransfer, transfer="U")
    last = backend.flush()
    until(lambda: len(done) == 3)
    assert done[2] == (last, 0) and Path(file).read_bytes()[:512] == b"2" * 512
    backend.close()
    daemon.end()


def test_a_daemon_is_refused_and_says_why(daemons: list[Daemon], runtime: Path, tmp_path: Path) -> None:
    files = make_files(tmp_path, "x", "y")
    record = tmp_path / "y disk.img.lease-1"
    record.write_bytes(b"damaged")
    daemon = Daemon(runtime / "s", *(Export(name, file, lease=TAKE) for name, file in files.items()))
    daemons.append(daemon)
    assert isinstance(daemon.hello, messages.Failed)
    assert daemon.hello.error.startswith(f"{files['y']}: its lease {record} is damaged")
    assert daemon.island.end() == 1 and litter(tmp_path) == [record.name]
    good = Daemon(runtime / "g", Export("x", files["x"], lease=TAKE))
    daemons.append(good)
    wanted = (Export("y", files["y"], lease=TAKE),)
    assert "is damaged" in good.refuses(messages.AcquireLeases, exports=wanted)
    record.unlink()
    assert [row["id"] for row in good.ask(messages.AcquireLeases, exports=wanted)] == ["y"]
    assert [row["state"] for row in good.ask(messages.QueryLeases)] == ["held", "held"]
    good.ask(messages.CloseExport, id="y")
    assert litter(tmp_path) == ["x disk.img.lease-1"]
    good.end()


def test_a_daemon_that_was_killed(daemons: list[Daemon], runtime: Path, tmp_path: Path) -> None:
    file = make_files(tmp_path, "x")["x"]
    first = Daemon(runtime / "1", Export("hd0", file, lease=TAKE))
    daemons.append(first)
    first.island.process.kill()
    first.island.end()
    assert litter(tmp_path) == ["x disk.img.lease-1"]
    second = Daemon(runtime / "2", Export("hd0", file, lease=TAKE))
    daemons.append(second)
    assert second.ask(messages.QueryLeases)[0]["epoch"] == 2
    second.end()
    assert litter(tmp_path) == []


def test_the_lease_tool(
    daemons: list[Daemon], runtime: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make_files(tmp_path, "x")["x"]

    def says(*arguments: str, status: int = 0) -> str:
        assert img.run(["lease", *arguments]) == status
        return "".join(capsys.readouterr()).strip()

    assert says(file) == f"{file}: no lease" == says("--break", file)
    assert "none: No such file" in says(f"{file}-none", status=1)
    assert "an export has no lease" in says("nbd://localhost/x", status=1)
    daemon = Daemon(runtime / "1", Export("hd0", file, lease=TAKE))
    daemons.append(daemon)
    assert says(file).startswith(f"{file}: epoch 1, VM 'vm-1' on host ")
    assert "is locked" in says("--break", file, status=1)
    daemon.ask(messages.PrepareTransfer, transfer="T")
    assert says(file).endswith(", being handed over by transfer T")
    daemon.ask(messages.ReleaseTransfer, transfer="T", epoch=1)
    assert says(file).endswith(", handed over by transfer T and not taken yet")
    assert '"state": "released"' in says("--output=json", file)
    assert says("--break", file).endswith("; broken") and litter(tmp_path) == []
    daemon.end()


# ---- killed at each step -----------------------------------------------------------------------------------
class Deadly(Folder):
    """Kills its process before the nth file operation."""

    left = 0


def _deadly(name: str) -> Any:
    def operation(self: Deadly, *arguments: Any) -> Any:
        if not Deadly.left:
            os.kill(os.getpid(), signal.SIGKILL)
        Deadly.left -= 1
        return getattr(Folder, name)(self, *arguments)

    return operation


for _name in ("names", "read", "draft", "publish", "remove", "sync"):
    setattr(Deadly, _name, _deadly(_name))


#: in this process
SIDES: list[Side] = []


def end_sides() -> None:
    for side in SIDES:
        side.exports.close_all()
    SIDES.clear()


class Side:
    """The leased exports of one process."""

    def __init__(self, files: dict[str, str], lease: LeasePolicy, deadly: bool = False) -> None:
        self.exports = LeasedExports(ExportTable(), Owner("", "vm"), Deadly if deadly else Folder)
        self.exports.open_all([Export(name, file, lease=lease) for name, file in files.items()])
        self.source, self.target = Source(self.exports), Destination(self.exports)
        SIDES.append(self)

    def writes(self) -> bool:
        for name in ("a", "b"):
            self.exports.table.named(name).image.write(0, b"w" * 512)
        return True


def child(work: Any) -> int:
    """The exit status of a process that does some work, negative for the signal that killed it."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _source(files: dict[str, str], moment: int) -> None:
    Deadly.left = 1 << 30
    side = Side(files, TAKE, deadly=True)
    Deadly.left = moment
    side.source.prepare("T")
    side.source.release("T", 1)


def _target(files: dict[str, str], moment: int) -> None:
    Deadly.left = 1 << 30
    side = Side(files, AWAIT, deadly=True)
    Deadly.left = moment
    side.target.grant("T", 1)
    side.writes()


def test_sources_killed_at_every_step(tmp_path: Path) -> None:
    outcomes = set()
    for moment in range(1000):
        folder = tmp_path / str(moment)
        folder.mkdir()
        files = make_files(folder, "a", "b")
        status = child(partial(_source, files, moment))
        assert status in (0, -signal.SIGKILL)
        target = Side(files, AWAIT)
        try:
            target.target.grant("T", 1)
        except BlockError:
            assert status and Side(files, TAKE).writes()  # the source's host goes on
            outcomes.add("kept")
        else:
            outcomes.add("released")
            assert target.writes()
            with pytest.raises(BlockError, match="locked"):
                Side(files, TAKE)
        end_sides()
        if not status:
            break
    assert outcomes == {"kept", "released"}


def test_destinations_killed_at_every_step(tmp_path: Path) -> None:
    for moment in range(1000):
        folder = tmp_path / str(moment)
        folder.mkdir()
        files = make_files(folder, "a", "b")
        source = Side(files, TAKE)
        source.source.prepare("T")
        source.source.release("T", 1)
        status = child(partial(_target, files, moment))
        assert status in (0, -signal.SIGKILL)
        with pytest.raises(BlockError, match="is released"):
            source.source.abort("T")
        last = Side(files, BREAK)  # the destination is gone, its user says
        assert last.writes() and top(files["a"]).epoch >= 2
        assert last.exports.close_all() == [] and not list(folder.glob("*.lease-*"))
        end_sides()
        if not status:
            break
