"""QEMU's tools and libnbd's against our server, and our locks beside theirs; QEMU's server against our
client."""

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockd.raw import RawImage
from coordinator.contract.config import Export, Media
from coordinator.contract.errors import BlockError
from devhost.block_client import BlockClient, Completion
from tests.blockd.conftest import Serve, make_image
from tests.support.tools import require_tool, run_tool

MIB = 1 << 20
SECONDS = 30


def uri(path: str, name: str = "hd0") -> str:
    return f"nbd+unix:///{name}?socket={path}"


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """8 MiB that no two runs of 4 KiB are alike in."""
    file = tmp_path / "noise"
    file.write_bytes(random.Random(1).randbytes(8 * MIB))
    return file


# ---- their clients, our server ----------------------------------------------------------------------
def test_nbdinfo(serve: Serve, noise: Path, tmp_path: Path) -> None:
    cd = Export("cd0", make_image(tmp_path / "cd", 2 * MIB), media=Media.CDROM)
    path = serve(Export("hd0", str(noise)), cd)
    told = run_tool("nbdinfo", uri(path))
    assert "export-size: 8388608" in told and "is_read_only: false" in told
    for ability in ("flush", "fua", "multi_conn", "trim", "zero", "fast_zero", "cache", "df"):
        assert f"can_{ability}: true" in told
    assert "is_read_only: true" in run_tool("nbdinfo", uri(path, "cd0"))
    listed = run_tool("nbdinfo", "--list", uri(path, ""))
    assert 'export="hd0"' in listed and 'export="cd0"' in listed
    run_tool("nbdinfo", uri(path, "other"), status=1)


def test_nbdinfo_map(serve: Serve, tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as sparse:
        sparse.truncate(4 * MIB)
        os.pwrite(sparse.fileno(), b"d" * MIB, MIB)
    lines = run_tool("nbdinfo", "--map", uri(serve(Export("hd0", str(tmp_path / "sparse"))))).splitlines()
    fields = [line.split() for line in lines]
    assert [(int(f[0]), int(f[1]), int(f[2])) for f in fields] == [
        (0, MIB, 3),
        (MIB, MIB, 0),
        (2 * MIB, 2 * MIB, 3),
    ]


def test_nbdcopy_both_ways(serve: Serve, noise: Path, tmp_path: Path) -> None:
    """Four connections, many requests in flight on each."""
    target = tmp_path / "target"
    with open(target, "wb") as file:
        file.truncate(8 * MIB)
    path = serve(Export("hd0", str(noise), read_only=True), Export("hd1", str(target)))
    run_tool("nbdcopy", uri(path), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == noise.read_bytes()
    run_tool("nbdcopy", "--flush", str(noise), uri(path, "hd1"))
    assert target.read_bytes() == noise.read_bytes()
    run_tool("nbdcopy", uri(path), uri(path, "hd1"))
    assert target.read_bytes() == noise.read_bytes()


def test_qemu_img(serve: Serve, noise: Path, tmp_path: Path) -> None:
    path = serve(Export("hd0", str(noise)))
    copy = str(tmp_path / "copy.qcow2")
    run_tool("qemu-img", "convert", "-O", "qcow2", uri(path), copy)
    assert "identical" in run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri(path), copy)
    run_tool("qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", copy, uri(path))
    assert "identical" in run_tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri(path), copy)
    assert "8 MiB" in run_tool("qemu-img", "info", uri(path))


def test_qemu_io(serve: Serve, tmp_path: Path) -> None:
    file = make_image(tmp_path / "disk", 4 * MIB, 0x11)
    path = serve(Export("hd0", file))
    script = (
        "write -P 0xa5 65536 4096",
        "write -f -P 0x5a 100 200",
        "write -z -u 1M 64k",
        "write -z 2M 64k",
        "discard 3M 64k",
        "aio_write -P 0x77 512k 1M",
        "aio_flush",
        "flush",
        "read -P 0xa5 65536 4096",
        "read -P 0x5a 100 200",
        "read -P 0x77 512k 512k",
        "read -P 0 2M 64k",
    )
    commands = [word for command in script for word in ("-c", command)]
    told = run_tool("qemu-io", "-f", "raw", *commands, uri(path))
    assert "failed" not in told and "error" not in told.lower()
    expected = bytearray(b"\x11" * 4 * MIB)
    expected[65536:69632] = b"\xa5" * 4096
    expected[100:300] = b"\x5a" * 200
    expected[512 << 10 : 1536 << 10] = b"\x77" * MIB
    expected[2 * MIB : 2 * MIB + 65536] = bytes(65536)
    expected[3 * MIB : 3 * MIB + 65536] = bytes(65536)  # a hole, in a file
    assert Path(file).read_bytes() == expected


