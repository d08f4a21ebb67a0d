"""Images that were made to do harm: one line of error, nothing read or allocated beyond measure.

Items 13 to 16 and 24 of the list of inputs that have broken emulators, and where each is tested:

13  fields of the header, cluster_bits, unknown feature, corrupt bit: test_header_fields, test_an_unknown_
    feature_is_named_as_the_image_names_it, test_a_corrupt_image_can_be_read
    L2 entry BFFFFFFFFFFF0000h: test_l2_entries_that_would_destroy_the_image
14  backing and data files: test_backing_files_that_nobody_allowed, test_data_files_that_nobody_allowed,
    test_a_link_does_not_lead_out_of_the_folder; allowed ones in test_a_link..., nbd_client/test_everywhere.py
15  petabytes: test_petabytes_in_a_tiny_file_cost_nothing, test_entries_that_would_make_the_file_huge
    loops: test_chains_that_loop; inflation: test_a_compressed_cluster_that_inflates_without_end
    self-referencing tables: test_l2_entries_that_would_destroy_the_image, test_l1_entry_that_points_at_
    the_header_or_the_l1_table, test_refcounts_that_count_themselves
16  name of 3,000 bytes: test_handshake.py::test_long_export_name; order of options: ::test_meta_context_
    wants_structured_replies_first; slow client: ::test_huge_option_of_a_slow_client; shutdown:
    ::test_clients_connected_at_shutdown; past the end and unknown: test_transmission.py::test_refused_
    requests, ::test_write_past_the_end; truncated: ::test_truncated_write_changes_nothing
    block status of maximal length: test_block_status_of_maximal_length
24  test_faults.py; kills in test_crash.py, loss of power in test_power_loss.py

Beyond the list: tests/blockd/fuzz.
"""

import errno
import os
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockd.opening import open_qcow2
from blockd.qcow2.backing import Chain
from blockd.qcow2.check import check, repair
from blockd.qcow2.compression import decompress
from coordinator.contract.config import Export
from coordinator.contract.errors import BlockError
from tests.blockd.conftest import Serve
from tests.blockd.qcow2.anatomy import Anatomy
from tests.blockd.qcow2.support import make, qemu_check, read
from tests.support.nbd_wire import WireClient
from tests.support.tools import run_tool


def patched(file: str, *changes: tuple[int, str, int]) -> str:
    with open(file, "r+b") as image:
        for offset, form, value in changes:
            os.pwrite(image.fileno(), struct.pack(form, value), offset)
    return file


def refusal(file: str, **how: object) -> str:
    with pytest.raises(BlockError) as caught:
        open_qcow2(file, **how).close()  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text and text.startswith(file)
    return text


HEADERS: list[tuple[int, str, int, str]] = [
    (100, ">I", 0xFFFFFFFF, "header_length"),
    (100, ">I", 0x7FFFFFFF, "header_length"),
    (100, ">I", 96, "header_length"),
    (116, ">I", 0x7FFFFFFF, "header extension"),
    (56, ">I", 0xFFFFFFFF, "refcount table"),
    (56, ">I", 0, "refcount table"),
    (48, ">Q", 0x10001, "refcount table offset"),
    (48, ">Q", 1 << 60, "refcount table lies behind"),
    (40, ">Q", 0x30200, "L1 table offset"),
    (40, ">Q", 0, "L1 table lies upon the header"),
    (36, ">I", 0xFFFFFFFF, "L1 table of"),
    (36, ">I", 0, "L1 table is too small"),
    (60, ">I", 0xFFFFFFFF, "snapshots"),
    (60, ">I", 3, "snapshot table"),
    (16, ">I", 0xFFFFFFFF, "backing file name of"),
    (20, ">I", 0, "cluster_bits"),
    (20, ">I", 8, "cluster_bits"),
    (20, ">I", 22, "cluster_bits"),
    (20, ">I", 63, "cluster_bits"),
    (24, ">Q", 1 << 52, "L1 table is too small"),
    (24, ">Q", 0xFFFFFFFFFFFFFFFF, "disk size"),
    (32, ">I", 1, "encrypted (AES)"),
    (32, ">I", 2, "encrypted (LUKS)"),
    (4, ">I", 4, "version 4"),
    (0, ">I", 0, "no qcow2 image"),
    (72, ">Q", 1 << 63, "unknown incompatible feature 63"),
    (72, ">Q", 1 << 2, "external data file"),
    (72, ">Q", 1 << 5, "unknown incompatible feature 5"),
    (72, ">Q", 1 << 1, "marked corrupt"),
    (72, ">Q", 1 << 3, "compression type"),
    (88, ">Q", 1 << 1, "raw external data"),
    (96, ">I", 7, "refcount_order"),
]


