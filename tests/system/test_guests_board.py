"""Guests of our own against the board: interrupts, resets, random accesses, video, firmware."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support import bare
from tests.support.launch import Guest, Launcher
from tests.system.test_guests_cpu import disk, pattern_disk


@contextmanager
def control(socket: Path) -> Iterator[QEMUMonitorProtocol]:
    """The machine's control socket."""
    monitor = QEMUMonitorProtocol(str(socket))
    monitor.connect()
    try:
        yield monitor
    finally:
        monitor.close()


def qmp(socket: Path) -> list[str]:
    return ["-qmp", f"unix:{socket},server=on,wait=off"]


def quiet(guest: Guest) -> bool:
    """Nobody had anything to say but the launcher that it was ended."""
    return "Traceback" not in guest.errors() and "died" not in guest.errors()


def test_interrupts(launcher: Launcher, tmp_path: Path) -> None:
    with bare.start(launcher, tmp_path, "legacy", 2, disk(pattern_disk(tmp_path / "disk"))) as guest:
        assert bare.failures(guest) == []


def test_resets_in_a_transfer(launcher: Launcher, tmp_path: Path) -> None:
    options = [*disk(pattern_disk(tmp_path / "disk")), *qmp(tmp_path / "qmp")]
    with bare.start(launcher, tmp_path, "reset", 2, options, reboot=True) as guest:
        guest.expect("^reset me")
        with control(tmp_path / "qmp") as monitor:
            monitor.cmd("system_reset")
        assert bare.failures(guest) == []
    names = [line.removeprefix("ok ") for line in guest.lines if line.startswith("ok ")]
    assert names == [
        "power_on", "reset_cf9_hard", "reset_cf9_soft", "reset_port_92", "reset_keyboard",
        "reset_triple_fault", "reset_qmp",
    ]


def test_triple_fault_ends_a_machine_that_must_not_reboot(launcher: Launcher, tmp_path: Path) -> None:
    with bare.start(launcher, tmp_path, "triple") as guest:
        assert guest.wait(silence=bare.SILENCE_SECONDS) == 0
    assert guest.lines == ["falling"]


@pytest.mark.parametrize("vga", ["std", "none"])
def test_random_accesses_kill_nothing(launcher: Launcher, tmp_path: Path, vga: str) -> None:
    disks = [
        *disk(pattern_disk(tmp_path / "disk")),
        "-drive", f"file={pattern_disk(tmp_path / 'cd')},format=raw,if=ide,index=2,media=cdrom",
    ]
    options = [*disks, "-vga", vga, *qmp(tmp_path / "qmp")]
    with bare.start(launcher, tmp_path, "fuzz", 1, options, ram=16) as guest:
        guest.expect("^fuzz: done")
        with control(tmp_path / "qmp") as monitor:
            status: Any = monitor.cmd("query-status")
            assert status["running"] is True
            drives: Any = monitor.cmd("query-block")
            assert len(drives) == 2
            monitor.cmd("quit")
        assert guest.wait() == 0
        assert quiet(guest), guest.errors()


def test_video_memory_and_registers_out_of_range(launcher: Launcher, tmp_path: Path) -> None:
    pictures: dict[str, str] = {}
    with bare.start(launcher, tmp_path, "video", 1, ["-vga", "std", *qmp(tmp_path / "qmp")]) as guest:
        guest.expect("^ok pit_read_back")
        with control(tmp_path / "qmp") as monitor:
            for name in ("text", "cursor_out", "start_out", "linear", "offsets_out", "sizes_out", "no_size"):
                guest.expect(f"^shoot {name}")
                path = tmp_path / f"{name}.ppm"
                monitor.cmd("screendump", filename=str(path))
                pictures[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
                monitor.cmd("send-key", keys=[{"type": "qcode", "data": "spc"}])
        assert bare.failures(guest) == []
    assert pictures["text"] and pictures["linear"]
    assert pictures["text"] != pictures["linear"]


def test_firmware_in_real_mode(launcher: Launcher, tmp_path: Path) -> None:
    options = ["-m", "16", "-bios", str(bare.firmware("real"))]
    with bare.start_firmware(launcher, tmp_path, "real", options) as guest:
        assert bare.failures(guest) == []
    assert [line for line in guest.lines if line.startswith("ok ")] == [
        "ok reset", "ok a20_port92", "ok a20_keyboard", "ok pam_copy", "ok pam_under_running_code",
    ]
