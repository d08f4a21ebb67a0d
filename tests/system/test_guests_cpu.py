"""Guests of our own for what user mode cannot show: APIC, wake-ups, atomics, changing code, paging."""

from pathlib import Path

import pytest

from tests.support import bare
from tests.support.launch import Launcher

SECTOR = 512


def code_disk(path: Path) -> Path:
    """Sector n, for n in 0 to 63: ``mov $0x1000 + n, %eax; ret``."""
    sectors = (b"\xb8" + (0x1000 + n).to_bytes(4, "little") + b"\xc3" for n in range(64))
    path.write_bytes(b"".join(sector.ljust(SECTOR, b"\0") for sector in sectors).ljust(1 << 20, b"\0"))
    return path


def pattern_disk(path: Path) -> Path:
    """Sector n holds bytes n + 7 i, modulo 256."""
    sectors = (bytes((n + 7 * i) & 0xFF for i in range(SECTOR)) for n in range(64))
    path.write_bytes(b"".join(sectors).ljust(1 << 20, b"\0"))
    return path


def disk(path: Path) -> list[str]:
    return ["-drive", f"file={path},format=raw,if=ide,index=0"]


@pytest.mark.parametrize(("name", "cpus"), [("apic", 4), ("wake", 4), ("atomic", 4)])
def test_processors(launcher: Launcher, tmp_path: Path, name: str, cpus: int) -> None:
    with bare.start(launcher, tmp_path, name, cpus) as guest:
        assert bare.failures(guest) == []


def test_code_that_changes(launcher: Launcher, tmp_path: Path) -> None:
    with bare.start(launcher, tmp_path, "code", 2, disk(code_disk(tmp_path / "disk"))) as guest:
        assert bare.failures(guest) == []


def test_faults_in_strings_and_shootdown(launcher: Launcher, tmp_path: Path) -> None:
    with bare.start(launcher, tmp_path, "memory", 4, disk(pattern_disk(tmp_path / "disk"))) as guest:
        assert bare.failures(guest) == []


def test_memory_above_four_gib(launcher: Launcher, tmp_path: Path) -> None:
    with bare.start(launcher, tmp_path, "high", ram=4608) as guest:
        assert bare.failures(guest) == []
