"""NBD names where images are named: atoll img, drives, qcow2 over NBD, backing files."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import pytest

from blockd.export_image import open_image
from blockd.image import Image
from blockd.img.main import run
from blockd.nbd.file import NbdFile
from blockd.opening import open_qcow2
from blockd.qcow2.backing import Chain
from blockd.qcow2.create import Options, create
from coordinator.cli import drives
from coordinator.cli.settings import Settings
from coordinator.contract.config import Export, Media
from coordinator.contract.errors import AtollError, BlockError
from tests.blockd.conftest import Serve, make_image
from tests.blockd.nbd_client.conftest import Start
from tests.blockd.nbd_client.script import MIB, name
from tests.support.tools import run_tool

SIZE = 4 * MIB


def content(image: Image) -> bytes:
    buffer = bytearray(image.size)
    image.read_into(0, memoryview(buffer))
    return bytes(buffer)


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """2 MiB of noise and as much nothing."""
    file = tmp_path / "noise"
    file.write_bytes(random.Random(1).randbytes(SIZE // 2) + bytes(SIZE // 2))
    return file


@pytest.fixture
def qcow2(tmp_path: Path, noise: Path) -> str:
    """The same, as qemu-img writes it, with room behind it for more."""
    file = str(tmp_path / "noise.qcow2")
    run_tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(noise), file)
    return file


def with_room(file: str) -> str:
    """A block device of an image: longer than what it holds."""
    with open(file, "r+b") as image:
        image.truncate(16 * MIB)
    return file


def told(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    assert run(list(arguments)) == status
    out, err = capsys.readouterr()
    return out + err


# ---- atoll img -----------------------------------------------------------------------------------------
def test_info(nbdkit: Start, capsys: pytest.CaptureFixture[str], noise: Path) -> None:
    """As qemu-img has it, but for what is not known over NBD here either."""
    uri = name(nbdkit("file", str(noise)))
    ours = json.loads(told(capsys, "info", "--output=json", uri))
    theirs = json.loads(run_tool("qemu-img", "info", "--output=json", uri))
    theirs.pop("actual-size", None)
    assert ours == theirs | {"filename": uri}
    assert "disk size: unavailable" in told(capsys, "info", uri)


def test_map_and_check(nbdkit: Start, capsys: pytest.CaptureFixture[str], noise: Path, qcow2: str) -> None:
    uri = name(nbdkit("file", str(noise)))
    ours = json.loads(told(capsys, "map", "--output=json", uri))
    assert [(e["start"], e["length"]) for e in ours if e["data"]] == [(0, SIZE // 2)] or len(ours) == 1
    assert "cannot be checked" in told(capsys, "check", uri, status=63)
    uri = name(nbdkit("file", qcow2))
    assert "No errors" in told(capsys, "check", uri)
    assert json.loads(told(capsys, "map", "--output=json", uri)) == json.loads(
        run_tool("qemu-img", "map", "--output=json", "-f", "qcow2", uri)
    )


def test_convert_and_compare(
    nbdkit: Start, qemu_nbd: Start, capsys: pytest.CaptureFixture[str], noise: Path, tmp_path: Path
) -> None:
    source = name(nbdkit("-r", "file", str(noise)))
    copy = str(tmp_path / "copy.qcow2")
    told(capsys, "convert", "-O", "qcow2", source, copy)
    assert "identical" in told(capsys, "compare", source, copy)
    assert "identical" in run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(noise), copy)
    target = name(qemu_nbd("-f", "raw", "-x", "x", make_image(tmp_path / "disk", SIZE, 0xEE)))
    told(capsys, "convert", "-n", "-O", "raw", copy, target)
    assert "identical" in told(capsys, "compare", "-f", "raw", source, target)
    assert "cannot be created" in told(capsys, "convert", "-O", "raw", copy, target, status=1)
    room = name(nbdkit("file", with_room(make_qcow2(tmp_path / "room.qcow2"))))
    told(capsys, "convert", "-n", "-O", "qcow2", source, room)
    assert "identical" in told(capsys, "compare", "-F", "qcow2", source, room)
    assert "identical" in run_tool("qemu-img", "compare", "-F", "qcow2", "-f", "raw", str(noise), room)


def make_qcow2(path: Path, **more: str) -> str:
    create(str(path), Options(SIZE, **more))  # type: ignore[arg-type]
    return str(path)


def test_bench_and_what_cannot_be(nbdkit: Start, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    uri = name(nbdkit("memory", f"size={SIZE}"))
    assert "Run completed" in told(capsys, "bench", "-f", "raw", "-w", "-c", "100", "-d", "8", uri)
    assert "Run completed" in told(capsys, "bench", "-c", "100", uri)
    assert "cannot be created over NBD" in told(capsys, "create", uri, "1M", status=1)
    assert "cannot be created over NBD" in told(capsys, "create", "-f", "qcow2", uri, "1M", status=1)
    assert "cannot be resized over NBD" in told(capsys, "resize", "-f", "raw", uri, "8M", status=1)
    assert "is not supported" in told(capsys, "info", uri + "&x=y", status=1)


def test_backing_files(
    nbdkit: Start, qemu_nbd: Start, capsys: pytest.CaptureFixture[str], noise: Path, tmp_path: Path
) -> None:
    """create -b, rebase and commit, judged by qemu-img over the same server."""
    uri = name(qemu_nbd("-f", "raw", "-x", "x", str(noise)))
    top = str(tmp_path / "top.qcow2")
    told(capsys, "create", "-f", "qcow2", "-b", uri, "-F", "raw", top)
    assert "identical" in run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, top)
    assert "identical" in told(capsys, "compare", "--allow-backing", uri, uri, top)
    info = json.loads(told(capsys, "info", "--output=json", top))
    assert (info["backing-filename"], info["full-backing-filename"]) == (uri, uri)
    chain = told(capsys, "info", "--output=json", "--backing-chain", "--allow-backing", uri, top)
    assert [row["filename"] for row in json.loads(chain)] == [top, uri]

    run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 1M 64k", top)
    told(capsys, "commit", "--allow-backing", "*", top)
    assert noise.read_bytes()[MIB : MIB + 65536] == b"\x5a" * 65536
    other = name(nbdkit("memory", f"size={SIZE}"))
    told(capsys, "rebase", "-b", other, "-F", "raw", "--allow-backing", uri, top)
    assert "identical" in run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(noise), top)
    told(capsys, "rebase", "-b", "", "--allow-backing", other, top)
    assert "identical" in told(capsys, "compare", uri, top)


def test_a_backing_file_shorter_than_the_image(
    nbdkit: Start, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    uri = name(nbdkit("memory", "size=1M"))
    top = make_qcow2(tmp_path / "top.qcow2", backing_file=uri, backing_format="raw")
    image = open_qcow2(top, True, Chain((uri,)))
    assert content(image) == bytes(SIZE)
    image.close()
    assert "cannot be resized over NBD" in told(capsys, "commit", "--allow-backing", uri, top, status=1)


# ---- what an image may name (hardware-cases 14) --------------------------------------------------------
def test_a_server_is_asked_only_when_the_user_says_so(nbdkit: Start, tmp_path: Path) -> None:
    path = nbdkit("memory", f"size={SIZE}")
    for spelling in (name(path), f"nbd:unix:{path}:exportname=x"):
        top = make_qcow2(tmp_path / "top.qcow2", backing_file=spelling, backing_format="raw")
        for places in ((), (str(tmp_path),), (name(path, "other"),), (f"nbds+unix:///x?socket={path}",)):
            with pytest.raises(BlockError, match="is on a server, so it is refused"):
                open_qcow2(top, True, Chain(places))
        for place in ("*", name(path), name(path, ""), f"nbd:unix:{path}"):
            image = open_qcow2(top, True, Chain((place,)))
            assert content(image) == bytes(SIZE)
            image.close()


def test_an_image_on_a_server_has_no_folder(nbdkit: Start, tmp_path: Path, noise: Path) -> None:
    for backing, words in (("noise", "no plain file name"), (str(noise), "outside")):
        top = make_qcow2(tmp_path / "top.qcow2", backing_file=backing, backing_format="raw")
        uri = name(nbdkit("file", top))
        with pytest.raises(BlockError, match=words):
            open_qcow2(uri, True)
    image = open_qcow2(uri, True, Chain((str(tmp_path),)))
    assert content(image) == noise.read_bytes()
    image.close()


def test_a_chain_that_loops_over_a_server(nbdkit: Start, tmp_path: Path) -> None:
    top = str(tmp_path / "top.qcow2")
    uri = name(nbdkit("file", make_qcow2(tmp_path / "top.qcow2")))
    make_qcow2(tmp_path / "top.qcow2", backing_file=uri, backing_format="qcow2")
    with pytest.raises(BlockError, match="is a loop"):
        open_qcow2(top, True, Chain(("*",)))


# ---- qcow2 over NBD ------------------------------------------------------------------------------------
def test_qcow2_is_read(nbdkit: Start, qcow2: str, noise: Path) -> None:
    image = open_image(Export("hd0", name(nbdkit("-r", "file", qcow2)), "auto", read_only=True))
    assert (image.format, content(image)) == ("qcow2", noise.read_bytes())
    image.prefetch(0, SIZE)
    image.close()


def test_qcow2_is_written(nbdkit: Start, qemu_nbd: Start, qcow2: str, noise: Path) -> None:
    """Into the room behind it, as into a block device; then there is ENOSPC. qemu-img judges."""
    expected = bytearray(noise.read_bytes())
    with_room(qcow2)
    for path in (nbdkit("file", qcow2), qemu_nbd("-f", "raw", "-x", "x", qcow2)):
        image = open_image(Export("hd0", name(path), "qcow2"))
        rnd = random.Random(7)
        for _ in range(100):
            offset = rnd.randrange(SIZE - 70000)
            data = rnd.randbytes(rnd.choice([512, 4096, 70000]))
            image.write(offset, data)
            expected[offset : offset + len(data)] = data
        image.write_zeroes(MIB, MIB, unmap=True, fast=False)
        expected[MIB : 2 * MIB] = bytes(MIB)
        image.flush()
        assert content(image) == expected
        image.close()
        noise.write_bytes(expected)
        uri = name(path)
        assert "identical" in run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(noise), uri)
        assert "No errors" in run_tool("qemu-img", "check", "-f", "qcow2", uri)


def test_an_export_does_not_grow(nbdkit: Start, tmp_path: Path) -> None:
    file = make_qcow2(tmp_path / "full.qcow2")
    image = open_image(Export("hd0", name(nbdkit("file", file)), "qcow2"))
    with pytest.raises(OSError) as caught:
        image.write(0, b"x" * MIB)
    assert caught.value.errno == errno.ENOSPC
    image.close()
    assert "No errors" in run_tool("qemu-img", "check", file)


def test_the_file_below(nbdkit: Start) -> None:
    path = nbdkit("memory", "size=1000")
    host = NbdFile(name(path))
    assert host.read(990, 20) == bytes(20)
    host.zero(900, 1000)
    host.write(0, b"x")
    host.sync()
    with pytest.raises(OSError):
        host.reserve(0, 1000)
    assert host.identity() == NbdFile(f"nbd:unix:{path}:exportname=x").identity()
    host.close()


# ---- drives --------------------------------------------------------------------------------------------
def test_a_drive(nbdkit: Start, tmp_path: Path, serve: Serve) -> None:
    """Served again by our own daemon, with writes thrown away and without."""
    uri = name(nbdkit("memory", "size=1M"))
    settings = Settings()
    drives.drive(settings, f"file={uri},format=raw,allow-backing={uri}")
    assert (settings.drives[0].file, settings.drives[0].backing_allowed) == (uri, (uri,))
    path = serve(Export("hd0", uri), Export("thrown", uri, snapshot=True))
    run_tool("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", name(path, "thrown"))
    run_tool("qemu-io", "-f", "raw", "-c", "read -P 0 0 64k", "-c", "write -P 9 0 64k", name(path, "hd0"))
    assert "identical" in run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, name(path, "hd0"))


def test_a_cd_of_no_whole_sectors(nbdkit: Start) -> None:
    image = open_image(Export("cd0", name(nbdkit("pattern", "size=5120")), media=Media.CDROM))
    assert (image.size, image.read_only, content(image)[5112:]) == (
        6144, True, (5112).to_bytes(8, "big") + bytes(1024))  # fmt: skip
    image.close()


def test_a_probed_raw_disk_stays_one(nbdkit: Start) -> None:
    image = open_image(Export("hd0", name(nbdkit("memory", "size=1M")), "auto"))
    with pytest.raises(OSError, match="say format=raw"):
        image.write(0, b"QFI\xfb")
    image.write(1, b"FI\xfb")
    with pytest.raises(OSError, match="say format=raw"):
        image.write(0, b"Q")
    image.close()


def test_what_is_no_name_is_refused_in_one_line(tmp_path: Path) -> None:
    for file in ("nbd://", "nbd:x", f"nbd+unix:///?socket={tmp_path}/none"):
        with pytest.raises(AtollError) as caught:
            open_image(Export("hd0", file))
        assert "\n" not in str(caught.value)
