"""``atoll img`` beside qemu-img: the same answers, field names and exit statuses."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from blockd.hostfile import HostFile
from blockd.img.main import COMMANDS
from blockd.opening import open_image
from coordinator.cli.main import main
from tests.blockd.qcow2.support import qemu_check, qemu_reads
from tests.support.tools import run_tool

MIB = 1 << 20


def img(*arguments: str, status: int | None = 0) -> str:
    """Run ``atoll img``; its output, both streams together."""
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        found = main(["img", *arguments])
    assert status is None or found == status, f"{arguments}: exit {found}\n{told.getvalue()}"
    return told.getvalue()


def qemu_img(*arguments: str, status: int | None = 0) -> str:
    return run_tool("qemu-img", *arguments, status=status)


def both_json(*arguments: str, leave_out: tuple[str, ...] = ()) -> Any:
    """What both say as JSON, which must be the same."""
    ours, theirs = json.loads(img(*arguments)), json.loads(qemu_img(*arguments))
    for name in leave_out:
        for rows in (ours, theirs):
            for row in rows if isinstance(rows, list) else [rows]:
                row.pop(name, None)
    assert ours == theirs
    return ours


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A raw disk with data, zeroes and a ragged end."""
    rnd = random.Random(1)
    data = rnd.randbytes(MIB) + bytes(MIB) + b"text " * 60000 + bytes(700 * 512) + rnd.randbytes(512)
    file = tmp_path / "noise.raw"
    file.write_bytes(data[: len(data) // 512 * 512])
    return file


OPTIONS = [
    (),
    ("-o", "cluster_size=4k,refcount_bits=8"),
    ("-o", "compat=0.10"),
    ("-o", "lazy_refcounts=on,compression_type=zstd"),
    ("-o", "preallocation=metadata"),
    ("-o", "preallocation=falloc"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o[-1] if o else "plain")
def test_create_and_info(tmp_path: Path, options: tuple[str, ...]) -> None:
    ours, theirs = str(tmp_path / "ours.qcow2"), str(tmp_path / "theirs.qcow2")
    said = img("create", "-f", "qcow2", *options, ours, "10M")
    wanted = qemu_img("create", "-f", "qcow2", *options, theirs, "10M").replace("theirs", "ours")
    assert sorted(said.split()) == sorted(wanted.split())
    qemu_check(ours)
    for file in (ours, theirs):
        both_json("info", "--output=json", file)
        assert img("info", file) == qemu_img("info", file)
    assert img("check", ours) == qemu_img("check", ours)
    qemu_reads(ours, bytes(10 * MIB), tmp_path)


def test_check(tmp_path: Path) -> None:
    file = str(tmp_path / "disk.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", file, "8M")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 1 0 3M", "-c", "write -q -z 1M 64k", file)
    both_json("check", "--output=json", file)
    assert img("check", file) == qemu_img("check", file)
    end = os.path.getsize(file) // 65536
    os.truncate(file, (end + 1) * 65536)
    with open(file, "r+b") as image:
        image.seek(0x20000 + 2 * end)  # a leak
        image.write(b"\0\1")
    qemu_status = qemu_img("check", "--output=json", file, status=3)
    assert json.loads(img("check", "--output=json", file, status=3)) == json.loads(
        qemu_status[qemu_status.index("{") :]
    )
    fixed = json.loads(img("check", "-r", "leaks", "--output=json", file))
    assert fixed["leaks-fixed"] == 1
    qemu_check(file)
    with open(file, "r+b") as image:
        image.seek(0x20000 + 2 * 6)  # in use, and said to be free
        image.write(b"\0\0")
    qemu_img("check", file, status=2)
    assert "ERROR cluster 6 refcount=0 reference=1" in img("check", file, status=2)
    img("check", "-r", "all", file)
    qemu_check(file)
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(512))
    img("check", str(raw), status=63)
    img("check", str(tmp_path / "none"), status=1)


@pytest.mark.parametrize(
    "options", [(), ("-c",), ("-c", "-o", "compression_type=zstd,cluster_size=4k")], ids=str
)
def test_convert(tmp_path: Path, noise: Path, options: tuple[str, ...]) -> None:
    file, back = str(tmp_path / "disk.qcow2"), str(tmp_path / "back.raw")
    said = img("convert", "-p", "-f", "raw", "-O", "qcow2", *options, str(noise), file)
    assert said.endswith("(100.00/100%)\r\n")
    report = qemu_check(file)
    assert bool(report.get("compressed-clusters")) == bool(options)
    qemu_reads(file, noise.read_bytes(), tmp_path)
    img("convert", "-O", "raw", file, back)
    assert Path(back).read_bytes() == noise.read_bytes()
    theirs = str(tmp_path / "theirs.qcow2")
    qemu_img("convert", "-O", "qcow2", *options, str(noise), theirs)
    assert (
        json.loads(qemu_img("check", "--output=json", theirs))["allocated-clusters"]
        == report["allocated-clusters"]
    )
    assert img("compare", file, theirs) == "Images are identical.\n"


def test_compare(tmp_path: Path, noise: Path) -> None:
    file = str(tmp_path / "disk.qcow2")
    img("convert", "-O", "qcow2", str(noise), file)
    assert img("compare", file, str(noise)) == qemu_img("compare", file, str(noise))
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 3 1537k 512", file)
    assert img("compare", file, str(noise), status=1) == qemu_img("compare", file, str(noise), status=1)
    longer = tmp_path / "longer.raw"
    longer.write_bytes(noise.read_bytes() + bytes(MIB))
    for strict, status in ((), 0), (("-s",), 1):
        both = "compare", *strict, "-f", "raw", "-F", "raw", str(noise), str(longer)
        assert img(*both, status=status) == qemu_img(*both, status=status)
    longer.write_bytes(noise.read_bytes() + bytes(MIB - 512) + b"x" * 512)
    both = "compare", "-f", "raw", "-F", "raw", str(noise), str(longer)
    assert img(*both, status=1) == qemu_img(*both, status=1)
    img("compare", file, str(tmp_path / "none"), status=2)


def test_map_of_a_chain(tmp_path: Path, noise: Path) -> None:
    base, top = str(tmp_path / "base.qcow2"), str(tmp_path / "top.qcow2")
    qemu_img("convert", "-O", "qcow2", str(noise), base)
    img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
    img("resize", "-q", top, "+4M")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 3 512k 128k", "-c", "write -q -z 1M 64k", top)
    for file in (base, top, str(noise)):
        both_json("map", "--output=json", file)
        assert img("map", file) == qemu_img("map", file)


def test_snapshots(tmp_path: Path) -> None:
    file = str(tmp_path / "disk.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", file, "4M")
    states = {}
    for number in range(3):
        run_tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P {number + 1} {number}M 1500k", file)
        (img if number % 2 else qemu_img)("snapshot", "-c", f"s{number}", file)
        qemu_img("convert", "-O", "raw", file, str(tmp_path / "now"))
        states[f"s{number}"] = (tmp_path / "now").read_bytes()
    assert img("snapshot", "-l", file).split("\n")[0] == "Snapshot list:"
    assert [line.split()[:2] for line in img("snapshot", "-l", file).splitlines()] == [
        line.split()[:2] for line in qemu_img("snapshot", "-l", file).splitlines()
    ]
    for name, state in states.items():
        img("convert", "-l", name, "-O", "raw", file, str(tmp_path / "then"))
        assert (tmp_path / "then").read_bytes() == state
    img("snapshot", "-a", "s0", file)
    qemu_reads(file, states["s0"], tmp_path)
    img("snapshot", "-d", "s1", file)
    qemu_img("snapshot", "-d", "s0", file)
    qemu_check(file)
    img("snapshot", "-d", "s1", file, status=1)
    qemu_img("snapshot", "-a", "s2", file)
    qemu_reads(file, states["s2"], tmp_path)


def test_resize(tmp_path: Path, noise: Path) -> None:
    file = str(tmp_path / "disk.qcow2")
    img("convert", "-O", "qcow2", str(noise), file)
    img("resize", file, "+10M")
    assert "--shrink" in img("resize", file, "-11M", status=1)
    img("resize", "--shrink", file, "-11M")
    size = noise.stat().st_size - MIB
    qemu_check(file)
    qemu_reads(file, noise.read_bytes()[:size], tmp_path)
    img("resize", "--preallocation=metadata", file, "6M")
    assert qemu_check(file)["allocated-clusters"] > 48
    qemu_reads(file, noise.read_bytes()[:size].ljust(6 * MIB, b"\0"), tmp_path)
    img("resize", "-f", "raw", str(noise), "8M")
    assert noise.stat().st_size == 8 * MIB
    img("resize", "-f", "raw", str(noise), "--shrink", "--", "-1M")
    assert noise.stat().st_size == 7 * MIB


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
def test_commit(tmp_path: Path, noise: Path, kind: str) -> None:
    base, top = str(tmp_path / "base"), str(tmp_path / "top")
    qemu_img("convert", "-O", kind, str(noise), base)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", kind, top, "5M")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 100k 70k", "-c", "write -q -z 1M 2M", top)
    qemu_img("convert", "-O", "raw", top, str(tmp_path / "whole"))
    assert img("commit", top) == "Image committed.\n"
    qemu_check(top)
    assert not qemu_check(top).get("allocated-clusters")
    assert (
        qemu_img("compare", "-F", "raw", base, str(tmp_path / "whole"), *(("-f", kind)))
        == "Images are identical.\n"
    )
    assert img("compare", top, str(tmp_path / "whole")) == "Images are identical.\n"


def test_rebase(tmp_path: Path, noise: Path) -> None:
    other = tmp_path / "other.raw"
    other.write_bytes(bytes(MIB // 2) + noise.read_bytes()[MIB // 2 :])
    top = str(tmp_path / "top")
    img("create", "-q", "-f", "qcow2", "-b", "noise.raw", "-F", "raw", top)
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 100k 70k", top)
    qemu_img("convert", "-O", "raw", top, str(tmp_path / "before"))
    before = (tmp_path / "before").read_bytes()
    for name, image_format in (("other.raw", ("-F", "raw")), ("", ())):
        img("rebase", "-b", name, *image_format, top)
        qemu_check(top)
        qemu_reads(top, before, tmp_path)
    assert "backing-filename" not in json.loads(qemu_img("info", "--output=json", top))
    img("rebase", "-u", "-b", "noise.raw", "-F", "raw", top)
    both_json("info", "--output=json", top)
    assert img("info", "--backing-chain", top).count("image: ") == 2


def test_bench(tmp_path: Path, noise: Path) -> None:
    assert "Run completed in" in img("bench", "-c", "50", "-f", "raw", str(noise))
    assert "50 write requests" in img("bench", "-w", "-c", "50", "-f", "raw", str(noise))


@pytest.mark.parametrize("name", ["a b", "a,b", "a%20b", "./a:b", "-", "\u00fc"])
def test_names_as_users_give_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A chain in a folder, seen from there and by way of a link to it; what is told has the user's names."""
    folder = tmp_path / "my images"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    base, top = f"{name}.qcow2", f"{name} top.qcow2"
    img("create", "-q", "-f", "qcow2", "--", base, "1M")
    below = f"./{base}" if base.startswith("-") else base
    img("create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", "--", top)
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -q -P 3 0 64k", "--", str(folder / base))
    for place in ("", "../link/", f"{tmp_path}/link/"):
        for command in (("info",), ("info", "--backing-chain"), ("map",)):
            both_json(*command, "--output=json", "--", place + top)
            assert img(*command, "--", place + top) == qemu_img(*command, "--", place + top)


def test_an_image_that_is_a_link_lies_where_that_leads(tmp_path: Path) -> None:
    for folder in ("images", "links"):
        (tmp_path / folder).mkdir()
    base, top = (str(tmp_path / "images" / name) for name in ("base", "top"))
    img("create", "-q", "-f", "qcow2", base, "1M")
    img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", top)
    link = tmp_path / "links" / "top"
    link.symlink_to(top)
    told = json.loads(img("info", "--backing-chain", "--output=json", str(link)))
    assert told[0]["full-backing-filename"] == told[1]["filename"] == base


def test_help(tmp_path: Path) -> None:
    told = img("--help")
    for command in COMMANDS:
        assert f"\n  {command} " in told
        about = io.StringIO()
        with redirect_stdout(about), pytest.raises(SystemExit, match="^0$"):
            main(["img", command, "--help"])
        assert about.getvalue().startswith(f"usage: atoll img {command} ")
    listed = [text.split()[0] for text in img("create", "-f", "qcow2", "-o", "help").splitlines()[1:]]
    wanted = qemu_img("create", "-f", "qcow2", "-o", "help").splitlines()
    theirs = [text.split("=")[0].strip() for text in wanted]
    assert set(listed) == {name for name in theirs if re.fullmatch("[a-z0-9_]+", name)} - {"encryption"}
    assert "cluster_size" not in img("create", "-o", "?")


#: what a user may name by mistake, and what each command says then: exit statuses by qemu-img's
NO_IMAGES = {
    "folder": "s a directory",
    "none": "No such file or directory",
    "folder/none": "No such file or directory",
    "fifo": "is no file and no block device",
    "/dev/null": "is no file and no block device",
}
ON_ONE_IMAGE = (
    ("info",), ("check",), ("map",), ("snapshot", "-l"), ("snapshot", "-c", "x"), ("commit",),
    ("rebase", "-b", ""), ("bench", "-c", "1"), ("compare", "disk"), ("convert", "-O", "qcow2", "-n", "disk"),
)  # fmt: skip


@pytest.mark.parametrize("command", ON_ONE_IMAGE, ids=" ".join)
def test_what_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("fifo")
    img("create", "-q", "-f", "qcow2", "disk", "1M")
    for name, words in NO_IMAGES.items():
        told = img(*command, name, status=2 if command[0] == "compare" else 1)
        assert told.startswith("atoll img: ") and words in told and told.count("\n") == 1


def test_a_raw_image_has_no_snapshots_to_list(noise: Path) -> None:
    assert img("snapshot", "-l", str(noise)) == qemu_img("snapshot", "-l", str(noise)) == ""
    assert "no snapshots" in img("snapshot", "-c", "x", "-f", "raw", str(noise), status=1)


def test_errors_are_one_line(tmp_path: Path) -> None:
    for arguments in (
        ("nothing",),
        ("info", str(tmp_path / "none")),
        ("create", "-f", "vmdk", "x", "1M"),
        ("create", "-f", "qcow2", str(tmp_path / "x"), "huge"),
        ("create", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=4k", str(tmp_path / "x"), "1M"),
        ("convert", "-c", "-O", "raw", "a", "b"),
        ("resize", str(tmp_path), "1M"),
    ):
        told = img(*arguments, status=None)
        assert told.startswith("atoll ") and told.count("\n") == 1
    img("nothing", status=1)  # qemu-img's


@pytest.mark.parametrize("command", ["create", "snapshot", "resize"])
def test_what_the_kernel_refuses_is_told_with_the_name_of_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """And an image that could not be made does not stay."""
    file = str(tmp_path / "disk.qcow2")
    arguments = {
        "create": ("create", "-q", "-f", "qcow2", file, "1M"),
        "snapshot": ("snapshot", "-c", "s", file),
        "resize": ("resize", file, "+1T"),
    }[command]
    if command != "create":
        img("create", "-q", "-f", "qcow2", file, "1M")

    def full(host: HostFile) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(HostFile, "sync", full)
    told = img(*arguments, status=1)
    assert file in told and "No space left on device" in told.splitlines()[-1]
    assert os.path.exists(file) == (command != "create")


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_force_share_reads_what_somebody_writes(tmp_path: Path, image_format: str) -> None:
    file, copy = str(tmp_path / "disk"), str(tmp_path / "copy")
    img("create", "-q", "-f", image_format, file, "1M")
    with contextlib.closing(open_image(file, image_format)):
        for command, more in (("info", ()), ("map", ()), ("compare", (file,)), ("convert", (copy,))):
            arguments = (command, "-f", image_format, file, *more)
            locked = 2 if command == "compare" else 1
            assert "is locked" in img(*arguments, status=locked)
            for shared in ("-U", "--force-share"):
                img(*arguments, shared)
                qemu_img(*arguments, shared)


@pytest.mark.parametrize("name", ["luks", "qed", "vmdk", "vhdx", "vdi"])
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str) -> None:
    """Copied as raw they would give a disk that nobody has written."""
    file = str(tmp_path / "disk")
    if name == "luks":  # making one is a matter of luck where processor time cannot be measured
        Path(file).write_bytes(b"LUKS\xba\xbe\x00\x01".ljust(4096, b"\0"))
    else:
        qemu_img("create", "-q", "-f", name, file, "1M")
    assert f"looks like {name.upper()}" in img("convert", file, str(tmp_path / "copy"), status=1)
    assert not os.path.exists(tmp_path / "copy")
    img("convert", "-f", "raw", file, str(tmp_path / "copy"))


FAILING = [("raw", "falloc"), ("qcow2", "falloc"), ("qcow2", "full"), ("qcow2", "falloc,data_file=d")]


@pytest.mark.parametrize("image_format,options", FAILING)
def test_what_could_not_be_made_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_format: str, options: str
) -> None:
    """A full disk; a file that was there is emptied, one that another process uses is left alone."""

    def full(host: HostFile, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(command: str, *arguments: str) -> str:
        how = ("-o", f"preallocation={options.replace('=d', f'={data}')}")
        told = img(command, *how, *arguments, status=1)
        assert told.count("\n") == 1
        return told

    file, data, source = (str(tmp_path / name) for name in ("disk", "data", "source"))
    Path(source).write_bytes(bytes(MIB))
    commands = [("create", "-f", image_format, file, "1M")]
    if image_format == "qcow2":
        commands.append(("convert", "-O", image_format, source, file))
    monkeypatch.setattr(HostFile, "reserve", full)
    for command in commands:
        assert "No space left" in fails(*command)
        assert os.listdir(tmp_path) == ["source"]
        Path(file).write_bytes(b"old")
        fails(*command)
        assert Path(file).read_bytes() == b"" and not os.path.exists(data)
        Path(file).write_bytes(bytes(512))
        with contextlib.closing(open_image(file, "raw")):
            assert "is locked" in fails(*command)
            assert os.stat(file).st_size == 512 and not os.path.exists(data)
        os.unlink(file)


def test_a_raw_image_too_large_for_the_file_system_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate = os.ftruncate

    def limited(fd: int, size: int) -> None:
        if size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        truncate(fd, size)

    monkeypatch.setattr(os, "ftruncate", limited)
    assert "File too large" in img("create", str(tmp_path / "disk"), "1M", status=1)
    assert os.listdir(tmp_path) == []


def test_empty_raw_images(tmp_path: Path) -> None:
    """Every command takes them, as qemu-img does."""
    file, copy, disk = (str(tmp_path / name) for name in ("disk", "copy", "disk.qcow2"))
    Path(file).write_bytes(b"")
    assert "virtual size: 0 B (0 bytes)" in img("info", file)
    assert json.loads(img("map", "--output=json", file)) == []  # qemu-img tells of an extent without length
    img("convert", file, copy)
    assert os.stat(copy).st_size == 0
    img("convert", "-O", "qcow2", file, disk)
    qemu_check(disk)
    assert img("compare", file, copy) == qemu_img("compare", "-f", "raw", "-F", "raw", file, copy)
    assert img("compare", file, disk) == qemu_img("compare", "-f", "raw", "-F", "qcow2", file, disk)
    img("resize", "-f", "raw", file, "1M")
    assert Path(file).read_bytes() == bytes(MIB)


def test_preallocation_of_raw_images(tmp_path: Path) -> None:
    """The modes are qemu-img's; a wrong one changes nothing."""
    file = str(tmp_path / "disk")
    for mode in ("metadata", "other"):
        img("create", "-o", f"preallocation={mode}", file, "1M", status=1)
        assert not os.path.exists(file)
    img("create", file, "1M")
    img("resize", "-f", "raw", "--preallocation=metadata", file, "2M", status=1)
    assert os.stat(file).st_size == MIB
    img("resize", "-f", "raw", "--preallocation=falloc", file, "2M")
    status = os.stat(file)
    assert status.st_size == 2 * MIB and status.st_blocks * 512 == MIB


def test_what_another_process_uses_is_not_overwritten(tmp_path: Path) -> None:
    from blockd.opening import open_qcow2

    file = str(tmp_path / "disk.qcow2")
    img("create", "-q", "-f", "qcow2", file, "1M")
    image = open_qcow2(file)
    image.write(0, b"precious")
    for arguments in (("create", "-f", "qcow2", file, "1M"), ("create", file, "1M"), ("resize", file, "2M")):
        assert "locked" in img(*arguments, status=1)
    image.close()
    assert img("check", file).startswith("No errors")
