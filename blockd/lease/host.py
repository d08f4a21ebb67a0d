"""Who this process is, and whether the holder of a lease is proven dead.

Proof is what could not be otherwise: on the same boot of the same kernel a PID with another start time is
another process, and an image lock ends with its process; after another boot of the same machine no process
is left. A holder on another host is never proven dead from here.
"""

from __future__ import annotations

import os
import platform

from blockd.lease.record import Identity, Record

BOOT = "/proc/sys/kernel/random/boot_id"
MACHINE = "/etc/machine-id"


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except (OSError, UnicodeError):
        return ""


def started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), stat, field 22). None for one that is gone,
    or a zombie, which does nothing any more."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return int(fields[19])


def this_process() -> Identity:
    """Asked anew each time, for a process may have been forked."""
    pid = os.getpid()
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return Identity(platform.node(), _text(MACHINE), _text(BOOT), namespace, pid, started(pid) or 0)


def is_dead(record: Record, locked: bool) -> bool:
    """Is the holder proven dead? ``locked``: we hold the image's locks, so nobody on this host writes it."""
    me = this_process()
    if record.boot and record.boot == me.boot:
        if record.namespace and record.namespace == me.namespace:
            return started(record.pid) != record.started
        # a container that is gone, say; while a transfer is under way a living holder has no locks either
        return locked and record.state == "held"
    # the same machine, booted again
    return bool(record.boot and record.machine) and (record.machine, record.host) == (me.machine, me.host)
