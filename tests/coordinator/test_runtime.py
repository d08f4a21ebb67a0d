"""Runtime folders: private, one a machine, and gone with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator import runtime
from coordinator.contract.errors import ConfigError


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="at-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def test_private_named_and_removed(base: Path) -> None:
    with runtime.folder("a vm/with ..odd?name") as folder:
        assert folder == base / "atoll" / f"a_vm_with_..odd_name-{os.getpid()}"
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "deep").mkdir()
    assert not folder.exists()


def test_removed_after_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), runtime.folder("vm") as folder:
        raise ZeroDivisionError
    assert not folder.exists()


def test_what_a_killed_machine_left_is_swept_a_living_one_is_not(base: Path) -> None:
    program = (
        "from coordinator import runtime\n"
        "with runtime.folder('other') as folder:\n"
        "    print(folder, flush=True)\n"
        "    input()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdin is not None
    theirs = Path(other.stdout.readline().strip())
    with runtime.folder("vm"):
        assert theirs.exists()
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    (theirs / "vcpu0.log").write_text("")
    assert theirs.exists()
    (base / "atoll" / "a file").write_text("not a machine's")
    elsewhere = base / "elsewhere"
    elsewhere.mkdir()
    (base / "atoll" / "link-1").symlink_to(elsewhere)
    with runtime.folder("vm"):
        assert not theirs.exists() and elsewhere.exists()
        assert (base / "atoll" / "a file").exists()


def test_too_long_a_path(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / ("n" * 100)))
    with pytest.raises(ConfigError, match="XDG_RUNTIME_DIR"), runtime.folder("vm"):
        pass


def test_without_a_runtime_dir_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert runtime.base().name == f"atoll-{os.getuid()}"