@pytest.mark.parametrize("at, form, value, told", HEADERS)
def test_header_fields(tmp_path: Path, at: int, form: str, value: int, told: str) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20)
    changes = [(at, form, value)]
    if told.startswith("backing file name"):
        changes.append((8, ">Q", 1024))
    assert told in refusal(patched(file, *changes))


def test_an_unknown_feature_is_named_as_the_image_names_it(tmp_path: Path) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20)
    start = 112 + 8
    with open(file, "r+b") as image:
        os.pwrite(image.fileno(), struct.pack(">BB46s", 0, 40, b"time travel"), start)
    assert "time travel" in refusal(patched(file, (72, ">Q", 1 << 40)))


def test_a_corrupt_image_can_be_read(tmp_path: Path) -> None:
    file = patched(make(tmp_path / "disk.qcow2", 1 << 20), (72, ">Q", 2))
    image = open_qcow2(file, read_only=True)
    assert not any(read(image))
    image.close()


@pytest.mark.parametrize("length", [0, 3, 71, 72, 103, 104, 111])
def test_a_file_that_ends_in_the_header(tmp_path: Path, length: int) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20)
    os.truncate(file, length)
    refusal(file, read_only=True)


@pytest.mark.parametrize(
    "entry",
    [
        0xBFFFFFFFFFFF0000,  # reserved bits
        0x8000000000000000,  # COPIED without an offset
        0x8000000000000200,  # not aligned
        0x8000000000010000,  # the refcount table
        0x8000000000020000,  # a refcount block
        0x8000000000030000,  # the L1 table
        0x8000000000040000,  # the L2 table itself
    ],
)
def test_l2_entries_that_would_destroy_the_image(tmp_path: Path, entry: int) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20)
    image = open_qcow2(file)
    image.write(0, b"x" * 512)
    l2 = int(image.mapping.l1[0]) & ~(1 << 63)
    assert l2 == 0x40000
    image.close()
    patched(file, (l2 + 8, ">Q", entry))
    before = Path(file).read_bytes()[:l2]
    image = open_qcow2(file)
    for attempt in (lambda: image.write(65536, b"y" * 512), lambda: image.trim(65536, 65536)):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EIO
    assert check(image).corruptions
    image.close()
    assert Path(file).read_bytes()[:l2] == before


def test_l1_entry_that_points_at_the_header_or_the_l1_table(tmp_path: Path) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20)
    for entry in (0x8000000000000200, 0x8000000000030000, 0xFF00000000040000):
        image = open_qcow2(patched(file, (0x30000, ">Q", entry)))
        with pytest.raises(OSError, match="L1 entry"):
            image.write(0, b"z")
        image.close()


@pytest.mark.parametrize("table", [0x30000, 0x40000], ids=["L1", "L2"])
def test_entries_that_would_make_the_file_huge(tmp_path: Path, table: int) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20)
    image = open_qcow2(file)
    image.write(0, b"x" * 512)
    image.close()
    patched(file, (table, ">Q", 1 << 63 | 1 << 50))
    size = os.path.getsize(file)
    image = open_qcow2(file)
    for offset in (0, 65536):
        with pytest.raises(OSError, match="not possible|behind the end"):
            image.write(offset, b"y" * 512)
    image.close()
    assert os.path.getsize(file) == size


@pytest.mark.parametrize("cluster", [0, 1, 2, 3, 4], ids=["header", "table", "block", "L1", "L2"])
def test_tables_whose_refcount_is_zero_are_not_given_away(tmp_path: Path, cluster: int) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20)
    image = open_qcow2(file)
    image.write(0, b"x" * 512)
    image.close()
    patched(file, (0x20000 + 2 * cluster, ">H", 0))
    before = Path(file).read_bytes()
    image = open_qcow2(file)
    with pytest.raises(OSError, match="refcounts are wrong"):
        image.write(65536, b"y" * 512)
    image.close()
    assert Path(file).read_bytes() == before
    assert run_tool("qemu-img", "check", file, status=2)  # and QEMU finds that wrong, too


