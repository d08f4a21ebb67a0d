"""Extended L2 entries (subclusters): written by one side and read by the other, a model beside them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockd.hostfile import HostFile
from blockd.opening import open_qcow2
from blockd.qcow2 import subclusters
from blockd.qcow2.check import check, repair
from blockd.qcow2.compression import compress
from blockd.qcow2.header import Header, Incompatible
from blockd.qcow2.tables import COMPRESSED, DATA, PACKED, UNALLOCATED, ZEROES, L2Table, Layout
from coordinator.contract.errors import BlockError
from tests.blockd.qcow2.support import Model, make, ours, qemu_check, qemu_reads, read
from tests.blockd.qcow2.test_hostile import probe_all
from tests.blockd.qcow2.test_img import both_json, img, qemu_img
from tests.blockd.qcow2.test_interop import theirs
from tests.support.tools import run_tool

SIZE = (8 << 20) + 3 * 512
SHAPES = [(16384, 3, 16), (65536, 3, 8), (1 << 21, 3, 16)]


def same_map(file: str) -> None:
    """Not for large clusters: where most of a file is holes, qemu-img looks for them in the file, too."""
    if json.loads(qemu_img("info", "--output=json", file))["cluster-size"] < 1 << 20:
        both_json("map", "--output=json", file)
        if not json.loads(qemu_img("check", "--output=json", file)).get("compressed-clusters"):
            assert img("map", file) == qemu_img("map", file)


# ---- tables -----------------------------------------------------------------------------------------
_PAIR = st.one_of(
    st.just((0, 0)),
    st.tuples(st.just(0), st.integers(0, (1 << 32) - 1).map(lambda bits: bits << 32)),
    st.tuples(
        st.integers(1, 4).map(lambda c: c << 14),
        st.integers(0, (1 << 64) - 1).map(lambda bits: bits & ~((bits & 0xFFFFFFFF) << 32)),
    ),
    st.tuples(st.integers(600, 900).map(lambda o: COMPRESSED | o), st.just(0)),
)


@given(st.lists(_PAIR, min_size=4, max_size=4), st.integers(0, 127), st.integers(1, 128))
def test_runs_of_a_table(pairs: list[tuple[int, int]], first: int, length: int) -> None:
    """Against one subcluster of 512 bytes after the other, as the specification's table says."""
    header = Header(3, 14, incompatible=int(Incompatible.EXTENDED_L2))
    entries, bitmaps = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))
    table, layout = L2Table(0x10000, entries, bitmaps), Layout(header)
    low, high = first * 512, min(first + length, 128) * 512
    at = low
    for kind, position, size, place in subclusters.runs(table, layout, 0, 4, low, high):
        assert position == at and size > 0
        for inside in range(0, size, 512):
            number = (at + inside) // 512
            entry, bitmap = pairs[number // 32]
            bit = number % 32
            if entry & COMPRESSED:
                wanted = PACKED, entry
            elif bitmap >> bit & 1:
                wanted = DATA, entry + 512 * bit
            else:
                wanted = ZEROES if bitmap >> 32 >> bit & 1 else UNALLOCATED, entry and entry + 512 * bit
            assert (kind, place if kind == PACKED or not place else place + inside) == wanted
        at += size
    assert at == high


@given(st.integers(0, (1 << 32) - 1))
def test_runs_of_bits(bits: int) -> None:
    found = subclusters.runs_of_bits(bits)
    assert sum(subclusters.span(*run) for run in found) == bits
    assert all(end < following for (_, end), (following, _) in zip(found, found[1:], strict=False))


# ---- both ways --------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ours_then_theirs(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    file = make(tmp_path / "disk.qcow2", SIZE, shape, extended_l2=True)
    model = Model(SIZE, shape[0])
    rnd = random.Random(shape[0])
    for _ in range(3):
        image = open_qcow2(file)
        for _ in range(60):
            ours(image, model, rnd)
        assert read(image) == model.data
        image.close()
        figures = qemu_check(file)
        qemu_reads(file, bytes(model.data), tmp_path)
        image = open_qcow2(file, read_only=True)
        report = check(image)
        assert (report.corruptions, report.leaks, report.lines) == (0, 0, [])
        assert report.allocated_clusters == figures.get("allocated-clusters", 0)
        image.close()
        same_map(file)
    for name, data in model.snapshots.items():
        image = open_qcow2(file, read_only=True, snapshot=name)
        assert read(image) == data
        image.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_theirs_and_ours_in_turn(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    file = str(tmp_path / "disk.qcow2")
    options = f"extended_l2=on,cluster_size={shape[0]},refcount_bits={shape[2]}"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, file, str(SIZE))
    model = Model(SIZE, shape[0])
    rnd = random.Random(shape[0] + 1)
    for turn in range(4):
        theirs(file, model, rnd, first=turn == 0, snapshots=turn < 2)
        same_map(file)
        image = open_qcow2(file)
        assert read(image) == model.data
        for _ in range(40):
            ours(image, model, rnd, whole=turn == 1)
        image.close()
        qemu_check(file)
    qemu_reads(file, bytes(model.data), tmp_path)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_over_a_backing_file(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    below = random.Random(3).randbytes(3 << 20)
    (tmp_path / "base").write_bytes(below)
    size = 4 << 20
    file = make(
        tmp_path / "top", size, shape, extended_l2=True, backing_file="base", backing_format="raw"
    )  # fmt: skip
    model = Model(size, shape[0], below)
    rnd = random.Random(4)
    for turn in range(3):
        theirs(file, model, rnd, first=False, snapshots=turn == 1)
        image = open_qcow2(file)
        for _ in range(60):
            ours(image, model, rnd, whole=False)
        assert read(image) == model.data
        image.close()
        qemu_check(file)
        qemu_reads(file, bytes(model.data), tmp_path)
        same_map(file)


def test_only_the_subclusters_that_are_written_are_copied(tmp_path: Path) -> None:
    """2 MiB clusters, so subclusters of 64 KiB: a write of one sector hides one subcluster of what lies
    below."""
    (tmp_path / "base").write_bytes(b"b" * (4 << 20))
    file = make(
        tmp_path / "top", 4 << 20, (1 << 21, 3, 16), extended_l2=True, backing_file="base",
        backing_format="raw",
    )  # fmt: skip
    image = open_qcow2(file)
    image.write(70 << 10, b"x" * 512)
    pieces = [(kind, start, size) for kind, start, size, _ in image.map(0, image.size)]
    assert (DATA, 64 << 10, 64 << 10) in pieces
    assert sum(size for kind, _, size in pieces if kind == DATA) == 64 << 10
    image.write_zeroes(128 << 10, 64 << 10, unmap=True, fast=True)
    assert (ZEROES, 128 << 10, 64 << 10) in [piece[:3] for piece in image.map(0, image.size)]
    image.close()
    qemu_check(file)


class _Log(HostFile):
    """Notes writes, and how many of them a sync has made durable."""

    def __init__(self, file: str, read_only: bool = False) -> None:
        super().__init__(file, read_only)
        self.writes: list[tuple[int, bytes]] = []
        self.durable = 0

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().write(offset, data)
        self.writes.append((offset, bytes(data)))

    def sync(self) -> None:
        super().sync()
        self.durable = len(self.writes)


@pytest.mark.parametrize("below", [False, True])
def test_no_old_bytes_come_to_light(tmp_path: Path, below: bool) -> None:
    """A subcluster that had data, was zeroed (or lies below) and is written in part: whichever write the
    disk loses, around the new bytes it reads as it had been flushed."""
    (tmp_path / "base").write_bytes(b"b" * 65536)
    more = {"backing_file": "base", "backing_format": "raw"} if below else {}
    file = make(tmp_path / "disk.qcow2", 65536, (65536, 3, 16), extended_l2=True, **more)
    image = open_qcow2(file, open_file=_Log)
    log = image.host
    assert isinstance(log, _Log)
    image.write(0, b"o" * 32768)
    image.write_zeroes(2048, 2048, unmap=False, fast=False)
    image.flush()
    for at in (2048 + 500, 40000):
        before = read(image)
        image.flush()
        start, first = Path(file).read_bytes(), len(log.writes)
        image.write(at, b"n" * 100)
        for lost in range(log.durable, len(log.writes)):
            data = bytearray(start)
            for number in range(first, len(log.writes)):
                offset, content = log.writes[number]
                if number != lost:
                    data[offset : offset + len(content)] = content
            (tmp_path / "lost").write_bytes(data)
            after = open_qcow2(str(tmp_path / "lost"), read_only=True)
            found = read(after)
            after.close()
            assert found[:at] + found[at + 100 :] == before[:at] + before[at + 100 :]
    image.close()


def test_a_host_cluster_that_is_used_again_is_not_taken_for_empty(tmp_path: Path) -> None:
    """Subclusters that were never written in its first life hold data in its second."""
    size, count = 16384, 64
    file = make(tmp_path / "disk.qcow2", size * count, (size, 3, 16), extended_l2=True)
    image = open_qcow2(file)
    for number in range(count):
        image.write(number * size, b"1" * 512)
    image.write_zeroes(0, size * count, unmap=True, fast=False)
    image.flush()
    for number in range(count):
        image.write(number * size, b"2" * size)
        image.write_zeroes(number * size + 2048, 1024, unmap=False, fast=False)
        image.write(number * size + 2048, b"3" * 100)
    expected = b"2" * 2048 + b"3" * 100 + bytes(924) + b"2" * (size - 3072)
    assert read(image) == expected * count
    image.close()
    qemu_check(file)


def test_compressed_clusters_beside_them(tmp_path: Path) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20, (65536, 3, 16), extended_l2=True)
    plain = bytes(random.Random(5).choices(b"\1\2", k=65536))
    model = Model(1 << 20, 65536)
    image = open_qcow2(file)
    for number in range(4):
        image.write_compressed(number << 16, compress(plain, "zlib"))
        model.data[number << 16 : (number + 1) << 16] = plain
    image.write(65536 + 5000, b"out" * 100)
    model.data[65536 + 5000 : 65536 + 5300] = b"out" * 100
    image.write_zeroes(131072 + 2048, 4096, unmap=True, fast=False)
    model.data[131072 + 2048 : 131072 + 6144] = bytes(4096)
    image.close()
    qemu_check(file)
    qemu_reads(file, bytes(model.data), tmp_path)
    same_map(file)


@pytest.mark.parametrize("raw", [False, True])
def test_with_an_external_data_file(tmp_path: Path, raw: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = str(tmp_path / "disk.qcow2")
    options = "extended_l2=on,cluster_size=16k,data_file=disk.data" + (",data_file_raw=on" if raw else "")
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, file, "4M")
    model = Model(4 << 20, 16384)
    rnd = random.Random(5)
    for turn in range(3):
        image = open_qcow2(file)
        for _ in range(60):
            ours(image, model, rnd, whole=False)
        assert read(image) == model.data
        image.close()
        qemu_check(file)
        qemu_reads(file, bytes(model.data), tmp_path)
        run_tool("qemu-io", "-f", "qcow2", "-c", f"write -q -P {turn + 1} {turn}M 70000", file)
        model.data[turn << 20 : (turn << 20) + 70000] = bytes([turn + 1]) * 70000
        if raw:
            assert (tmp_path / "disk.data").read_bytes() == model.data


# ---- what the tools say -----------------------------------------------------------------------------
@pytest.mark.parametrize("more", ["", ",cluster_size=128k,lazy_refcounts=on", ",preallocation=metadata"])
def test_create_and_info(tmp_path: Path, more: str) -> None:
    mine, other = str(tmp_path / "ours.qcow2"), str(tmp_path / "theirs.qcow2")
    said = img("create", "-f", "qcow2", "-o", "extended_l2=on" + more, mine, "10M")
    wanted = qemu_img("create", "-f", "qcow2", "-o", "extended_l2=on" + more, other, "10M")
    assert sorted(said.split()) == sorted(wanted.replace("theirs", "ours").split())
    for file in (mine, other):
        assert both_json("info", "--output=json", file)["format-specific"]["data"]["extended-l2"]
        assert sorted(img("info", file).splitlines()) == sorted(qemu_img("info", file).splitlines())
    assert img("check", mine) == qemu_img("check", mine)
    qemu_reads(mine, bytes(10 << 20), tmp_path)
    assert "16k" in img("create", "-o", "extended_l2=on,cluster_size=8k", "-f", "qcow2", mine, "1M", status=1)


def test_convert_resize_and_preallocation(tmp_path: Path) -> None:
    plain, file = tmp_path / "plain", str(tmp_path / "disk.qcow2")
    data = random.Random(6).randbytes(1 << 20) + bytes(1 << 20) + b"text " * 100000 + bytes(224)
    plain.write_bytes(data)
    for extra in ((), ("-c",)):
        img("convert", *extra, "-f", "raw", "-O", "qcow2", "-o", "extended_l2=on", str(plain), file)
        qemu_check(file)
        qemu_reads(file, data, tmp_path)
    img("resize", "--shrink", file, "-512")
    img("resize", "--preallocation=metadata", file, "+4M")
    qemu_check(file)
    qemu_reads(file, data[:-512].ljust(len(data) - 512 + (4 << 20), b"\0"), tmp_path)


def test_repair_of_impossible_bitmaps(tmp_path: Path) -> None:
    """Allocated and zero at once; allocated without a cluster; a bitmap beside a compressed cluster."""
    file = make(tmp_path / "disk.qcow2", 1 << 20, (16384, 3, 16), extended_l2=True)
    image = open_qcow2(file)
    image.write(0, b"x" * 16384)
    image.write_compressed(32768, compress(b"c" * 16384, "zlib"))
    image.close()
    image = open_qcow2(file, read_only=True)
    l2 = int(image.mapping.l1[0]) & ~(1 << 63)
    image.close()
    start = Path(file).read_bytes()
    for number, bitmap in ((0, b"\0\0\0\1\xff\xff\xff\xff"), (1, b"\0\0\0\0\0\0\0\1"), (2, bytes(7) + b"\1")):
        damaged = bytearray(start)
        damaged[l2 + 16 * number + 8 : l2 + 16 * number + 16] = bitmap
        Path(file).write_bytes(damaged)
        image = open_qcow2(file)
        with pytest.raises(OSError, match="subcluster bitmap"):
            image.write(65536, b"y")
        image.close()
        image = open_qcow2(file, repair=True)
        assert check(image).corruptions
        after = repair(image, everything=True)
        assert not after.corruptions and not after.leaks and after.corruptions_fixed
        image.close()
        qemu_check(file)
        image = open_qcow2(file, read_only=True)
        assert read(image, 0, 49152) == b"x" * 16384 + bytes(16384) + b"c" * 16384
        image.close()


def test_clusters_that_are_too_small_are_refused(tmp_path: Path) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20, (4096, 3, 16))
    data = bytearray(Path(file).read_bytes())
    data[79] |= 16
    Path(file).write_bytes(data)
    with pytest.raises(BlockError, match="extended L2 entries with clusters of 4096"):
        open_qcow2(file, read_only=True)


#: the header, the first entries of the refcount table, of a block, of the L1 table and of two L2 tables
_FUZZED = [*range(4, 120)]
for _start in (0x4000, 0x8000, 0xC000, 0x10000, 0x14000):
    _FUZZED += range(_start, _start + 64)


@given(
    changes=st.lists(st.tuples(st.sampled_from(_FUZZED), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 40000),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzzed_images(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    seed = tmp_path / "seed"
    if not seed.exists():
        image = open_qcow2(make(seed, 256 << 10, (16384, 3, 16), extended_l2=True))
        image.write(3000, random.Random(1).randbytes(30000))
        image.write_compressed(65536, compress(b"c" * 16384, "zlib"))
        image.write_zeroes(16384, 2048, unmap=False, fast=False)
        image.close()
        qemu_img("snapshot", "-c", "one", str(seed))
    data = bytearray(seed.read_bytes())
    for at, value in changes:
        if at < len(data):
            data[at] = value
    file = tmp_path / "fuzzed.qcow2"
    file.write_bytes(data[: len(data) - cut] if cut % 3 == 0 else data)
    probe_all(str(file))
