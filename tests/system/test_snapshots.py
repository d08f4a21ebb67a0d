"""Snapshots of the whole machine: memory, devices and disks go back as one, or nothing does.

The guest (tests/guests/scribe) counts in memory and on its disk, and says "bad" where the two are not of one
moment. qemu-img judges the disks, QEMU itself what QMP says.
"""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.migrate.machines import LINE, Moved
from tests.support.tools import require_tool, run_tool
from tests.system.machine import ATOLL, Machine, _listens, until

#: of the guest: it uses so many sectors in turn
SECTORS, SECTOR = 32, 512
SIZE = 1 << 20
FIRST, SECOND = "ide0-hd0", "ide0-hd1"
BOTH = [FIRST, SECOND]


class Scribe(Moved):
    """A machine with the guest; each disk is a file with more of -drive."""

    def __init__(self, *disks: str, options: tuple[str, ...] = (), **more: Any) -> None:
        drives = [f"-drive=if=ide,index={index},file={disk}" for index, disk in enumerate(disks)]
        words = [word for drive in drives for word in drive.split("=", 1)]
        super().__init__(*words, *options, guest="scribe", **more)

    def job(self, name: str, **arguments: Any) -> str | None:
        """To its end, and dismissed; its error."""
        self.cmd(name, job_id="job0", **arguments)
        until(lambda: self.cmd("query-jobs")[0]["status"] == "concluded", "the end of a job")
        (job,) = self.cmd("query-jobs")
        self.cmd("job-dismiss", id="job0")
        assert job["type"] == name and job["id"] == "job0"
        error: str | None = job.get("error")
        return error

    def save(self, tag: str, devices: list[str] = BOTH, vmstate: str = FIRST) -> str | None:
        return self.job("snapshot-save", tag=tag, vmstate=vmstate, devices=devices)

    def load(self, tag: str, devices: list[str] = BOTH, vmstate: str = FIRST) -> str | None:
        return self.job("snapshot-load", tag=tag, vmstate=vmstate, devices=devices)

    def monitor(self, line: str) -> str:
        return str(self.cmd("human-monitor-command", command_line=line)).replace("\r", "")

    def __enter__(self) -> Scribe:
        return self

    def quit(self) -> str:
        text = super().quit()
        if self._qmp is not None:
            with contextlib.suppress(EOFError, OSError):  # it has closed the session first
                self._qmp.close()
            self._qmp = None
        return text

    @property
    def numbers(self) -> list[int]:
        assert "bad" not in self.text
        return [int(number, 16) for number in LINE.findall(self.text)]


@pytest.fixture
def disks(tmp_path: Path) -> tuple[str, str]:
    files = str(tmp_path / "first.qcow2"), str(tmp_path / "second.qcow2")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", files[0], str(SIZE))
    how = "extended_l2=on,cluster_size=128k"
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", how, files[1], "8M")
    return files


@pytest.fixture
def scribe(disks: tuple[str, str]) -> Iterator[Scribe]:
    with Scribe(*disks) as machine:
        machine.counts(5)
        yield machine


def clean(*files: str) -> None:
    for file in files:
        assert "No errors were found" in run_tool("qemu-img", "check", file)


def tags(file: str) -> dict[str, int]:
    """The snapshots of an image: size of the machine's state by tag."""
    told = json.loads(run_tool("qemu-img", "info", "-U", "--output=json", file))
    return {each["name"]: each["vm-state-size"] for each in told.get("snapshots", [])}


def written(last: int) -> list[int]:
    """What each sector holds when ``last`` was the last number."""
    found = [0] * SECTORS
    for n in range(max(1, last - SECTORS + 1), last + 1):
        found[n % SECTORS] = n
    return found


def holds(plain: bytes) -> list[int]:
    words = struct.unpack(f"<{SECTORS * SECTOR // 4}I", plain[: SECTORS * SECTOR])
    sectors = [set(words[128 * i : 128 * i + 128]) for i in range(SECTORS)]
    assert all(len(sector) == 1 for sector in sectors)
    return [sector.pop() for sector in sectors]