def test_a_leak_of_a_cluster_in_use_is_freed_with_its_flag(tmp_path: Path) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20)
    image = open_qcow2(file)
    image.write(0, b"x" * 512)
    data = image.mapping.l1_view[0] & ~(1 << 63)
    image.close()
    # as after the loss of a snapshot: counted twice, and so without the flag COPIED
    patched(file, (0x20000 + 2 * 5, ">H", 2), (data, ">Q", 0x50000))
    qemu_check(file, leaks_allowed=True)
    image = open_qcow2(file, repair=True)
    assert repair(image, everything=False).leaks_fixed == 1
    image.close()
    qemu_check(file)


@pytest.mark.parametrize(
    "at, value, told",
    [
        (0, 0x30000, "upon tables"),  # its table: the L1 table
        (0, 1 << 40, "behind the end"),
        (0, 1 << 63, "behind the end"),
        ("table", 0x30000, "upon tables"),  # its first cluster
        ("table", 1 << 40, "behind the end"),
    ],
)
def test_bitmaps_that_would_destroy_the_image(tmp_path: Path, at: object, value: int, told: str) -> None:
    file = make(tmp_path / "disk.qcow2", 1 << 20)
    run_tool("qemu-img", "bitmap", "--add", file, "one")
    parts = {part.role: part.offset for part in Anatomy(Path(file).read_bytes()).parts}
    patched(file, (parts["bitmap table" if at == "table" else "bitmap directory"], ">Q", value))
    before = Path(file).read_bytes()
    assert told in refusal(file)
    assert Path(file).read_bytes() == before


def test_nothing_at_the_end_of_the_disk(tmp_path: Path) -> None:
    """Where the last L2 table ends with the disk."""
    file = make(tmp_path / "disk.qcow2", 32 << 10, (512, 3, 16))
    image = open_qcow2(file)
    assert read(image, 32 << 10, 0) == b""
    image.write(32 << 10, b"")
    image.prefetch(32 << 10, 0)
    image.close()


@pytest.mark.parametrize("cluster", [0, 1, 3], ids=["header", "itself", "L1"])
def test_refcounts_that_count_themselves(tmp_path: Path, cluster: int) -> None:
    """The refcount table names something else than a refcount block."""
    file = patched(make(tmp_path / "disk.qcow2", 1 << 20), (0x10000, ">Q", cluster << 16))
    before = Path(file).read_bytes()
    image = open_qcow2(file)
    with pytest.raises(OSError):
        image.write(0, b"z" * 512)
    assert check(image).corruptions
    image.close()
    assert Path(file).read_bytes() == before


def test_block_status_of_maximal_length(tmp_path: Path, serve: Serve) -> None:
    """Many extents: the reply is bounded, and goes on where it ended."""
    file = make(tmp_path / "disk.qcow2", 8 << 30)
    image = open_qcow2(file)
    for number in range(3000):
        image.write(number << 17, b"x" * 512)
    image.close()
    with WireClient(serve(Export("hd0", file, "qcow2"))) as client:
        client.option(8)
        client.option(10, b"\0\0\0\3hd0\0\0\0\1\0\0\0\x0fbase:allocation")
        client.go("hd0")
        offset, extents = 0, []
        while offset < 8 << 30:
            client.send_request(7, offset, min(0xFFFFFFFF, (8 << 30) - offset))
            flags, kind, _, body = client.chunk()
            assert (flags, kind) == (1, 5) and len(body) <= 64 << 10
            found = list(struct.iter_unpack(">II", body[4:]))
            offset += sum(length for length, _ in found)
            extents += found
    assert offset == 8 << 30
    assert sum(length for length, state in extents if not state) == 3000 << 16


def test_petabytes_in_a_tiny_file_cost_nothing(tmp_path: Path) -> None:
    file = make(tmp_path / "disk.qcow2", 2 << 50, (1 << 21, 3, 16))
    tracemalloc.start()
    image = open_qcow2(file, read_only=True)
    assert [(e.length, e.zero) for e in image.extents(0, image.size)] == [(2 << 50, True)]
    image.close()
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("method", ["zlib", "zstd"])
def test_a_compressed_cluster_that_inflates_without_end(method: str) -> None:
    from blockd.qcow2.compression import compress

    packed = compress(bytes(64 << 20), method)
    tracemalloc.start()
    assert decompress(packed, method, 65536) == bytes(65536)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    for bad in (b"", b"\xff" * 100, compress(b"", method)):
        with pytest.raises(OSError):
            decompress(bad, method, 65536)


