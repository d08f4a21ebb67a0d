"""Raw images: bytes, holes, sizes, and one line for every way in which a file cannot be used."""

import errno
import os
from pathlib import Path

import pytest

from blockd.export_image import open_image
from blockd.image import Extent
from blockd.qcow2.create import Options, create
from blockd.raw import RawImage
from coordinator.contract.config import Export, Media
from coordinator.contract.errors import BlockError
from tests.blockd.conftest import make_image

NOBODY = 65534


def read(image: RawImage, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    image.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_reads_what_was_written(tmp_path: Path) -> None:
    file = make_image(tmp_path / "disk", 4096, 0xAA)
    image = RawImage(file)
    assert image.size == 4096
    image.write(512, b"x" * 512)
    image.write(1536, memoryview(b"y" * 512), fua=True)
    image.flush()
    assert read(image, 0, 2048) == b"\xaa" * 512 + b"x" * 512 + b"\xaa" * 512 + b"y" * 512
    image.close()
    assert Path(file).read_bytes()[512:1024] == b"x" * 512
    assert os.path.getsize(file) == 4096


@pytest.mark.parametrize("unmap", [True, False])
def test_write_zeroes(tmp_path: Path, unmap: bool) -> None:
    file = make_image(tmp_path / "disk", 3 << 20, 0xAA)
    image = RawImage(file)
    image.write_zeroes(1 << 20, 1 << 20, unmap=unmap, fast=False, fua=True)
    image.close()
    expected = b"\xaa" * (1 << 20) + bytes(1 << 20) + b"\xaa" * (1 << 20)
    assert Path(file).read_bytes() == expected


def test_write_zeroes_where_the_file_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr("blockd.raw._fallocate", refuse)
    file = make_image(tmp_path / "disk", 3 << 20, 0xAA)
    image = RawImage(file)
    image.trim(0, 4096)  # a hint
    with pytest.raises(OSError) as caught:
        image.write_zeroes(512, 512, unmap=True, fast=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    image.write_zeroes(512, (2 << 20) + 512, unmap=True, fast=False)
    image.close()
    data = Path(file).read_bytes()
    assert data[:512] == b"\xaa" * 512 and data[(2 << 20) + 1024 :] == b"\xaa" * ((1 << 20) - 1024)
    assert not any(data[512 : (2 << 20) + 1024])


def test_extents_of_a_sparse_file(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    with open(file, "wb") as sparse:
        sparse.truncate(3 << 20)
        os.pwrite(sparse.fileno(), b"d" * (1 << 20), 1 << 20)
    image = RawImage(str(file))
    hole, data = Extent(1 << 20, True, True), Extent(1 << 20, False, False)
    assert list(image.extents(0, 3 << 20)) == [hole, data, hole]
    assert list(image.extents((1 << 20) + 512, 1024)) == [Extent(1024, False, False)]
    assert list(image.extents(512, 512)) == [Extent(512, True, True)]
    image.close()


def test_a_cd_is_padded_to_a_whole_sector(tmp_path: Path) -> None:
    file = make_image(tmp_path / "cd.iso", 2560, 0x11)
    image = RawImage(file, read_only=True, granularity=2048, pad=True)
    assert image.size == 4096
    assert read(image, 2048, 2048) == b"\x11" * 512 + bytes(1536)
    assert read(image, 3072, 512) == bytes(512)
    image.close()


def test_a_file_that_has_shrunk_is_an_error(tmp_path: Path) -> None:
    file = make_image(tmp_path / "disk", 4096, 0x11)
    image = RawImage(file, read_only=True)
    os.truncate(file, 1024)
    with pytest.raises(OSError) as caught:
        read(image, 512, 1024)
    assert caught.value.errno == errno.EIO
    image.close()


def check_refused(file: str, words: str, number: int, read_only: bool = False) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BlockError) as caught:
        RawImage(file, read_only=read_only)
    text = str(caught.value)
    assert file in text and words in text and "\n" not in text
    assert caught.value.errno == number
    assert os.listdir("/proc/self/fd") == before


def test_missing(tmp_path: Path) -> None:
    check_refused(str(tmp_path / "none"), "No such file", errno.ENOENT)


def test_directory(tmp_path: Path) -> None:
    check_refused(str(tmp_path), "directory", errno.EISDIR)
    check_refused(str(tmp_path), "directory", errno.EISDIR, read_only=True)


def test_empty(tmp_path: Path) -> None:
    """An image may be empty; no drive has such a medium."""
    file = make_image(tmp_path / "disk", 0)
    image = RawImage(file)
    assert image.size == 0 and list(image.extents(0, 0)) == []
    image.close()
    before = os.listdir("/proc/self/fd")
    for media in Media:
        with pytest.raises(BlockError, match=f"{file}: is empty"):
            open_image(Export("x", file, media=media))
    create(file, Options(0))
    for image_format in ("qcow2", "auto"):
        with pytest.raises(BlockError, match=f"{file}: is empty"):
            open_image(Export("x", file, image_format))
    assert os.listdir("/proc/self/fd") == before


def test_what_cannot_be_written_names_the_callers_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root nothing lacks a permission, so the system call says so."""
    file = make_image(tmp_path / "disk")
    opened = os.open

    def refuse(path: str, flags: int, *mode: int) -> int:
        if path == file and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    text = f"{file}: cannot be opened for writing: Permission denied"
    for option in ("readonly=on", "-r"):
        with pytest.raises(BlockError) as caught:
            open_image(Export("x", file, read_only_option=option))
        assert str(caught.value) == f"{text} ({option} asks for less)"
    with pytest.raises(BlockError) as caught:
        RawImage(file)
    assert str(caught.value) == text


@pytest.mark.parametrize("option", ["format=raw", "-f raw"])
def test_a_probed_disk_names_the_callers_option(tmp_path: Path, option: str) -> None:
    image = open_image(Export("x", make_image(tmp_path / "disk"), "auto", raw_option=option))
    with pytest.raises(OSError, match=f"say {option}$"):
        image.write(0, b"QFI\xfb")
    image.close()


def test_odd_size(tmp_path: Path) -> None:
    check_refused(make_image(tmp_path / "disk", 1000, 1), "1000 is not a multiple of 512", errno.EINVAL)


def test_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    check_refused(str(tmp_path / "fifo"), "no file", errno.EINVAL, read_only=True)


def test_name_that_is_none() -> None:
    with pytest.raises(BlockError):
        RawImage("a\0b")


def test_unreadable_and_unwritable(runtime: Path) -> None:
    file = make_image(runtime / "disk", 512)
    runtime.chmod(0o755)  # so that another user gets as far as the file
    os.chmod(file, 0o444)
    privileged = os.geteuid() == 0
    if privileged:
        os.seteuid(NOBODY)
    try:
        check_refused(file, "cannot be opened for writing: Permission denied", errno.EACCES)
        if privileged:
            RawImage(file, read_only=True).close()
    finally:
        if privileged:
            os.seteuid(0)
    os.chmod(file, 0)
    if privileged:
        os.seteuid(NOBODY)
    try:
        check_refused(file, "Permission denied", errno.EACCES, read_only=True)
    finally:
        if privileged:
            os.seteuid(0)


def test_two_writers_and_a_reader_beside_a_writer(tmp_path: Path) -> None:
    file = make_image(tmp_path / "disk", 512)
    writer = RawImage(file)
    check_refused(file, "is locked", errno.EAGAIN)
    check_refused(file, "is locked", errno.EAGAIN, read_only=True)
    writer.close()
    readers = [RawImage(file, read_only=True) for _ in range(2)]
    check_refused(file, "is locked", errno.EAGAIN)
    for reader in readers:
        reader.close()
    RawImage(file).close()
