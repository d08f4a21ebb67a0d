"""The guest ``cdreader``: a Linux whose first program reads the CD without end (guest/cdreader).

Kernel and driver modules come from Debian's package (coordinator/pieces.py), the program is compiled here.
The CD is random data with no file system; its SHA-256 is told to the guest on the kernel's command line.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy

from coordinator import pieces
from coordinator.lab import cpio, modules
from coordinator.lab.plan import Experiment
from coordinator.lab.product import STATIC_FLAGS, compiled, product, source

SOURCES = Path(__file__).resolve().parent / "guest"
MODULES = ("ata_piix", "sr_mod")
#: of the CD's contents
SEED = 1
#: the guest's clock gaps worth a line, ms
GAP_MS = 8
#: the drive's id, as the command line of ``atoll run`` makes it
DRIVE = "ide1-cd0"


@dataclass(frozen=True)
class Guest:
    """What a machine needs to boot it, and its options, which both sides of a migration must have alike."""

    options: tuple[str, ...]
    append: str


@cache
def initramfs() -> Path:
    """The program as /init, and the modules of the CD-ROM drive in the order in which it loads them."""
    return packed("lab", program("cdreader"), MODULES)


def program(name: str) -> Path:
    """One of the guest's programs."""
    flags = (*STATIC_FLAGS, "-march=x86-64", "-pthread")
    return compiled(name, SOURCES / name, flags, SOURCES / "common")


def packed(name: str, program: Path, wanted: tuple[str, ...], beside: tuple[Path, ...] = ()) -> Path:
    """A static program as /init of an initramfs, modules with the order in which it must load them, and other
    programs ``beside`` it, /1 and up."""
    kernel = pieces.modules_dir()

    def build(path: Path) -> None:
        archive = cpio.Archive()
        for folder in ("dev", "proc", "sys", "modules"):
            archive.folder(folder)
        archive.device("dev/console", 5, 1)
        ordered = modules.load_order(kernel, wanted)
        for module, elf in ordered:
            archive.file(f"modules/{module}.ko", elf)
        archive.file("modules/order", "".join(f"{module}\n" for module, _ in ordered).encode())
        archive.file("init", program.read_bytes(), 0o755)
        for number, other in enumerate(beside, 1):
            archive.file(str(number), other.read_bytes(), 0o755)
        path.write_bytes(gzip.compress(archive.finish(), compresslevel=6, mtime=0))

    builder = source(Path(__file__), Path(cpio.__file__), Path(modules.__file__))
    programs = (program.name, *(other.name for other in beside))
    return product(f"{name}.gz", [kernel.name, *programs, *wanted, *builder], build)


@cache
def medium(mib: int) -> tuple[Path, str]:
    """The CD of that size, and its SHA-256."""

    def build(path: Path) -> None:
        path.write_bytes(numpy.random.Generator(numpy.random.PCG64(SEED)).bytes(mib << 20))

    path = product(f"labcd{mib}.iso", [str(SEED), str(mib)], build)
    with path.open("rb") as file:
        return path, hashlib.file_digest(file, "sha256").hexdigest()


def guest(experiment: Experiment) -> Guest:
    """PieceError or ConfigError where something to build it from is missing."""
    path, digest = medium(experiment.cd)
    words = {
        "sha256": digest,
        "gap_ms": GAP_MS,
        "timeout": experiment.command_timeout,
        "fill": experiment.fill,
        "dirty": experiment.dirty,
        "dirty_rate": experiment.dirty_rate,
    }
    return machine(initramfs(), path, experiment.ram, experiment.vcpus, words)


def machine(initrd: Path, cd: Path, ram: int, vcpus: int, words: Mapping[str, Any]) -> Guest:
    """A machine without what no guest of the laboratory needs; ``words`` are for its programs."""
    options = (
        *("-machine", "pc", "-vga", "none", "-display", "none", "-monitor", "none"),
        *("-m", str(ram), "-smp", str(vcpus), "-cdrom", str(cd).replace(",", ",,")),
        *("-kernel", str(pieces.kernel()), "-initrd", str(initrd)),
    )
    append = " ".join(
        [
            "console=ttyS0",
            "quiet",
            "loglevel=0",
            "panic=-1",
            *(f"lab.{name}={value}" for name, value in words.items()),
        ]
    )
    return Guest((*options, "-append", append), append)
