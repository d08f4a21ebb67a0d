"""What the guests of the tests are made of (coordinator/lab/product.py keeps them)."""

import gzip
import hashlib
from functools import cache
from pathlib import Path

from coordinator import pieces
from coordinator.lab import cpio, modules
from coordinator.lab.guest import packed
from coordinator.lab.product import STATIC_FLAGS, compiled, product, source
from tests.support import iso

GUESTS = Path(__file__).resolve().parent.parent / "guests"
CD_MODULES = ("ata_piix", "sr_mod")
DISK_MODULES = ("sd_mod",)
PAYLOAD_BYTES = 64 << 20


BARE_FLAGS = (
    "-m32", "-ffreestanding", "-nostdlib", "-fno-pie", "-no-pie", "-mgeneral-regs-only",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables", "-fcf-protection=none",
    "-Wl,-Ttext=0x100000,-n,--build-id=none,--no-warn-rwx-segments",
)  # fmt: skip


def program(name: str) -> Path:
    """The static program built from the C files of tests/guests/NAME; runs here and in guests."""
    return _compiled(name, (*STATIC_FLAGS, "-march=x86-64"))


def bare(name: str) -> Path:
    """The multiboot kernel built from the C files of tests/guests/NAME."""
    return _compiled(name, (*STATIC_FLAGS, *BARE_FLAGS))


@cache
def _compiled(name: str, flags: tuple[str, ...]) -> Path:
    return compiled(name, GUESTS / name, flags)


@cache
def initramfs() -> Path:
    """busybox, modules for CD and disks, our own programs and tests/guests/init, as the kernel wants it."""
    builder = source(Path(cpio.__file__), Path(modules.__file__), Path(__file__), GUESTS / "init")
    programs = {"busybox": pieces.busybox()} | {name: program(name) for name in ("bench", "fill", "port")}

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
def writer() -> Path:
    """An initramfs whose first program is tests/guests/writer."""
    return packed("writer", program("writer"), ("ata_piix", *DISK_MODULES))


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
