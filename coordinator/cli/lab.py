"""``atoll lab``: migrations and crashes by the hundred, measured (docs/lab.md)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from coordinator.contract.drives import DrivePhase
from coordinator.contract.errors import UsageError
from coordinator.lab import compare, plan, report, table
from coordinator.lab.crash import report as crash_report
from coordinator.lab.crash import run as crash
from coordinator.lab.crash import table as crash_table
from coordinator.lab.crash.plan import trial
from coordinator.lab.crash.results import Crashes
from coordinator.lab.crash.statistics import failed_checks
from coordinator.lab.local import Local
from coordinator.lab.plan import Experiment, Plan, Policy
from coordinator.lab.progress import Progress
from coordinator.lab.results import Results, gathered
from coordinator.lab.run import run as carry_out
from coordinator.lab.statistics import summaries

#: what a shell reports of a program that Ctrl-C ended
STATUS_INTERRUPTED = 130
PHASES = [phase.value for phase in DrivePhase]
POLICIES = [policy.value for policy in Policy]

#: options of an experiment: name -> (argument, what it is); types and bounds are those of plan.Experiment
EXPERIMENT = {
    "guest": ("NAME", "what the guest does: cdreader"),
    "count": ("N", "migrations"),
    "seed": ("N", "what moments are drawn from"),
    "ram": ("MIB", "guest memory"),
    "vcpus": ("N", "virtual CPUs"),
    "cd": ("MIB", "size of the CD"),
    "fill": ("MIB", "memory that the guest fills once"),
    "dirty": ("MIB", "memory that the guest writes again and again"),
    "dirty-rate": ("MIB", "so much of it a second"),
    "streams": ("N", "connections for guest memory"),
    "compression": ("none|zstd", "of guest memory"),
    "fault": ("POINT=WHAT", "fault at a point of each migration (docs/migration.md)"),
    "stopped-time": ("passes|stands", "whether the guest's clock goes on while it is stopped"),
    "drain": ("MS", "bound of policy drain"),
    "delay": ("MS", "of the network, each way"),
    "loss": ("SHARE", "of connections that break"),
    "rate": ("MB", "a second and connection"),
    "patience": ("SECONDS", "without a read until a guest counts as lost"),
    "command-timeout": ("SECONDS", "until the guest's kernel gives up a CD command; 0: its own choice"),
}


#: options of ``crash``; types, bounds and defaults are those of lab/crash/plan.Trial
CRASH = {
    "kills": ("N", "how many (200)"),
    "spacing": ("MS", "from one to the next, half of it more or less (500); 0: as soon as it is there again"),
    "seed": ("N", "what islands and moments are drawn from"),
    "roles": ("R,R", "devhost, devhostN, blockd (devhost,blockd)"),
    "hang": ("SHARE", "of them that are stopped instead, for the coordinator to find out (0)"),
    "island-timeout": ("SECONDS", "after which it does (2)"),
    "ram": ("MIB", "guest memory"),
    "vcpus": ("N", "virtual CPUs (2)"),
    "cd": ("MIB", "size of the CD"),
    "disk": ("MIB", "size of the qcow2 disk"),
    "patience": ("SECONDS", "for an island to come back and the guest to read on (120)"),
}


class Parser(argparse.ArgumentParser):
    """Errors are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> Parser:
    about = "Migrations and crashes by the hundred, measured."
    parser = Parser(prog="atoll lab", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    output = Parser(add_help=False)
    output.add_argument("--json", type=Path, metavar="F", help="write figures and all migrations as JSON")
    output.add_argument("--html", type=Path, metavar="F", help="write a report with plots as one HTML file")
    output.add_argument("--png", type=Path, metavar="FOLDER", help="write the plots as PNG files")
    records = Parser(add_help=False)
    records.add_argument(
        "--results", type=Path, metavar="F", help="keep each migration there, one line of JSON"
    )
    records.add_argument("--resume", action="store_true", help="go on with what --results has")

    settings = Parser(add_help=False)
    for name, (argument, about) in EXPERIMENT.items():
        settings.add_argument(f"--{name}", metavar=argument, help=about, default=argparse.SUPPRESS)
    settings.add_argument(
        "--hosts", choices=("loopback", "namespaces"), default="loopback", help="where the two are"
    )

    def add(name: str, about: str, *parents: Parser) -> Any:
        return commands.add_parser(name, help=about, description=about, parents=parents, allow_abbrev=False)

    pingpong = add("pingpong", "one guest, moved to and fro", settings, records, output)
    pingpong.add_argument("--policy", choices=POLICIES, default=Policy.CARRY.value)
    pingpong.add_argument(
        "--aim", choices=PHASES, metavar="PHASE", help=f"when to migrate: {', '.join(PHASES)}"
    )
    side = add("compare", "policies side by side", settings, records, output)
    side.add_argument("--policies", default=",".join(POLICIES), metavar="P,P", help="default: all five")
    side.add_argument(
        "--aim",
        action="append",
        metavar="PHASE|none",
        help="may be said more than once; none: drawn from the seed",
    )
    side.add_argument(
        "--drop-count", type=int, default=compare.DROP_COUNT, metavar="N", help="at most so many of drop"
    )
    sweep = add("sweep", "the experiments of a plan file", records, output)
    sweep.add_argument("plan", type=Path, metavar="PLAN.toml")
    crash = add("crash", "islands killed while the guest reads and writes", records, output)
    for name, (argument, about) in CRASH.items():
        crash.add_argument(f"--{name}", metavar=argument, help=about, default=argparse.SUPPRESS)
    again = add("report", "reports of results there are already, shards of one run together", output)
    again.add_argument("files", type=Path, nargs="+", metavar="RESULTS")
    return parser


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    given = vars(options)
    return {name: given[key] for name in names if (key := name.replace("-", "_")) in given}


def _experiment(options: argparse.Namespace, **more: Any) -> Experiment:
    return plan.experiment({**_given(options, EXPERIMENT), **more})


def _words(text: str, known: list[str], option: str) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in known:
            raise UsageError(f"{option} {word}: choose from {', '.join(known)}")
    return list(dict.fromkeys(words))


def _plan(options: argparse.Namespace) -> Plan:
    match options.command:
        case "sweep":
            return plan.read(options.plan)
        case "compare":
            policies = [Policy(word) for word in _words(options.policies, POLICIES, "--policies")]
            aims = _words(",".join(options.aim or ["none"]), ["none", *PHASES], "--aim")
            places = [None if aim == "none" else DrivePhase(aim) for aim in aims]
            return compare.plan(
                _experiment(options, name="base"), policies, places, options.drop_count, options.hosts
            )
        case _:
            name = options.policy if options.aim is None else f"{options.policy} at {options.aim}"
            one = _experiment(options, name=name, policy=options.policy, aim=options.aim)
            return msgspec.convert({"experiments": [one], "hosts": options.hosts}, Plan)


def _crash(options: argparse.Namespace) -> tuple[bool, bool]:
    """Whether it came to its end, and nothing was wrong."""
    results = Crashes(trial(_given(options, CRASH)), options.results, options.resume)
    progress = Progress(sys.stderr, results.plan.kills, len(results.kills))
    try:
        whole = crash.run(results, progress)
    finally:
        results.close()
    print(crash_table.text(results))
    crash_report.write(results, options.json, options.html, options.png)
    return whole, not failed_checks(results) and not any(kill.errors for kill in results.kills)


def run(arguments: list[str]) -> int:
    """The subcommand; returns 0, 1 where kills did harm, or 130 where the run was ended early."""
    options = _parser().parse_args(arguments)
    whole = harmless = True
    if getattr(options, "resume", False) and options.results is None:
        raise UsageError("--resume needs --results, the file to go on with")
    if options.command == "crash":
        whole, harmless = _crash(options)
    elif options.command == "report":
        results = gathered(options.files)
        _show(options, results)
    else:
        made = _plan(options)
        results = Results(made, options.results, options.resume)
        progress = Progress(sys.stderr, made.migrations, results.done.total())
        try:
            whole = carry_out(results, Local(), progress)
        finally:
            results.close()
        _show(options, results)
    if not whole and getattr(options, "results", None) is not None:
        print(f"atoll lab: ended early; --results {options.results} --resume goes on", file=sys.stderr)
    return STATUS_INTERRUPTED if not whole else 0 if harmless else 1


def _show(options: argparse.Namespace, results: Results) -> None:
    print(table.text(summaries(results)))
    report.write(results, options.json, options.html, options.png)
