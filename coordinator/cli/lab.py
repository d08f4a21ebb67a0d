"""``atoll lab``: migrations by the hundred, measured (docs/lab.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from coordinator.contract.drives import DrivePhase
from coordinator.contract.errors import UsageError
from coordinator.lab import compare, plan, report, table
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


class Parser(argparse.ArgumentParser):
    """Errors are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> Parser:
    parser = Parser(prog="atoll lab", description="Migrations by the hundred, measured.", allow_abbrev=False)
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
    again = add("report", "reports of results there are already, shards of one run together", output)
    again.add_argument("files", type=Path, nargs="+", metavar="RESULTS")
    return parser


def _experiment(options: argparse.Namespace, **more: Any) -> Experiment:
    given = vars(options)
    fields = {name: given[key] for name in EXPERIMENT if (key := name.replace("-", "_")) in given}
    return plan.experiment({**fields, **more})


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


def run(arguments: list[str]) -> int:
    """The subcommand; returns 0, or 130 where the run was ended early."""
    options = _parser().parse_args(arguments)
    whole = True
    if options.command == "report":
        results = gathered(options.files)
    else:
        if options.resume and options.results is None:
            raise UsageError("--resume needs --results, the file to go on with")
        made = _plan(options)
        results = Results(made, options.results, options.resume)
        progress = Progress(sys.stderr, made.migrations, results.done.total())
        try:
            whole = carry_out(results, Local(), progress)
        finally:
            results.close()
    print(table.text(summaries(results)))
    report.write(results, options.json, options.html, options.png)
    if not whole and getattr(options, "results", None) is not None:
        print(f"atoll lab: ended early; --results {options.results} --resume goes on", file=sys.stderr)
    return 0 if whole else STATUS_INTERRUPTED
