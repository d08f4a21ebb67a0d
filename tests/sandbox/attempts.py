"""What somebody tries who has taken an island over, by raw system calls.

Each attempt returns 0 when it has worked, else an errno. Numbers of calls: <asm/unistd_64.h>.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
PROT_READ, PROT_WRITE, PROT_EXEC, MAP_PRIVATE_ANONYMOUS = 1, 2, 4, 0x22
PTRACE_ATTACH, CLONE_NEWUSER, SIGKILL = 16, 0x10000000, 9
SECRET, NEW = "secret", "new"

_folder = b""
_victim = 0


def prepare(folder: Path, victim: int) -> None:
    """``folder`` has a file named SECRET; ``victim`` is a process of the same user."""
    global _folder, _victim
    _folder, _victim = os.fsencode(folder), victim


def _call(number: int, *arguments: int | bytes | None) -> int:
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return ctypes.get_errno() if _libc.syscall(ctypes.c_long(number), *wide) < 0 else 0


def _open(name: str, flags: int) -> int:
    return _call(257, AT_FDCWD, _folder + b"/" + name.encode(), flags, 0o600)


def _inet() -> int:
    return _call(41, socket.AF_INET, socket.SOCK_STREAM, 0)


def _program_in_memory() -> int:
    fd = _libc.syscall(ctypes.c_long(319), b"program", ctypes.c_long(0))
    if fd < 0:
        return ctypes.get_errno()
    os.write(fd, b"#!/bin/true\n")
    return _call(322, fd, b"", None, None, AT_EMPTY_PATH)


ATTEMPTS: dict[str, Callable[[], int]] = {
    "open to read": lambda: _open(SECRET, os.O_RDONLY),
    "open to write": lambda: _open(SECRET, os.O_WRONLY),
    "create": lambda: _open(NEW, os.O_WRONLY | os.O_CREAT),
    "remove": lambda: _call(87, _folder + b"/" + SECRET.encode()),
    "old open": lambda: _call(2, _folder + b"/" + SECRET.encode(), os.O_RDONLY),
    "execve": lambda: _call(59, b"/bin/true", None, None),
    "program in memory": _program_in_memory,
    "fork": lambda: _call(57),
    "clone": lambda: _call(56, 17, 0, 0, 0, 0),
    "TCP": _inet,
    "packets": lambda: _call(41, 17, socket.SOCK_RAW, 0x300),
    "ptrace": lambda: _call(101, PTRACE_ATTACH, _victim, 0, 0),
    "kill": lambda: _call(62, _victim, SIGKILL),
    "tgkill": lambda: _call(234, _victim, _victim, SIGKILL),
    "memory of another": lambda: _call(310, _victim, 0, 0, 0, 0, 0),
    "mount": lambda: _call(165, b"none", b"/mnt", b"tmpfs", 0, None),
    "io_uring": lambda: _call(425, 8, bytes(256)),
    "user namespace": lambda: _call(272, CLONE_NEWUSER),
    "bpf": lambda: _call(321, 0, None, 0),
    "terminal input": lambda: _call(16, 2, 0x5412, b"x"),
    "executable memory": lambda: _call(
        9, 0, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE_ANONYMOUS, -1, 0
    ),
}
NAMES = list(ATTEMPTS)
#: calls that are answered by the end of the process (SIGSYS)
DEADLY = {
    "execve", "program in memory", "fork", "ptrace", "memory of another", "mount", "io_uring",
    "user namespace", "bpf",
}  # fmt: skip
REFUSALS = (errno.EPERM, errno.EACCES)
