"""A machine to a file and back, between Vms without islands: a full disk, a cancel, and what a file could
have wrong.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import stat
import time
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from coordinator.migrate import file, ram
from tests.migrate.conftest import Run
from tests.migrate.quiet import Quiet, World


async def saved(world: World, path: Path) -> Quiet:
    source = await world.source()
    source.write(77)
    source.migration.migrate(f"file:{path}")
    assert await source.done() == "completed", source.error
    assert source.state == "postmigrate" and not source.runs
    return source


def comes(world: World, path: Path, stopped_time: str = "stands", start_paused: bool = False) -> Quiet:
    vm = Quiet(world, replace(world.machines[0].options, start_paused=start_paused))
    vm.state = "inmigrate"
    vm.migration.set({"stopped-time": stopped_time})
    vm.migration.incoming(f"file:{path}")
    return vm


def test_round_trip(quiet: Run, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await saved(world, tmp_path / "a state")
        target = comes(world, tmp_path / "a state")
        assert await target.done() == "completed"
        assert (target.runs, target.read()) == (True, 77)
        assert [path.name for path in tmp_path.glob("*state*")] == ["a state"]

    quiet(test)


@pytest.mark.parametrize("kind", ["stands", "passes"])
def test_stopped_time(quiet: Run, tmp_path: Path, kind: str) -> None:
    """The guest's clock where it goes on; it is not let run, so that it can be read."""

    async def test(world: World) -> None:
        source = await saved(world, tmp_path / "state")
        saved_at = time.time_ns()
        loaded_at = time.time_ns()
        target = comes(world, tmp_path / "state", kind, start_paused=True)
        assert await target.done() == "completed"
        assert source.segment is not None and target.segment is not None
        before = int(source.segment.header.time.guest_ns)
        gap = int(target.segment.header.time.guest_ns) - before
        assert gap == 0 if kind == "stands" else gap >= loaded_at - saved_at

    quiet(test)


@pytest.mark.parametrize("at", ["write", "memory", "sync", "rename"])
def test_a_disk_that_is_full_at_any_step(
    quiet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def full(*words: Any) -> None:
        raise OSError(28, "No space left on device")

    async def test(world: World) -> None:
        source = await world.source()
        with monkeypatch.context() as patch:
            match at:
                case "write":
                    patch.setattr(file, "_put", full)
                case "memory":
                    patch.setattr(ram.Sender, "run", full)
                case "sync":
                    patch.setattr(os, "fsync", full)
                case "rename":
                    patch.setattr(os, "replace", full)
            source.migration.migrate(f"file:{tmp_path / 'state'}")
            assert await source.done() == "failed"
        assert "No space left on device" in source.error
        assert source.runs and source.state == "running"
        assert list(tmp_path.glob("state*")) == []

    quiet(test)


def test_a_folder_that_cannot_be_synced(
    quiet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file can be seen, so it counts: the guest stays still here."""
    sync = os.fsync

    def broken(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(5, "Input/output error")
        sync(fd)

    async def test(world: World) -> None:
        monkeypatch.setattr(os, "fsync", broken)
        await saved(world, tmp_path / "state")
        assert await comes(world, tmp_path / "state").done() == "completed"

    quiet(test)


@pytest.mark.parametrize("blocks", ["some", "none"])
def test_a_disk_that_is_really_full(
    quiet: Run, tmp_path: Path, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full takes nothing (full(4)); a limit on the size of files takes some, and then nothing more
    (setrlimit(2))."""

    async def test(world: World) -> None:
        source = await world.source()
        source.write(77)
        if blocks == "none":
            monkeypatch.setattr(file, "_begun", lambda path, half: FileIO("/dev/full", "w"))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if blocks == "some" else before[0], before[1]))
            source.migration.migrate(f"file:{tmp_path / 'state'}")
            assert await source.done() == "failed"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert ("File too large" if blocks == "some" else "No space left on device") in source.error
        assert source.runs and source.state == "running"
        assert list(tmp_path.glob("state*")) == []

    quiet(test)


def test_what_is_there_is_not_overwritten(quiet: Run, tmp_path: Path) -> None:
    """A half file that leads elsewhere, one that another is writing, a device; what a killed one left is used
    again, and a link at the name itself stays one."""
    precious = tmp_path / "precious"
    precious.write_text("data")

    async def test(world: World) -> None:
        part = tmp_path / "state.part"
        source = await world.source()

        async def fails(why: str, name: str = "state") -> None:
            source.migration.migrate(f"file:{tmp_path / name}")
            assert await source.done() == "failed"
            assert why in source.error and "\n" not in source.error, source.error
            assert source.runs

        part.symlink_to(precious)
        await fails("cannot be written")
        part.unlink()
        os.link(precious, part)
        await fails("no half file of ours")
        part.unlink()
        os.mkfifo(part)
        await fails("cannot be written")
        part.unlink()
        os.mkfifo(tmp_path / "pipe")
        await fails("is no regular file", "pipe")
        with part.open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            await fails("being written by another migration")
        assert precious.read_text() == "data"
        part.unlink()
        part = tmp_path / "real.part"
        part.write_bytes(b"half" * 100_000)
        (tmp_path / "state").symlink_to(tmp_path / "real")
        source.migration.migrate(f"file:{tmp_path / 'state'}")
        assert await source.done() == "completed", source.error
        assert (tmp_path / "state").is_symlink() and not part.exists()
        assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
        assert await comes(world, tmp_path / "state").done() == "completed"

    quiet(test)


def test_a_cancel_leaves_no_file(quiet: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that writes has ended before the file is closed: its descriptor may be another's then."""
    ended: list[int] = []

    async def test(world: World) -> None:
        source = await world.source()
        run = ram.Sender.run

        def slow(self: ram.Sender, fd: int, peer: str) -> None:
            loop.call_soon_threadsafe(source.migration.cancel)
            while not self.cancelled:
                pass
            os.fstat(fd)
            ended.append(fd)
            run(self, fd, peer)

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(ram.Sender, "run", slow)
        source.migration.migrate(f"file:{tmp_path / 'state'}")
        assert await source.done() == "cancelled"
        assert len(ended) == 1
        assert source.runs
        assert list(tmp_path.glob("state*")) == []

    quiet(test)


def test_truncated_anywhere_and_flipped_anywhere(quiet: Run, tmp_path: Path) -> None:
    async def test(world: World) -> None:
        await saved(world, tmp_path / "state")
        whole = (tmp_path / "state").read_bytes()
        bad = tmp_path / "bad"
        step = len(whole) // 24
        for place in [*range(0, len(whole), step), len(whole) - 1]:
            for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]):
                bad.write_bytes(data)
                target = comes(world, bad)
                assert await target.done() == "failed", place
                assert "incoming migration" in await target.ended()
                assert not target.runs
                await target.shut()

    quiet(test)
