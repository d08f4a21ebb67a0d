"""Write leases of whole machines: taken, refused, left behind by force, given back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.system.machine import ATOLL, CONSOLE, Machine, until


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "a disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def lease(disk: Path) -> Any:
    told = subprocess.run(
        [ATOLL, "img", "lease", "--output=json", str(disk)], check=True, stdout=subprocess.PIPE, timeout=60
    )
    return json.loads(told.stdout)


def drive(disk: Path, more: str = "") -> tuple[str, ...]:
    return (*CONSOLE, "-drive", f"file={disk},format=raw{more}")


def test_a_machine_takes_and_gives_back_the_lease_of_its_disk(disk: Path) -> None:
    uuid = "12345678-9abc-def0-1234-56789abcdef0"
    with Machine(*drive(disk), "-uuid", uuid) as machine:
        machine.says("ready")
        told = lease(disk)
        assert (told["state"], told["epoch"], told["vm"], told["uuid"]) == ("held", 1, machine.name, uuid)
        assert (told["pid"], told["holder-dead"]) == (machine.roles()["blockd"], False)
        for more in ("", ",lease=break"):
            with Machine(*drive(disk, more)) as second:
                assert second.wait() == 1
                (line,) = second.errors().splitlines()
                assert line.startswith(f"atoll run: {disk}: is locked")
        assert lease(disk) == told
        machine.type(b"O")
        assert machine.wait() == 0
    assert os.listdir(disk.parent) == [disk.name]


def test_a_machine_that_was_killed_leaves_it_to_the_next(disk: Path) -> None:
    with Machine(*drive(disk)) as machine:
        machine.says("ready")
        machine.kill(signal.SIGKILL)
        machine.wait()
        until(lambda: not machine.roles(), "the end of the islands")
    told = lease(disk)
    assert (told["epoch"], told["holder-dead"]) == (1, True)
    with Machine(*drive(disk)) as successor:
        successor.says("ready")
        assert lease(disk)["epoch"] == 2
        successor.type(b"O")
        assert successor.wait() == 0
    assert os.listdir(disk.parent) == [disk.name]


def test_a_lease_that_nobody_here_can_judge(disk: Path) -> None:
    record = disk.with_name(f"{disk.name}.lease-3")
    record.write_text("of a later version\n")
    with Machine(*drive(disk)) as machine:
        assert machine.wait() == 1
        (line,) = machine.errors().splitlines()
        assert line.startswith(f"atoll run: {disk}: its lease {record} is damaged, or of another version; if")
    for more in (",lease=break", ",readonly=on", ",snapshot=on"):
        record.write_text("of a later version\n")
        with Machine(*drive(disk, more)) as machine:
            machine.says("ready")
            assert os.path.exists(record) == (more != ",lease=break")
            machine.type(b"O")
            assert machine.wait() == 0


def test_words_of_the_option(disk: Path) -> None:
    with Machine(*drive(disk, ",lease=await")) as machine:
        assert machine.wait() == 2
        (line,) = machine.errors().splitlines()
        assert "lease" in line and "break" in line
    with Machine(*drive(disk, ",lease=off")) as machine:
        machine.says("ready")
        assert os.listdir(disk.parent) == [disk.name]
