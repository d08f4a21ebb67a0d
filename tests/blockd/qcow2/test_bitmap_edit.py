"""``atoll img bitmap`` beside qemu-img, and what becomes of bitmaps when an image changes as a whole."""

from __future__ import annotations

import json
import os
import random
import select
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockd.opening import open_qcow2
from blockd.qcow2 import operations
from blockd.qcow2.bitmap_edit import BitmapSet, scaled
from blockd.qcow2.check import check
from tests.blockd.qcow2.support import qemu_check
from tests.blockd.qcow2.test_header import _Log, states
from tests.blockd.qcow2.test_img import both_json, img, qemu_img
from tests.support.tools import run_tool

MIB = 1 << 20


def dirty(file: str, name: str) -> list[tuple[int, int]]:
    """(start, length) of what a bitmap marks, as qemu-nbd exports it."""
    socket, number = file + ".sock", Path(file + ".pid")
    how = "--fork", "--pid-file", str(number), "-r", "-f", "qcow2", "-B", name, "-k", socket
    run_tool("qemu-nbd", *how, file)
    server = os.pidfd_open(int(number.read_text()))
    try:
        uri = f"nbd+unix:///?socket={socket}"
        told = run_tool("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri)
        assert select.select([server], [], [], 60)[0]  # it ends after its client, with its locks
    finally:
        os.close(server)
    return [(row["offset"], row["length"]) for row in json.loads(told) if row["type"] == 1]


def shown(file: str) -> dict[str, tuple[int, list[str]]]:
    """name -> (granularity, flags), in which both tools agree."""
    told: Any = both_json("info", "--output=json", file)
    rows = told["format-specific"]["data"].get("bitmaps", [])
    assert img("info", file).count("granularity: ") == len(rows)
    return {row["name"]: (row["granularity"], row["flags"]) for row in rows}


def clean(file: str) -> None:
    qemu_check(file)
    image = open_qcow2(file, read_only=True)
    report = check(image)
    image.close()
    assert not report.lines


#: what is done to two images by both tools in turn; each must leave the same
SCRIPT: list[tuple[str, ...]] = [
    ("--add", "FILE", "one"),
    ("--add", "-g", "4k", "FILE", "two"),
    ("--add", "--disable", "-g", "1M", "FILE", "three"),
    ("write", "1M", "70000"),
    ("write", "3000k", "4k"),
    ("--merge", "one", "FILE", "three"),
    ("--disable", "FILE", "two"),
    ("write", "5M", "1M"),
    ("--clear", "--merge", "one", "FILE", "two"),
    ("--enable", "FILE", "three"),
    ("--add", "--merge", "two", "-g", "512", "FILE", "four"),
    ("--remove", "FILE", "one"),
    ("write", "0", "512"),
    ("--merge", "four", "-b", "OTHER", "-F", "qcow2", "FILE", "three"),
    ("--remove", "FILE", "three"),
    ("--remove", "FILE", "two"),
    ("--remove", "FILE", "four"),
]


@pytest.mark.parametrize(
    "options", ["cluster_size=64k", "cluster_size=512", "extended_l2=on,cluster_size=16k"]
)
def test_beside_qemu_img(tmp_path: Path, options: str) -> None:
    files = {tool: str(tmp_path / f"{tool}.qcow2") for tool in ("ours", "theirs")}
    other = str(tmp_path / "other.qcow2")
    for file in (*files.values(), other):
        qemu_img("create", "-q", "-f", "qcow2", "-o", options, file, "8M")
    qemu_img("bitmap", "--add", "-g", "2M", other, "four")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q 7M 4k", other)
    for words in SCRIPT:
        if words[0] == "write":
            for file in files.values():
                run_tool("qemu-io", "-f", "qcow2", "-c", f"write -q {words[1]} {words[2]}", file)
            continue
        for tool, file in files.items():
            arguments = [{"FILE": file, "OTHER": other}.get(word, word) for word in words]
            assert (img if tool == "ours" else qemu_img)("bitmap", *arguments) == ""
        clean(files["ours"])
        found = shown(files["ours"])
        assert found == shown(files["theirs"])
        for name in found:
            assert dirty(files["ours"], name) == dirty(files["theirs"], name), (words, name)
    assert not shown(files["ours"])


REFUSED: list[tuple[tuple[str, ...], str]] = [
    (("--add", "FILE", "one"), "Bitmap already exists: one"),
    (("--remove", "FILE", "none"), "Dirty bitmap 'none' not found"),
    (("--merge", "none", "FILE", "one"), "Dirty bitmap 'none' not found"),
    (("--add", "-g", "3k", "FILE", "two"), "Granularity must be power of 2 and at least 512"),
    (("--add", "-g", "256", "FILE", "two"), "Granularity must be power of 2 and at least 512"),
    (("--add", "FILE", ""), "Bitmap name cannot be empty"),
    (("--add", "FILE", "x" * 1024), "Name length exceeds maximum (1023 characters)"),
    (("FILE", "one"), "Need at least one of --add"),
    (("--clear", "-g", "4k", "FILE", "one"), "granularity only supported with --add"),
    (("--merge", "one", "-F", "qcow2", "FILE", "one"), "-F only supported with -b"),
    (("--clear", "-b", "FILE", "FILE", "one"), "Merge bitmap source file only supported with --merge"),
    (("--add", "FILE"), "Expecting filename and bitmap name"),
    (("--merge", "big", "-b", "BIG", "-F", "qcow2", "FILE", "one"), "are of different sizes"),
    (("--add", "OLD", "one"), "Cannot store dirty bitmaps in qcow2 v2 files"),
    (("--clear", "FILE", "broken"), "Bitmap 'broken' is inconsistent and cannot be used"),
    (("--merge", "broken", "FILE", "one"), "Bitmap 'broken' is inconsistent and cannot be used"),
]


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An image whose bitmap "broken" a killed program has left in use, and two others."""
    files = {name: str(tmp_path / name.lower()) for name in ("FILE", "BIG", "OLD")}
    file = files["FILE"]
    qemu_img("create", "-q", "-f", "qcow2", file, "4M")
    qemu_img("bitmap", "--add", file, "broken")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q 0 64k", "-c", "sigraise 9", file, status=None)
    qemu_img("bitmap", "--add", file, "one")
    qemu_img("create", "-q", "-f", "qcow2", files["BIG"], "8M")
    qemu_img("bitmap", "--add", files["BIG"], "big")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "compat=0.10", files["OLD"], "4M")
    return files


def test_what_is_refused(broken: dict[str, str]) -> None:
    for arguments, told in REFUSED:
        words = [broken.get(word, word) for word in arguments]
        mine, other = img("bitmap", *words, status=None), qemu_img("bitmap", *words, status=1)
        assert told in mine and told in other, (mine, other)
        assert mine.count("\n") == 1
    file = broken["FILE"]
    for arguments in (("resize", file, "8M"), ("resize", "--shrink", file, "1M")):
        assert "inconsistent" in img(*arguments, status=1)
    img("bitmap", "--remove", file, "broken")
    img("resize", "-q", file, "8M")
    clean(file)


def test_convert(tmp_path: Path, broken: dict[str, str]) -> None:
    file, mine, other = broken["FILE"], str(tmp_path / "mine"), str(tmp_path / "other")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q 1M 100k", file)
    for arguments in (("--bitmaps",), ("--skip-broken-bitmaps",), ("--bitmaps", "-O", "raw")):
        words = ["convert", *(arguments if "-O" in arguments else (*arguments, "-O", "qcow2")), file, mine]
        assert img(*words, status=None).count("\n") == 1
        qemu_img(*words, status=1)
    for tool, target in (img, mine), (qemu_img, other):
        told = tool("convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", file, target)
        assert "warning: Skipping inconsistent bitmap 'broken'" in told
    clean(mine)
    assert shown(mine) == shown(other) == {"one": (65536, ["auto"])}
    assert dirty(mine, "one") == dirty(other, "one") == [(MIB, 131072)]


def test_resize(tmp_path: Path) -> None:
    """Beside qemu-img, growing and shrinking, bits of the last granule included."""
    files = {tool: str(tmp_path / f"{tool}.qcow2") for tool in ("ours", "theirs")}
    for file in files.values():
        qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", file, "4M")
        for name, granularity in ("fine", "512"), ("coarse", "1M"):
            qemu_img("bitmap", "--add", "-g", granularity, file, name)
        qemu_img("bitmap", "--add", "--disable", file, "off")
    rnd = random.Random(1)
    sizes = [4 * MIB, 9 * MIB, 5 * MIB + 512, 5 * MIB + 1024, 512, 3 * MIB]
    for size, following in zip(sizes, sizes[1:], strict=False):
        for _ in range(3):
            offset = rnd.randrange(0, size // 512) * 512
            for file in files.values():
                run_tool("qemu-io", "-f", "qcow2", "-c", f"write -q {offset} 512", file)
        img("resize", "-q", "--shrink", files["ours"], str(following))
        qemu_img("resize", "-q", "--shrink", files["theirs"], str(following))
        clean(files["ours"])
        found = shown(files["ours"])
        assert found == shown(files["theirs"]) and len(found) == 3
        for name in found:
            assert dirty(files["ours"], name) == dirty(files["theirs"], name), (following, name)


def test_writers_beside_a_disk_that_grows(tmp_path: Path) -> None:
    """No change is missing in a bitmap that is made anew while it is marked."""
    file = str(tmp_path / "disk.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", file, "4M")
    img("bitmap", "--add", "-g", "512", file, "one")
    image = open_qcow2(file)
    written: list[set[int]] = [set() for _ in range(3)]

    def work(number: int) -> None:
        rnd = random.Random(number)
        for _ in range(150):
            sector = rnd.randrange(4 * MIB // 512)
            image.write(sector * 512, b"x" * 512)
            written[number].add(sector)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for step in range(1, 9):
        operations.resize(image, (4 + step) * MIB)
    for thread in threads:
        thread.join()
    image.close()
    clean(file)
    image = open_qcow2(file, read_only=True)
    assert set(np.flatnonzero(BitmapSet(image).content("one")).tolist()) == set().union(*written)
    image.close()


def test_a_snapshot_of_another_size(tmp_path: Path) -> None:
    file = str(tmp_path / "disk.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", file, "2M")
    img("bitmap", "--add", "-g", "64k", file, "one")
    img("snapshot", "-c", "small", file)
    img("resize", "-q", file, "4M")
    img("snapshot", "-c", "large", file)
    for name, size in ("small", 2 * MIB), ("large", 4 * MIB):
        img("bitmap", "--clear", file, "one")
        img("snapshot", "-a", name, file)
        clean(file)
        assert dirty(file, "one") == [(0, size)]


def test_commit_marks_the_base_alone(tmp_path: Path) -> None:
    """The disk of the image that is emptied does not change."""
    for tool, run in ("ours", img), ("theirs", qemu_img):
        base, top = str(tmp_path / f"base.{tool}"), str(tmp_path / f"top.{tool}")
        qemu_img("create", "-q", "-f", "qcow2", base, "4M")
        qemu_img("create", "-q", "-f", "qcow2", "-b", f"base.{tool}", "-F", "qcow2", top)
        run_tool("qemu-io", "-f", "qcow2", "-c", "write -q 2M 64k", top)
        for file in (base, top):
            qemu_img("bitmap", "--add", file, "one")
        run("commit", "-q", top)
        assert dirty(base, "one") == [(2 * MIB, 65536)] and dirty(top, "one") == []
        qemu_check(base)
        qemu_check(top)


@pytest.mark.parametrize("change", ["add", "remove", "grow", "shrink"])
def test_loss_of_power(tmp_path: Path, change: str) -> None:
    """Whichever writes are lost, all bitmaps of before or all of after are there, and the file is clean or
    has leaks."""
    file = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", str(file), "1M")
    for name in ("one", "two"):
        img("bitmap", "--add", "-g", "512", str(file), name)
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q 0 4k", str(file))
    start = file.read_bytes()
    image = open_qcow2(str(file), open_file=_Log)
    log = image.host
    assert isinstance(log, _Log)
    with operations.at_rest(image):
        if change in ("add", "remove"):
            known = BitmapSet(image)
            known.add("three") if change == "add" else known.remove("two")
            known.save()
        else:
            operations.resize(image, 3 * MIB if change == "grow" else MIB // 2)
    image.close()
    names = {"add": {"one", "two", "three"}, "remove": {"one"}}.get(change, {"one", "two"})
    seen = states(start, log.log, most=8)
    lost = tmp_path / "lost.qcow2"
    for data in random.Random(2).sample(seen, min(len(seen), 60)):
        lost.write_bytes(data)
        image = open_qcow2(str(lost), read_only=True, repair=True)
        report = check(image)
        assert not report.corruptions, report.lines
        known = BitmapSet(image)
        found = {bitmap.name for bitmap in known.bitmaps()}
        assert found in ({"one", "two"}, names)
        for name in found - {"three"}:
            assert known.content(name)[:9].tolist() == [True] * 8 + [False]
        image.close()


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(9, 12), st.integers(9, 12))
def test_scaled(bits: list[bool], old: int, new: int) -> None:
    """Byte by byte."""
    marked = {
        byte >> new for n, bit in enumerate(bits) if bit for byte in range(n << old, (n + 1) << old, 512)
    }
    found = scaled(np.array(bits), old, new)
    assert set(np.flatnonzero(found).tolist()) == marked
