"""A change of medium, an empty tray and a medium again, while the guest runs."""

import contextlib
import time
from pathlib import Path

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support import products
from tests.support.launch import Launcher
from tests.system import boots

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1500)]

TRIES = 200  # while the guest looks at the drive it has locked the tray


def when_unlocked(monitor: QEMUMonitorProtocol, command: str, **arguments: object) -> None:
    """A command that a locked tray refuses, until the guest has unlocked it."""
    for _ in range(TRIES):
        reply = monitor.cmd_raw(command, dict(arguments))
        if "error" not in reply:
            return
        assert "locked" in reply["error"]["desc"], reply
        time.sleep(0.05)
    pytest.fail(f"{command}: the tray stayed locked")


def test_guest_sees_each_medium(launcher: Launcher, tmp_path: Path) -> None:
    media = []
    for number in (1, 2):
        path = tmp_path / f"{number}.iso"
        path.write_bytes(bytes([number, *range(256)])[:256] * 2048 * number)
        media.append((path, f"^atoll: medium {path.stat().st_size} {products.sha256_of(path)}"))
    socket = tmp_path / "qmp"
    options = [
        *boots.kernel_options("atoll.demo=media"),
        "-drive", f"file={media[0][0]},if=ide,index=2,media=cdrom,format=raw,readonly=on",
        "-qmp", f"unix:{socket},server=on,wait=off", "-no-reboot",
    ]
    with boots.start(launcher, tmp_path, options) as guest:
        guest.expect(media[0][1], silence=boots.SILENCE_SECONDS)
        monitor = QEMUMonitorProtocol(str(socket))
        monitor.connect()
        try:
            device = monitor.cmd("query-block")[0]["device"]  # type: ignore[index]
            change = {"device": device, "filename": str(media[1][0]), "format": "raw"}
            when_unlocked(monitor, "blockdev-change-medium", **change)
            guest.expect(media[1][1], silence=boots.SILENCE_SECONDS)
            when_unlocked(monitor, "eject", device=device)
            guest.expect("^atoll: medium none", silence=boots.SILENCE_SECONDS)
            when_unlocked(monitor, "blockdev-change-medium", **change)
            guest.expect(media[1][1], silence=boots.SILENCE_SECONDS)
            events = [event["event"] for event in monitor.get_events()]
            assert events.count("DEVICE_TRAY_MOVED") >= 4
            monitor.cmd("quit")
        finally:
            with contextlib.suppress(EOFError):  # the machine may close the socket first
                monitor.close()
        assert guest.wait(silence=boots.SILENCE_SECONDS) == 0
