"""The processes of a machine as the kernel counts them: query-islands, ``info islands``, ``atoll top``."""

from __future__ import annotations

import os
import time
from typing import Any

from coordinator.islands import nursery_pid
from coordinator.machine import Vm

_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
#: proc(5): words behind the name in /proc/PID/stat, and lines of /proc/PID/status
_STATE, _UTIME, _STIME, _THREADS, _START = 0, 11, 12, 17, 19
_MEMORY = {"VmRSS": "resident", "RssAnon": "private", "RssShmem": "shared"}


def describe(vm: Vm) -> list[dict[str, Any]]:
    """One row a process: ``role``, ``pid``, ``alive``; of those that are, ``state`` (proc(5)), ``threads``,
    ``uptime-ms``, ``cpu-ms`` (user and system), ``memory`` in bytes: ``resident``, of it ``private`` and
    ``shared`` (of the segment what it has touched). ``restarts``: other processes that were this island."""
    restarts = vm.crew.succession.restarts
    pids = {"coordinator": os.getpid()}
    if (nursery := nursery_pid()) is not None:
        pids["nursery"] = nursery
    pids |= {role: island.pid for role, island in vm.islands.items()}
    pids |= vm.crew.standbys.pids()
    return [
        {"role": role, "pid": pid, "restarts": restarts.get(role, 0), **process(pid)}
        for role, pid in pids.items()
    ]


def process(pid: int) -> dict[str, Any]:
    """What is known of a process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            lines = dict(line.rstrip().split(":", 1) for line in file if ":" in line)
    except OSError:
        return {"alive": False}
    if words[_STATE] in "ZX":
        return {"alive": False}
    up = time.clock_gettime(time.CLOCK_BOOTTIME) - int(words[_START]) / _CLOCK_TICKS
    return {
        "alive": True,
        "state": words[_STATE],
        "threads": int(words[_THREADS]),
        "uptime-ms": max(0, int(up * 1000)),
        "cpu-ms": (int(words[_UTIME]) + int(words[_STIME])) * 1000 // _CLOCK_TICKS,
        "memory": {
            name: int(lines[line].split()[0]) << 10 for line, name in _MEMORY.items() if line in lines
        },
    }
