"""The option -sandbox, and what the coordinator hands out."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from blockd import handout as client
from coordinator.cli import build
from coordinator.contract.config import Drive, Media
from coordinator.contract.errors import UsageError
from coordinator.handout import Grants, Handout
from tests.system.machine import CONSOLE, Machine


@pytest.mark.parametrize(
    ("value", "on"), [("on", True), ("off", False), ("on,obsolete=deny,spawn=deny", True)]
)
def test_spelled_as_in_qemu(value: str, on: bool) -> None:
    assert build.settings(["-sandbox", value]).options.sandbox is on
    assert build.settings([]).options.sandbox


@pytest.mark.parametrize("value", ["maybe", "on,network=deny"])
def test_what_is_unknown_is_refused(value: str) -> None:
    with pytest.raises(UsageError):
        build.settings(["-sandbox", value])


def test_off_is_said_aloud_and_on_is_not() -> None:
    for options, said in ((("-sandbox", "off"), True), ((), False)):
        with Machine(*CONSOLE, *options) as machine:
            machine.says("ready")
            for role, pid in machine.roles().items():
                if role.startswith("standby"):
                    continue  # confined for good when it takes over, before its hello
                status = Path(f"/proc/{pid}/status").read_text()
                confined = role not in ("coordinator", "nursery") and not said
                assert ("Seccomp:\t2" in status) is confined, role
            machine.type(b"O")
            assert machine.wait() == 0
            assert ("-sandbox off" in machine.errors()) is said


def test_grants_are_what_the_user_named(tmp_path: Path) -> None:
    for name in ("a/disc.iso", "b/top.qcow2", "c/base.raw"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    grants = Grants()
    grants.add(Drive("cd0", 2, Media.CDROM, str(tmp_path / "a/disc.iso")))
    grants.add(Drive("cd1", 3, Media.CDROM, str(tmp_path / "b/top.qcow2"), "qcow2"))
    grants.add(Drive("cd2", 3, Media.CDROM, "nbd://example.org:10810/x"))
    assert grants.has_file(str(tmp_path / "a/disc.iso"))
    assert not grants.has_file(str(tmp_path / "a/another.iso"))
    assert grants.has_file(str(tmp_path / "b/base.qcow2"))
    assert not grants.has_file(str(tmp_path / "bb"))
    assert not grants.has_file(str(tmp_path / "c/base.raw"))
    assert grants.has_server("example.org", 10810)
    assert not grants.has_server("example.org", 22)


@pytest.mark.parametrize("known", [True, False])
def test_handed_out_to_the_block_daemon_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    disc, other, link = tmp_path / "disc", tmp_path / "other", tmp_path / "link"
    disc.write_bytes(b"the disc")
    other.write_bytes(b"something else")
    link.symlink_to(other)

    async def both() -> None:
        handout = Handout(str(tmp_path / "s"), lambda: os.getpid() if known else 1)
        handout.grants.add(Drive("cd0", 2, Media.CDROM, str(disc)))
        monkeypatch.setattr(client, "_path", str(tmp_path / "s"))
        try:
            if known:
                fd = await asyncio.to_thread(client.open_readable, str(disc))
                assert os.read(fd, 100) == b"the disc"
                with pytest.raises(OSError):
                    os.write(fd, b"x")
                os.close(fd)
            else:
                with pytest.raises(PermissionError):
                    await asyncio.to_thread(client.open_readable, str(disc))
            for file in (other, link, tmp_path):
                with pytest.raises(PermissionError):
                    await asyncio.to_thread(client.open_readable, str(file))
            with pytest.raises(PermissionError):
                await asyncio.to_thread(client.connected, "localhost", 9, 1.0)
        finally:
            handout.close()

    asyncio.run(both())
