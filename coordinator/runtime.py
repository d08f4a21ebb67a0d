"""The private runtime folder of a machine: sockets and logs, gone when the machine ends.

It is ``$XDG_RUNTIME_DIR/atoll/NAME-PID`` (else under the temporary folder), mode 0700. What a
killed coordinator left behind is removed by the next start: the PID in the name is looked up.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from coordinator.contract.errors import ConfigError

#: the kernel's limit on a UNIX socket path, less our longest file name
_LONGEST = 90


def base() -> Path:
    """The folder that holds all machines of this user."""
    parent = os.environ.get("XDG_RUNTIME_DIR")
    if parent and os.access(parent, os.W_OK) and len(parent) < _LONGEST - 40:
        return Path(parent) / "atoll"
    return Path(tempfile.gettempdir()) / f"atoll-{os.getuid()}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sweep() -> None:
    """Remove folders of machines whose coordinator is dead."""
    for folder in base().glob("*-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def create(name: str) -> Path:
    """A new folder for machine ``name``; ConfigError when it cannot be made."""
    top = base()
    safe = re.sub(r"[^A-Za-z0-9_.]", "_", name)[:24] or "vm"
    folder = top / f"{safe}-{os.getpid()}"
    try:
        top.mkdir(mode=0o700, parents=True, exist_ok=True)
        if top.stat().st_uid != os.getuid():
            raise ConfigError(f"runtime folder {top} belongs to another user; set XDG_RUNTIME_DIR")
        sweep()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(f"cannot make the runtime folder {folder}: {error.strerror}; set XDG_RUNTIME_DIR") from None
    return folder
