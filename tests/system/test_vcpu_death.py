"""A vCPU is killed: the machine stands still, its state is shown, and it goes on with another process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.system.machine import ATOLL, CONSOLE, Machine, until, with_qmp


def monitor(qmp: Any, line: str) -> str:
    return str(qmp.cmd("human-monitor-command", **{"command-line": line}))


def kill(machine: Machine, qmp: Any, role: str, number: signal.Signals = signal.SIGKILL) -> dict[str, Any]:
    """The event's data."""
    os.kill(machine.roles()[role], number)

    def died() -> dict[str, Any] | None:
        found = [event["data"] for event in qmp.get_events() if event["event"] == "ISLAND_DIED"]
        return found[0] if found else None

    data: dict[str, Any] = until(died, "the event")
    return data


def test_what_it_was_is_shown_as_before_and_a_reset_brings_another() -> None:
    with with_qmp(*CONSOLE, "-smp", "2") as machine, machine.qmp() as qmp:
        machine.says("ready")
        qmp.cmd("stop")
        before = monitor(qmp, "info registers")
        pid = machine.roles()["vcpu0"]
        data = kill(machine, qmp, "vcpu0")
        assert (data["role"], data["cause"]) == ("vcpu0", f"vcpu0 (pid {pid}) was killed by SIGKILL")
        assert qmp.cmd("query-status")["status"] == "internal-error"
        assert monitor(qmp, "info registers") == before
        assert re.search(r"CPU #0: dead", monitor(qmp, "info cpus"))
        report = Path(data["report"]).read_text()
        assert before in report and "outside of the guest" in report
        marked = [line.split(None, 2) for line in report.splitlines() if line.startswith("=>")]
        assert [int(line[1], 16) for line in marked] == [data["rip"]]
        # the monitor reads code through the dead vCPU's page tables, as the report does
        assert monitor(qmp, "x/1i $rip").strip().endswith(marked[0][2])
        reply = qmp.cmd_obj({"execute": "cont"})
        assert "Resetting the Virtual Machine is required" in reply["error"]["desc"]
        qmp.cmd("system_reset")
        assert qmp.cmd("query-status")["status"] == "prelaunch"
        assert machine.roles()["vcpu0"] != pid
        qmp.cmd("cont")
        machine.says("ready")
        machine.type(b"a")
        machine.says("got 61")
        machine.type(b"O")
        assert machine.wait() == 0
        (line,) = machine.errors().splitlines()
        assert line.startswith(f"atoll run: vcpu0 (pid {pid}) was killed by SIGKILL; RIP=")
        machine.gone()


@pytest.mark.parametrize("role", ["vcpu0", "vcpu1"])
def test_a_running_guest_stops(role: str) -> None:
    """Guest time with it; killed again before it runs again, and once it runs."""
    with with_qmp(*CONSOLE, "-smp", "2") as machine, machine.qmp() as qmp:
        machine.says("ready")
        for _ in range(3):
            kill(machine, qmp, role)
            assert qmp.cmd("query-status")["status"] == "internal-error"
            qmp.cmd("system_reset")
            os.kill(machine.roles()[role], signal.SIGKILL)
            until(lambda: qmp.cmd("query-status")["status"] == "internal-error", "the state")
            qmp.cmd("system_reset")
            qmp.cmd("cont")
            machine.says("ready")
            qmp.clear_events()
        machine.type(b"b")
        machine.says("got 62")
        qmp.cmd("quit")
        assert machine.wait() == 0
        machine.gone()


def test_a_crash_shows_the_end_of_its_log() -> None:
    with with_qmp(*CONSOLE) as machine, machine.qmp() as qmp:
        machine.says("ready")
        data = kill(machine, qmp, "vcpu0", signal.SIGSEGV)  # faulthandler writes its trace into the log
        assert "was killed by SIGSEGV; its last words: " in data["cause"]
        machine.kill(signal.SIGTERM)
        assert machine.wait() == 0
        machine.gone()


def test_it_goes_on_from_a_snapshot(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    subprocess.run([ATOLL, "img", "create", "-q", "-f", "qcow2", str(disk), "1M"], check=True)
    with with_qmp(*CONSOLE, "-hda", str(disk), "-smp", "2") as machine, machine.qmp() as qmp:
        machine.says("ready")
        qmp.cmd("stop")
        assert monitor(qmp, "savevm a") == ""
        before = monitor(qmp, "info registers")
        qmp.cmd("cont")
        machine.type(b"a")
        machine.says("got 61")
        kill(machine, qmp, "vcpu0")
        assert "does not exist" in monitor(qmp, "loadvm b")
        assert monitor(qmp, "loadvm a") == ""
        assert qmp.cmd("query-status")["status"] == "paused"
        assert monitor(qmp, "info registers") == before
        qmp.cmd("cont")
        machine.type(b"c")
        machine.says("got 63")
        qmp.cmd("quit")
        assert machine.wait() == 0
        machine.gone()
