"""A guest with qcow2 disks over backing files: what it wrote is there, and QEMU's tools find no fault."""

import hashlib
import random
from pathlib import Path

import pytest

from tests.support.launch import Launcher
from tests.support.tools import run_tool
from tests.system import boots

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1500)]

SIZE = 24 << 20
#: disk -> options of its overlay
OVERLAYS = {"disk0": "cluster_size=64k", "disk1": "extended_l2=on,cluster_size=128k"}


def lines(text: str, length: int) -> bytes:
    """As the guest makes them: see tests/guests/init."""
    line = f"atoll {text}\n".encode()
    return (line * (length // len(line) + 1))[:length]


def changed(disk: str, content: bytes) -> bytes:
    """The disk after change_disk of tests/guests/init."""
    result = bytearray(content)
    for offset, data in (
        (20 << 16, lines(f"one {disk}", 1 << 20)),
        (20001 * 512, lines(f"two {disk}", 33280)),
        (300 * 4096, bytes(40 * 4096)),
        (4000 * 4096, lines(f"three {disk}", 4096)),
    ):
        result[offset : offset + len(data)] = data
    return bytes(result)


def test_linux_writes_to_qcow2(launcher: Launcher, tmp_path: Path) -> None:
    rnd = random.Random(1)
    base = b"".join(rnd.randbytes(1 << 20) + bytes(2 << 20) for _ in range(SIZE // (3 << 20)))
    (tmp_path / "base.raw").write_bytes(base)
    run_tool("qemu-img", "convert", "-O", "qcow2", str(tmp_path / "base.raw"), str(tmp_path / "base.qcow2"))
    options = [*boots.kernel_options("atoll.demo=disk"), "-no-reboot"]
    for index, (disk, how) in enumerate(OVERLAYS.items()):
        file = str(tmp_path / f"{disk}.qcow2")
        below = "-b", "base.qcow2", "-F", "qcow2"
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", how, *below, file)
        options += ["-drive", f"file={file},format=qcow2,if=ide,index={index},discard=unmap,aio=threads"]
    with boots.start(launcher, tmp_path, options) as guest:
        facts = boots.finish(guest)
    for disk in OVERLAYS:
        file, expected = str(tmp_path / f"{disk}.qcow2"), changed(disk, base)
        assert facts.marks[f"{disk}-before"] == hashlib.sha256(base).hexdigest()
        assert facts.marks[f"{disk}-after"] == hashlib.sha256(expected).hexdigest()
        assert "No errors were found" in run_tool("qemu-img", "check", file)
        (tmp_path / "expected").write_bytes(expected)
        told = run_tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", file, str(tmp_path / "expected"))
        assert told.strip() == "Images are identical."
    assert run_tool("qemu-img", "check", str(tmp_path / "base.qcow2")).startswith("No errors")
    told = run_tool("qemu-img", "compare", str(tmp_path / "base.qcow2"), str(tmp_path / "base.raw"))
    assert told.strip() == "Images are identical."