def test_memory_and_disks_go_back_as_one(scribe: Scribe, disks: tuple[str, str], tmp_path: Path) -> None:
    scribe.counts(SECTORS + 20)
    assert scribe.save("x") is None
    scribe.counts(SECTORS + 50)
    assert scribe.state == "running"
    before = len(scribe.numbers)
    assert scribe.load("x") is None
    scribe.counts(SECTORS + 5)
    numbers = scribe.numbers
    back = next(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1)
    assert back >= before and numbers == [*range(1, back + 1), *range(numbers[back], numbers[-1] + 1)]
    assert numbers[back] < back - SECTORS
    scribe.quit()
    clean(*disks)
    assert tags(disks[1]) == {"x": 0} and tags(disks[0])["x"] > 1 << 12
    plain = tmp_path / "plain"
    run_tool("qemu-img", "convert", "-l", "snapshot.name=x", "-O", "raw", disks[0], str(plain))
    # it was saved between saying one number and saying the next, whose sector may be written
    assert holds(plain.read_bytes()) in (written(numbers[back] - 1), written(numbers[back]))


def test_events_and_errors_are_those_of_qemu(disks: tuple[str, str], tmp_path: Path) -> None:
    require_tool("qemu-system-x86_64")
    folder = tmp_path / "theirs"
    folder.mkdir()
    other = str(folder / "disk.qcow2")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", other, str(SIZE))
    path = folder / "qmp"
    command = ["qemu-system-x86_64", "-accel", "tcg", "-nodefaults", "-display", "none", "-m", "16"]
    command += ["-blockdev", f"driver=qcow2,node-name={FIRST},file.driver=file,file.filename={other}"]
    command += ["-device", f"ide-hd,drive={FIRST}", "-qmp", f"unix:{path},server=on,wait=off"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until(lambda: _listens(path), "the socket")
            monitor = QEMUMonitorProtocol(str(path))
            monitor.connect()
            theirs = _session(monitor)
        finally:
            process.kill()
            with contextlib.suppress(EOFError, OSError):
                monitor.close()
    with Scribe(disks[0]) as ours:
        ours.counts(1)
        assert _session(ours.qmp) == theirs


STEPS: list[tuple[str, dict[str, Any]]] = [
    ("query-jobs", {}),
    ("snapshot-save", {"tag": "x", "vmstate": FIRST, "devices": [FIRST]}),
    ("snapshot-save", {"tag": "x", "vmstate": FIRST, "devices": [FIRST]}),
    ("snapshot-save", {"tag": "y", "vmstate": "nope", "devices": [FIRST]}),
    ("snapshot-save", {"tag": "y", "vmstate": FIRST, "devices": ["nope"]}),
    ("snapshot-save", {"tag": "y", "vmstate": FIRST, "devices": []}),
    ("snapshot-load", {"tag": "x", "vmstate": FIRST, "devices": [FIRST]}),
    ("query-status", {}),
    ("snapshot-delete", {"tag": "nope", "devices": [FIRST]}),
    ("snapshot-save", {"job-id": "1", "tag": "y", "vmstate": FIRST, "devices": [FIRST]}),
    ("snapshot-save", {"job-id": "", "tag": "y", "vmstate": FIRST, "devices": [FIRST]}),
    ("snapshot-save", {"job-id": "ä", "tag": "y", "vmstate": FIRST, "devices": [FIRST]}),
    ("snapshot-save", {"tag": "y", "vmstate": FIRST}),
    ("snapshot-save", {"tag": 7, "vmstate": FIRST, "devices": [FIRST]}),
    ("job-dismiss", {"id": "nope"}),
    ("stop", {}),
    ("snapshot-save", {"tag": "z", "vmstate": FIRST, "devices": [FIRST]}),
    ("snapshot-load", {"tag": "z", "vmstate": FIRST, "devices": [FIRST]}),
    ("snapshot-delete", {"tag": "x", "devices": [FIRST]}),
]


def _session(monitor: Any) -> list[Any]:
    """All replies, jobs and events."""
    told: list[Any] = []
    for name, arguments in STEPS:
        job = name.startswith("snapshot-")
        reply = monitor.cmd_raw(name, {"job-id": "j0", **arguments} if job else arguments)
        told.append((name, reply.get("return"), reply.get("error", {}).get("desc")))
        if job and "return" in reply:
            until(lambda: monitor.cmd("query-jobs")[0]["status"] == "concluded", "the end of a job")
            told.append(sorted(monitor.cmd("query-jobs")[0].items()))
            again = monitor.cmd_raw(name, {"job-id": "j0", **arguments})
            told.append(again["error"]["desc"])
            told.append(monitor.cmd("job-dismiss", id="j0"))
        events = monitor.get_events(wait=False)
        told.append([(event["event"], event.get("data")) for event in events if "RTC" not in event["event"]])
    return told


# ---- what cannot ----------------------------------------------------------------------------------------
def test_a_disk_that_cannot_is_refused_by_name(disks: tuple[str, str], tmp_path: Path) -> None:
    raw, wide = tmp_path / "raw.img", str(tmp_path / "wide.qcow2")
    raw.write_bytes(bytes(SIZE))
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path / 'data'}", wide, "1M")
    cases = {
        f"{raw},format=raw": "a raw image has no snapshots",
        f"{disks[1]},lease=off": "is not written under a lease",
        f"{disks[1]},snapshot=on": "what is written to it is thrown away",
        wide: "has an external data file",
    }
    for second, why in cases.items():
        with Scribe(disks[0], second) as machine:
            machine.counts(1)
            told = machine.save("x")
            assert told is not None and "\n" not in told
            assert told.startswith(f"Device '{SECOND}' is writable but does not support snapshots: ")
            assert why in told and str(tmp_path) in told
            machine.counts()
            assert tags(disks[0]) == tags(disks[1]) == {}
            if why.startswith("a raw"):
                machine.quit()
                told = refuses(disks[0], second, tag="x")
                assert "does not support snapshots" in told


