"""External data files: guest clusters in a file of their own, with QEMU's tools on the other side."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from blockd.opening import open_qcow2
from blockd.qcow2 import operations
from blockd.qcow2.backing import Chain
from blockd.qcow2.check import check, repair
from coordinator.contract.errors import BlockError
from tests.blockd.qcow2.support import Model, ours, qemu_check, qemu_reads, read
from tests.blockd.qcow2.test_img import both_json, img, qemu_img
from tests.support.tools import run_tool

SIZE = 4 << 20


def make_image(folder: Path, maker: str, raw: bool) -> str:
    file = str(folder / "disk.qcow2")
    options = "data_file=disk.data,cluster_size=4k" + (",data_file_raw=on" if raw else "")
    if maker == "theirs":
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, file, str(SIZE))
    else:
        img("create", "-q", "-f", "qcow2", "-o", options, file, str(SIZE))
    return file


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu-img looks for a new image's data file in the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("maker", ["ours", "theirs"])
def test_both_sides(tmp_path: Path, maker: str, raw: bool) -> None:
    file = make_image(tmp_path, maker, raw)
    both_json("info", "--output=json", file)
    model = Model(SIZE, 4096)
    rnd = random.Random(5)
    for turn in range(3):
        image = open_qcow2(file)
        for _ in range(40):
            ours(image, model, rnd, whole=False)
        assert read(image) == model.data
        image.close()
        image = open_qcow2(file, read_only=True)
        assert not check(image).lines
        image.close()
        qemu_check(file)
        qemu_reads(file, bytes(model.data), tmp_path)
        byte = turn + 1
        run_tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P {byte} {turn}M 70000", file)
        model.data[turn << 20 : (turn << 20) + 70000] = bytes([byte]) * 70000
        if raw:
            assert (tmp_path / "disk.data").read_bytes() == model.data
    both_json("map", "--output=json", file)
    assert img("check", file) == qemu_img("check", file)


def test_what_lay_in_the_data_file_does_not_come_to_light(tmp_path: Path) -> None:
    file = make_image(tmp_path, "ours", False)
    (tmp_path / "disk.data").write_bytes(b"\xaa" * SIZE)
    image = open_qcow2(file)
    image.write(4096 + 100, b"x" * 10)
    assert read(image, 0, 12288) == bytes(4196) + b"x" * 10 + bytes(12288 - 4206)
    image.close()
    qemu_check(file)


def test_size_and_what_cannot_be(tmp_path: Path) -> None:
    file = make_image(tmp_path, "ours", True)
    image = open_qcow2(file)
    image.write(0, b"q" * SIZE)
    with pytest.raises(OSError, match="no snapshots"):
        operations.create(image, "one")
    with pytest.raises(OSError, match="nothing is compressed"):
        image.write_compressed(0, b"c")
    operations.resize(image, SIZE * 2)
    assert read(image) == b"q" * SIZE + bytes(SIZE)
    operations.resize(image, SIZE // 2)
    image.close()
    assert os.path.getsize("disk.data") == SIZE // 2
    qemu_check(file)
    qemu_reads(file, b"q" * (SIZE // 2), tmp_path)
    image = open_qcow2(file, repair=True)
    assert not repair(image, everything=True).corruptions
    image.close()


def test_a_data_file_elsewhere_must_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = str(tmp_path / "images" / "disk.qcow2")
    img("create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/secret", file, "1M")
    with pytest.raises(BlockError, match="data file .* outside"):
        open_qcow2(file, read_only=True)
    open_qcow2(file, read_only=True, chain=Chain((str(tmp_path),))).close()
    os.unlink(file)
    img("create", "-q", "-f", "qcow2", "-o", "data_file=disk.qcow2", file, "1M", status=None)
    with pytest.raises(BlockError):
        open_qcow2(file, read_only=True)
