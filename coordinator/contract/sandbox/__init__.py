"""The sandbox of an island: what it does not need once it serves is taken from it.

Two steps, since some things are needed to get ready: ``enter``, while there is one thread, closes the file
system but for the places of the role and gives privileges up; ``seal``, just before the first guest input,
leaves the system calls of the role (policy.h). What a kernel lacks is said in the log, once, and the rest is
done.

Landlock binds the thread that asks and those it starts, which is why ``enter`` comes before all threads.
"""

from __future__ import annotations

import enum
import logging
import os
import resource
import stat
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from coordinator.contract.sandbox._sandbox import lib

log = logging.getLogger(__name__)

# ---- linux/landlock.h: LANDLOCK_ACCESS_FS_*
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 5
MAKE_REG, MAKE_SOCK = 1 << 8, 1 << 9
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
#: version of the interface, and the rights that are known from it on
_KNOWN_SINCE = ((1, (1 << 13) - 1), (2, REFER), (3, TRUNCATE), (5, IOCTL_DEV))
#: rights that a rule for a plain file may have; the lowest is EXECUTE
_OF_FILES = 1 << 0 | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

#: linux/capability.h
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER = 1, 2, 3

#: what an island may write into one file, its log for those who have no other, bytes
MOST_LOG = 4 << 30
#: descriptors of those who open none; select(2) ends at 1024
MOST_DESCRIPTORS = 1024


class Access(enum.IntFlag):
    """What may be done with a place and all below it."""

    READ = READ_FILE | READ_DIR | IOCTL_DEV
    WRITE = WRITE_FILE | TRUNCATE | IOCTL_DEV
    #: plain files come and go
    NAMES = MAKE_REG | REMOVE_FILE
    #: sockets come and go
    SOCKETS = MAKE_SOCK | REMOVE_FILE


class Role(NamedTuple):
    """What differs between the roles beside their system calls."""

    number: int
    #: bits of the capabilities that it keeps where it has them; one who runs as root may use images of others
    capabilities: int
    #: it opens files and starts threads while it serves
    opens: bool


ROLES = {
    "vcpu": Role(lib.ROLE_VCPU, 0, False),
    "devhost": Role(lib.ROLE_DEVHOST, 0, False),
    "blockd": Role(lib.ROLE_BLOCKD, 1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH | 1 << CAP_FOWNER, True),
}


class _LateImports:
    """First of the import system's finders (sys.meta_path). A module's files cannot be seen any more, and an
    error of the import may pass for another one: so it is said which module should have been loaded."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        log.warning("sandbox: module %s is imported too late", name)


class Sandbox:
    """Of this process. ``name`` is the island's, as in "devhost0"; nothing happens unless ``on``."""

    def __init__(
        self, role: str, name: str, on: bool, places: Sequence[tuple[str | int, Access]] = ()
    ) -> None:
        """``places``: paths, or descriptors of files, with what may be done there."""
        self.on = on
        self._role = ROLES[role]
        #: of the island, for messages
        self.name = name
        self._places = places

    def enter(self) -> None:
        """No new privileges, no files but the places; with a single thread."""
        if not self.on:
            return
        time.localtime()  # reads the time zone, which the log wants
        _must(lib.sandbox_no_new_privileges(), "no new privileges")
        _must(lib.sandbox_keep_capabilities(self._role.capabilities), "fewer capabilities")
        _limit(resource.RLIMIT_CORE, 0)
        if not self._role.opens:
            _limit(resource.RLIMIT_FSIZE, MOST_LOG)
            _limit(resource.RLIMIT_NOFILE, MOST_DESCRIPTORS)
        self._close_files()
        sys.meta_path.insert(0, _LateImports)

    def seal(self) -> None:
        """Only the role's system calls from now on, in all threads."""
        if not self.on:
            return
        if not self._role.opens:
            _limit(resource.RLIMIT_NPROC, 0)  # the threads that it has are all that it needs
        _must(lib.sandbox_seccomp(self._role.number, self.name.encode()), "seccomp")

    def _close_files(self) -> None:
        version = lib.sandbox_landlock_version()
        if version < 0:
            _must(version, "Landlock")
            return
        handled = sum(rights for since, rights in _KNOWN_SINCE if version >= since)
        rules = lib.sandbox_landlock_rules(version, handled)
        if not _must(rules, "Landlock"):
            return
        for place, access in self._places:
            _allow(rules, place, access & handled)
        _must(lib.sandbox_landlock_enforce(rules), "Landlock")
        os.close(rules)


def _allow(rules: int, place: str | int, access: int) -> None:
    """A place that is not there needs no rule: who opens it says that it is not there."""
    try:
        fd = os.dup(place) if isinstance(place, int) else os.open(place, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            access &= _OF_FILES
        _must(lib.sandbox_landlock_allow(rules, fd, access), f"Landlock's rule for {place}")
    finally:
        os.close(fd)


def _limit(what: int, most: int) -> None:
    """Lower a limit; one that is lower already stays."""
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(what, (most, most))


def _must(result: int, what: str) -> bool:
    """Whether it worked; else one line, for a weaker sandbox is better than no machine."""
    if result < 0:
        log.warning("sandbox: goes without %s: %s", what, os.strerror(-result))
    return result >= 0