def refuses(*disks: str, tag: str) -> str:
    """What a machine that cannot go on from a snapshot says at its end."""
    with Scribe(*disks, options=("-loadvm", tag)) as machine:
        assert machine.machine.wait() == 1
        (line,) = machine.machine.errors().splitlines()
        assert line.startswith("atoll run: ")
        return line


def test_devices_that_do_not_make_a_machine(scribe: Scribe) -> None:
    for devices, vmstate, why in (
        ([FIRST], FIRST, f"Device '{SECOND}' is writable and not among the devices; it must go along"),
        (BOTH, "ide1-cd0", "vmstate block device 'ide1-cd0' does not exist"),
        ([*BOTH, "x" * 1000], FIRST, f"No block device node '{'x' * 1000}'"),
    ):
        assert scribe.save("t", devices=devices, vmstate=vmstate) == why
    for devices in ([FIRST], [*BOTH, "x"]):
        told = scribe.load("t", devices=devices)
        assert told is not None and ("must go along" in told or told == "No block device node 'x'")
    scribe.counts()
    assert scribe.monitor("info snapshots") == "There is no snapshot available.\n"


@pytest.mark.parametrize("tag", ["7", "-d", "s p,a=ce", "Ünïcödé 名前", "x" * 255, "../../'\"\\"])
def test_names_that_are_taken_as_they_are(scribe: Scribe, disks: tuple[str, str], tag: str) -> None:
    assert scribe.save(tag) is None
    assert scribe.save(tag) == f"Snapshot '{tag}' already exists in one or more devices"
    scribe.counts()
    assert scribe.load(tag) is None
    scribe.counts()
    assert scribe.save("other") is None
    assert scribe.job("snapshot-delete", tag=tag, devices=BOTH) is None
    assert scribe.load(tag) == f"Snapshot '{tag}' does not exist in one or more devices ({FIRST}, {SECOND})"
    scribe.quit()
    clean(*disks)
    assert list(tags(disks[0])) == list(tags(disks[1])) == ["other"]


def test_names_that_are_refused(scribe: Scribe, disks: tuple[str, str]) -> None:
    for tag in ("", "x" * 256, "x" * 1000, "ü" * 128, "new\nline", "\0", "\x1b[2J", "\ud800"):
        for command in (scribe.save, scribe.load):
            told = command(tag)
            assert told is not None and told.startswith("the ") and "\n" not in told
    scribe.counts()
    assert tags(disks[0]) == {}


def test_jobs(scribe: Scribe) -> None:
    assert scribe.save("x") is None
    for ident, why in (("job0", "already in use"), ("7up", "Invalid job ID"), ("a b", "Invalid job ID")):
        scribe.cmd("snapshot-delete", job_id="job0", tag="nope", devices=BOTH)
        arguments: dict[str, object] = {"job-id": ident, "tag": "x", "vmstate": FIRST, "devices": BOTH}
        told = scribe.qmp.cmd_raw("snapshot-load", arguments)
        assert why in told["error"]["desc"]
        until(lambda: scribe.cmd("query-jobs")[0]["status"] == "concluded", "the end of a job")
        scribe.cmd("job-dismiss", id="job0")
    for number in range(5):  # at once
        scribe.cmd("snapshot-save", job_id=f"j{number}", tag=f"t{number}", vmstate=FIRST, devices=BOTH)
    until(lambda: {job["status"] for job in scribe.cmd("query-jobs")} == {"concluded"}, "the end of all jobs")
    assert [job.get("error") for job in scribe.cmd("query-jobs")] == [None] * 5
    scribe.counts()


