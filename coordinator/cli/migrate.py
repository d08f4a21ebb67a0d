"""``atoll migrate NAME URI``: move a running machine, with a progress bar.

Exit status: 0 the guest is there, 1 it is not (and goes on here, unless the message says otherwise).
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from coordinator import runtime
from coordinator.contract.errors import ConfigError, IslandError
from coordinator.migrate import uri
from coordinator.migrate.parameters import Parameters
from coordinator.migrate.status import FINAL
from coordinator.qmp.client import QmpClient
from coordinator.qmp.door import SOCKET

POLL_SECONDS = 0.05
WIDTH = 30
MIB = 1 << 20


def run(arguments: list[str]) -> int:
    """The subcommand; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="atoll migrate", description="Move a running machine to another coordinator, or into a file."
    )
    parser.add_argument("name", metavar="NAME", help="the machine, as -name calls it, or NAME-PID")
    parser.add_argument("uri", metavar="URI", help=uri.FORMS)
    parser.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
        help="as migrate-set-parameters has it, e.g. multifd-channels=2",
    )  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing while it goes well")
    options = parser.parse_args(arguments)
    place = str(uri.parse(options.uri))
    values = parameters(options.parameter)
    machine = QmpClient(runtime.find(options.name) / SOCKET)
    try:
        if values:
            machine.command("migrate-set-parameters", **values)
        machine.command("migrate", uri=place)
        status = _follow(machine, not options.quiet and sys.stderr.isatty())
    finally:
        machine.close()
    if status["status"] != "completed":
        raise IslandError(
            f"{options.name}: {status['status']}: {status.get('error-desc', 'no reason given')}"
        )
    if not options.quiet:
        print(_summary(status))
    return 0


def parameters(words: list[str]) -> dict[str, Any]:
    """NAME=VALUE words as migrate-set-parameters takes them; ConfigError names a wrong one."""
    known = Parameters().as_dict()
    values: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--parameter {word}: is not NAME=VALUE with one of {', '.join(known)}")
        numeric = isinstance(known[name], int) and value.isascii() and value.isdigit()
        values[name] = int(value) if numeric else value
    Parameters().changed(values)
    return values


def _follow(machine: QmpClient, bar: bool) -> dict[str, Any]:
    """Poll to the end; Ctrl-C cancels where that can still be."""
    while True:
        try:
            status: dict[str, Any] = machine.command("query-migrate")
            if bar:
                print(f"\r{_bar(status)}", end="", file=sys.stderr, flush=True)
            if status["status"] in FINAL:
                break
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            machine.command("migrate_cancel")
    if bar:
        print("\r" + " " * 79 + "\r", end="", file=sys.stderr, flush=True)
    return status


def _bar(status: dict[str, Any]) -> str:
    memory = status.get("ram", {})
    total, left = memory.get("total", 0), memory.get("remaining", 0)
    done = round(WIDTH * (total - left) / total) if total else 0
    text = f"[{'#' * done:<{WIDTH}}] {(total - left) / MIB:.0f} of {total / MIB:.0f} MiB"
    return f"{text}, {status['status']} {status.get('x-phase', '')}"[:78].ljust(78)


def _summary(status: dict[str, Any]) -> str:
    sent = status.get("ram", {}).get("transferred", 0)
    down = status.get("downtime", status.get("expected-downtime", 0))
    return f"completed in {status['total-time']} ms, guest stopped for {down} ms, {sent / MIB:.1f} MiB sent"
