"""Dirty bitmaps as metadata contexts: what qemu-nbd tells of the same file is what we tell."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

import pytest

from blockd.export import ExportTable
from blockd.opening import open_qcow2
from blockd.qcow2 import dirty
from blockd.qcow2.dirty import DirtyBitmap
from coordinator.contract.config import Export
from coordinator.contract.errors import BlockError
from tests.blockd.conftest import SERVICES, Serve, make_image
from tests.support.nbd_wire import WireClient
from tests.support.tools import run_tool

KIB, MIB = 1 << 10, 1 << 20
ACK = (1, b"")
ERR = 1 << 31
LIST_META, SET_META, STRUCTURED = 9, 10, 8
BLOCK_STATUS, REQ_ONE = 7, 8
ALLOCATION, DIRT = "base:allocation", "qemu:dirty-bitmap:"


def make_disk(file: Path, size: int = 64 * MIB, cluster: int = 65536, **bitmaps: int) -> str:
    """An image with bitmaps by name and granularity, made by qemu-img."""
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", str(file), str(size))
    for name, granularity in bitmaps.items():
        run_tool("qemu-img", "bitmap", "--add", "-g", str(granularity), str(file), name)
    return str(file)


def dirty_by_qemu(file: str, *places: tuple[int, int]) -> None:
    commands = [word for at, length in places for word in ("-c", f"write -P 1 {at} {length}")]
    run_tool("qemu-io", "-f", "qcow2", *commands, file)


def told(path: str, context: str, name: str = "hd0") -> list[tuple[int, int, int]]:
    """Offset, length and flags of every extent, by nbdinfo."""
    text = run_tool("nbdinfo", f"--map={context}", f"nbd+unix:///{name}?socket={path}")
    return [(int(at), int(length), int(flags)) for at, length, flags, *_ in map(str.split, text.splitlines())]


def query(*queries: str, name: str = "hd0") -> bytes:
    data = b"".join(struct.pack(">I", len(text)) + text.encode() for text in (name,))
    data += struct.pack(">I", len(queries))
    return data + b"".join(struct.pack(">I", len(text)) + text.encode() for text in queries)


# ---- what is told --------------------------------------------------------------------------------------
def test_nbdinfo_and_qemu_img(serve: Serve, tmp_path: Path) -> None:
    file = make_disk(tmp_path / "disk", b0=65536)
    dirty_by_qemu(file, (MIB, 128 * KIB), (5 * MIB + 1000, 10), (64 * MIB - 512, 512))
    expected = [
        (0, MIB, 0),
        (MIB, 128 * KIB, 1),
        (MIB + 128 * KIB, 4 * MIB - 128 * KIB, 0),
        (5 * MIB, 64 * KIB, 1),
        (5 * MIB + 64 * KIB, 59 * MIB - 128 * KIB, 0),
        (64 * MIB - 64 * KIB, 64 * KIB, 1),
    ]
    path = serve(Export("hd0", file, "qcow2", read_only=True, bitmaps=("b0",)))
    assert told(path, DIRT + "b0") == expected
    listed = run_tool("nbdinfo", f"nbd+unix:///hd0?socket={path}")
    assert DIRT + "b0" in listed and ALLOCATION in listed
    options = f"driver=nbd,server.type=unix,server.path={path},export=hd0,x-dirty-bitmap={DIRT}b0"
    rows = json.loads(run_tool("qemu-img", "map", "--output=json", "--image-opts", options))
    # "x-dirty-bitmap": what is dirty shows as no data
    assert [(row["start"], row["length"], int(not row["data"])) for row in rows] == expected


@pytest.mark.parametrize("cluster, granularity", [(512, 512), (4096, 65536), (65536, 4096), (2 * MIB, 512)])
def test_beside_qemu_nbd(
    serve: Serve, runtime: Path, tmp_path: Path, cluster: int, granularity: int
) -> None:
    file = make_disk(tmp_path / "disk", 8 * MIB, cluster, b0=granularity)
    chance = random.Random(cluster + granularity)
    places = [(chance.randrange(8 * MIB - 65536), chance.randrange(1, 65536)) for _ in range(40)]
    dirty_by_qemu(file, *places)
    path = serve(Export("hd0", file, "qcow2", read_only=True, bitmaps=("b0",)))
    socket, pid = str(runtime / "theirs"), runtime / "pid"
    run_tool("qemu-nbd", "-r", "-t", "-f", "qcow2", "-x", "hd0", "-B", "b0", "-k", socket, "--fork",
             "--pid-file", str(pid), file)  # fmt: skip
    try:
        assert told(path, DIRT + "b0") == told(socket, DIRT + "b0")
    finally:
        run_tool("kill", pid.read_text().strip())


def test_bitmaps_follow_what_clients_write(serve: Serve, tmp_path: Path) -> None:
    """Seen at once, also by others; and by QEMU when the disk is at rest."""
    file = make_disk(tmp_path / "disk", b0=65536)
    path = serve(Export("hd0", file, "qcow2", bitmaps=("b0",)))
    assert told(path, DIRT + "b0") == [(0, 64 * MIB, 0)]
    with WireClient(path) as client:
        client.go("hd0")
        assert client.request(1, 3 * MIB + 5, 4, data=b"data") == 0
        now = [(0, 3 * MIB, 0), (3 * MIB, 64 * KIB, 1), (3 * MIB + 64 * KIB, 61 * MIB - 64 * KIB, 0)]
        assert told(path, DIRT + "b0") == now
    service = SERVICES[path]
    service.exports.close("hd0")
    again = serve(Export("hd0", file, "qcow2", read_only=True, bitmaps=("b0",)))
    assert told(again, DIRT + "b0") == now
    SERVICES[again].exports.close("hd0")
    run_tool("qemu-img", "check", file)


def test_two_contexts_in_one_request(serve: Serve, tmp_path: Path) -> None:
    file = make_disk(tmp_path / "disk", b0=65536)
    dirty_by_qemu(file, (0, 64 * KIB))
    run_tool("qemu-img", "bitmap", "--add", file, "b1")
    dirty_by_qemu(file, (MIB, 64 * KIB))
    with WireClient(serve(Export("hd0", file, "qcow2", True, bitmaps=("b1", "b0")))) as client:
        client.option(STRUCTURED)
        replies = client.option(SET_META, query(DIRT + "b0", ALLOCATION, DIRT + "b1", "qemu:", "no:such"))
        chosen = {data[4:].decode(): data[:4] for kind, data in replies if kind == 4}
        assert set(chosen) == {ALLOCATION, DIRT + "b0", DIRT + "b1"} and len(set(chosen.values())) == 3
        assert bytes(4) not in chosen.values()
        client.go("hd0")
        answers = {}
        client.send_request(BLOCK_STATUS, 0, 2 * MIB)
        for count in (1, 2, 3):
            flags, kind, _, body = client.chunk()
            assert kind == 5 and flags == (1 if count == 3 else 0)
            answers[body[:4]] = [struct.unpack_from(">II", body, at) for at in range(4, len(body), 8)]
        clean = MIB - 64 * KIB
        assert answers[chosen[DIRT + "b0"]] == [(64 * KIB, 1), (clean, 0), (64 * KIB, 1), (clean, 0)]
        assert answers[chosen[DIRT + "b1"]] == [(MIB, 0), (64 * KIB, 1), (clean, 0)]
        assert answers[chosen[ALLOCATION]] == [(64 * KIB, 0), (clean, 3), (64 * KIB, 0), (clean, 3)]
        client.send_request(BLOCK_STATUS, 1000, 64 * KIB, flags=REQ_ONE)
        for _ in range(3):
            _, _, _, body = client.chunk()
            rest = 64 * KIB - 1000
            wanted = {DIRT + "b0": (rest, 1), DIRT + "b1": (64 * KIB, 0), ALLOCATION: (rest, 0)}
            answer = {chosen[name]: answer for name, answer in wanted.items()}[body[:4]]
            assert struct.unpack(">II", body[4:]) == answer


def test_queries(serve: Serve, tmp_path: Path) -> None:
    """ "NBD_OPT_LIST_META_CONTEXT", "NBD_OPT_SET_META_CONTEXT", and QEMU's namespace."""
    file = make_disk(tmp_path / "disk", a=65536, b=65536, hidden=65536)
    with WireClient(serve(Export("hd0", file, "qcow2", True, bitmaps=("a", "b")))) as client:
        client.option(STRUCTURED)

        def names(option: int, *queries: str) -> set[str]:
            replies = client.option(option, query(*queries))
            assert replies[-1] == ACK
            return {data[4:].decode() for _, data in replies[:-1]}

        both = {DIRT + "a", DIRT + "b"}
        assert names(LIST_META) == {ALLOCATION} | both
        assert names(LIST_META, "qemu:") == names(LIST_META, DIRT) == both
        assert names(LIST_META, "base:") == {ALLOCATION}
        assert names(LIST_META, "base:", DIRT + "b") == {ALLOCATION, DIRT + "b"}
        assert names(LIST_META, DIRT + "hidden", "qemu:allocation-depth", DIRT + "", "x:") == both
        assert names(LIST_META, "", "qemu", "qemu:dirty-bitmap", "QEMU:") == set()
        assert names(SET_META) == names(SET_META, "qemu:") == names(SET_META, DIRT, "base:") == set()
        assert names(SET_META, DIRT + "hidden", DIRT + "b") == {DIRT + "b"}
        client.go("hd0")
        client.send_request(BLOCK_STATUS, 0, 512)
        assert client.chunk()[1] == 5


