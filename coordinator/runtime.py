"""The private runtime folder of a machine: sockets and logs, gone when the machine ends.

It is ``$XDG_RUNTIME_DIR/atoll/NAME-PID`` (else under the temporary folder), mode 0700. A machine
holds a lock on a file in it for as long as it lives; what a killed coordinator left behind has no such
lock any more and is removed by the next start. A lock tells more than the PID in the name, which may
belong to another process by now, or to another PID namespace.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from coordinator.contract.errors import ConfigError

LOCK = "lock"
#: the kernel's limit on a UNIX socket path (unix(7): 108 with the final zero), less our longest file name
LONGEST_FOLDER = 90
LONGEST_NAME = 24


def base() -> Path:
    """The folder that holds all machines of this user."""
    parent = os.environ.get("XDG_RUNTIME_DIR")
    if parent:
        return Path(parent).absolute() / "atoll"
    return Path(tempfile.gettempdir()) / f"atoll-{os.getuid()}"


def _lock(path: Path, wait: bool = False) -> int | None:
    """A descriptor that holds the lock of this file; None where another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def sweep(top: Path) -> None:
    """Remove the folders of machines that are no more; the caller holds the lock of ``top``."""
    for folder in top.iterdir():
        if folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(OSError):
            fd = _lock(folder / LOCK)
            if fd is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(fd)


def find(name: str | None) -> Path:
    """The folder of the running machine called ``name``, or ``name-PID`` where several are, or of the only
    one; ConfigError says which there are."""
    running = [folder for folder in sorted(base().glob("*")) if folder.is_dir() and _lives(folder)]
    if name is None:
        if len(running) == 1:
            return running[0]
        known = ", ".join(folder.name for folder in running) or "none"
        raise ConfigError(f"say which machine (there are: {known})")
    found = [folder for folder in running if folder.name == name]
    found = found or [folder for folder in running if folder.name.rpartition("-")[0] == _safe(name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(folder.name for folder in (found or running)) or "none"
    problem = "several machines are" if found else "no running machine is"
    raise ConfigError(f"{problem} called {name} (there are: {known})")


def _lives(folder: Path) -> bool:
    """Whether a machine holds the folder's lock."""
    try:
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", name)[:LONGEST_NAME] or "vm"


def _create(name: str) -> tuple[Path, int]:
    top = base()
    folder = top / f"{_safe(name)}-{os.getpid()}"
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        raise ConfigError(
            f"the runtime folder {folder} has too long a path for sockets; set XDG_RUNTIME_DIR"
        )
    try:
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
        if top.stat().st_uid != os.getuid():
            raise ConfigError(f"the runtime folder {top} belongs to another user; set XDG_RUNTIME_DIR")
        all_machines = _lock(top / ".lock", wait=True)
        assert all_machines is not None
        try:
            sweep(top)
            folder.mkdir(mode=0o700)
            held = _lock(folder / LOCK)
            assert held is not None, "nobody else can know the new folder"
        finally:
            os.close(all_machines)
    except OSError as error:
        raise ConfigError(
            f"cannot make the runtime folder {folder}: {error.strerror}; set XDG_RUNTIME_DIR"
        ) from None
    return folder, held


@contextlib.contextmanager
def folder(name: str) -> Iterator[Path]:
    """A new folder for machine ``name``, removed at the end; ConfigError when it cannot be made."""
    path, held = _create(name)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(held)
