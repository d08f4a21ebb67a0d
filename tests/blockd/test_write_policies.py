"""What a drive's cache=, discard= and detect-zeroes= do to what a client sends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from blockd.hostfile import HostFile
from coordinator.contract.config import DetectZeroes, Export
from tests.blockd.conftest import Serve
from tests.support.nbd_wire import WireClient
from tests.support.tools import run_tool

SIZE = 1 << 20
WRITE, FLUSH, TRIM, ZEROES = 1, 3, 4, 6
CLUSTER = 65536


def make_disk(folder: Path) -> str:
    """A disk full of data."""
    file = str(folder / "disk.qcow2")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", file, str(SIZE))
    run_tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P 7 0 {SIZE}", file)
    return file


def mapped(file: str) -> list[tuple[int, int, bool, bool]]:
    """start, length, zero, has it a place?"""
    rows = json.loads(run_tool("qemu-img", "map", "-U", "--output=json", file))
    return [(row["start"], row["length"], row["zero"], "offset" in row) for row in rows]


@pytest.mark.parametrize("discard", [False, True])
def test_discard(serve: Serve, tmp_path: Path, discard: bool) -> None:
    file = make_disk(tmp_path)
    with WireClient(serve(Export("hd0", file, "qcow2", discard=discard))) as client:
        client.go("hd0")
        client.request(TRIM, 0, CLUSTER)
        client.request(ZEROES, 2 * CLUSTER, CLUSTER)  # a hole is allowed
        client.request(FLUSH)
        found = client.read(0, SIZE)
    kept = b"\7" * CLUSTER
    assert found == (bytes(CLUSTER) if discard else kept) + kept + bytes(CLUSTER) + kept * 13
    rows = mapped(file)
    zero = [(start, place) for start, _, is_zero, place in rows if is_zero]
    assert zero == ([(0, False), (2 * CLUSTER, False)] if discard else [(2 * CLUSTER, True)])


@pytest.mark.parametrize("mode", list(DetectZeroes))
def test_detect_zeroes(serve: Serve, tmp_path: Path, mode: DetectZeroes) -> None:
    file = make_disk(tmp_path)
    with WireClient(serve(Export("hd0", file, "qcow2", detect_zeroes=mode))) as client:
        client.go("hd0")
        client.request(WRITE, 0, CLUSTER, data=bytes(CLUSTER))
        client.request(WRITE, 2 * CLUSTER, CLUSTER, data=bytes(CLUSTER - 1) + b"x")
        client.request(WRITE, 4 * CLUSTER + 512, 512, data=bytes(512))
        client.request(WRITE, 6 * CLUSTER, 0, data=b"")
        client.request(FLUSH)
        found = client.read(0, SIZE)
    kept = b"\7" * CLUSTER
    part = kept[:512] + bytes(512) + kept[1024:]
    assert found == bytes(CLUSTER) + kept + bytes(CLUSTER - 1) + b"x" + kept + part + kept * 11
    zero = [(start, place) for start, _, is_zero, place in mapped(file) if is_zero]
    assert (
        zero
        == {
            DetectZeroes.OFF: [],
            DetectZeroes.ON: [(0, True)],
            DetectZeroes.UNMAP: [(0, False)],
        }[mode]
    )


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
@pytest.mark.parametrize("through", [False, True])
def test_writethrough(
    serve: Serve, tmp_path: Path, through: bool, image_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write is durable when it is answered: seen by the syncs, of the file and of single writes."""
    file = make_disk(tmp_path)
    if image_format == "raw":
        (tmp_path / "disk.qcow2").write_bytes(b"\7" * SIZE)
    done: list[str] = []
    sync, pwritev = HostFile.sync, os.pwritev

    def noted_sync(host: HostFile) -> None:
        done.append("sync")
        sync(host)

    def noted_write(fd: int, buffers: tuple[bytes, ...], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_DSYNC:
            done.append("sync")
        return pwritev(fd, buffers, offset, flags)

    with WireClient(serve(Export("hd0", file, image_format, writethrough=through))) as client:
        client.go("hd0")
        monkeypatch.setattr(HostFile, "sync", noted_sync)
        monkeypatch.setattr(os, "pwritev", noted_write)
        client.request(WRITE, 0, 512, data=b"x" * 512)
        assert ("sync" in done) == through
        monkeypatch.undo()
