"""Chains of images: commit through several levels and rebase, with qemu-img on the other side and a model."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from blockd.opening import open_qcow2
from blockd.qcow2.backing import Chain
from tests.blockd.qcow2.support import qemu_check, qemu_reads, read
from tests.blockd.qcow2.test_img import img, qemu_img
from tests.support.tools import run_tool

MIB = 1 << 20
#: of the images from the base up
SIZES = [3 * MIB, 2 * MIB + 512, 4 * MIB, 4 * MIB + 3 * 512]
NAMES = ["base", "low", "mid", "top"]


class Disks:
    """What each image of a chain reads as."""

    def __init__(self, folder: Path, seed: int, options: str) -> None:
        self.folder, self.rnd = folder, random.Random(seed)
        self.read: dict[str, bytes] = {}
        below: str | None = None
        for name, size in zip(NAMES, SIZES, strict=True):
            self.make(name, size, below, options)
            below = name

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def make(self, name: str, size: int, below: str | None, options: str) -> None:
        over = () if below is None else ("-b", below, "-F", "qcow2")
        img("create", "-q", "-f", "qcow2", "-o", options, *over, self.file(name), str(size))
        content = bytearray((self.read[below] if below else b"")[:size].ljust(size, b"\0"))
        commands = []
        for _ in range(6):
            length = self.rnd.choice([512, 3000 // 512 * 512, 65536, 200 * 512])
            offset = self.rnd.randrange(0, (size - length) // 512) * 512
            byte = self.rnd.randrange(256)
            commands += ["-c", f"write -q {f'-P {byte}' if byte % 4 else '-z -u'} {offset} {length}"]
            content[offset : offset + length] = bytes([byte if byte % 4 else 0]) * length
        run_tool("qemu-io", "-f", "qcow2", *commands, self.file(name))
        self.read[name] = bytes(content)

    def judged(self, *names: str) -> None:
        for name in names:
            qemu_check(self.file(name))
            qemu_reads(self.file(name), self.read[name], self.folder)
            image = open_qcow2(self.file(name), read_only=True, chain=Chain(("*",)))
            assert read(image) == self.read[name]
            image.close()


OPTIONS = ["cluster_size=64k", "cluster_size=4k,compat=0.10", "extended_l2=on,cluster_size=16k"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("base", ["base", "low", "mid", None])
def test_commit(tmp_path: Path, base: str | None, options: str) -> None:
    """Beside qemu-img: the base reads as the top afterwards, and the top as it did."""
    disks = Disks(tmp_path, OPTIONS.index(options), options)
    other = tmp_path / "theirs"
    other.mkdir()
    for name in NAMES:
        shutil.copy(disks.file(name), other / name)
    arguments = ("-b", base) if base else ()
    assert img("commit", *arguments, disks.file("top")) == "Image committed.\n"
    # it cannot grow every base of version 2
    qemu_img("commit", *arguments, str(other / "top"), status=None if "0.10" in options else 0)
    target = base or "mid"
    disks.read[target] = disks.read["top"]
    disks.judged(target, "top")
    mine, theirs = (
        qemu_check(str(folder / "top")).get("allocated-clusters", 0) for folder in (tmp_path, other)
    )
    assert mine == theirs and bool(mine) == bool(base)  # it is emptied only into the next one
    if "0.10" not in options:
        qemu_reads(str(other / target), disks.read[target], tmp_path)


def test_what_commit_refuses(tmp_path: Path) -> None:
    disks = Disks(tmp_path, 9, "cluster_size=64k")
    for arguments in (
        ("-b", "none", disks.file("top")),
        ("-b", "top", disks.file("top")),
        (disks.file("base"),),
    ):
        mine, other = img("commit", *arguments, status=1), qemu_img("commit", *arguments, status=1)
        assert mine.removeprefix("atoll img: ") == other.removeprefix("qemu-img: ")
    img("commit", "-q", "-d", disks.file("mid"))
    disks.read["low"] = disks.read["mid"]
    disks.judged("mid", "low")
    img("commit", "-q", "-b", disks.file("base"), disks.file("top"))
    disks.read["base"] = disks.read["top"]
    disks.judged("base")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("new", ["base", "low", None, "shorter", "longer"])
def test_rebase(tmp_path: Path, new: str | None, options: str) -> None:
    disks = Disks(tmp_path, 20 + OPTIONS.index(options), options)
    disks.make("shorter", MIB, None, options)
    disks.make("longer", 6 * MIB, "base", options)
    over = ("-b", new or "") + (("-F", "qcow2") if new else ())
    assert img("rebase", *over, disks.file("top")) == ""
    disks.judged("top")
    told = json.loads(qemu_img("info", "--output=json", disks.file("top")))
    assert told.get("backing-filename") == new
    for name in ("mid", *(["low"] if new != "low" else [])):
        (tmp_path / name).unlink()  # nobody needs them any more
    disks.judged("top")


def test_rebase_of_the_name_alone(tmp_path: Path) -> None:
    disks = Disks(tmp_path, 30, "cluster_size=64k")
    img("convert", "-O", "raw", "--allow-backing", "*", disks.file("mid"), disks.file("flat"))
    (tmp_path / "mid").unlink()
    img("rebase", "-u", "-b", "flat", "-F", "raw", disks.file("top"))
    disks.judged("top")
    img("rebase", "-u", "-b", "none", "-F", "raw", disks.file("top"))
    assert "cannot be opened" in img("map", disks.file("top"), status=1)
    for arguments in (("-u", "-b", "flat"), ("-b", "none", "-F", "raw")):
        for tool in (img, qemu_img):
            tool("rebase", *arguments, disks.file("top"), status=None)
    img("rebase", "-u", "-b", "flat", "-F", "raw", disks.file("top"))
    disks.judged("top")


def test_a_sparse_tebibyte_is_rebased_at_once(tmp_path: Path) -> None:
    """Only what has data is read."""
    for name in ("old", "new"):
        img("create", "-q", "-f", "qcow2", str(tmp_path / name), "1T")
        run_tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P {len(name)} 700G 64k", str(tmp_path / name))
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 900G 64k", str(tmp_path / "old"))
    top = str(tmp_path / "top")
    img("create", "-q", "-f", "qcow2", "-b", "old", "-F", "qcow2", top)
    img("rebase", "-b", "new", "-F", "qcow2", top)
    assert qemu_check(top)["allocated-clusters"] == 1
    run_tool(
        "qemu-io", "-r", "-f", "qcow2", "-c", "read -q -P 9 900G 64k", "-c", "read -q -P 3 700G 64k", top
    )
