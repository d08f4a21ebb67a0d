"""The tables by themselves: encodings against the specification's words, runs against a slow reading."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockd.hostfile import HostFile
from blockd.opening import open_qcow2
from blockd.qcow2.header import Header, parse
from blockd.qcow2.refcounts import decode, encode, runs_of
from blockd.qcow2.tables import COMPRESSED, COPIED, DATA, PACKED, UNALLOCATED, ZEROES, Layout
from tests.blockd.qcow2.support import make, qemu_check, read


@given(st.integers(0, 6), st.binary(min_size=64, max_size=64))
def test_refcount_blocks(order: int, raw: bytes) -> None:
    """ "If refcount_bits implies a sub-byte width, note that bit 0 means the least significant bit"."""
    bits = 1 << order
    values = decode(raw, order)
    assert len(values) == 64 * 8 // bits
    for index, value in enumerate(values.tolist()):
        if bits >= 8:
            width = bits // 8
            expected = int.from_bytes(raw[index * width : (index + 1) * width], "big")
        else:
            expected = raw[index * bits // 8] >> (index * bits % 8) & ((1 << bits) - 1)
        assert value == expected
    assert encode(values, order) == raw


@given(st.sets(st.integers(0, 300)))
def test_runs(clusters: set[int]) -> None:
    runs = runs_of(np.array(sorted(clusters), np.int64))
    assert {c for first, count in runs for c in range(first, first + count)} == clusters
    assert all(
        first + count < following for (first, count), (following, _) in zip(runs, runs[1:], strict=False)
    )


@given(st.integers(9, 21), st.integers(0, (1 << 40) - 1), st.integers(0, 7))
def test_compressed_descriptor(cluster_bits: int, offset: int, sectors: int) -> None:
    """x = 62 - (cluster_bits - 8): offset below bit x, additional sectors from x to 61."""
    layout = Layout(Header(3, cluster_bits))
    x = 62 - (cluster_bits - 8)
    sectors %= 1 << (cluster_bits - 8)
    found, length = layout.packed(COMPRESSED | sectors << x | offset)
    assert found == offset
    assert offset + length == (offset // 512 + 1 + sectors) * 512
    clusters = layout.clusters_of(np.array([COMPRESSED | sectors << x | offset], np.uint64)).tolist()
    assert clusters == sorted({offset >> cluster_bits, (offset + length - 1) >> cluster_bits})


_ENTRY = st.one_of(
    st.just(0),
    st.just(1),
    st.integers(1, 6).map(lambda c: c << 9 | COPIED),
    st.integers(1, 6).map(lambda c: c << 9),
    st.integers(1, 6).map(lambda c: c << 9 | 1),
    st.integers(600, 900).map(lambda o: COMPRESSED | o),
)


@given(st.lists(_ENTRY, min_size=64, max_size=64), st.data())
@settings(deadline=None, max_examples=60)
def test_runs_of_a_table(entries: list[int], data: st.DataObject) -> None:
    from blockd.qcow2.tables import L2Table, Mapping

    mapping = Mapping.__new__(Mapping)
    mapping.layout = Layout(Header(3, 9))
    table = L2Table(0x1000, np.array(entries, np.uint64))
    first = data.draw(st.integers(0, 63))
    count = data.draw(st.integers(1, 64 - first))
    at = first
    for run in mapping.runs(table, first, count):
        assert run.first == at and run.clusters >= 1 and run.entry == entries[at]
        for inside in range(run.clusters):
            entry = entries[at + inside]
            kind = PACKED if entry & COMPRESSED else ZEROES if entry & 1 else DATA if entry else UNALLOCATED
            assert run.kind == kind
            if kind == DATA:
                assert entry == run.entry + 512 * inside
        assert run.kind != PACKED or run.clusters == 1
        at += run.clusters
    assert at == first + count


@given(
    st.sampled_from([2, 3]),
    st.integers(9, 21),
    st.lists(st.tuples(st.integers(1 << 31, (1 << 32) - 1), st.binary(max_size=30)), max_size=3),
    st.one_of(st.none(), st.text("abc/.ü", min_size=1, max_size=40)),
)
def test_header_round_trip(
    version: int, bits: int, extensions: list[tuple[int, bytes]], name: str | None
) -> None:
    """Unknown extensions are kept, and the name of the backing file."""
    size = 1 << bits
    header = Header(version, bits, 1 << 20, l1_size=4096, l1_table_offset=3 * size, backing_file=name)
    header.refcount_table_offset, header.refcount_table_clusters = size, 1
    header.extensions = [(kind & ~0x7FFFFFFF | 0x11111111, data) for kind, data in extensions]
    if version == 2:
        header.header_length = 72
    found = parse("x", header.encode().ljust(size, b"\0"), 1 << 30, writable=True)
    assert found.backing_file == name and found.extensions == header.extensions
    assert (found.size, found.cluster_bits, found.version) == (1 << 20, bits, version)


@pytest.mark.parametrize("shape", [(65536, 3, 16), (4096, 3, 1), (512, 3, 64)], ids=str)
def test_the_refcount_table_grows(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """Each of these needs new refcount blocks, and the last two a larger table."""
    file = make(tmp_path / "disk.qcow2", 48 << 20, shape)
    image = open_qcow2(file)
    data = bytes(range(1, 251)) * 4096
    length = {65536: 8 << 20, 4096: 40 << 20, 512: 6 << 20}[shape[0]]
    for at in range(0, length, len(data)):
        image.write(at, data)
    image.flush()
    for at in range(0, length, len(data)):
        assert read(image, at, len(data)) == data
    image.close()
    assert qemu_check(file)["allocated-clusters"] >= length // shape[0]


@pytest.mark.parametrize(("cluster_size", "extended"), [(4096, False), (65536, True)])
def test_many_threads(tmp_path: Path, cluster_size: int, extended: bool) -> None:
    """Writers of ranges of their own, discards and flushes, and readers that look only at theirs."""
    file = make(tmp_path / "disk.qcow2", 16 << 20, (cluster_size, 3, 16), extended_l2=extended)
    image = open_qcow2(file)
    failures: list[str] = []

    def work(number: int) -> None:
        rnd = np.random.default_rng(number)
        base, size = number << 22, 1 << 22
        mine = bytearray(size)
        for turn in range(120):
            length = int(rnd.choice([512, 4096, 40000]))
            at = int(rnd.integers(0, (size - length) // 512)) * 512
            if turn % 5 == 4:
                image.write_zeroes(base + at, length, unmap=True, fast=False)
                mine[at : at + length] = bytes(length)
            else:
                data = rnd.bytes(length)
                image.write(base + at, data)
                mine[at : at + length] = data
            if turn % 7 == 0:
                image.flush()
            if read(image, base + at, length) != mine[at : at + length]:
                failures.append(f"thread {number} turn {turn}")
        if read(image, base, size) != mine:
            failures.append(f"thread {number} at the end")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    image.close()
    assert not failures
    qemu_check(file)


def test_discarded_space_is_used_again(tmp_path: Path) -> None:
    file = make(tmp_path / "disk.qcow2", 16 << 20)
    image = open_qcow2(file)
    for turn in range(10):
        image.write(0, bytes([turn + 1]) * (4 << 20))
        image.trim(0, 4 << 20)
        image.flush()
    image.close()
    host = HostFile(file, read_only=True)
    assert host.size() < 20 << 20
    host.close()
    qemu_check(file)
