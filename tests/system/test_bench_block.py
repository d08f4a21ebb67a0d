"""The block section of `make bench` runs with a small disk, and says what it leaves out."""

import shutil
from pathlib import Path

import pytest

from tests.support.tools import require_tool
from tests.system import bench_block
from tests.system.bench_block import MIB, Plan

SMALL = Plan(
    disk=8 * MIB, slow_disk=4 * MIB, sparse_disk=1 << 32, seconds=0.1, allocations=32, touches=64, repeats=1
)


def test_small(tmp_path: Path) -> None:
    require_tool("qemu-nbd")
    results = bench_block.run(SMALL, print, tmp_path)
    assert not results.failures
    told = bench_block.report(results)
    for row in results.rows:
        assert row.ratio is not None and row.ratio > 0
        assert row.name in told
    assert {"convert raw to qcow2", "convert raw to qcow2, zstd"} <= {row.name for row in results.rows}
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    results = bench_block.run(SMALL, print, tmp_path)
    assert results.skipped == [
        "skipped: the block section: qemu-img is not installed (Debian's package qemu-utils)"
    ]
    assert results.skipped[0] in bench_block.report(results)


def test_wrong_copies_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convert of ours that copies nothing is found out."""
    require_tool("qemu-nbd")
    monkeypatch.setattr(shutil, "which", lambda name: None if name in ("fio", "nbdcopy") else name)
    broken = ("sh", "-c", 'for target; do :; done; qemu-img create -q -f raw "$target" 8M', "sh")
    monkeypatch.setitem(bench_block.COMMANDS, (bench_block.ATOLL, "img"), broken)
    results = bench_block.run(SMALL, print, tmp_path)
    assert len(results.failures) == 6 and all("qemu-img" in text for text in results.failures)
    assert len(results.skipped) == 8