# ---- what is no snapshot of this machine ----------------------------------------------------------------
def test_snapshots_of_disks_alone(scribe: Scribe, disks: tuple[str, str]) -> None:
    assert scribe.save("x") is None
    scribe.quit()
    for file in disks:
        run_tool("qemu-img", "snapshot", "-c", "disks", file)
        run_tool("qemu-img", "snapshot", "-c", "later" if file == disks[0] else "x", file)
    run_tool("qemu-img", "snapshot", "-d", "x", disks[1])  # the first of two
    assert "has no machine state" in refuses(*disks, tag="disks")
    assert "does not exist in one or more devices" in refuses(*disks, tag="later")
    assert "was not made together" in refuses(*disks, tag="x")
    with Scribe(*disks) as machine:
        machine.counts(1)
        told = machine.monitor("info snapshots")
    assert [line.split()[:2] for line in told.splitlines()] == [
        ["List", "of"], ["ID", "TAG"], ["1", "x"], ["2", "disks"], ["3", "later"],
        [], ["List", "of"], ["ID", "TAG"], ["2", "disks"], ["3", "x"],
    ]  # fmt: skip


def test_another_machine_is_refused(scribe: Scribe, disks: tuple[str, str]) -> None:
    """Before anything is changed."""
    assert scribe.save("x") is None
    scribe.counts()
    scribe.quit()
    before = [run_tool("sha256sum", file) for file in disks]
    for more, what in (
        (("-smp", "2"), "vcpus: source 1, target 2"),
        (("-vga", "std"), "vga: source False, target True"),
        (("-m", "24"), "memory (bytes)"),
    ):
        with Scribe(*disks, options=(*more, "-loadvm", "x")) as machine:
            assert machine.machine.wait() == 1
            (line,) = machine.machine.errors().splitlines()
            assert line.startswith("atoll run: snapshot x: does not fit this machine: ") and what in line
    assert [run_tool("sha256sum", file) for file in disks] == before
    with Scribe(*disks, options=("-m", "24")) as machine:  # one that runs goes on
        machine.counts(1)
        told = machine.load("x")
        assert told is not None and "memory (bytes)" in told
        machine.counts()
        assert machine.state == "running" and machine.numbers[0] == 1
    clean(*disks)


# ---- what goes wrong half-way ---------------------------------------------------------------------------
def spoil(file: str, place: str) -> None:
    """A byte of the machine's state, which lies in the image as it is."""
    data = bytearray(Path(file).read_bytes())
    parts, at = [], -1
    while (at := data.find(b"ATOLLMIG", at + 1)) >= 0:
        parts.append(at)
    assert len(parts) == 4  # description, state, mark of memory, end
    data[{"state": parts[1] + 100, "memory": parts[2] + 300}[place]] ^= 1
    Path(file).write_bytes(data)


def test_a_spoilt_state_changes_nothing(scribe: Scribe, disks: tuple[str, str]) -> None:
    assert scribe.save("x") is None
    scribe.quit()
    spoil(disks[0], "state")
    with Scribe(*disks) as machine:
        machine.counts(1)
        assert machine.load("x") == "snapshot x: its state has a wrong checksum"
        machine.counts()
        assert machine.state == "running"


def test_spoilt_memory_leaves_no_machine_that_runs(scribe: Scribe, disks: tuple[str, str]) -> None:
    assert scribe.save("x") is None
    scribe.counts()
    scribe.quit()
    spoil(disks[0], "memory")
    with Scribe(*disks, options=("-S",)) as machine:
        machine.cmd("cont")
        machine.counts(1)
        told = machine.load("x")
        assert told is not None and told.startswith("snapshot x: ") and "memory is lost" in told
        machine.stands()
        assert machine.state == "internal-error"
        reply = machine.qmp.cmd_raw("cont")
        assert "Resetting the Virtual Machine is required" in reply["error"]["desc"]
        assert machine.save("y") == "there is no guest to save; the machine needs a reset"
        machine.cmd("system_reset")
        machine.cmd("cont")
        machine.counts()
        assert machine.numbers.count(1) == 2  # it has begun anew
        machine.quit()
    clean(*disks)


