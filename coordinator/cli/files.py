"""Whether the files that a command line names can be used, before anything starts."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from coordinator.cli.settings import Settings
from coordinator.contract.errors import ConfigError
from coordinator.contract.nbd import is_network_name


def check(s: Settings) -> None:
    """Files that the user named must be usable before anything starts."""
    for option, file in (("bios", s.bios), ("kernel", s.kernel)):
        if file is not None:
            _readable(f"-{option}", file)
    for file in _initrds(s.initrd):
        _readable("-initrd", file)
    for drive in s.drives:
        if drive.file is not None and not is_network_name(drive.file):
            mode = _readable(f"drive {drive.id}:", drive.file, (stat.S_ISREG, stat.S_ISBLK))
            if not (drive.read_only or drive.snapshot) and not os.access(drive.file, os.W_OK):
                raise ConfigError(
                    f"drive {drive.id}: {drive.file}: is not writable; add readonly=on or change its mode"
                )
            if stat.S_ISREG(mode) and os.path.getsize(drive.file) == 0:
                raise ConfigError(
                    f"drive {drive.id}: {drive.file}: is empty; give an image with at least one sector"
                )
    for option, file in (("-stats", s.stats), ("-pidfile", s.pidfile), ("-D", s.log_file)):
        if file is not None:
            _writable(option, file)


def _initrds(text: str | None) -> list[str]:
    """One file; or multiboot modules, each with words behind its file's name, where there is no such file."""
    if not text or os.path.lexists(text):
        return [text] if text else []
    modules = [word.split(" ")[0] for word in text.split(",")]
    return modules if any(os.path.lexists(module) for module in modules) else [text]


def _readable(what: str, file: str, kinds: tuple[Callable[[int], bool], ...] = (stat.S_ISREG,)) -> int:
    """The mode of a file that can be read."""
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise ConfigError(f"{what} {file}: {reason}") from None
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{what} {file}: is a directory, not an image")
    if not any(kind(mode) for kind in kinds):
        raise ConfigError(f"{what} {file}: is not a regular file")
    if not os.access(file, os.R_OK):
        raise ConfigError(f"{what} {file}: is not readable")
    return mode


def _writable(what: str, file: str) -> None:
    folder = os.path.dirname(os.path.abspath(file))
    if os.path.isdir(file):
        raise ConfigError(f"{what} {file}: is a directory")
    if not os.path.isdir(folder):
        raise ConfigError(f"{what} {file}: there is no folder {folder}")
    if not os.access(file if os.path.exists(file) else folder, os.W_OK):
        raise ConfigError(f"{what} {file}: cannot be written")
