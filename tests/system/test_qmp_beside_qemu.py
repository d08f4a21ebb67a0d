"""The same session with QEMU and with us: the same replies, classes of errors, states and events."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support import products
from tests.support.tools import require_tool
from tests.system.machine import ATOLL, _listens, until

#: an order typed at the guest (bytes) with the event that ends it, or a QMP command with its arguments
Step = tuple[bytes, str] | tuple[str, dict[str, Any]]

CD = {"device": "ide1-cd0"}
SESSIONS: dict[str, tuple[list[str], list[Step]]] = {
    "life": (
        [],
        [
            ("query-status", {}),
            ("stop", {}),
            ("stop", {}),
            ("query-status", {}),
            ("cont", {}),
            ("cont", {}),
            ("query-status", {}),
            (b"R", "RESET"),
            ("system_reset", {}),
            ("query-status", {}),
            ("system_powerdown", {}),
            ("inject-nmi", {}),
            ("quit", {}),
        ],
    ),
    "errors": (
        [],
        [
            ("nope", {}),
            ("qmp_capabilities", {}),
            ("stop", {"a": 1}),
            ("eject", {}),
            ("eject", {"device": "x"}),
            ("eject", {"device": "a", "id": "b"}),
            ("eject", {"device": 1}),
            ("blockdev-open-tray", {"id": "x"}),
            ("blockdev-change-medium", {"id": "x", "filename": "/none"}),
            ("screendump", {}),
            ("screendump", {"filename": "/none"}),
            ("send-key", {"keys": [{"type": "qcode", "data": "nokey"}]}),
            ("send-key", {}),
            ("human-monitor-command", {}),
            ("query-block", {}),
        ],
    ),
    "no-shutdown": (
        ["-no-shutdown"],
        [
            (b"O", "STOP"),
            ("query-status", {}),
            ("cont", {}),
            ("system_reset", {}),
            ("query-status", {}),
            ("cont", {}),
            ("query-status", {}),
        ],
    ),
    "stopped": (
        ["-S"],
        [
            ("query-status", {}),
            ("system_reset", {}),
            ("stop", {}),
            ("query-status", {}),
            ("cont", {}),
            ("query-status", {}),
        ],
    ),
    "no-reboot": (["-no-reboot"], [(b"R", "SHUTDOWN")]),
    "power off": ([], [(b"O", "SHUTDOWN")]),
    "media": (
        ["-cdrom", "{disc}"],
        [
            ("query-block", {}),
            ("blockdev-open-tray", CD),
            ("blockdev-open-tray", CD),
            ("query-block", {}),
            ("blockdev-close-tray", CD),
            ("blockdev-close-tray", CD),
            ("eject", CD),
            ("eject", CD),
            ("query-block", {}),
            ("blockdev-change-medium", {**CD, "filename": "/none"}),
            ("query-block", {}),
            ("blockdev-change-medium", {**CD, "filename": "{disc}"}),
            ("query-block", {}),
            ("blockdev-change-medium", {**CD, "filename": "{disc}"}),
            ("eject", {**CD, "force": True}),
        ],
    ),
}
#: of a drive, what both know
DRIVE = ("device", "locked", "removable", "tray_open", "type", "io-status")


def common(value: Any) -> Any:
    """A reply or an event without what may differ."""
    if isinstance(value, list):
        return [common(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "desc" in value:
        return {"class": value["class"]}
    if "removable" in value:
        inserted = value.get("inserted", {})
        return {key: value.get(key) for key in DRIVE} | {
            "size": inserted.get("image", {}).get("virtual-size")
        }
    return {key: common(item) for key, item in value.items() if key not in ("timestamp", "id")}


def transcript(command: list[str], steps: list[Step], disc: Path) -> tuple[list[Any], list[Any]]:
    """Replies in order, and events in order."""
    with tempfile.TemporaryDirectory(prefix="qmp-") as folder:
        path = Path(folder) / "qmp"
        options = [
            "-nodefaults",
            "-display",
            "none",
            "-kernel",
            str(products.bare("control")),
            "-serial",
            "stdio",
        ]
        with subprocess.Popen(
            [*command, *options, "-qmp", f"unix:{path},server=on,wait=off"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            assert process.stdin is not None and process.stdout is not None
            until(lambda: _listens(path), "the socket")
            if "-S" not in command:
                assert process.stdout.readline().strip() == b"ready"
            monitor = QEMUMonitorProtocol(str(path))
            monitor.connect()
            replies: list[Any] = []
            events: list[Any] = []
            try:
                for what, more in steps:
                    if isinstance(what, bytes):
                        process.stdin.write(what)
                        process.stdin.flush()
                        while not events or events[-1]["event"] != more:
                            events.append(monitor.pull_event(wait=60.0))
                    elif isinstance(more, dict):
                        arguments = {k: str(disc) if v == "{disc}" else v for k, v in more.items()}
                        replies.append((what, common(monitor.cmd_raw(what, arguments))))
                if steps[-1][0] != "quit" and not isinstance(steps[-1][0], bytes):
                    monitor.cmd("quit")
                events += monitor.get_events(wait=False)
            finally:
                with contextlib.suppress(EOFError, OSError):  # the machine may have closed it first
                    monitor.close()
                process.stdin.close()
                process.kill()
        return replies, [common(event) for event in events if event["event"] in WANTED]


WANTED = ("STOP", "RESUME", "RESET", "POWERDOWN", "DEVICE_TRAY_MOVED")


@pytest.mark.parametrize("name", SESSIONS)
def test_the_same_session(name: str, tmp_path: Path) -> None:
    require_tool("qemu-system-x86_64")
    disc = tmp_path / "disc.iso"
    disc.write_bytes(bytes(8192))
    options, steps = SESSIONS[name]
    options = [option.replace("{disc}", str(disc)) for option in options]
    theirs = transcript(["qemu-system-x86_64", "-accel", "tcg", "-vga", "none", *options], steps, disc)
    ours = transcript([ATOLL, "run", *options], steps, disc)
    assert ours == theirs