def test_a_full_disk_is_told_and_the_guest_goes_on(scribe: Scribe, disks: tuple[str, str]) -> None:
    """blockd may write no larger files from now on (prlimit(2), RLIMIT_FSIZE)."""
    require_tool("prlimit")
    limit = Path(disks[0]).stat().st_size + 100
    run_tool("prlimit", "--pid", str(scribe.machine.roles()["blockd"]), f"--fsize={limit}:")
    told = scribe.save("x")
    assert told is not None and disks[0] in told and "large" in told
    assert scribe.state == "running"
    scribe.counts()
    run_tool("prlimit", "--pid", str(scribe.machine.roles()["blockd"]), "--fsize=unlimited:")
    assert scribe.save("x") is None
    scribe.quit()
    clean(*disks)


# ---- monitor and command line ---------------------------------------------------------------------------
def test_the_monitor(scribe: Scribe, disks: tuple[str, str]) -> None:
    assert scribe.monitor("savevm x") == ""
    (title, heads, row) = scribe.monitor("info snapshots").splitlines()
    assert title == "List of snapshots present on all disks:"
    assert heads == "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"
    assert row.split()[:2] == ["--", "x"] and time.strftime("%Y-%m-") in row
    scribe.counts(20)
    assert scribe.monitor("savevm x") == ""  # in the place of the first
    scribe.counts(20)
    last = scribe.numbers[-1]
    assert scribe.monitor("loadvm x") == ""
    scribe.counts(1)
    assert 20 < scribe.numbers[-1] < last
    assert "does not exist" in scribe.monitor("loadvm y")
    assert scribe.monitor("savevm") == ""
    assert "vm-" in scribe.monitor("info snapshots")
    assert scribe.monitor("delvm x") == scribe.monitor("delvm nope") == ""
    assert " x " not in scribe.monitor("info snapshots")
    assert "too many words" in scribe.monitor("savevm a b") and "too few words" in scribe.monitor("loadvm")
    scribe.quit()
    clean(*disks)


def test_paused_machines_stay_paused(scribe: Scribe, disks: tuple[str, str]) -> None:
    scribe.cmd("stop")
    assert scribe.save("x") is None
    assert scribe.state == "paused"
    scribe.cmd("cont")
    scribe.counts()
    scribe.cmd("stop")
    assert scribe.load("x") is None
    assert scribe.state == "paused"
    scribe.cmd("cont")
    scribe.counts()
    assert scribe.load("x") is None  # saved paused, loaded running: it goes on
    scribe.counts()
    scribe.quit()
    for options in (("-loadvm", "x"), ("-loadvm", "x", "-S")):
        with Scribe(*disks, options=options) as machine:
            if "-S" in options:
                until(partial(_is, machine, "paused"), "a machine that has loaded")
                assert machine.text == ""
                machine.cmd("cont")
            machine.counts(SECTORS + 10)
            assert 1 < machine.numbers[0] < 200
            machine.quit()
    clean(*disks)


def _is(machine: Scribe, state: str) -> bool:
    return machine.state == state


def test_a_tag_that_is_not_there_ends_the_start(disks: tuple[str, str]) -> None:
    told = refuses(*disks, tag="x")
    assert told == f"atoll run: Snapshot 'x' does not exist in one or more devices ({FIRST}, {SECOND})"
    with Machine("-loadvm", "x", guest=True) as machine:
        assert machine.wait() == 1
        assert machine.errors() == "atoll run: No block device can accept snapshots"


def test_atoll_img_knows_them(scribe: Scribe, disks: tuple[str, str]) -> None:
    assert scribe.save("x") is None
    scribe.quit()
    told = run_tool(ATOLL, "img", "snapshot", "-l", disks[0])
    assert told == run_tool("qemu-img", "snapshot", "-l", disks[0])
    run_tool(ATOLL, "img", "snapshot", "-a", "x", disks[0])
    clean(*disks)
    run_tool(ATOLL, "img", "snapshot", "-d", "x", disks[0])
    clean(*disks)
    assert tags(disks[0]) == {}
