"""``atoll top [NAME]``: the processes of a running machine, again and again.

Exit status: 0, also when it is ended by Ctrl-C or the machine ends; 1 where there is no machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from typing import Any

from coordinator import runtime
from coordinator.contract.errors import IslandError, UsageError
from coordinator.qmp.client import QmpClient
from coordinator.qmp.door import SOCKET

SHORTEST_SECONDS = 0.1
#: control sequences, ECMA-48 and DEC: to the upper left, erase to the end of the line, of the screen, the
#: cursor away and back
HOME, END_OF_LINE, END_OF_SCREEN, HIDE, SHOW = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[?25l", "\x1b[?25h"
HEADER = (
    f"{'ROLE':<16} {'PID':>8} S {'UPTIME':>9} {'RESTARTS':>8} {'%CPU':>6} {'CPU TIME':>10} {'PRIVATE':>9}"
    f" {'SHARED':>9}"
)


def run(arguments: list[str]) -> int:
    """The subcommand; returns its exit status."""
    parser = argparse.ArgumentParser(prog="atoll top", description="Show the processes of a running machine.")
    parser.add_argument("name", metavar="NAME", nargs="?", help="as -name calls it, or NAME-PID")
    parser.add_argument("-b", "--batch", action="store_true", help="print one table after another")
    parser.add_argument("-n", "--number", type=int, metavar="N", help="end after so many tables")
    parser.add_argument(
        "-d", "--delay", type=float, default=2.0, metavar="SECONDS", help="between two tables (default 2)"
    )
    options = parser.parse_args(arguments)
    if options.number is not None and options.number < 1:
        raise UsageError(f"-n {options.number}: at least one table")
    if not SHORTEST_SECONDS <= options.delay <= 86400:
        raise UsageError(f"-d {options.delay}: from {SHORTEST_SECONDS} s to a day")
    machine = QmpClient(runtime.find(options.name) / SOCKET)
    try:
        _show(machine, options.batch or not sys.stdout.isatty(), options.number, options.delay)
    except KeyboardInterrupt:
        pass
    finally:
        machine.close()
    return 0


def _show(machine: QmpClient, batch: bool, number: int | None, delay: float) -> None:
    before, shown = None, 0
    name = machine.command("query-name").get("name", "")
    try:
        if not batch:
            print(HIDE + HOME + END_OF_SCREEN, end="")
        while True:
            try:
                now = _sample(machine)
            except IslandError:
                if not shown:
                    raise
                print(f"{name}: the machine has ended")
                return
            lines = table(name, now, before)
            if batch:
                print("\n".join(lines), end="\n\n" if number != 1 else "\n", flush=True)
            else:
                width, height = shutil.get_terminal_size()
                text = "".join(line[:width] + END_OF_LINE + "\n" for line in lines[: height - 1])
                print(HOME + text + END_OF_SCREEN, end="", flush=True)
            before, shown = now, shown + 1
            if shown == number:
                return
            time.sleep(delay)
    finally:
        if not batch:
            print(SHOW, end="", flush=True)


def _sample(machine: QmpClient) -> dict[str, Any]:
    status = machine.command("query-status")["status"]
    return {"time": time.monotonic(), "status": status, "rows": machine.command("query-islands")}


def table(name: str, now: dict[str, Any], before: dict[str, Any] | None) -> list[str]:
    """The lines. %CPU is since the table ``before``, in the first since the process began."""
    old = {(row["role"], row["pid"]): row for row in before["rows"]} if before else {}
    lines = [f"{name}: {now['status']}, {time.strftime('%H:%M:%S')}", "", HEADER]
    for row in now["rows"]:
        start = f"{row['role']:<16.16} {row['pid']:>8}"
        if not row["alive"]:
            lines.append(f"{start} - {'dead':>9} {row['restarts']:>8}")
            continue
        last = old.get((row["role"], row["pid"]), {})
        if last.get("alive") and before is not None:
            used, passed = row["cpu-ms"] - last["cpu-ms"], (now["time"] - before["time"]) * 1000
        else:
            used, passed = row["cpu-ms"], row["uptime-ms"]
        memory = row["memory"]
        lines.append(
            f"{start} {row['state']} {_clock(row['uptime-ms']):>9} {row['restarts']:>8}"
            f" {100 * used / max(passed, 1):>6.1f} {row['cpu-ms'] / 1000:>8.2f} s"
            f" {memory.get('private', 0) / (1 << 20):>7.1f} M {memory.get('shared', 0) / (1 << 20):>7.1f} M"
        )
    return lines


def _clock(ms: int) -> str:
    minutes, seconds = divmod(ms // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
