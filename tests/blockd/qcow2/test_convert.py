"""``atoll img convert``: what it writes for each of its options, and what stays when it does not get to its
end. qemu-img is the judge."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.img import copying
from blockd.opening import open_qcow2
from tests.blockd.qcow2.support import qemu_check
from tests.blockd.qcow2.test_img import img, qemu_img

MIB = 1 << 20


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A raw disk of several parts, with all that a part can be, small holes, and a ragged end."""
    rnd = random.Random(3)
    file = tmp_path / "mixed.raw"
    with open(file, "wb") as disk:
        disk.write(rnd.randbytes(3 * MIB))
        disk.write(b"text " * (MIB // 2))
        disk.write(bytes(3 * MIB))
        disk.seek(5 * MIB, os.SEEK_CUR)  # a hole
        for _ in range(64):
            disk.write(rnd.randbytes(4096) + bytes(4096))
            disk.seek(12288, os.SEEK_CUR)
        disk.write(rnd.randbytes(65536) + b"words " * 30000 + rnd.randbytes(65536 * 3))
        disk.seek(-disk.tell() % 65536 + 512, os.SEEK_CUR)
        disk.write(b"end".ljust(1024, b"."))
    return file


def junk(file: Path, size: int) -> Path:
    """A file in which nothing is zero."""
    file.write_bytes(b"\xff" * size)
    return file


def same(one: Path, other: Path, kind: str) -> None:
    qemu_img("compare", "-f", "raw", "-F", kind, str(one), str(other))
    if kind == "qcow2":
        qemu_check(str(other))


@pytest.mark.parametrize("options", [
    ("-m", "1"), ("-S", "0"), ("-S", "64k"), ("-S", "1M"), ("-C",), ("-t", "none"), ("-W", "-m", "16"),
], ids=" ".join)
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_options(mixed: Path, tmp_path: Path, kind: str, options: tuple[str, ...]) -> None:
    target = tmp_path / "target"
    img("convert", "-f", "raw", "-O", kind, *options, str(mixed), str(target))
    same(mixed, target, kind)
    back = tmp_path / "back"
    img("convert", "-f", kind, "-O", "raw", *options, str(target), str(back))
    same(mixed, back, "raw")


@pytest.mark.parametrize("options", [
    "cluster_size=512", "cluster_size=2M", "refcount_bits=1", "refcount_bits=2,cluster_size=4k",
    "compat=0.10", "compression_type=zstd", "extended_l2=on",
    "cluster_size=512,compression_type=zstd,refcount_bits=64",
])
def test_compressed(mixed: Path, tmp_path: Path, options: str) -> None:
    """Clusters that become smaller share host clusters, as far as a refcount allows; others stay plain."""
    target, theirs = tmp_path / "target", tmp_path / "theirs"
    img("convert", "-c", "-O", "qcow2", "-o", options, str(mixed), str(target))
    same(mixed, target, "qcow2")
    qemu_img("convert", "-c", "-O", "qcow2", "-o", options, str(mixed), str(theirs))
    assert target.stat().st_size <= 1.05 * theirs.stat().st_size + (4 << 20 if "2M" in options else 1 << 16)
    back = tmp_path / "back"
    img("convert", "-O", "raw", str(theirs), str(back))
    same(mixed, back, "raw")


def test_sparse_as_qemu_img_leaves_it(mixed: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for kind in ("raw", "qcow2"):
        img("convert", "-O", kind, str(mixed), str(ours))
        qemu_img("convert", "-O", kind, str(mixed), str(theirs))
        assert ours.stat().st_blocks <= theirs.stat().st_blocks + 128


@pytest.mark.parametrize("kind, how", [
    ("raw", ()), ("raw", ("-C",)), ("qcow2", ()), ("qcow2", ("-c",)),
])
def test_existing_target_keeps_what_lies_behind_and_nothing_else(
    mixed: Path, tmp_path: Path, kind: str, how: tuple[str, ...]
) -> None:
    size = mixed.stat().st_size
    full = junk(tmp_path / "junk", size + 3 * 65536)
    target = tmp_path / "target"
    qemu_img("convert", "-O", kind, str(full), str(target))
    img("convert", "-n", "-O", kind, *how, str(mixed), str(target))
    expected = tmp_path / "expected"
    expected.write_bytes(mixed.read_bytes() + b"\xff" * (3 * 65536))
    same(expected, target, kind)


@pytest.mark.parametrize("how", [(), ("-c",)], ids=" ".join)
def test_zeroes_hide_the_backing_file(mixed: Path, tmp_path: Path, how: tuple[str, ...]) -> None:
    base = junk(tmp_path / "base", 2 * mixed.stat().st_size)
    target = tmp_path / "target"
    img("convert", "-O", "qcow2", "-B", str(base), "-F", "raw", *how, str(mixed), str(target))
    same(mixed, target, "qcow2")


def test_external_data_file_is_made(mixed: Path, tmp_path: Path) -> None:
    target, data = tmp_path / "target", tmp_path / "data"
    img("convert", "-O", "qcow2", "-o", f"data_file={data},data_file_raw=on", str(mixed), str(target))
    same(mixed, target, "qcow2")
    assert data.read_bytes() == mixed.read_bytes()


@pytest.mark.parametrize("options", [
    ("-m", "0"), ("-m", "17"), ("-S", "100"), ("-C", "-S", "4k"), ("-C", "-c", "-O", "qcow2"), ("-t", "fast"),
], ids=" ".join)
def test_wrong_options(mixed: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    told = img("convert", *options, str(mixed), str(tmp_path / "target"), status=None)
    assert told.count("\n") == 1 and told.startswith("atoll img: convert: "), told
    assert not (tmp_path / "target").exists()


# ---- what stays of a conversion that did not get to its end ------------------------------------------
LIMITED = """
import resource, signal, sys
from coordinator.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("options", [
    ("-O", "qcow2"), ("-O", "qcow2", "-o", "preallocation=full"), ("-c", "-O", "qcow2"),
], ids=" ".join)
def test_no_room(mixed: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """A limit of the file's size stands for a disk that is full."""
    target = tmp_path / "target"
    command = [sys.executable, "-c", LIMITED, "img", "convert", *options, str(mixed), str(target)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == f"atoll img: {target}: cannot be written: {os.strerror(27)}\n"
    assert not target.exists()


@pytest.fixture
def not_ignored() -> Iterator[None]:
    """SIGINT as in the foreground: a shell's background jobs ignore it, and so does what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("options", [("-O", "raw"), ("-O", "qcow2"), ("-c", "-O", "qcow2")], ids=" ".join)
@pytest.mark.usefixtures("not_ignored")
def test_signal(
    mixed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    options: tuple[str, ...],
) -> None:
    find_zeroes, sent = copying.find_zeroes, list[int]()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(offset: int, *others: int) -> list[copying.Piece]:
        if offset and not sent:  # a second one would be the end of this process
            sent.append(number)
            os.kill(os.getpid(), number)
        return find_zeroes(offset, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(copying, "find_zeroes", interrupted)
    target = tmp_path / "target"
    for existed in (False, True):
        if existed:
            target.write_bytes(b"old")
            sent.clear()
        told = img("convert", "-m", "1", *options, str(mixed), str(target), status=128 + number)
        assert told == f"atoll img: convert: ended by {number.name}, {target} is not complete\n"
        assert target.exists() == existed and (not existed or not target.stat().st_size)
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_source_that_cannot_be_read(mixed: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    img("convert", "-c", "-O", "qcow2", str(mixed), str(source))
    image = open_qcow2(str(source), read_only=True)
    kind, _, _, entry = next(piece for piece in image.map(3 * MIB, MIB))
    place, length = image.mapping.layout.packed(entry)
    image.close()
    with open(source, "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * min(length, 64))
    told = img("convert", "-O", "raw", str(source), str(target), status=1)
    assert told.startswith(f"atoll img: {source}: cannot be read: ") and told.count("\n") == 1
    assert not target.exists()


def test_target_in_use_stays(mixed: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    img("create", "-f", "qcow2", str(target), "1M")
    before = target.read_bytes()
    user = open_qcow2(str(target))
    try:
        for kind in ("raw", "qcow2"):
            # the lock is another open file's, as another process's would be
            assert "is locked" in img("convert", "-O", kind, str(mixed), str(target), status=1)
    finally:
        user.close()
    assert target.read_bytes() == before
