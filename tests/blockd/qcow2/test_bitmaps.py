"""Persistent dirty bitmaps, made and read by QEMU's tools, kept true by us."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blockd.opening import open_qcow2
from blockd.qcow2 import operations
from blockd.qcow2.check import check
from tests.blockd.qcow2.support import qemu_check
from tests.support.tools import run_tool

MIB = 1 << 20
GRANULE = 65536


def dirty(file: str, name: str) -> set[int]:
    """Granules that a bitmap says are dirty, as qemu-nbd exports them."""
    socket = file + ".sock"
    # it serves in the background once it listens, and ends with its client
    run_tool("qemu-nbd", "--fork", "-r", "-f", "qcow2", "-B", name, "-k", socket, file)
    told = run_tool("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", f"nbd+unix:///?socket={socket}")
    result: set[int] = set()
    for line in told.splitlines():
        fields = line.split()
        if len(fields) >= 3 and fields[0].isdigit() and fields[2] == "1":
            start, length = int(fields[0]), int(fields[1])
            result |= set(range(start // GRANULE, -(-(start + length) // GRANULE)))
    return result


@pytest.fixture
def file(tmp_path: Path) -> str:
    name = str(tmp_path / "disk.qcow2")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", name, "16M")
    run_tool("qemu-img", "bitmap", "--add", "-g", "64k", name, "one")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 1M 64k", name)
    run_tool("qemu-img", "bitmap", "--add", "--disable", name, "two")
    return name


def flags(file: str) -> dict[str, list[str]]:
    told = json.loads(run_tool("qemu-img", "info", "--output=json", file))
    return {b["name"]: b["flags"] for b in told["format-specific"]["data"]["bitmaps"]}


def test_changes_are_followed(file: str) -> None:
    image = open_qcow2(file)
    image.write(2 * MIB - 100, b"x" * 200)
    image.write_zeroes(8 * MIB, MIB, unmap=True, fast=False)
    image.trim(12 * MIB, GRANULE)
    operations.create(image, "snap")
    image.close()
    qemu_check(file)
    assert flags(file) == {"one": ["auto"], "two": []}
    assert dirty(file, "one") == {16, 31, 32, *range(128, 144), 192}
    image = open_qcow2(file, read_only=True)
    report = check(image)
    assert not report.lines
    image.close()


def test_opening_alone_changes_nothing(file: str) -> None:
    before = Path(file).read_bytes()
    open_qcow2(file).close()
    assert Path(file).read_bytes() == before


def test_a_crash_leaves_the_bitmap_marked(file: str) -> None:
    child = os.fork()
    if not child:
        try:
            open_qcow2(file).write(0, b"x")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert flags(file) == {"one": ["in-use", "auto"], "two": []}
    qemu_check(file, leaks_allowed=True)


def test_the_bit_without_the_extension_is_cleared(tmp_path: Path) -> None:
    name = tmp_path / "plain.qcow2"
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", str(name), "1M")
    data = bytearray(name.read_bytes())
    data[95] |= 1
    name.write_bytes(data)
    open_qcow2(str(name)).close()
    assert name.read_bytes()[95] == 0


def test_a_smaller_disk_after_writes_that_wait_to_be_noted(tmp_path: Path) -> None:
    """Storing the bitmap takes clusters, in the middle of the change of size."""
    name = str(tmp_path / "disk.qcow2")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", name, "256k")
    run_tool("qemu-img", "bitmap", "--add", "-g", "512", name, "one")
    image = open_qcow2(name)
    image.write(0, b"x" * 20000)
    operations.resize(image, 65536)
    image.write(30000, b"y" * 20000)
    image.close()
    qemu_check(name)
