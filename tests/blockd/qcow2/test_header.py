"""A header that changes: whichever sectors of its writes the disk loses, it is the old one or the new one."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from blockd.hostfile import HostFile
from blockd.opening import open_qcow2
from blockd.qcow2 import header, operations
from blockd.qcow2.header import Header
from coordinator.contract.errors import BlockError
from tests.blockd.qcow2.support import make, qemu_check
from tests.blockd.qcow2.test_img import both_json

SECTOR = 512


class _Log(HostFile):
    """Notes writes of sectors, and None for a sync."""

    def __init__(self, file: str, read_only: bool = False) -> None:
        super().__init__(file, read_only)
        self.log: list[tuple[int, bytes] | None] = []

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().write(offset, data)
        at = 0
        while at < len(data):
            stop = min(len(data), at + SECTOR - (offset + at) % SECTOR)
            self.log.append((offset + at, bytes(data[at:stop])))
            at = stop

    def sync(self) -> None:
        super().sync()
        self.log.append(None)


def states(start: bytes, log: list[tuple[int, bytes] | None], most: int = 12) -> list[bytes]:
    """What the file may be after loss of power: all up to a sync, and any of the writes behind it; of more
    than ``most`` of those, the last ones."""
    end = max(offset + len(content) for offset, content in filter(None, log))
    result, done = [], bytearray(start.ljust(end, b"\0"))
    for last, group in itertools.groupby(log, key=lambda entry: entry is None):
        writes = [entry for entry in group if entry is not None]
        if last:
            continue
        for offset, content in writes[:-most]:
            done[offset : offset + len(content)] = content
        writes = writes[-most:]
        for kept in itertools.product((False, True), repeat=len(writes)):
            data = bytearray(done)
            for (offset, content), keep in zip(writes, kept, strict=True):
                if keep:
                    data[offset : offset + len(content)] = content
            result.append(bytes(data))
        for offset, content in writes:
            done[offset : offset + len(content)] = content
    return result


def essence(found: Header) -> tuple[str | None, list[tuple[int, bytes]]]:
    """All of it but the names of features."""
    kept = [(k, data) for k, data in found.extensions if k != header.ExtensionType.FEATURE_NAMES]
    return found.backing_file, kept


NAMES: list[str | None] = ["short", "other", "a" * 200, "b" * 300, None, "c", "long/" * 40 + "x", "d", None]


@pytest.mark.parametrize("cluster_size, version", [(4096, 3), (1024, 3), (512, 3), (4096, 2)])
def test_the_backing_file_changes_all_at_once(tmp_path: Path, cluster_size: int, version: int) -> None:
    file = make(
        tmp_path / "disk.qcow2", 1 << 20, (cluster_size, version, 16),
        backing_file="first", backing_format="raw",
    )  # fmt: skip
    for name in NAMES:
        if cluster_size == 1024 and name is not None:
            name = name[:60]  # there must be room for the old and the new one
        start = Path(file).read_bytes()
        image = open_qcow2(file, open_file=_Log, backed=False)
        log = image.host
        assert isinstance(log, _Log)
        before = essence(image.header)
        try:
            operations.set_backing(image, name, None if name is None else "qcow2")
        except BlockError:
            assert cluster_size == 512 and name is not None and len(name) > 100
            image.close()
            continue
        after = essence(image.header)
        image.close()
        seen = {0: before, 1: after}
        for data in states(start, log.log):
            found = essence(header.parse("x", data[:cluster_size], len(data), writable=True))
            assert found in seen.values()
        again = open_qcow2(file, read_only=True, backed=False)
        assert essence(again.header) == after
        assert (
            again.header.extension(header.ExtensionType.FEATURE_NAMES) is not None
            or version == 2
            or (cluster_size == 512)
        )
        again.close()
        if name is None:
            qemu_check(file)
            both_json("info", "--output=json", file)
