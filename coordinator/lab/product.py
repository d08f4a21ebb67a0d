"""Guest pieces that are built once and kept in the user's cache folder.

A product is a file named by the digest of all that went into it, so that a change of the kernel
package, of a guest program or of the builder gives another file, and nothing is ever stale.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from coordinator import pieces
from coordinator.contract.errors import ConfigError

KEEP = 4  # of each product, the newest
STATIC_FLAGS = ("-O2", "-std=gnu11", "-static", "-Wall", "-Wextra", "-Werror")


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


def compiled(name: str, folder: Path, flags: Sequence[str], common: Path | None = None) -> Path:
    """The program built from all C files of a folder, and of one with ``common`` parts; ConfigError where it
    cannot be compiled."""
    files = sorted(folder.glob("*.[ch]"))
    places = []
    if common is not None:
        files += sorted(common.glob("*.[ch]"))
        places = [f"-I{common}"]
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise ConfigError(f"{compiler} not found: it compiles the guests' programs")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout

    def build(path: Path) -> None:
        units = [str(file) for file in files if file.suffix == ".c"]
        result = subprocess.run(
            [compiler, *flags, *places, "-o", str(path), *units], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise ConfigError(f"cannot compile {name}:\n{result.stderr}")

    return product(name, [version, *flags, *source(*files)], build)
