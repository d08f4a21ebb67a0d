"""``atoll migrate NAME URI``: move a running machine, with a progress bar; and what can be done about a
migration that is under way (``--cancel``) or that has lost its other side (``--resume``, ``--recover``).

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
#: QMP's word for a guest that has been released to a target which does not answer
PAUSED = "postcopy-paused"
UNANSWERED = (
    "the guest has been released, and the target does not answer; it is asked on. "
    "Where it listens elsewhere: atoll migrate --resume {name} URI"
)


def run(arguments: list[str]) -> int:
    """The subcommand; returns its exit status."""
    options = _parser().parse_intermixed_args(arguments)
    if options.cancel != (options.uri is None):
        raise ConfigError("--cancel takes a NAME alone" if options.cancel else "NAME and URI are wanted")
    place = uri.parse(options.uri) if options.uri else None
    values = parameters(options.parameter)
    machine = QmpClient(runtime.find(options.name) / SOCKET)
    try:
        if place is None:
            return _cancel(machine, options.name)
        if options.recover:
            return _recover(machine, options.name, place)
        if values:
            machine.command("migrate-set-parameters", **values)
        machine.command("migrate", uri=str(place), **({"resume": True} if options.resume else {}))
        status = _follow(machine, options.name, not options.quiet and sys.stderr.isatty())
    finally:
        machine.close()
    if status["status"] != "completed":
        raise IslandError(
            f"{options.name}: {status['status']}: {status.get('error-desc', 'no reason given')}"
        )
    if not options.quiet:
        print(_summary(status, place))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atoll migrate", description="Move a running machine to another coordinator, or into a file."
    )
    parser.add_argument("name", metavar="NAME", help="the machine, as -name calls it, or NAME-PID")
    parser.add_argument("uri", metavar="URI", nargs="?", help=uri.FORMS)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--cancel", action="store_true", help="the guest of NAME is to stay, while it can")
    what.add_argument(
        "--resume", action="store_true",
        help="NAME has released its guest to a target that does not answer, and that is at URI now",
    )  # fmt: skip
    what.add_argument(
        "--recover", action="store_true",
        help="NAME has a guest and waits for its source's word: go on by file:RECORD of the source, "
        "or listen at URI, too",
    )  # fmt: skip
    parser.add_argument(
        "-p", "--parameter", action="append", default=[], metavar="NAME=VALUE",
        help="as migrate-set-parameters has it, e.g. multifd-channels=2",
    )  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing while it goes well")
    return parser


def _cancel(machine: QmpClient, name: str) -> int:
    """Until it is known how that went."""
    before = machine.command("query-migrate").get("status", "none")
    if before in FINAL:
        raise ConfigError(f"{name}: no migration is under way")
    if machine.command("query-status")["status"] == "inmigrate":
        raise ConfigError(f"{name} waits for its guest; the migration is cancelled at the source")
    machine.command("migrate_cancel")
    status = _follow(machine, name, False)
    if status["status"] != "cancelled":
        raise IslandError(f"{name}: the migration could not be cancelled any more: {status['status']}")
    return 0


def _recover(machine: QmpClient, name: str, place: uri.Uri) -> int:
    """At the target: by the record it goes on at once; at another address it waits for its source."""
    machine.command("migrate-recover", uri=str(place))
    if place.kind != "file":
        print(f"{name} listens at {place}; say at the source: atoll migrate --resume NAME {place}")
        return 0
    status = _follow(machine, name, False)
    if status["status"] != "completed":
        raise IslandError(f"{name}: {status['status']}: {status.get('error-desc', 'no reason given')}")
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


def _follow(machine: QmpClient, name: str, bar: bool) -> dict[str, Any]:
    """Poll to the end; Ctrl-C cancels where that can still be."""
    told = False
    while True:
        try:
            status: dict[str, Any] = machine.command("query-migrate")
            if bar:
                print(f"\r{_bar(status)}", end="", file=sys.stderr, flush=True)
            if status["status"] in FINAL:
                break
            if status["status"] == PAUSED and not told:
                told = True
                print(f"\n{name}: {UNANSWERED.format(name=name)}", file=sys.stderr)
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            try:
                machine.command("migrate_cancel")
            except IslandError as error:  # the guest has gone, or is about to: its end is waited for
                print(f"\n{name}: {error}", file=sys.stderr)
    if bar:
        print("\r" + " " * 79 + "\r", end="", file=sys.stderr, flush=True)
    return status


def _bar(status: dict[str, Any]) -> str:
    memory = status.get("ram", {})
    total, left = memory.get("total", 0), memory.get("remaining", 0)
    done = round(WIDTH * (total - left) / total) if total else 0
    text = f"[{'#' * done:<{WIDTH}}] {(total - left) / MIB:.0f} of {total / MIB:.0f} MiB"
    return f"{text}, {status['status']} {status.get('x-phase', '')}"[:78].ljust(78)


def _summary(status: dict[str, Any], place: uri.Uri) -> str:
    sent = status.get("ram", {}).get("transferred", 0)
    text = f"completed in {status['total-time']} ms, {sent / MIB:.1f} MiB sent"
    if place.kind == "file":
        return f"{text}, the guest is in {place.path}"
    return f"{text}, guest stopped for {status['downtime']} ms" if "downtime" in status else text
