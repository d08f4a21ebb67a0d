"""A run that is ended early leaves nothing behind, and goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.lab.results import Migration, read
from tests.system.machine import until

pytestmark = [pytest.mark.boot, pytest.mark.timeout(600)]

PATIENCE = 300.0


def lab(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "coordinator.cli.main", "lab", "pingpong", "--count", "4"]
    return subprocess.Popen(
        [*command, "--results", str(folder / "r.jsonl"), *more],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def migrations(folder: Path) -> list[int]:
    path = folder / "r.jsonl"
    return [one.index for one in read(path)[0] if isinstance(one, Migration)] if path.exists() else []


def processes(folder: Path) -> list[str]:
    """Those that were started with this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.fsencode(f"TMPDIR={folder}\0") in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def leftovers(folder: Path) -> list[str]:
    """Processes, and files but the results."""
    return processes(folder) + [path.name for path in folder.iterdir() if path.name != "r.jsonl"]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("l")  # a short name: sockets are below it


def test_ctrl_c_and_resume(folder: Path) -> None:
    first = lab(folder)
    until(lambda: migrations(folder) or first.poll() is not None, "a migration", PATIENCE)
    first.send_signal(signal.SIGINT)
    out, errors = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("atoll lab: ended early") and "Traceback" not in errors
    assert out.startswith("experiment") and leftovers(folder) == []
    done = migrations(folder)
    assert 0 < len(done) < 4

    again = lab(folder, "--resume")
    out, errors = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, errors
    assert migrations(folder) == [0, 1, 2, 3] and "4 of 4" in out and leftovers(folder) == []


def test_no_machine_outlives_a_laboratory_that_is_killed(folder: Path) -> None:
    killed = lab(folder)
    until(lambda: migrations(folder) or killed.poll() is not None, "a migration", PATIENCE)
    killed.kill()
    killed.communicate(timeout=PATIENCE)
    until(lambda: not processes(folder), "their end")