def test_a_choice_is_for_one_export(serve: Serve, tmp_path: Path) -> None:
    """Contexts that were chosen for another export, or for a medium that has been changed, are void."""
    one, two = (make_disk(tmp_path / name, a=65536) for name in ("one", "two"))
    raw = Export("hd1", make_image(tmp_path / "raw"))
    path = serve(Export("hd0", one, "qcow2", True, bitmaps=("a",)), raw)
    for chosen, taken in (("hd0", "hd1"), ("hd1", "hd0")):
        with WireClient(path) as client:
            client.option(STRUCTURED)
            client.option(SET_META, query(ALLOCATION, DIRT + "a", name=chosen))
            client.go(taken)
            client.send_request(BLOCK_STATUS, 0, 512)
            assert client.chunk()[1] == 1 << 15 | 1
    with WireClient(path) as client:
        client.option(STRUCTURED)
        client.option(SET_META, query(DIRT + "a"))
        SERVICES[path].exports.open(Export("hd0", two, "qcow2", True))
        client.go("hd0")
        client.send_request(BLOCK_STATUS, 0, 512)
        assert client.chunk()[1] == 1 << 15 | 1


def test_a_reply_is_bounded(serve: Serve, tmp_path: Path) -> None:
    """Every second of 16,384 bits is set: one reply tells of some, and the client goes on from there."""
    file = make_disk(tmp_path / "disk", 8 * MIB, b0=512)
    image = open_qcow2(file)
    for at in range(0, 8 * MIB, 1024):
        image.write(at, b"x" * 512)
    image.close()
    path = serve(Export("hd0", file, "qcow2", True, bitmaps=("b0",)))
    with WireClient(path) as client:
        client.option(STRUCTURED)
        client.option(SET_META, query(DIRT + "b0"))
        client.go("hd0")
        client.send_request(BLOCK_STATUS, 0, 8 * MIB)
        _, kind, _, body = client.chunk()
        assert kind == 5 and 8 + 4 < len(body) <= 64 * KIB
    extents = told(path, DIRT + "b0")
    assert extents == [(at, 512, 1 - at // 512 % 2) for at in range(0, 8 * MIB, 512)]


def test_steps_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are the same however few bits are looked at in one step; any range begins and ends as asked."""
    file = make_disk(tmp_path / "disk", 8 * MIB, 512, b0=512)
    chance = random.Random(3)
    bits = bytearray(8 * MIB // 512)
    image = open_qcow2(file)
    for _ in range(60):
        first, count = chance.randrange(len(bits) - 400), chance.choice((1, 2, 7, 8, 9, 64, 400))
        image.write(first * 512, b"x" * (512 * count))
        bits[first : first + count] = b"\1" * count
    image.close()
    image = open_qcow2(file, read_only=True)
    bitmap = DirtyBitmap(image, "b0")
    for step in (1, 3, 64, 1000, 1 << 19):
        monkeypatch.setattr(dirty, "_STEP", step)
        for _ in range(20):
            offset = chance.randrange(8 * MIB - 1)
            length = chance.randrange(1, min(256 * KIB, 8 * MIB - offset) + 1)
            runs = list(bitmap.runs(offset, length))
            assert sum(run.length for run in runs) == length and all(run.length for run in runs)
            assert all(one.dirty is not two.dirty for one, two in zip(runs, runs[1:], strict=False))
            at = offset
            for run in runs:
                for place in (at, at + run.length - 1):
                    assert bits[place // 512] == run.dirty
                at += run.length
    image.close()


# ---- what is refused -----------------------------------------------------------------------------------
def refusal(wanted: Export) -> str:
    with pytest.raises(BlockError) as caught:
        ExportTable().open(wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bitmaps_that_cannot_be_told(tmp_path: Path) -> None:
    file = make_disk(tmp_path / "disk", b0=65536)
    assert "bitmap 'no' is not there" in refusal(Export("hd0", file, "qcow2", True, bitmaps=("no",)))
    raw = make_image(tmp_path / "raw")
    assert "raw images have no bitmaps" in refusal(Export("hd0", raw, bitmaps=("b0",)))
    image = open_qcow2(file)
    image.write(0, b"x")
    crashed = str(tmp_path / "crashed")
    shutil.copy(file, crashed)  # as a crash leaves it
    image.close()
    for read_only in (True, False):
        said = refusal(Export("hd0", crashed, "qcow2", read_only, bitmaps=("b0",)))
        assert "'b0' is inconsistent" in said
    options = ("-r", "-f", "qcow2", "-B", "b0", "-k", str(tmp_path / "s"))
    assert "inconsistent" in run_tool("qemu-nbd", *options, crashed, status=1)
    open_qcow2(file, read_only=True).close()  # a refusal has left no lock behind
