"""qcow2 images as exports: NBD's clients on one side, QEMU's tools on the other."""

import os
import random
from pathlib import Path

import pytest

from blockd.export_image import open_image
from coordinator.contract.config import Export
from coordinator.contract.errors import BlockError
from tests.blockd.conftest import Serve
from tests.blockd.qcow2.support import make, qemu_check, qemu_reads, read
from tests.support.tools import run_tool

MIB = 1 << 20


def test_nbd_clients_write_a_qcow2_image(serve: Serve, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3 * MIB) + bytes(MIB)
    (tmp_path / "plain").write_bytes(data)
    file = make(tmp_path / "disk.qcow2", 4 * MIB)
    uri = f"nbd+unix:///hd0?socket={serve(Export('hd0', file, 'qcow2'))}"
    run_tool("nbdcopy", str(tmp_path / "plain"), uri)
    run_tool("qemu-io", "-f", "raw", "-c", "write -P 5 1M 4k", "-c", "discard 2M 1M", "-c", "flush", uri)
    expected = data[:MIB] + b"\x05" * 4096 + data[MIB + 4096 : 2 * MIB] + bytes(2 * MIB)
    run_tool("nbdcopy", uri, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == expected
    lines = [line.split()[:3] for line in run_tool("nbdinfo", "--map", uri).splitlines()]
    assert lines == [["0", str(2 * MIB), "0"], [str(2 * MIB), str(2 * MIB), "3"]]


def test_an_image_that_is_served_is_locked_and_clean_afterwards(tmp_path: Path) -> None:
    file = make(tmp_path / "disk.qcow2", 4 * MIB)
    image = open_image(Export("hd0", file, "auto"))
    assert image.format == "qcow2"
    image.write(MIB, b"abc" * 1000)
    assert "lock" in run_tool("qemu-img", "check", file, status=1)
    with pytest.raises(BlockError, match="locked"):
        open_image(Export("hd0", file, "qcow2"))
    image.close()
    qemu_check(file)
    qemu_reads(file, bytes(MIB) + b"abc" * 1000 + bytes(3 * MIB - 3000), tmp_path)


def test_a_raw_disk_that_was_guessed_stays_raw(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.write_bytes(b"Q" + bytes(MIB - 1))
    image = open_image(Export("hd0", str(file), "auto"))
    assert image.format == "raw"
    for offset, data in ((0, b"QFI\xfb" + bytes(508)), (1, b"FI\xfb")):
        with pytest.raises(PermissionError):
            image.write(offset, data)
    image.write(0, b"QFI" + bytes(509))
    image.write(512, b"QFI\xfb")
    assert read(image, 512, 4) == b"QFI\xfb"
    image.close()
    image = open_image(Export("hd0", str(file), "raw"))
    image.write(0, b"QFI\xfb")  # whoever says raw means it
    image.close()
    assert os.path.getsize(file) == MIB


def test_a_format_that_is_not_known(tmp_path: Path) -> None:
    with pytest.raises(BlockError, match="known: auto, qcow2, raw"):
        open_image(Export("hd0", str(tmp_path / "x"), "vmdk"))


def test_backing_files_elsewhere_must_be_allowed(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "base").write_bytes(b"b" * MIB)
    base = str(tmp_path / "a" / "base")
    file = make(tmp_path / "b" / "top", MIB, backing_file=base, backing_format="raw")
    with pytest.raises(BlockError, match="outside the image's folder"):
        open_image(Export("hd0", file, "qcow2"))
    image = open_image(Export("hd0", file, "qcow2", backing_allowed=(str(tmp_path / "a"),)))
    assert read(image) == b"b" * MIB
    image.close()


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "auto"])
def test_writes_of_a_snapshot_are_thrown_away(tmp_path: Path, image_format: str) -> None:
    file = make(tmp_path / "disk", MIB)
    if image_format == "raw":
        Path(file).write_bytes(b"r" * MIB)
    before = Path(file).read_bytes()
    image = open_image(Export("hd0", file, image_format, snapshot=True))
    start = read(image, 0, 1024)
    image.write(512, b"new")
    image.flush()
    assert read(image, 0, 1024) == start[:512] + b"new" + start[515:]
    assert (image.size, image.file, image.read_only) == (MIB, file, False)
    image.close()
    assert Path(file).read_bytes() == before and os.listdir(tmp_path) == ["disk"]
