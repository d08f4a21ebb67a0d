"""Random operations by both sides in turn on one image, over every cluster size and refcount width.

A turn is some writes and something that is done to the whole image: snapshot, resize, commit, rebase. Who
does which is left to chance: blockd and ``atoll img``, or qemu-io and qemu-img. Judges after each turn:
qemu-img check, our own check, qemu-img compare, and a plain model of the disk and its snapshots.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockd.opening import open_qcow2
from blockd.qcow2.check import check
from blockd.qcow2.compression import compress
from blockd.qcow2.image import Qcow2Image
from tests.blockd.qcow2.support import SECTOR, Model, qemu_check, qemu_reads, read, step
from tests.blockd.qcow2.test_img import img, qemu_img
from tests.support.tools import run_tool

TURNS = 5
#: never a multiple of a cluster
SIZE = (5 << 20) + 3 * SECTOR
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Kind:
    """One sort of image."""

    cluster_size: int
    version: int = 3
    refcount_bits: int = 16
    compression: str = "zlib"
    #: "raw", "qcow2": format of a backing file
    below: str = ""
    data_file: bool = False
    extended: bool = False

    def __str__(self) -> str:
        words = [f"{self.cluster_size}", f"v{self.version}", f"{self.refcount_bits}bit", self.compression]
        words += [f"over-{self.below}"] * bool(self.below) + ["data-file"] * self.data_file
        return "-".join(words + ["extended"] * self.extended)

    def options(self) -> str:
        options = f"cluster_size={self.cluster_size},compat={'1.1' if self.version == 3 else '0.10'}"
        if self.version == 3:
            options += f",refcount_bits={self.refcount_bits},compression_type={self.compression}"
        if self.extended:
            options += ",extended_l2=on"
        return options + (",data_file=disk.data" if self.data_file else "")


KINDS = [
    Kind(512, refcount_bits=2),
    Kind(1 * KIB, refcount_bits=1, compression="zstd", below="raw"),
    Kind(2 * KIB, version=2),
    Kind(4 * KIB, refcount_bits=4, below="qcow2"),
    Kind(8 * KIB, version=2, below="raw"),
    Kind(16 * KIB, refcount_bits=8, compression="zstd", extended=True),
    Kind(64 * KIB, extended=True, below="raw"),
    Kind(32 * KIB, compression="zstd", data_file=True),
    Kind(64 * KIB, refcount_bits=32, below="qcow2"),
    Kind(128 * KIB, refcount_bits=64),
    Kind(256 * KIB, version=2, below="qcow2"),
    Kind(512 * KIB, compression="zstd", below="raw"),
    Kind(1 * MIB, refcount_bits=8, data_file=True),
    Kind(2 * MIB, refcount_bits=64, compression="zstd"),
    Kind(2 * MIB, extended=True, below="qcow2"),
]


class Match:
    """One image, and what it must hold."""

    def __init__(self, folder: Path, kind: Kind, seed: int) -> None:
        self.folder, self.kind, self.rnd = folder, kind, random.Random(seed)
        self.file = str(folder / "disk.qcow2")
        below, over = b"", []
        if kind.below:
            below = random.Random(3).randbytes(3 * MIB + SECTOR)
            (folder / "base.raw").write_bytes(below)
            if kind.below == "qcow2":
                self._tool()("convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "base.raw", "base.qcow2")
            over = ["-b", f"base.{kind.below}", "-F", kind.below]
        self._tool()("create", "-q", "-f", "qcow2", "-o", kind.options(), *over, self.file, str(SIZE))
        self.model = Model(SIZE, kind.cluster_size, below)
        self.backed = bool(kind.below)

    def _tool(self) -> Callable[..., str]:
        """atoll img or qemu-img, which have one spelling."""
        return self.rnd.choice([img, qemu_img])

    # ---- writes -----------------------------------------------------------------------------------
    def write(self) -> None:
        if self.rnd.random() < 0.5:
            image = open_qcow2(self.file)
            try:
                for _ in range(12):
                    discards = self.kind.version >= 3 or not self.backed
                    step(self.model, self.rnd, whole=False, discards=discards)(image)
                if not self.kind.data_file:
                    self._pack(image)
            finally:
                image.close()
        else:
            run_tool("qemu-io", "-f", "qcow2", *self._commands(), self.file)

    def _pack(self, image: Qcow2Image) -> None:
        """Two clusters, compressed."""
        size = self.kind.cluster_size
        for _ in range(2):
            offset = self.rnd.randrange(len(self.model.data) // size) * size
            data = bytes(self.rnd.choices(b"\1\2", k=min(size, 4096))) * (size // min(size, 4096))
            image.write_compressed(offset, compress(data, self.kind.compression))
            self.model.data[offset : offset + size] = data

    def _commands(self) -> list[str]:
        """What qemu-io shall do."""
        commands = []
        for _ in range(10):
            offset, length = self.model.span(self.rnd)
            choice, byte = self.rnd.random(), self.rnd.randrange(1, 256)
            if choice < 0.6:
                commands.append(f"write -q -P {byte} {offset} {length}")
                self.model.data[offset : offset + length] = bytes([byte]) * length
            elif choice < 0.85:
                unmap = self.rnd.choice(["", "-u "])
                commands.append(f"write -q -z {unmap}{offset} {length}")
                self.model.data[offset : offset + length] = bytes(length)
            else:
                found = bytes(self.model.data[offset : offset + SECTOR])
                if found == found[:1] * SECTOR:
                    commands.append(f"read -q -P {found[0]} {offset} {SECTOR}")
        return [word for command in commands for word in ("-c", command)]

    # ---- the whole image --------------------------------------------------------------------------
    def change(self) -> None:
        """Something that the image can have done to it."""
        names = sorted(self.model.snapshots)
        possible: list[Callable[[], None]] = []
        if not self.kind.data_file and self.kind.refcount_bits > 2:
            possible += [self._create] * (2 if len(names) < 3 else 0)
            if names:
                possible += [self._apply, self._delete]
        if self.kind.version >= 3 or not names:  # version 2 does not note how large the disk was
            possible.append(self._resize)
        if self.backed and not names:
            possible += [self._commit, self._flatten]
        self.rnd.choice(possible)()

    def _create(self) -> None:
        name = self.model.new_name()
        self._tool()("snapshot", "-c", name, self.file)
        self.model.snapshots[name] = bytes(self.model.data)

    def _apply(self) -> None:
        name = self.rnd.choice(sorted(self.model.snapshots))
        self._tool()("snapshot", "-a", name, self.file)
        self.model.data = bytearray(self.model.snapshots[name])

    def _delete(self) -> None:
        name = self.rnd.choice(sorted(self.model.snapshots))
        self._tool()("snapshot", "-d", name, self.file)
        del self.model.snapshots[name]

    def _resize(self) -> None:
        size = self.rnd.randrange(3 * MIB, 8 * MIB) // SECTOR * SECTOR
        self._tool()("resize", "-q", "-f", "qcow2", "--shrink", self.file, str(size))
        self.model.data = self.model.data[:size].ljust(size, b"\0")

    def _commit(self) -> None:
        self._tool()("commit", "-q", self.file)

    def _flatten(self) -> None:
        self._tool()("rebase", "-q", "-f", "qcow2", "-b", "", self.file)
        self.backed = False

    # ---- judges -------------------------------------------------------------------------------------
    def judge(self) -> None:
        qemu_check(self.file)
        qemu_reads(self.file, bytes(self.model.data), self.folder)
        image = open_qcow2(self.file, read_only=True)
        try:
            assert read(image) == self.model.data
            report = check(image)
            assert (report.corruptions, report.leaks, report.lines) == (0, 0, [])
        finally:
            image.close()
        for name, data in self.model.snapshots.items():
            image = open_qcow2(self.file, read_only=True, snapshot=name)
            assert read(image) == data
            image.close()
            if len(data) == len(self.model.data):  # QEMU takes the disk's size of now
                qemu_img("convert", "-l", name, "-f", "qcow2", "-O", "raw", self.file, "then.raw")
                assert Path("then.raw").read_bytes() == data


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_sides_in_turn(tmp_path: Path, kind: Kind) -> None:
    with contextlib.chdir(tmp_path):  # where qemu-img looks for data files
        match = Match(tmp_path, kind, kind.cluster_size)
        for turn in range(TURNS):
            match.write()
            match.change()
            try:
                match.judge()
            except AssertionError as error:
                raise AssertionError(f"turn {turn}: {error}") from error
