"""Linux is saved while it changes its disks, shuts down, is brought back, and does it all once more."""

import random
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support.launch import Launcher
from tests.support.tools import run_tool
from tests.system import boots
from tests.system.machine import until
from tests.system.test_disk import changed

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1500)]

SIZE = 17 << 20


def test_linux_goes_back_with_its_disks(launcher: Launcher, tmp_path: Path) -> None:
    plain, qmp = tmp_path / "plain", tmp_path / "qmp"
    content = random.Random(2).randbytes(SIZE)
    plain.write_bytes(content)
    options = [*boots.kernel_options("atoll.demo=disk"), "-no-shutdown"]
    options += ["-qmp", f"unix:{qmp},server=on,wait=off"]
    for index, disk in enumerate(("disk0", "disk1")):
        file = str(tmp_path / f"{disk}.qcow2")
        run_tool("qemu-img", "convert", "-O", "qcow2", str(plain), file)
        options += ["-drive", f"file={file},format=qcow2,if=ide,index={index}"]
    with boots.start(launcher, tmp_path, options) as guest:
        guest.expect("atoll: disk0-before", silence=boots.SILENCE_SECONDS)
        monitor = QEMUMonitorProtocol(str(qmp))
        monitor.connect()
        assert monitor.cmd("human-monitor-command", **{"command-line": "savevm x"}) == ""
        first = _hashes(guest, "disk0-after", "disk1-before", "disk1-after")
        guest.expect("Power down", silence=boots.SILENCE_SECONDS)
        until(lambda: _state(monitor) == "shutdown", "the end of the guest")
        assert monitor.cmd("human-monitor-command", **{"command-line": "loadvm x"}) == ""
        assert _state(monitor) == "paused"
        monitor.cmd("cont")
        assert _hashes(guest, "disk0-after", "disk1-before", "disk1-after") == first
        guest.expect("Power down", silence=boots.SILENCE_SECONDS)
        monitor.cmd("quit")
        monitor.close()
        assert guest.wait(silence=boots.SILENCE_SECONDS) == 0
    for disk in ("disk0", "disk1"):
        file = str(tmp_path / f"{disk}.qcow2")
        assert "No errors were found" in run_tool("qemu-img", "check", file)
        plain.write_bytes(changed(disk, content))
        assert run_tool("qemu-img", "compare", file, str(plain)).strip() == "Images are identical."
    plain.write_bytes(content)  # nothing of disk1 had been changed when all was saved
    then = tmp_path / "then"
    run_tool("qemu-img", "convert", "-l", "x", "-O", "raw", str(tmp_path / "disk1.qcow2"), str(then))
    assert then.read_bytes() == content


def _state(monitor: Any) -> str:
    return str(monitor.cmd("query-status")["status"])


def _hashes(guest: boots.Guest, *marks: str) -> list[str]:
    return [guest.expect(f"atoll: {mark} ([0-9a-f]+)", silence=boots.SILENCE_SECONDS)[1] for mark in marks]