@pytest.mark.parametrize("name", ["json:{}", "/etc/passwd", "../x", "nbd://localhost/x", "fd:1", "a/../../x"])
def test_backing_files_that_nobody_allowed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "x").write_bytes(bytes(1 << 20))
    (folder / "a").mkdir()
    file = make(folder / "top.qcow2", 1 << 20, backing_file=name, backing_format="raw")
    assert "refused" in (told := refusal(file)) or "outside" in told


@pytest.mark.parametrize("name", ["json:{}", "/etc/passwd", "../x", "nbd://localhost/x", "fd:1"])
def test_data_files_that_nobody_allowed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "x").write_bytes(bytes(1 << 20))
    file = make(folder / "top.qcow2", 1 << 20, data_file=name)
    assert "refused" in (told := refusal(file)) or "outside" in told


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * 512)
    (folder / "base").symlink_to(tmp_path / "secret")
    file = make(folder / "top.qcow2", 512, backing_file="base", backing_format="raw")
    assert "outside" in refusal(file)
    for place in (str(tmp_path), str(tmp_path / "secret"), "*"):
        image = open_qcow2(file, chain=Chain(allowed=(place,)))
        assert read(image) == b"s" * 512
        image.close()


def test_chains_that_loop(tmp_path: Path) -> None:
    file = make(tmp_path / "a", 1 << 20, backing_file="b", backing_format="qcow2")
    make(tmp_path / "b", 1 << 20, backing_file="a", backing_format="qcow2")
    assert "loop" in refusal(file, read_only=True)
    own = make(tmp_path / "own", 1 << 20, backing_file="own", backing_format="qcow2")
    assert "loop" in refusal(own, read_only=True)


def test_a_backing_format_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(bytes(512))
    file = make(tmp_path / "top", 512, backing_file="base", backing_format="vmdk")
    assert "'vmdk' is not supported" in refusal(file)


def probe_all(file: str) -> None:
    """Everything a reader and a checker would do; only the two errors that callers expect may come."""
    for action in (_read_all, _check_all, _write_some):
        try:
            action(file)
        except (BlockError, OSError):
            continue


def _read_all(file: str) -> None:
    image = open_qcow2(file, read_only=True)
    try:
        for offset in range(0, min(image.size, 1 << 20), 65536):
            read(image, offset, min(65536, image.size - offset))
        for number, _ in enumerate(image.extents(0, image.size)):
            if number > 10000:
                break
    finally:
        image.close()


def _check_all(file: str) -> None:
    image = open_qcow2(file, read_only=True, repair=True)
    try:
        check(image)
    finally:
        image.close()


def _write_some(file: str) -> None:
    image = open_qcow2(file)
    try:
        image.write(0, b"w" * min(5000, image.size))
        image.trim(0, image.size)
        image.flush()
    finally:
        image.close()


_BYTE: Callable[[], st.SearchStrategy[int]] = lambda: st.integers(0, 255)  # noqa: E731


@given(
    changes=st.lists(
        st.tuples(
            st.sampled_from(
                [*range(4, 120), *range(0x200, 0x210), *range(0x400, 0x410), *range(0x600, 0x800, 3)]
            ),
            _BYTE(),
        ),
        min_size=1,
        max_size=6,
    ),
    cut=st.integers(0, 6000),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_fuzzed_images(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    file = tmp_path / "fuzzed.qcow2"
    if not (tmp_path / "seed").exists():
        seed = make(tmp_path / "seed", 64 << 10, (512, 3, 16))
        image = open_qcow2(seed)
        image.write(0, random.Random(1).randbytes(3000))
        image.close()
        run_tool("qemu-img", "snapshot", "-c", "one", seed)
    data = bytearray((tmp_path / "seed").read_bytes())
    for at, value in changes:
        if at < len(data):
            data[at] = value
    file.write_bytes(data[: max(len(data) - cut, 512)] if cut % 3 == 0 else data)
    probe_all(str(file))


def test_the_deflate_window_is_the_one_others_can_read() -> None:
    from blockd.qcow2.compression import compress

    data = random.Random(2).randbytes(4096) * 16
    assert zlib.decompressobj(-12).decompress(compress(data, "zlib")) == data
