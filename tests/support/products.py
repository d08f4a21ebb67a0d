"""What guests are made of, built once and kept in the user's cache folder.

A product is a file named by the digest of all that went into it, so that a change of the kernel
package, of a guest program or of the builder gives another file, and nothing is ever stale.
"""

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from coordinator import pieces
from coordinator.contract.errors import ConfigError
from tests.support import cpio, iso, modules

GUESTS = Path(__file__).resolve().parent.parent / "guests"
CD_MODULES = ("ata_piix", "sr_mod")
DISK_MODULES = ("sd_mod",)
PAYLOAD_BYTES = 64 << 20
KEEP = 4  # of each product, the newest


def product(name: str, inputs: Sequence[bytes | str], build: Callable[[Path], None]) -> Path:
    """The file `name` with the given inputs; calls `build` with a path to write if it is not there."""
    digest = hashlib.sha256()
    for item in inputs:
        data = item.encode() if isinstance(item, str) else item
        digest.update(len(data).to_bytes(8, "little") + data)
    stem, _, suffix = name.partition(".")
    folder = pieces.cache_dir() / "guests"
    path = folder / ".".join(filter(None, (f"{stem}-{digest.hexdigest()[:16]}", suffix)))
    if path.exists():
        os.utime(path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{stem}-", dir=folder) as scratch:
        build(Path(scratch) / name)
        (Path(scratch) / name).replace(path)
    versions = [old for old in folder.glob(f"{stem}-{'[0-9a-f]' * 16}{path.suffix}") if old != path]
    for old in sorted(versions, key=lambda old: old.stat().st_mtime)[: -(KEEP - 1)]:
        old.unlink(missing_ok=True)
    return path


def source(*paths: Path) -> list[bytes]:
    """The contents of source files, as inputs of a product."""
    return [path.read_bytes() for path in paths]


COMMON_FLAGS = ("-O2", "-std=gnu11", "-static", "-Wall", "-Wextra", "-Werror")
BARE_FLAGS = (
    "-m32", "-ffreestanding", "-nostdlib", "-fno-pie", "-no-pie", "-mgeneral-regs-only",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
    "-Wl,-Ttext=0x100000,-n,--build-id=none,--no-warn-rwx-segments",
)  # fmt: skip


def program(name: str) -> Path:
    """The static program built from the C files of tests/guests/NAME; runs here and in guests."""
    return _compiled(name, (*COMMON_FLAGS, "-march=x86-64"))


def bare(name: str) -> Path:
    """The multiboot kernel built from the C files of tests/guests/NAME."""
    return _compiled(name, (*COMMON_FLAGS, *BARE_FLAGS))


@cache
def _compiled(name: str, flags: tuple[str, ...]) -> Path:
    files = sorted((GUESTS / name).glob("*.[ch]"))
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise ConfigError(f"{compiler} not found: run `make setup`")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout

    def build(path: Path) -> None:
        units = [str(file) for file in files if file.suffix == ".c"]
        result = subprocess.run(
            [compiler, *flags, "-o", str(path), *units], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise ConfigError(f"cannot compile tests/guests/{name}:\n{result.stderr}")

    return product(name, [version, *flags, *source(*files)], build)


@cache
def initramfs() -> Path:
    """busybox, modules for CD and disks, our own programs and tests/guests/init, as the kernel wants it."""
    builder = source(Path(cpio.__file__), Path(modules.__file__), Path(__file__), GUESTS / "init")
    programs = {"busybox": pieces.busybox(), "bench": program("bench"), "port": program("port")}

    def build(path: Path) -> None:
        archive = cpio.Archive()
        for folder in ("dev", "proc", "sys", "tmp", "modules"):
            archive.folder(folder)
        archive.device("dev/console", 5, 1)
        for name, file in programs.items():
            archive.file(f"bin/{name}", file.read_bytes(), 0o755)
        archive.symlink("bin/sh", "busybox")
        packed: set[str] = set()
        for listed, wanted in (("order", CD_MODULES), ("disk", DISK_MODULES)):
            ordered = modules.load_order(pieces.modules_dir(), wanted)
            ordered = [(name, elf) for name, elf in ordered if name not in packed]
            for name, elf in ordered:
                archive.file(f"modules/{name}.ko", elf)
            archive.file(f"modules/{listed}", "".join(f"{name}\n" for name, _ in ordered).encode())
            packed.update(name for name, _ in ordered)
        archive.file("init", (GUESTS / "init").read_bytes(), 0o755)
        path.write_bytes(gzip.compress(archive.finish(), compresslevel=6, mtime=0))

    kernel = pieces.modules_dir()
    identity = [kernel.name, str((kernel / "modules.builtin").stat().st_size)]
    return product("initramfs.gz", [*identity, *source(*programs.values()), *builder], build)


@cache
def demo_iso(
    words: str = "atoll.demo=hash", payload_bytes: int = PAYLOAD_BYTES, seed: int = 1, name: str = "demo"
) -> Path:
    """A bootable ISO with the kernel, the initramfs and a random payload.

    `words` follow `console=ttyS0` on the kernel's command line; they are the guest's own. Variants
    that are used together need names of their own, as few versions of a name are kept.
    """
    initrd = initramfs()
    inputs = [pieces.kernel().name, initrd.name, words, str(payload_bytes), str(seed)]
    loader = source(pieces.isolinux(), pieces.ldlinux(), Path(iso.__file__))

    def build(path: Path) -> None:
        iso.build(
            path,
            isolinux=pieces.isolinux(), ldlinux=pieces.ldlinux(),
            kernel=pieces.kernel(), initrd=initrd,
            command_line=f"console=ttyS0 {words}",
            payload_bytes=payload_bytes, seed=seed,
        )

    return product(f"{name}.iso", [*inputs, *loader], build)


def sha256_of(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
