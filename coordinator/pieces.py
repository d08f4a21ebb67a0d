"""Guest pieces from Debian's packages: firmware, boot loader, kernel, busybox.

Packages are downloaded with `apt-get download`, unpacked into the user's cache folder
(`$XDG_CACHE_HOME/atoll`, by default `~/.cache/atoll`) and never installed over the system.
`python -m coordinator.pieces` (part of `make setup`) fetches what is missing; the functions below
only look, and raise `PieceError` with one line that says what to do. Firmware is also taken from
`/usr/share`, where the packages `seabios` and `vgabios` put it.

Where apt's package lists are missing or stale, and for users other than root, lists of our own are
fetched into the cache folder from the sources that the system is configured for.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coordinator.contract.errors import AtollError, ConfigError, UsageError

LAYOUT = "pieces-1"  # name of the folder in the cache; changes when what is kept there changes
STAMP = "atoll-piece.json"  # written last into an unpacked package, so a folder with it is whole
SYSTEM_FIRMWARE = (Path("/usr/share/seabios"), Path("/usr/share/vgabios"))


class PieceError(ConfigError):
    """A guest piece is missing or could not be fetched; the text is one line for the user."""


@dataclass(frozen=True)
class Package:
    """A Debian package whose files guests are made of.

    `pattern` is the name as a regular expression, tried against the names that apt knows; where
    several match, the newest is taken. `needs` are globs below the unpacked tree, each of which
    must match exactly one file or folder.
    """

    key: str
    patterns: tuple[str, ...]
    needs: tuple[str, ...]


SEABIOS = Package(
    "seabios", ("seabios",), ("usr/share/seabios/bios-256k.bin", "usr/share/seabios/vgabios-stdvga.bin")
)
ISOLINUX = Package("isolinux", ("isolinux",), ("usr/lib/ISOLINUX/isolinux.bin",))
SYSLINUX = Package(
    "syslinux-common", ("syslinux-common",), ("usr/lib/syslinux/modules/bios/ldlinux.c32",)
)
LINUX = Package(
    "linux-image",
    (r"linux-image-6\.1\.\S+-cloud-amd64-unsigned", r"linux-image-\d\S+-cloud-amd64-unsigned"),
    ("boot/vmlinuz-*", "**/lib/modules/*/kernel"),
)
BUSYBOX = Package("busybox-static", ("busybox-static",), ("**/bin/busybox",))
PACKAGES = (SEABIOS, ISOLINUX, SYSLINUX, LINUX, BUSYBOX)


def cache_dir() -> Path:
    """The user's cache folder for this project (not created)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The base directory specification: a relative path in the variable is to be ignored.
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "atoll"


def pieces_dir() -> Path:
    """The folder of unpacked packages (not created)."""
    return cache_dir() / LAYOUT


# --- looking ---------------------------------------------------------------------------------


def firmware(name: str) -> Path:
    """A firmware image by its file name in Debian's seabios package, e.g. `bios-256k.bin`."""
    candidates = [pieces_dir() / SEABIOS.key / "usr/share/seabios" / name]
    candidates += [folder / name for folder in SYSTEM_FIRMWARE]
    for path in candidates:
        if path.is_file():
            return path
    raise PieceError(f"firmware {name} not found: run `make setup`, or install Debian's package seabios")


def kernel() -> Path:
    """The kernel image (bzImage) of the newest 6.1 cloud kernel."""
    return _need(LINUX, "boot/vmlinuz-*")


def modules_dir() -> Path:
    """`lib/modules/RELEASE` that belongs to `kernel()`; its name is what `uname -r` prints."""
    return _need(LINUX, "**/lib/modules/*/kernel").parent


def busybox() -> Path:
    """The static busybox."""
    return _need(BUSYBOX, "**/bin/busybox")


def isolinux() -> Path:
    """The El Torito boot image of ISOLINUX."""
    return _need(ISOLINUX, "usr/lib/ISOLINUX/isolinux.bin")


def ldlinux() -> Path:
    """The core module that ISOLINUX loads from the CD."""
    return _need(SYSLINUX, "usr/lib/syslinux/modules/bios/ldlinux.c32")


def _need(package: Package, pattern: str) -> Path:
    root = pieces_dir() / package.key
    found = list(root.glob(pattern)) if (root / STAMP).is_file() else []
    if len(found) != 1:
        raise PieceError(f"{package.key} is not in {pieces_dir()}: run `make setup`")
    return found[0]


def missing() -> list[Package]:
    """The packages whose unpacked tree is not there, not whole or damaged."""
    return [package for package in PACKAGES if not _intact(pieces_dir() / package.key)]


