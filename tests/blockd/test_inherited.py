"""A block daemon that has taken over from a dead one leaves no leaked clusters behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockd.lease.record import Owner
from blockd.qcow2.image import Qcow2Image
from blockd.service import Service
from coordinator.contract.config import Export
from tests.support.tools import run_tool

MIB = 1 << 20


@pytest.mark.parametrize("inherited", [False, True])
def test_clusters_that_a_dead_process_had_reserved_are_won_back(tmp_path: Path, inherited: bool) -> None:
    file = str(tmp_path / "disk.qcow2")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", file, str(8 * MIB))
    dead = Qcow2Image(file)
    dead.write(0, b"x" * MIB)
    dead.flush()
    dead.close_files()  # as the kernel does it: nothing is given back

    service = Service(owner=Owner("6f0d6b7e-9f0f-4a39-8f5a-2f1f4f5e9a01", "vm"))
    exports = [Export("hd0", file, "qcow2")]
    service.take_over(exports) if inherited else service.leased.open_all(exports)
    service.exports.named("hd0").image.write(3 * MIB, b"y" * 512)
    service.close()
    run_tool("qemu-img", "check", "-q", file, status=0 if inherited else 3)
    with_both = Qcow2Image(file, read_only=True)
    found = bytearray(4 * MIB)
    with_both.read_into(0, memoryview(found))
    with_both.close()
    assert found[:MIB] == b"x" * MIB and found[3 * MIB : 3 * MIB + 512] == b"y" * 512
