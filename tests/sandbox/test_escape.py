"""Attempts to get out of each role's sandbox, from processes that are in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.attempts import DEADLY, NAMES, NEW, REFUSALS, SECRET

ROLES = ("vcpu", "devhost", "blockd")
#: what a role may do after all: host stubs of a vCPU are made at run time
ALLOWED = {("vcpu", "executable memory")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / SECRET).write_text("nobody's business")
    (tmp_path / "allowed").mkdir()
    return tmp_path


@pytest.fixture
def victim() -> Iterator[int]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process.pid
        assert process.poll() is None
        process.kill()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("attempt", NAMES)
@pytest.mark.parametrize("role", ROLES)
def test_nothing_gets_out(role: str, attempt: str, folder: Path, victim: int) -> None:
    done = run("-m", "tests.sandbox.island", role, str(folder), str(victim), attempt)
    if attempt == "program in memory" and role != "vcpu":  # it is stopped one call earlier
        assert set(map(int, done.stdout.split())) <= set(REFUSALS), done.stderr
    elif attempt in DEADLY:
        assert done.returncode == -signal.SIGSYS, (done.returncode, done.stdout, done.stderr)
    else:
        results = [int(word) for word in done.stdout.split()]
        assert len(results) == 2, done.stderr
        wanted = (0,) if (role, attempt) in ALLOWED else REFUSALS
        assert set(results) <= set(wanted), (results, done.stderr)
    assert (folder / SECRET).read_text() == "nobody's business"
    assert not (folder / NEW).exists()
    os.kill(victim, 0)


def test_a_refusal_is_logged_once() -> None:
    code = """
import socket
from coordinator.contract.sandbox import Sandbox
sandbox = Sandbox("devhost", "devhost7", True)
sandbox.enter()
sandbox.seal()
for _ in range(3):
    try:
        socket.socket(socket.AF_INET)
    except PermissionError:
        print("refused")
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * 3
    assert done.stderr.splitlines() == ["sandbox: devhost7: system call 41 (socket) refused"]


def test_off_does_nothing() -> None:
    code = """
from coordinator.contract.sandbox import Sandbox
sandbox = Sandbox("devhost", "devhost0", False)
sandbox.enter()
sandbox.seal()
print([line.split()[1] for line in open("/proc/self/status") if line.startswith(("NoNewPrivs", "Seccomp:"))])
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['0', '0']"


def test_a_kernel_without_landlock_is_said_once_and_the_rest_is_done() -> None:
    code = """
import errno, logging, os
from coordinator.contract import sandbox
logging.basicConfig(format="%(message)s")
class Older:  # landlock_create_ruleset(2) where there is no Landlock
    def __getattr__(self, name): return getattr(real, name)
    def sandbox_landlock_version(self): return -errno.ENOSYS
real, sandbox.lib = sandbox.lib, Older()
status = os.open("/proc/self/status", os.O_RDONLY)
confined = sandbox.Sandbox("blockd", "blockd", True)
confined.enter()
confined.seal()
lines = os.pread(status, 9999, 0).decode().splitlines()
print(*[line for line in lines if line.startswith(("NoNew", "Seccomp:"))])
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["NoNewPrivs:", "1", "Seccomp:", "2"]
    assert done.stderr.splitlines() == ["sandbox: goes without Landlock: Function not implemented"]
