"""Death of each process of a machine, by force: who is named, what is said, what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from devhost.block_client import BlockClient
from tests.system.machine import CONSOLE, PATIENCE, Machine, processes, until, with_qmp

ROLES = {"coordinator", "nursery", "blockd", "devhost0", "vcpu0", "vcpu1"}
#: they come when the machine has started
STANDBYS = {"standby-devhost", "standby-blockd"}


@pytest.fixture
def disc(tmp_path: Path) -> Path:
    path = tmp_path / "a disc.iso"
    path.write_bytes(bytes(2048 * 4))
    return path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_islands_end_with_the_coordinator_and_the_next_start_cleans(number: signal.Signals) -> None:
    with Machine(*CONSOLE, "-smp", "2") as machine:
        machine.says("ready")
        assert set(machine.roles()) - STANDBYS == ROLES
        machine.kill(number)
        machine.wait()
        until(lambda: not machine.roles(), "the end of the islands")
        (folder,) = (machine.runtime / "atoll").glob("*-*")
        with Machine(*CONSOLE, runtime=machine.runtime) as successor:
            successor.says("ready")
            assert not folder.exists()
            successor.type(b"O")
            assert successor.wait() == 0
            successor.gone()


def test_a_device_host_that_dies_is_replaced() -> None:
    """The guest goes on, without a word to the user; once while it waits, once with input on its way."""
    with with_qmp(*CONSOLE, "-smp", "2") as machine, machine.qmp() as qmp:
        machine.says("ready")
        for restarts, (byte, paused) in enumerate([(b"a", False), (b"b", False), (b"c", True)], 1):
            if paused:
                qmp.cmd("stop")
            pid = machine.roles()["devhost0"]
            machine.type(byte)
            assert _replaced(machine, qmp, "devhost0", pid)["restarts"] == restarts
            if paused:
                assert qmp.cmd("query-status")["status"] == "paused"
                qmp.cmd("cont")
            machine.says(f"got {byte[0]:02x}")
        machine.type(b"O")
        assert machine.wait() == 0 and machine.errors() == ""
        machine.gone()


def _replaced(machine: Machine, qmp: Any, role: str, pid: int) -> dict[str, Any]:
    """Kill ``role``, and what is told of its successor."""
    os.kill(pid, signal.SIGKILL)
    event: dict[str, Any] = until(lambda: _restarted(qmp), "the event")
    assert event["role"] == role and event["blackout-ms"] > 0
    assert event["cause"] == f"{role} (pid {pid}) was killed by SIGKILL"
    assert machine.roles()[role] != pid
    return event


def test_a_standby_takes_over_and_the_next_one_is_there() -> None:
    """The process that waited is the island, in whose log it goes on."""
    with with_qmp(*CONSOLE) as machine, machine.qmp() as qmp:
        machine.says("ready")
        for live, waiting in (("devhost0", "standby-devhost"), ("blockd", "standby-blockd")):
            for _ in range(2):
                until(lambda waiting=waiting: waiting in machine.roles(), waiting)  # type: ignore[misc]
                standby = machine.roles()[waiting]
                _replaced(machine, qmp, live, machine.roles()[live])
                assert machine.roles()[live] == standby
                targets = [os.readlink(f"/proc/{standby}/fd/{fd}") for fd in (1, 2)]
                assert all(target.endswith(f"/{live}.log") for target in targets)
        machine.type(b"O")
        assert machine.wait() == 0 and machine.errors() == ""
        machine.gone()


def test_without_a_standby_a_process_is_started() -> None:
    """Killed together, again and again: whatever is ready takes over, and in the end all are there."""
    with with_qmp(*CONSOLE) as machine, machine.qmp() as qmp:
        machine.says("ready")
        for count in range(1, 4):
            for role in ("devhost0", "standby-devhost", "standby-blockd", "blockd"):
                with contextlib.suppress(KeyError, ProcessLookupError):
                    os.kill(machine.roles()[role], signal.SIGKILL)
            told: dict[str, Any] = {}

            def both(count: int = count, told: dict[str, Any] = told) -> bool:
                for event in qmp.get_events():
                    if event["event"] == "ISLAND_RESTARTED":
                        told[event["data"]["role"]] = event["data"]["restarts"]
                return told == {"devhost0": count, "blockd": count}

            until(both, "both events")
        machine.type(b"O")
        assert machine.wait() == 0
        machine.gone()


def test_a_block_daemon_that_dies_is_replaced(disc: Path, tmp_path: Path) -> None:
    """Its clients come back: the device host by itself, others by their own doing. Leases are held on."""
    disk, layered = tmp_path / "disk.img", tmp_path / "layered.img"
    for path in (disk, layered):
        path.write_bytes(bytes(1 << 20))
    options = ["-cdrom", str(disc), "-drive", f"file={disk},format=raw"]
    options += ["-drive", f"file={layered},format=raw,snapshot=on"]
    with with_qmp(*CONSOLE, *options) as machine, machine.qmp() as qmp:
        machine.says("ready")
        (folder,) = (machine.runtime / "atoll").glob("*-*")
        client = BlockClient(str(folder / "nbd"), "ide0-hd1")
        client.connect()
        client.write(512, [memoryview(b"w" * 512)])
        assert [done.errno for done in client.drain(PATIENCE)] == [0]
        for restarts in (1, 2):
            event = _replaced(machine, qmp, "blockd", machine.roles()["blockd"])
            assert event["restarts"] == restarts
            read = bytearray(512)
            client.read(512, [memoryview(read)])
            client.reconnect(PATIENCE)
            assert [done.errno for done in client.drain(PATIENCE)] == [0] and read == b"w" * 512
            assert {d["device"] for d in qmp.cmd("query-block")} == {"ide0-hd0", "ide0-hd1", "ide1-cd0"}
            records = list(tmp_path.glob("disk.img.lease-*"))
            assert len(records) == 1 and f'"pid":{machine.roles()["blockd"]}' in records[0].read_text()
        client.close()
        assert layered.read_bytes() == bytes(1 << 20)
        machine.type(b"O")
        assert machine.wait() == 0 and machine.errors() == ""
        machine.gone()
    assert not list(tmp_path.glob("disk.img.lease-*"))


def test_a_block_daemon_that_cannot_go_on_takes_the_machine_along(tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    with with_qmp(*CONSOLE, "-drive", f"file={disk},format=raw") as machine:
        machine.says("ready")
        disk.unlink()
        os.kill(machine.roles()["blockd"], signal.SIGKILL)
        assert machine.wait() == 1
        (line,) = machine.errors().splitlines()
        assert line.startswith(f"atoll run: {disk}: ") and "No such file" in line
        machine.gone()


def _restarted(qmp: Any) -> dict[str, Any] | None:
    events = [event["data"] for event in qmp.get_events() if event["event"] == "ISLAND_RESTARTED"]
    return events[0] if events else None


def test_the_machine_outlives_its_fork_server() -> None:
    with Machine(*CONSOLE) as machine:
        machine.says("ready")
        os.kill(machine.roles()["nursery"], signal.SIGKILL)
        machine.type(b"a")
        machine.says("got 61")
        machine.type(b"O")
        assert machine.wait() == 0
        machine.gone()


def test_an_island_dies_while_starting() -> None:
    with with_qmp(*CONSOLE) as machine:
        role = "blockd"
        until(lambda: role in processes(machine.name) or machine.process.poll() is not None, role)
        os.kill(machine.roles()[role], signal.SIGKILL)
        assert machine.wait() == 1
        (line,) = machine.errors().splitlines()
        assert line.startswith(f"atoll run: {role} (pid ")
        machine.gone()


def test_a_stopped_device_host_holds_up_neither_queries_nor_the_end() -> None:
    """A vCPU in the middle of an access that nobody answers is told to quit all the same."""
    with with_qmp(*CONSOLE) as machine, machine.qmp() as monitor:
        machine.says("ready")
        machine.type(b"I")
        machine.says("got 49")
        os.kill(machine.roles()["devhost0"], signal.SIGSTOP)
        assert monitor.cmd("query-status")["running"]
        assert "CPU #0" in monitor.cmd("human-monitor-command", **{"command-line": "info cpus"})
        monitor.cmd("quit")
        assert machine.wait() == 0
        machine.gone()


def test_quit_is_obeyed_while_a_command_waits() -> None:
    """Two sessions: one's stop waits for a device host that does not answer, the other's quit does not."""
    with with_qmp(*CONSOLE, "-monitor", "none") as machine, machine.qmp() as monitor:
        machine.says("ready")
        os.kill(machine.roles()["devhost0"], signal.SIGSTOP)
        with socket.socket(socket.AF_UNIX):
            machine.kill(signal.SIGTERM)
        assert machine.wait() == 0
        assert monitor is not None
        machine.gone()


# ---- what processes look like ---------------------------------------------------------------------------
def test_descriptors_of_islands(disc: Path, tmp_path: Path) -> None:
    """Islands have the segment, their sockets and their log; nothing of the terminal, no client."""
    serial = tmp_path / "serial"
    with with_qmp("-serial", f"file:{serial}", "-smp", "2", "-cdrom", str(disc)) as machine:
        until(lambda: serial.exists() and b"ready" in serial.read_bytes(), "the guest")
        roles = machine.roles()
        ours = {os.readlink(f"/proc/{machine.process.pid}/fd/{n}") for n in (0, 1, 2)}
        for role in ROLES - {"coordinator", "nursery"}:
            targets = {}
            for entry in Path(f"/proc/{roles[role]}/fd").iterdir():
                targets[int(entry.name)] = os.readlink(entry)
            assert targets[0] == "/dev/null"
            assert targets[1] == targets[2] and targets[1].endswith(f"/{role}.log")
            assert not ours & set(targets.values())
            assert ("/memfd:atoll-segment (deleted)" in targets.values()) == (role != "blockd")
            files = {
                name for name in targets.values() if name.startswith("/") and not name.startswith("/memfd")
            }
            expected = {"/dev/null", targets[1], *([str(disc)] if role == "blockd" else [])}
            assert files == expected
        assert len(list(Path(f"/proc/{roles['nursery']}/task").iterdir())) == 1  # a fork of it is safe


def test_the_runtime_folder_is_private() -> None:
    with Machine(*CONSOLE) as machine:
        machine.says("ready")
        for folder in (machine.runtime / "atoll", *(machine.runtime / "atoll").glob("*-*")):
            assert folder.stat().st_mode & 0o777 == 0o700
        machine.type(b"O")
        assert machine.wait() == 0


def test_without_commits_a_device_host_takes_the_machine_along() -> None:
    with Machine(*CONSOLE, "-x-commits", "off") as machine:
        machine.says("ready")
        os.kill(machine.roles()["devhost0"], signal.SIGKILL)
        assert machine.wait() == 1
        assert "devhost0 (pid" in machine.errors() and "\n" not in machine.errors()
        machine.gone()