def _intact(root: Path) -> bool:
    try:
        digests = json.loads((root / STAMP).read_text())["sha256"]
        return all(_sha256(root / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- fetching --------------------------------------------------------------------------------


def fetch(say: Callable[[str], None] = print) -> None:
    """Downloads and unpacks what is missing; several processes may do so at once.

    Raises `PieceError` where apt-get or dpkg-deb are missing or fail.
    """
    if not missing():
        return
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise PieceError(f"{tool} not found: guest pieces come from Debian's packages")
    try:
        pieces_dir().mkdir(parents=True, exist_ok=True)
        with _locked(pieces_dir() / "lock", say):
            apt = Apt(cache_dir() / "apt", say)
            for package in missing():
                _fetch_one(package, apt, say)
    except OSError as error:
        raise PieceError(f"cannot write to {pieces_dir()}: {error.strerror}") from error


def _fetch_one(package: Package, apt: "Apt", say: Callable[[str], None]) -> None:
    begun = time.monotonic()
    root = pieces_dir() / package.key
    with tempfile.TemporaryDirectory(prefix=f".{package.key}-", dir=pieces_dir()) as scratch:
        archive = apt.download(package, Path(scratch))
        tree = Path(scratch) / "tree"
        _run(["dpkg-deb", "-x", str(archive), str(tree)], f"cannot unpack {archive.name}")
        digests = {}
        for pattern in package.needs:
            found = list(tree.glob(pattern))
            if len(found) != 1:
                raise PieceError(f"{archive.name} has {len(found)} files for {pattern}, not one")
            if found[0].is_file():
                digests[str(found[0].relative_to(tree))] = _sha256(found[0])
        (tree / STAMP).write_text(json.dumps({"archive": archive.name, "sha256": digests}, indent=1) + "\n")
        if root.exists():
            root.rename(Path(scratch) / "damaged")
        tree.rename(root)
        say(f"[pieces] {archive.name}: unpacked ({time.monotonic() - begun:.1f} s)")


class Apt:
    """apt-get with the system's package lists, or with private ones where those do not serve."""

    def __init__(self, private: Path, say: Callable[[str], None]) -> None:
        self._private = private
        self._say = say
        # Downloading as the user _apt fails in folders that only we can read.
        self._options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        self._updated = False

    def download(self, package: Package, folder: Path) -> Path:
        """Downloads the newest package that matches into `folder`; apt checks its hash."""
        while True:
            name = self._newest(package)
            if name is not None:
                self._say(f"[pieces] {name}: downloading")
                result = subprocess.run(
                    ["apt-get", *self._options, "-q", "download", name],
                    cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                )
                archives = list(folder.glob("*.deb"))
                if result.returncode == 0 and len(archives) == 1:
                    return archives[0]
                reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            else:
                reason = "apt knows no such package"
            if self._updated:
                raise PieceError(f"cannot download {name or package.key}: {reason}")
            self._update()

    def _newest(self, package: Package) -> str | None:
        """The newest name that matches and that a source offers now (names outlive their packages)."""
        names = self._query("pkgnames")
        for pattern in package.patterns:
            matching = [name for name in names if re.fullmatch(pattern, name)]
            offered = [line.split()[0] for line in self._query("madison", *matching)] if matching else []
            if offered:
                return max(offered, key=_version_key)
        return None

    def _query(self, *words: str) -> list[str]:
        result = subprocess.run(
            ["apt-cache", *self._options, *words], capture_output=True, text=True, check=False
        )
        return result.stdout.splitlines()

    def _update(self) -> None:
        self._say("[pieces] fetching package lists of our own (once)")
        for folder in ("lists/partial", "cache/archives/partial"):
            (self._private / folder).mkdir(parents=True, exist_ok=True)
        self._options += ["-o", f"Dir::State::Lists={self._private / 'lists'}"]
        self._options += ["-o", f"Dir::Cache={self._private / 'cache'}"]
        _run(["apt-get", *self._options, "-q", "update"], "apt-get update failed")
        self._updated = True


def _version_key(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _run(command: list[str], failure: str) -> None:
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise PieceError(f"{failure}: {reason}")


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Holds an exclusive lock on `path`; the kernel drops it when the process ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("[pieces] another process is fetching; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


USAGE = """usage: atoll pieces

Fetches firmware, boot loader, kernel and busybox from Debian's packages into your cache folder, where
they are missing, and prints where each one is."""


def run(arguments: list[str]) -> int:
    """``atoll pieces``: fetch what is missing and print where everything is."""
    if any(word in ("-h", "-help", "--help") for word in arguments):
        print(USAGE)
        return 0
    if arguments:
        raise UsageError(f"'{arguments[0]}' is not known; it takes no arguments")
    fetch(lambda line: print(line, file=sys.stderr, flush=True))
    for path in (
        firmware("bios-256k.bin"), firmware("vgabios-stdvga.bin"),
        isolinux(), ldlinux(), kernel(), modules_dir(), busybox(),
    ):
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]))
    except AtollError as error:
        print(f"pieces: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
