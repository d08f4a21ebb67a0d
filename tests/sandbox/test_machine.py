"""Images of every kind reach a machine whose block daemon is confined, and its islands stay confined."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tools import run_tool
from tests.system.machine import CONSOLE, Machine, until, with_qmp


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "base.raw"
    path.parent.mkdir()
    path.write_bytes(b"base" * (1 << 18))
    return path


def test_backing_files_throwaway_layers_and_media_that_come_later(tmp_path: Path, base: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    top = images / "top.qcow2"
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(top))
    late = tmp_path / "late" / "disc.iso"
    late.parent.mkdir()
    late.write_bytes(bytes(2048 * 5))
    drive = f"file={top},if=ide,index=0,format=qcow2,allow-backing={base.parent}"
    thrown = f"file={base},if=ide,index=1,format=raw,snapshot=on"
    empty = "if=ide,index=2,media=cdrom,id=cd"
    with with_qmp(*CONSOLE, "-drive", drive, "-drive", thrown, "-drive", empty) as machine:
        machine.says("ready")
        with machine.qmp() as monitor:
            monitor.cmd("blockdev-change-medium", id="cd", filename=str(late))
            (medium,) = (row for row in monitor.cmd("query-block") if row["device"] == "cd")
            assert medium["inserted"]["image"]["virtual-size"] == 2048 * 5
        (folder,) = (machine.runtime / "atoll").glob("*-*")
        logs = {path.name: path.read_text() for path in folder.glob("*.log")}
        assert logs.keys() >= {"blockd.log", "devhost0.log", "vcpu0.log"}
        assert not any("sandbox" in text for text in logs.values()), logs
        machine.type(b"O")
        assert machine.wait() == 0


def test_an_nbd_server_over_tcp(tmp_path: Path, base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "blockd.main", "--tcp", str(port), "--export", f"x={base}"]
    with subprocess.Popen(command) as server:
        try:
            def listens() -> bool:
                with socket.socket() as sock:
                    return sock.connect_ex(("127.0.0.1", port)) == 0

            until(listens, "the NBD server")
            drive = f"file=nbd://127.0.0.1:{port}/x,if=ide,index=0,format=raw"
            with Machine(*CONSOLE, "-drive", drive) as machine:
                machine.says("ready")
                machine.type(b"O")
                assert machine.wait() == 0
        finally:
            server.terminate()
