"""Images of every shape, a plain model of a disk, and QEMU's tools as judges."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockd.image import Image
from blockd.qcow2 import operations
from blockd.qcow2.create import Options, create
from blockd.qcow2.image import Qcow2Image
from tests.support.tools import run_tool

SECTOR = 512
#: cluster size, version, refcount bits
SHAPES = [(65536, 3, 16), (512, 3, 4), (4096, 2, 16), (1 << 21, 3, 64), (1024, 3, 8), (16384, 3, 32)]


def make(path: Path, size: int, shape: tuple[int, int, int] = (65536, 3, 16), **more: Any) -> str:
    cluster_size, version, refcount_bits = shape
    create(str(path), Options(size, version, cluster_size, refcount_bits, **more))
    return str(path)


def read(image: Image, offset: int = 0, length: int | None = None) -> bytes:
    buffer = bytearray(image.size - offset if length is None else length)
    image.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def qemu_check(file: str, leaks_allowed: bool = False) -> dict[str, Any]:
    """qemu-img finds nothing wrong (3 is leaks only)."""
    told = run_tool("qemu-img", "check", "--output=json", file, status=None)
    report: dict[str, Any] = json.loads(told[told.index("{") : told.rindex("}") + 1])
    assert not report.get("corruptions") and not report["check-errors"], told
    assert leaks_allowed or not report.get("leaks"), told
    return report


def qemu_reads(file: str, expected: bytes, folder: Path) -> None:
    """qemu-img compare: the image has exactly these bytes."""
    plain = folder / "expected.raw"
    plain.write_bytes(expected)
    told = run_tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", file, str(plain))
    assert told.strip() == "Images are identical.", told  # it says so when the sizes differ


class Model:
    """A disk as a bytearray, its snapshots as copies, and what it expects of a random operation."""

    def __init__(self, size: int, cluster_size: int, below: bytes = b"") -> None:
        self.data = bytearray(below[:size].ljust(size, b"\0"))
        self.snapshots: dict[str, bytes] = {}
        self.cluster_size = cluster_size
        self._named = 0
        #: what the last step may have changed
        self.touched = (0, 0)

    def span(self, rnd: random.Random) -> tuple[int, int]:
        length = min(rnd.choice([512, 1536, 4096, 65536, 100 * 512, 1 << 20]), len(self.data))
        return rnd.randrange(0, len(self.data) - length + 1) // SECTOR * SECTOR, length

    def discarded(self, offset: int, length: int) -> None:
        """Whole clusters become zero; the disk's last one may be cut short."""
        mask = self.cluster_size - 1
        end = offset + length
        low = (offset + mask) & ~mask
        high = end if end == len(self.data) else end & ~mask
        if low < high:
            self.data[low:high] = bytes(high - low)

    def new_name(self) -> str:
        """One that no snapshot has; a crash may have left one that was not told of."""
        while (name := f"snap{self._named}") in self.snapshots or not self._named:
            self._named += 1
        return name


#: something to be done to an image
Step = Callable[[Qcow2Image], None]


def step(model: Model, rnd: random.Random, whole: bool = True, discards: bool = True) -> Step:
    """One random operation: done to the model now, and returned to be done to an image. ``whole`` allows
    snapshots and resizes; ``discards`` is False where a discard would bring the backing file to light."""
    choice = rnd.random()
    offset, length = model.touched = model.span(rnd)
    if choice < 0.5:
        data = rnd.randbytes(length)
        model.data[offset : offset + length] = data
        return lambda image: image.write(offset, data)
    if choice < 0.65:
        unmap = rnd.random() < 0.5
        model.data[offset : offset + length] = bytes(length)
        return lambda image: image.write_zeroes(offset, length, unmap=unmap, fast=False)
    if choice < 0.72:
        if discards:
            model.discarded(offset, length)
        return lambda image: image.trim(offset, length)
    if choice < 0.77:
        return lambda image: image.flush()
    if choice < 0.84 or not whole:
        expected = bytes(model.data[offset : offset + length])

        def compare(image: Qcow2Image) -> None:
            assert read(image, offset, length) == expected

        return compare
    return _whole_step(model, rnd, choice)


def _whole_step(model: Model, rnd: random.Random, choice: float) -> Step:
    if choice < 0.89 and len(model.snapshots) < 3:
        name = model.new_name()
        model.snapshots[name] = bytes(model.data)
        return lambda image: void(operations.create(image, name, now=1.5))
    if choice < 0.92 and model.snapshots:
        name = rnd.choice(sorted(model.snapshots))
        model.data = bytearray(model.snapshots[name])
        return lambda image: operations.apply(image, name)
    if choice < 0.95 and model.snapshots:
        name = rnd.choice(sorted(model.snapshots))
        del model.snapshots[name]
        return lambda image: operations.delete(image, name)
    size = rnd.randrange(2 << 20, 12 << 20) // SECTOR * SECTOR
    model.data = model.data[:size] + bytes(max(0, size - len(model.data)))
    return lambda image: operations.resize(image, size)


def void(_: object) -> None:
    """Drop a result."""


def ours(image: Qcow2Image, model: Model, rnd: random.Random, whole: bool = True) -> None:
    """One random operation on the image and the model."""
    discards = image.header.version >= 3 or image.backing is None
    step(model, rnd, whole, discards)(image)
