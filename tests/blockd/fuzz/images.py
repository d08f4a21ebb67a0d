"""qcow2 files of which one part has been spoilt: header, tables, refcounts, snapshots, bitmaps."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from blockd.opening import open_qcow2
from blockd.qcow2 import bitmaps, operations, snapshots
from blockd.qcow2.check import check, repair
from blockd.qcow2.dirty import DirtyBitmap
from blockd.qcow2.image import Qcow2Image
from coordinator.cli.main import main as atoll
from coordinator.contract.errors import AtollError
from tests.blockd.fuzz.runner import unlimited
from tests.blockd.qcow2.anatomy import Anatomy
from tests.blockd.qcow2.support import read
from tests.support.tools import run_tool

KIB = 1 << 10
#: what a disk may claim to be and still be read whole
MOST_READ = 4 << 20
ROLES = {
    "header": ("header",),
    "L1 table": ("L1 table", "snapshot's L1 table"),
    "L2 table": ("L2 table",),
    "refcounts": ("refcount table", "refcount block"),
    "snapshot table": ("snapshot table",),
    "bitmaps": ("bitmap directory", "bitmap table", "header"),
    "compressed data": ("compressed data", "L2 table"),
}
#: fields of the header: offset, bytes
_FIELDS = [(4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4)]
_FIELDS += [(64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1)]
_IMAGE = "disk.qcow2"


class Images:
    """Files with one part spoilt."""

    memory = 512 << 20

    def __init__(self, name: str, differential: int) -> None:
        """At most every so many inputs QEMU is asked what it reads; 0 is never."""
        self.name = name
        self._differential = differential
        self._seen = 0

    def prepare(self, folder: Path) -> None:
        self._folder = folder
        (folder / "base").write_bytes(random.Random(1).randbytes(96 * KIB))
        self._kept = {"base"}
        self._templates: list[tuple[bytes, Anatomy]] = []
        for number, (options, commands) in enumerate(_TEMPLATES):
            file = f"template{number}"
            run_tool("qemu-img", "create", "-q", "-f", "qcow2", *options, file, "256k")
            for command in commands:
                if command.startswith("img "):
                    run_tool("qemu-img", *(file if w == "@" else w for w in command.split()[1:]))
                else:
                    run_tool(
                        "qemu-io", "-f", "qcow2", *(w for c in command.split(";") for w in ("-c", c)), file
                    )
            data = Path(file).read_bytes()
            anatomy = Anatomy(data)
            if any(part.role in ROLES[self.name] for part in anatomy.parts):
                self._templates.append((data, anatomy))
            Path(file).unlink()
        for leftover in folder.iterdir():
            if leftover.name != "base":
                leftover.unlink()

    # ---- making -----------------------------------------------------------------------------------
    def make(self, rnd: random.Random) -> bytes:
        template, anatomy = rnd.choice(self._templates)
        data = bytearray(template)
        parts = [part for part in anatomy.parts if part.role in ROLES[self.name]]
        for _ in range(rnd.choice([1, 1, 1, 2, 3])):
            part = rnd.choice(parts if rnd.random() < 0.9 else anatomy.parts)
            offset, width = self._field(rnd, anatomy, part.role, part.offset, part.length)
            self._spoil(rnd, anatomy, data, offset, width)
        if rnd.random() < 0.08:
            end = rnd.choice([rnd.randrange(len(data)), rnd.choice(anatomy.parts).offset, len(data) - 1])
            del data[end:]
        elif rnd.random() < 0.05:
            data += bytes(rnd.choice([1, 512, 5 * anatomy.cluster_size]))
        return bytes(data)

    @staticmethod
    def _field(rnd: random.Random, anatomy: Anatomy, role: str, offset: int, length: int) -> tuple[int, int]:
        if role == "header" and rnd.random() < 0.7:
            return rnd.choice(_FIELDS)
        if role.endswith(("table", "directory")) and role not in ("snapshot table", "bitmap directory"):
            # entries that are used lie at the beginning, mostly
            entries = max(1, length // 8)
            return offset + 8 * rnd.randrange(min(entries, rnd.choice([4, 40, entries]))), 8
        width = rnd.choice([1, 2, 4, 8])
        return offset + rnd.randrange(max(1, length - width + 1)) // width * width, width

    @staticmethod
    def _spoil(rnd: random.Random, anatomy: Anatomy, data: bytearray, offset: int, width: int) -> None:
        old = int.from_bytes(data[offset : offset + width], "big")
        limit = (1 << (8 * width)) - 1
        place = rnd.choice(anatomy.parts).offset
        cluster = anatomy.cluster_size
        values: list[Callable[[], int]] = [
            lambda: rnd.randrange(limit + 1),
            lambda: old ^ 1 << rnd.randrange(8 * width),
            lambda: old + rnd.choice([-1, 1, 8, 512, cluster, -cluster]),
            lambda: rnd.choice([0, 1, 2, 0x7F, limit, limit >> 1, (limit >> 1) + 1]),
            lambda: place,
            lambda: place | 1 << 63,
            lambda: (len(data) // cluster + rnd.choice([0, 1, 100])) * cluster | rnd.choice([0, 1 << 63]),
            lambda: old ^ rnd.choice([1 << 63, 1 << 62, 1]),
            lambda: 1 << 62 | rnd.randrange(1 << 62),
            lambda: 0xBFFFFFFFFFFF0000,
        ]
        value = rnd.choice(values)() & limit
        data[offset : offset + width] = value.to_bytes(width, "big")

    # ---- judging ----------------------------------------------------------------------------------
    def judge(self, data: bytes, rnd: random.Random) -> None:
        file = str(self._folder / _IMAGE)
        Path(file).write_bytes(data)
        content = self._read(file)
        clean = self._in_order(file)
        self._tell(file)
        if content is not None and clean and self._differential:
            self._seen += 1
            if self._seen % self._differential == 0:
                with unlimited():
                    self._compare(file, content)
        opened = self._change(file, rnd, content if clean else None)
        assert Path("base").stat().st_size == 96 * KIB, "the backing file has changed"
        if opened:
            open_qcow2(file, read_only=True).close()
        if opened and clean:
            assert self._in_order(file), "it was in order before it was used"
        for each in self._folder.iterdir():
            if each.name not in self._kept:
                each.unlink()

    def finish(self) -> None:
        pass

    def _read(self, file: str) -> bytes | None:
        """The disk, and what the snapshots were; None when it cannot be read."""
        content: list[bytes] = []

        def read_all(image: Qcow2Image) -> None:
            sum(1 for _ in zip(image.extents(0, image.size), range(10000), strict=False))
            image.prefetch(0, min(image.size, 65536))
            for bitmap in bitmaps.load(image.host, image.header):
                self._expected(self._read_bitmap, image, bitmap.name)
            content.append(read(image, 0, min(image.size, MOST_READ)))

        self._with(file, read_all, read_only=True)
        names: list[str] = []
        self._with(
            file, lambda i: names.extend(s.id for s in snapshots.load(i.host, i.header)), read_only=True
        )
        for name in names[:3]:
            self._with(file, lambda i: read(i, 0, min(i.size, MOST_READ)), read_only=True, snapshot=name)
        return content[0] if content else None

    @staticmethod
    def _read_bitmap(image: Qcow2Image, name: str) -> None:
        runs = DirtyBitmap(image, name).runs(0, max(1, image.size))
        sum(1 for _ in zip(runs, range(1000), strict=False))

    def _in_order(self, file: str) -> bool:
        found: list[int] = []
        self._with(file, lambda image: found.append(check(image).corruptions), read_only=True)
        return found == [0]

    def _tell(self, file: str) -> None:
        """What ``atoll img`` says about it."""
        for command in ("info --output=json", "map", "snapshot -l", "check"):
            self._img(f"{command} {file}")

    @staticmethod
    def _img(command: str) -> None:
        """One line when it is an error; a check may have more to say."""
        out, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(errors):
            status = atoll(["img", *command.split()])
        if status and not command.startswith("check"):
            assert errors.getvalue().count("\n") == 1, errors.getvalue()

    def _compare(self, file: str, content: bytes) -> None:
        """Where QEMU finds it in order, too, it reads the same."""
        if "No errors were found" not in run_tool("qemu-img", "check", "-f", "qcow2", file, status=None):
            return
        if len(content) == MOST_READ or len(content) % 512:  # QEMU has no disks of half a sector
            return
        plain = self._folder / "plain"
        plain.write_bytes(content)
        told = run_tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", file, str(plain), status=None)
        assert "Images are identical" in told, told

    def _change(self, file: str, rnd: random.Random, content: bytes | None) -> bool:
        """Write, and do whatever can be done to a whole image; was it opened? ``content`` is what an image
        that is in order must hold."""
        opened: list[bool] = []

        def write(image: Qcow2Image) -> None:
            opened.append(True)
            for _ in range(6):
                length = min(rnd.choice([512, 5000, 70000]), image.size)
                offset = rnd.randrange(image.size - length + 1)
                data, unmap = rnd.randbytes(length), rnd.random() < 0.5
                self._expected(image.write, offset, data)
                if content is not None and image.size == len(content):
                    assert read(image, offset, length) == data, "a write is not there"
                self._expected(image.write_zeroes, offset, length, unmap, False)
                self._expected(image.trim, offset, length)
                self._expected(image.flush)

        def whole(image: Qcow2Image) -> None:
            actions: list[Callable[[], object]] = [
                lambda: operations.create(image, "new", now=1.0),
                lambda: operations.apply(image, "1"),
                lambda: operations.delete(image, "1"),
                lambda: operations.resize(image, rnd.choice([64, 200, 2000]) * KIB),
            ]
            rnd.shuffle(actions)
            for action in actions:
                self._expected(action)

        self._with(file, write)
        if self.name == "bitmaps":
            self._img(rnd.choice(_BITMAP_COMMANDS).replace("@", file))
        if rnd.random() < 0.5:
            self._with(file, whole)
        if rnd.random() < 0.3:
            self._with(file, lambda image: repair(image, everything=True), repair=True)
        return bool(opened)

    def _with(self, file: str, action: Callable[[Qcow2Image], object], **how: object) -> None:
        """Open, do it, close; errors are fine if they are told in one line."""

        def run() -> None:
            image = open_qcow2(file, **how)  # type: ignore[arg-type]
            try:
                action(image)
            finally:
                image.close()

        self._expected(run)

    @staticmethod
    def _expected(action: Callable[..., object], *arguments: object) -> None:
        try:
            action(*arguments)
        except (AtollError, OSError) as error:
            assert "\n" not in str(error), str(error)


_BITMAP_COMMANDS = [
    "bitmap -f qcow2 --clear @ one",
    "bitmap -f qcow2 --remove @ one",
    "bitmap -f qcow2 --disable @ one",
    "bitmap -f qcow2 --add @ two",
    "bitmap -f qcow2 --add --merge one @ two",
    "resize -f qcow2 --shrink @ 100k",
    "resize -f qcow2 @ 3M",
]
_FILL = "write -q -P 1 0 20k;write -q -P 2 70k 3k;write -q -z 128k 64k"
#: options of qemu-img create, and what qemu-img ("img ...") and qemu-io do then
_TEMPLATES: list[tuple[list[str], list[str]]] = [
    (
        ["-o", "cluster_size=512"],
        [
            _FILL,
            "img snapshot -c one @",
            "write -q -P 3 5k 9k",
            "img snapshot -c two @",
            "write -q -P 4 0 2k",
        ],
    ),
    (
        ["-o", "cluster_size=4k"],
        ["write -q -c -P 7 16k 4k;write -q -c -P 8 20k 4k", _FILL, "img bitmap --add -g 512 @ one"],
    ),
    (["-o", "cluster_size=4k,compression_type=zstd"], ["write -q -c -P 7 64k 4k", "write -q -P 8 0 20k"]),
    (["-o", "compat=0.10,cluster_size=1k", "-b", "base", "-F", "raw"], [_FILL, "img snapshot -c one @"]),
    (["-o", "cluster_size=4k", "-b", "base", "-F", "raw"], [_FILL]),
    (["-o", "cluster_size=512,refcount_bits=1"], [_FILL]),
    (["-o", "cluster_size=1k,refcount_bits=64"], [_FILL, "img snapshot -c one @"]),
    (["-o", "cluster_size=16k,extended_l2=on"], [_FILL]),
]
TARGETS = tuple(ROLES)
