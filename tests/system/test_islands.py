"""What is told of a machine's processes: query-islands, info islands, atoll top."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.system.machine import ATOLL, CONSOLE, Machine, until, with_qmp


def top(machine: Machine, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(machine.runtime)}
    return subprocess.run([ATOLL, "top", *words], capture_output=True, text=True, env=environment, timeout=60)


def islands(machine: Machine) -> dict[str, int]:
    """As ps shows them; a process that has just been forked still has the fork server's name."""
    named = ("coordinator", "vcpu0", "vcpu1", "devhost0", "blockd")
    return {role: pid for role, pid in machine.roles().items() if role in named}


def rows(qmp: Any) -> dict[str, dict[str, Any]]:
    return {row["role"]: row for row in qmp.cmd("query-islands")}


def test_every_process_is_told_of() -> None:
    with with_qmp(*CONSOLE, "-smp", "2") as machine, machine.qmp() as qmp:
        machine.says("ready")
        found = rows(qmp)
        assert {role: found[role]["pid"] for role in islands(machine)} == islands(machine)
        assert found["nursery"]["alive"]
        for row in found.values():
            status = Path(f"/proc/{row['pid']}/status").read_text()
            threads = re.search(r"Threads:\t(\d+)", status)
            assert threads and row["alive"] and row["threads"] >= 1 and row["restarts"] == 0
            assert row["memory"]["resident"] >= row["memory"]["private"] > 0
            assert 0 < row["uptime-ms"] < 1000 * 3600
        assert found["vcpu0"]["cpu-ms"] <= rows(qmp)["vcpu0"]["cpu-ms"]
        os.kill(machine.roles()["devhost0"], signal.SIGKILL)
        until(lambda: rows(qmp)["devhost0"]["restarts"] == 1, "the successor")
        os.kill(machine.roles()["vcpu1"], signal.SIGKILL)
        until(lambda: not rows(qmp)["vcpu1"]["alive"], "the death")
        until(lambda: qmp.cmd("query-status")["status"] == "internal-error", "the state")
        text = qmp.cmd("human-monitor-command", **{"command-line": "info islands"})
        assert re.search(r"^vcpu1 +\d+ dead", text, re.M) and "vcpu1: its last state is in /" in text
        qmp.cmd("system_reset")
        row = rows(qmp)["vcpu1"]
        assert row["alive"] and row["restarts"] == 1


def test_top_in_batches() -> None:
    with with_qmp(*CONSOLE, "-smp", "2") as machine, machine.qmp():
        machine.says("ready")
        for words in ((), (machine.name,), (f"{machine.name}-{machine.process.pid}",)):
            done = top(machine, *words, "-b", "-n", "1")
            assert (done.returncode, done.stderr) == (0, "")
            lines = done.stdout.splitlines()
            assert lines[0].startswith(f"{machine.name}: running, ") and lines[2].split()[:3] == [
                "ROLE", "PID", "S",
            ]  # fmt: skip
            shown = {line.split()[0]: int(line.split()[1]) for line in lines[3:] if line}
            assert {role: shown[role] for role in islands(machine)} == islands(machine)
        twice = top(machine, "-n", "2", "-d", "0.1")
        assert twice.stdout.count("ROLE") == 2 and "\x1b" not in twice.stdout
        assert top(machine, "nobody").returncode == 1
        assert top(machine, "-n", "0").returncode == 2
        assert "usage: atoll top" in top(machine, "--help").stdout


def test_top_ends_with_ctrl_c_and_with_the_machine() -> None:
    with with_qmp(*CONSOLE) as machine, machine.qmp() as qmp:
        machine.says("ready")
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(machine.runtime)}
        command = [ATOLL, "top", "-b", "-d", "0.1"]
        for ends in ("Ctrl-C", "the machine"):
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
            ) as watcher:
                assert watcher.stdout is not None and watcher.stderr is not None
                assert watcher.stdout.readline().startswith(f"{machine.name}: running")
                if ends == "Ctrl-C":
                    watcher.send_signal(signal.SIGINT)
                else:
                    qmp.cmd("quit")
                rest = watcher.stdout.read()
                assert watcher.wait() == 0 and watcher.stderr.read() == ""
                assert ("the machine has ended" in rest) == (ends == "the machine")
        assert machine.wait() == 0
