"""qcow2 both ways: what one side does, the other reads. Judges: qemu-img check and compare, and a model."""

import random
from pathlib import Path

import pytest

from blockd.opening import open_qcow2
from blockd.qcow2 import refcounts
from blockd.qcow2.check import check
from blockd.qcow2.create import Options, create
from blockd.qcow2.extended import MOST_UNTOUCHED, ExtendedMapping
from blockd.qcow2.tables import CACHE_BYTES
from tests.blockd.qcow2.support import SHAPES, Model, make, ours, qemu_check, qemu_reads, read
from tests.blockd.qcow2.test_img import both_json, img, qemu_img
from tests.support.tools import run_tool

SIZE = (8 << 20) + 3 * 512


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ours_then_theirs(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    file = make(tmp_path / "disk.qcow2", SIZE, shape)
    model = Model(SIZE, shape[0])
    rnd = random.Random(shape[0])
    for _ in range(2):
        image = open_qcow2(file)
        for _ in range(50):
            ours(image, model, rnd)
        image.close()
        figures = qemu_check(file)
        qemu_reads(file, bytes(model.data), tmp_path)
        image = open_qcow2(file, read_only=True)
        report = check(image)
        assert (report.corruptions, report.leaks, report.lines) == (0, 0, [])
        assert report.allocated_clusters == figures.get("allocated-clusters", 0)
        assert report.image_end_offset == figures["image-end-offset"]
        image.close()
    for name, data in model.snapshots.items():
        image = open_qcow2(file, read_only=True, snapshot=name)
        assert read(image) == data
        image.close()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_theirs_and_ours_in_turn(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    cluster_size, version, refcount_bits = shape
    file = str(tmp_path / "disk.qcow2")
    compat = f"compat={'1.1' if version == 3 else '0.10'},cluster_size={cluster_size}"
    if version == 3:
        compat += f",refcount_bits={refcount_bits}"
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", compat, file, str(SIZE))
    model = Model(SIZE, cluster_size)
    rnd = random.Random(shape[0] + 1)
    for turn in range(3):
        theirs(file, model, rnd, first=turn == 0, snapshots=turn < 2)
        image = open_qcow2(file)
        assert read(image) == model.data
        for _ in range(25):
            ours(image, model, rnd, whole=turn == 1)
        image.close()
        qemu_check(file)
    qemu_reads(file, bytes(model.data), tmp_path)


def theirs(file: str, model: Model, rnd: random.Random, first: bool, snapshots: bool) -> None:
    """Random operations by qemu-io and qemu-img, and on the model."""
    cluster = model.cluster_size
    commands: list[str] = []
    for number in range(3) if first else ():  # only where nothing is allocated yet
        offset, length = (2 << 20) * number, cluster
        commands += ["-c", f"write -q -c -P 9 {offset} {length}"]
        model.data[offset : offset + length] = b"\x09" * length
    for _ in range(12):
        offset, length = model.span(rnd)
        choice = rnd.random()
        if choice < 0.6:
            byte = rnd.randrange(1, 256)
            commands += ["-c", f"write -q -P {byte} {offset} {length}"]
            model.data[offset : offset + length] = bytes([byte]) * length
        elif choice < 0.8:
            commands += ["-c", f"write -q -z {'-u ' if rnd.random() < 0.5 else ''}{offset} {length}"]
            model.data[offset : offset + length] = bytes(length)
    run_tool("qemu-io", "-f", "qcow2", *commands, file)
    if snapshots:
        name = model.new_name()
        run_tool("qemu-img", "snapshot", "-c", name, file)
        model.snapshots[name] = bytes(model.data)
        if rnd.random() < 0.5:
            name = rnd.choice(sorted(model.snapshots))
            if len(model.snapshots[name]) == len(model.data):
                run_tool("qemu-img", "snapshot", "-a", name, file)
                model.data = bytearray(model.snapshots[name])


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("below", ["raw", "qcow2"])
def test_backing_file(tmp_path: Path, below: str, version: int) -> None:
    base_bytes = random.Random(3).randbytes(3 << 20)
    (tmp_path / "base.raw").write_bytes(base_bytes)
    if below == "qcow2":
        run_tool(
            "qemu-img",
            "convert",
            "-O",
            "qcow2",
            "-c",
            str(tmp_path / "base.raw"),
            str(tmp_path / "base.qcow2"),
        )
    size = 5 << 20
    file = make(
        tmp_path / "top.qcow2",
        size,
        (4096, version, 16),
        backing_file=f"base.{below}",
        backing_format=below,
    )
    model = Model(size, 4096, base_bytes)
    image = open_qcow2(file)
    rnd = random.Random(4)
    for _ in range(60):
        ours(image, model, rnd, whole=False)
    assert read(image) == model.data
    image.close()
    qemu_check(file)
    qemu_reads(file, bytes(model.data), tmp_path)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_compressed_clusters(tmp_path: Path, method: str, cluster_size: int) -> None:
    from blockd.qcow2.compression import compress

    rnd = random.Random(6)
    size = 64 * cluster_size
    expected = bytearray()
    file = make(tmp_path / "disk.qcow2", size, (cluster_size, 3, 16), compression=method)
    image = open_qcow2(file)
    for number in range(64):
        piece = bytes(rnd.choices(b"\1\2", k=cluster_size))
        packed = compress(piece, method)
        assert len(packed) < cluster_size
        image.write_compressed(number * cluster_size, packed)
        expected += piece
    assert read(image) == expected
    image.write(100, b"in the middle")  # copies the cluster out
    expected[100:113] = b"in the middle"
    image.trim(cluster_size, 4 * cluster_size)
    expected[cluster_size : 5 * cluster_size] = bytes(4 * cluster_size)
    image.close()
    qemu_check(file)
    qemu_reads(file, bytes(expected), tmp_path)


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_their_compressed_image(tmp_path: Path, method: str) -> None:
    plain = tmp_path / "plain.raw"
    data = b"".join(number.to_bytes(4, "big") * 20 for number in range(20000)) + bytes(200 * 512)
    data = data[: len(data) // 512 * 512]
    plain.write_bytes(data)
    file = str(tmp_path / "disk.qcow2")
    run_tool("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={method}", str(plain), file)
    image = open_qcow2(file, read_only=True)
    assert read(image) == data
    report = check(image)
    assert report.compressed_clusters and not report.lines
    image.close()


def test_lazy_refcounts_of_a_killed_writer_are_repaired_on_opening(tmp_path: Path) -> None:
    file = str(tmp_path / "disk.qcow2")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", file, "4M")
    script = "write -q -P 7 0 1M", "flush", "sigraise 9"
    run_tool("qemu-io", "-f", "qcow2", *(word for line in script for word in ("-c", line)), file, status=None)
    image = open_qcow2(file, read_only=True)
    assert image.header.incompatible & 1 and check(image).corruptions
    image.close()
    image = open_qcow2(file)
    assert read(image) == b"\x07" * (1 << 20) + bytes(3 << 20)
    assert not image.header.incompatible & 1 and image.header.compatible & 1
    image.close()
    qemu_check(file)


@pytest.mark.parametrize("how", ["leaks", "all"])
def test_lazy_refcounts_are_repaired_and_stay(tmp_path: Path, how: str) -> None:
    """As by qemu-img: "all" counts again and takes the mark off, and the feature stays."""
    files = {tool: str(tmp_path / f"{tool}.qcow2") for tool in ("ours", "theirs")}
    for file in files.values():
        options = "lazy_refcounts=on,extended_l2=on"
        run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, file, "4M")
        script = "write -q -P 7 0 1M", "flush", "sigraise 9"
        words = (word for line in script for word in ("-c", line))
        run_tool("qemu-io", "-f", "qcow2", *words, file, status=None)
        assert both_json("info", "--output=json", file)["dirty-flag"]
        assert img("info", file).count("cleanly shut down: no") == 1
    status = 0 if how == "all" else 2
    img("check", "-r", how, files["ours"], status=status)
    told = both_json("info", "--output=json", files["ours"])
    assert told["dirty-flag"] == (how == "leaks")
    assert told["format-specific"]["data"]["lazy-refcounts"]
    if how == "all":
        qemu_img("check", "-r", how, files["theirs"])
        assert img("check", files["ours"]) == qemu_img("check", files["ours"])
        assert img("compare", *files.values()) == "Images are identical.\n"


def test_lazy_refcounts_stay_right(tmp_path: Path) -> None:
    """With the feature on, our writer leaves nothing to be repaired: the bit is never set, whenever it is
    killed."""
    file = make(tmp_path / "disk.qcow2", 4 << 20, lazy_refcounts=True)
    image = open_qcow2(file)
    image.write(0, b"x" * (1 << 20))
    image.flush()
    copy = tmp_path / "killed.qcow2"
    copy.write_bytes(Path(file).read_bytes())  # what SIGKILL would leave
    image.close()
    assert both_json("info", "--output=json", str(copy))["dirty-flag"] is False
    qemu_check(str(copy), leaks_allowed=True)


@pytest.mark.parametrize("extended", [False, True])
def test_a_disk_of_a_tebibyte_takes_little(tmp_path: Path, extended: bool) -> None:
    """Clusters far apart, each with an L2 table of its own: more tables than are kept, and what is kept of
    tables, refcounts and empty subclusters stays within its bounds."""
    file = str(tmp_path / "disk.qcow2")
    create(file, Options(1 << 40, extended_l2=extended))
    image = open_qcow2(file)
    assert 65536 << image.mapping.layout.l2_bits <= 512 << 20
    places = range(0, 1 << 40, 512 << 20)
    assert len(places) > 2 * (CACHE_BYTES >> 16)
    for number in places:
        image.write(number, b"x" * 512)
        assert len(image.mapping._cache) <= CACHE_BYTES >> 16
    assert len(image.refcounts._cache) << 17 <= refcounts.CACHE_BYTES
    for number in reversed(places):
        assert read(image, number, 1024) == b"x" * 512 + bytes(512)
    assert len(image.mapping._cache) <= CACHE_BYTES >> 16
    kept = sum(table.entries.nbytes + table.bitmaps.nbytes for table in image.mapping._cache.values())
    assert kept <= CACHE_BYTES
    if isinstance(image.mapping, ExtendedMapping):
        assert len(image.mapping.untouched) <= MOST_UNTOUCHED
    assert sum(extent.length for extent in image.extents(0, 1 << 40)) == 1 << 40
    used = len(places) * (2048 if extended else 65536)
    assert sum(extent.length for extent in image.extents(0, 1 << 40) if not extent.zero) == used
    assert len(image.mapping._cache) <= CACHE_BYTES >> 16
    image.close()
    assert qemu_check(file)["allocated-clusters"] == len(places)