def test_qemu_io_on_a_read_only_export(serve: Serve, tmp_path: Path) -> None:
    path = serve(Export("cd0", make_image(tmp_path / "cd", MIB, 0x11), media=Media.CDROM))
    told = run_tool("qemu-io", "-f", "raw", "-c", "write 0 512", uri(path, "cd0"), status=1)
    assert "Permission denied" in told
    assert "error" not in run_tool("qemu-io", "-r", "-f", "raw", "-c", "read -P 0x11 0 1M", uri(path, "cd0"))


# ---- locks ---------------------------------------------------------------------------------------------
def test_our_locks_hold_their_tools_off(tmp_path: Path) -> None:
    file = make_image(tmp_path / "disk", MIB, 0)
    writer = RawImage(file)
    for command in ("write 0 512", "read 0 512"):
        told = run_tool("qemu-io", "-f", "raw", "-c", command, file, status=1)
        assert "lock" in told
    writer.close()
    reader = RawImage(file, read_only=True)
    assert "lock" in run_tool("qemu-io", "-f", "raw", "-c", "write 0 512", file, status=1)
    run_tool("qemu-io", "-r", "-f", "raw", "-c", "read 0 512", file)
    assert "identical" in run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", file, file)
    reader.close()
    run_tool("qemu-io", "-f", "raw", "-c", "write 0 512", file)


def start_qemu_nbd(path: str, *options: str) -> subprocess.Popen[bytes]:
    """qemu-nbd, once it listens."""
    require_tool("qemu-nbd")
    pid_file = Path(f"{path}.pid")
    process = subprocess.Popen(
        ["qemu-nbd", "-t", "-e", "4", "-f", "raw", "-k", path, "--pid-file", str(pid_file), *options]
    )
    while not pid_file.exists():  # bounded by the test's own time limit
        try:
            process.wait(0.01)
            raise AssertionError("qemu-nbd ended")
        except subprocess.TimeoutExpired:
            continue
    return process


@pytest.fixture
def foreign(runtime: Path, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """A writable qemu-nbd: its socket and its file."""
    file = make_image(tmp_path / "disk", 8 * MIB)
    path = str(runtime / "qemu")
    process = start_qemu_nbd(path, "-x", "hd0", file)
    yield path, file
    process.terminate()
    process.wait()


def test_their_locks_hold_us_off(foreign: tuple[str, str]) -> None:
    for read_only in (False, True):
        with pytest.raises(BlockError, match="is locked") as caught:
            RawImage(foreign[1], read_only=read_only)
        assert "\n" not in str(caught.value)


# ---- their server, our client ----------------------------------------------------------------------------
def test_our_client_at_their_server(foreign: tuple[str, str]) -> None:
    path, file = foreign
    model = bytearray(Path(file).read_bytes())
    client = BlockClient(path, "hd0")
    client.connect(SECONDS)
    assert client.size == 8 * MIB and not client.read_only
    chance = random.Random(2)
    for _ in range(40):
        offset = chance.randrange(8 * MIB // 512 - 256) * 512
        data = chance.randbytes(chance.randrange(1, 256) * 512)
        model[offset : offset + len(data)] = data
        cut = chance.randrange(len(data))
        client.write(offset, [memoryview(data)[:cut], memoryview(data)[cut:]])
        assert [done.errno for done in client.drain(SECONDS)] == [0]
    client.flush()
    ram = memoryview(bytearray(8 * MIB))
    for at in range(0, 8 * MIB, MIB):  # many at once, whatever order they are answered in
        client.read(at, [ram[at : at + 4096], ram[at + 4096 : at + MIB]])
    assert {done.errno for done in client.drain(SECONDS)} == {0}
    assert hashlib.sha256(ram).digest() == hashlib.sha256(model).digest()
    client.write_zeroes(0, MIB)
    client.trim(MIB, 65536)
    assert [done.errno for done in client.drain(SECONDS)] == [0, 0]
    client.read(0, [ram[:MIB]])
    client.drain(SECONDS)
    assert not any(ram[:MIB])
    client.close()


def test_our_client_and_a_name_their_server_does_not_have(foreign: tuple[str, str]) -> None:
    with pytest.raises(BlockError, match="hd9"):
        BlockClient(foreign[0], "hd9").connect(SECONDS)


# ---- our client, our server ----------------------------------------------------------------------------
def test_our_client_at_our_server(serve: Serve, noise: Path) -> None:
    client = BlockClient(serve(Export("hd0", str(noise))), "hd0")
    client.connect(SECONDS)
    ram = memoryview(bytearray(8 * MIB))
    assert client.max_length == 32 * MIB
    cookies = [client.read(at, [ram[at : at + 65536]]) for at in range(0, 8 * MIB, 65536)]
    assert client.drain(SECONDS) == [Completion(cookie, 0) for cookie in cookies]
    assert ram == noise.read_bytes()
    cookies = [client.write(0, [ram[MIB : 2 * MIB]], fua=True), client.flush(), client.read(0, [ram[:MIB]])]
    assert client.drain(SECONDS) == [Completion(cookie, 0) for cookie in cookies]
    assert ram[:MIB] == ram[MIB : 2 * MIB] == noise.read_bytes()[:MIB]
    client.close()
