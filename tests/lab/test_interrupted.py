"""A run that is ended early leaves nothing behind, and goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.lab.crash.results import Crashes, Kill
from coordinator.lab.results import Migration, Results
from tests.system.machine import until

pytestmark = [pytest.mark.boot, pytest.mark.timeout(600)]

PATIENCE = 300.0


#: what is run, and its table's first word
RUNS = {
    "pingpong": (("pingpong", "--count", "4"), "experiment"),
    "crash": (("crash", "--kills", "4", "--spacing", "50"), "role"),
}


def lab(folder: Path, run: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "coordinator.cli.main", "lab", *RUNS[run][0]]
    return subprocess.Popen(
        [*command, "--results", str(folder / "r.jsonl"), *more],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def done(folder: Path, run: str) -> list[int]:
    """Numbers of the migrations, or kills, that are kept."""
    path = folder / "r.jsonl"
    kind, journal = (Kill, Crashes) if run == "crash" else (Migration, Results)
    return [one.index for one in journal.read(path)[0] if isinstance(one, kind)] if path.exists() else []


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


@pytest.mark.parametrize("run", RUNS)
def test_ctrl_c_and_resume(folder: Path, run: str) -> None:
    first = lab(folder, run)
    until(lambda: done(folder, run) or first.poll() is not None, "the first", PATIENCE)
    first.send_signal(signal.SIGINT)
    out, errors = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("atoll lab: ended early") and "Traceback" not in errors
    assert out.startswith(RUNS[run][1]) and leftovers(folder) == []
    assert 0 < len(done(folder, run)) < 4

    again = lab(folder, run, "--resume")
    out, errors = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, errors
    assert done(folder, run) == [0, 1, 2, 3] and "of 4" in out and leftovers(folder) == []


@pytest.mark.parametrize("run", RUNS)
def test_no_machine_outlives_a_laboratory_that_is_killed(folder: Path, run: str) -> None:
    killed = lab(folder, run)
    until(lambda: done(folder, run) or killed.poll() is not None, "the first", PATIENCE)
    killed.kill()
    killed.communicate(timeout=PATIENCE)
    until(lambda: not processes(folder), "their end")
