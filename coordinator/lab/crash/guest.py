"""The guest that bears it: two vCPUs, ``cdreader`` and beside it ``diskwriter`` with a qcow2 disk."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from coordinator.contract.errors import ConfigError
from coordinator.lab import guest
from coordinator.lab.crash.plan import Trial

MODULES = (*guest.MODULES, "sd_mod", "msdos", "nls_cp437")
DISK_DRIVE = "ide0-hd0"
#: the first program that is started beside /init, see guest.packed
WRITER = "/1"


def machine(trial: Trial, disk: Path) -> tuple[str, ...]:
    """Options of ``atoll run``; makes the disk."""
    path, digest = guest.medium(trial.cd)
    words = {"sha256": digest, "gap_ms": guest.GAP_MS, "beside": WRITER}
    initrd = guest.packed("crash", guest.program("cdreader"), MODULES, (guest.program("diskwriter"),))
    img("create", "-q", "-f", "qcow2", str(disk), f"{trial.disk}M")
    drive = f"file={str(disk).replace(',', ',,')},format=qcow2,if=ide,index=0,id={DISK_DRIVE}"
    options = guest.machine(initrd, path, trial.ram, trial.vcpus, words).options
    return (*options, "-drive", drive)


def img(*words: str) -> None:
    """Our own image tool; ConfigError with its words where it fails."""
    _run([sys.executable, "-P", "-m", "coordinator.cli.main", "img", *words])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ConfigError(said[-1] if said else f"exit status {done.returncode}")


def checks(disk: Path, digest: str) -> dict[str, str]:
    """What the disk of a guest that has ended is like, see results.Ended; ``digest``: what the guest says of
    its second half."""
    found = {"atoll img check": _finding(lambda: img("check", "-q", str(disk)))}
    if shutil.which("qemu-img") is not None:
        found["qemu-img check"] = _finding(lambda: _run(["qemu-img", "check", "-q", str(disk)]))
    found["blocks read on the host"] = _finding(lambda: _compare(disk, digest))
    return found


def _finding(look: Callable[[], None]) -> str:
    try:
        look()
    except ConfigError as error:
        return str(error)
    return ""


def _compare(disk: Path, digest: str) -> None:
    raw = disk.with_suffix(".raw")
    img("convert", "-f", "qcow2", "-O", "raw", str(disk), str(raw))
    with raw.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        found = hashlib.file_digest(file, "sha256").hexdigest()
    raw.unlink()
    if found != digest:
        raise ConfigError(f"SHA-256 is {found}, the guest says {digest}")
