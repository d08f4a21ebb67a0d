"""What is to be tried: experiments, hosts and plans as plain data, and who carries them out.

A plan is TOML for people (``[base]`` and ``[[experiment]]``; a list as a value stands for one experiment
each) and JSON between programs. Nothing here knows how a migration is made: that is the Executor's business,
so that another one can spread the same plan over many machines.
"""

from __future__ import annotations

import enum
import itertools
import tomllib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import msgspec

from coordinator.contract.drives import DrivePhase
from coordinator.contract.errors import AtollError, ConfigError
from coordinator.migrate.faults import Fault

Natural = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]


class Policy(enum.Enum):
    """What source and destination do about a packet command under way (docs/migration.md)."""

    CARRY = "carry"
    DRAIN = "drain"
    RESTART = "restart"
    ERROR = "error"
    DROP = "drop"


class Experiment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """``count`` migrations of one guest under one setting.

    ``aim``: migrate when the CD-ROM drive enters this phase, else at moments drawn from ``seed``. ``ram``,
    ``fill`` and ``dirty`` are MiB, ``dirty-rate`` MiB a second: memory that the guest fills once with random
    words, and that it writes again and again. ``cd``: size of the medium, MiB. ``streams``: connections for
    guest memory. ``fault``: POINT=WHAT of migrate/faults.py. ``stopped-time``: whether the guest's clock goes
    on while it is stopped, which it must for the guest to see its downtime. ``drain``: bound in ms under the
    policy of that name. ``delay`` (ms, one way), ``loss`` (share of connections that break) and ``rate``
    (MB a second) are of the network between the hosts. ``patience``: seconds without a completed read after
    which a guest counts as lost. ``command-timeout``: seconds after which the guest's kernel gives up a CD
    command, 0 for its own choice (30).
    """

    name: str
    guest: Literal["cdreader"] = "cdreader"
    policy: Policy = Policy.CARRY
    count: Positive = 20
    seed: int = 1
    aim: DrivePhase | None = None
    ram: Annotated[int, msgspec.Meta(ge=64, le=16384)] = 96
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    cd: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 4
    fill: Natural = 0
    dirty: Natural = 0
    dirty_rate: Natural = 0
    streams: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1
    compression: Literal["none", "zstd"] = "none"
    fault: str = ""
    stopped_time: Literal["passes", "stands"] = "passes"
    drain: Positive = 1000
    delay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    loss: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    rate: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    patience: Annotated[float, msgspec.Meta(gt=0)] = 90.0
    command_timeout: Natural = 0

    @property
    def shaped(self) -> bool:
        """The network between the hosts is made worse than it is."""
        return bool(self.delay or self.loss or self.rate)

    def check(self) -> None:
        """What no type says; ConfigError."""
        Fault.parse(self.fault)
        if self.dirty and not self.dirty_rate:
            raise ConfigError(f"experiment {self.name}: dirty memory needs a dirty-rate")
        if self.fill + self.dirty > self.ram - 64:
            raise ConfigError(
                f"experiment {self.name}: {self.ram} MiB of RAM are too few, the guest needs 64 itself"
            )


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``hosts``: where the two coordinators live, see hosts.py."""

    experiments: tuple[Experiment, ...]
    hosts: Literal["loopback", "namespaces"] = "loopback"

    @property
    def migrations(self) -> int:
        return sum(experiment.count for experiment in self.experiments)


class Executor(Protocol):
    """Carries out what is left of a plan. ``done`` is how many migrations of each experiment there are
    already; each record that comes about is handed to ``record`` at once (results.py)."""

    def run(
        self, plan: Plan, done: Mapping[str, int], record: Callable[[Any], None]
    ) -> Coroutine[Any, Any, None]: ...


def experiment(fields: Mapping[str, Any]) -> Experiment:
    """From words as in a plan file; ConfigError says what does not fit."""
    try:
        made = msgspec.convert(dict(fields), Experiment, strict=False)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        if key := place.removesuffix("`"):
            what = f"{key} = {fields.get(key)}: {what}"
        raise ConfigError(f"experiment {fields.get('name', '')}: {what}") from None
    made.check()
    return made


def variants(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One table for each combination of the values that are lists; its name says which."""
    lists = {key: value for key, value in table.items() if isinstance(value, list)}
    for values in itertools.product(*lists.values()):
        chosen = dict(zip(lists, values, strict=True))
        tail = "".join(f" {key}={value}" for key, value in chosen.items())
        yield {**table, **chosen, "name": f"{table.get('name', '')}{tail}".strip()}


def read(path: Path) -> Plan:
    """A plan file. ConfigError with its name."""
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    unknown = document.keys() - {"hosts", "base", "experiment"}
    if unknown:
        raise ConfigError(f"{path}: '{unknown.pop()}' is not one of hosts, base, experiment")
    base, tables = document.get("base", {}), document.get("experiment", [])
    if not isinstance(base, dict) or not isinstance(tables, list) or not tables:
        raise ConfigError(f"{path}: says no [[experiment]]")
    try:
        if not all(isinstance(table, dict) for table in tables):
            raise ConfigError("experiment is a table, [[experiment]]")
        made = [experiment(fields) for table in tables for fields in variants({**base, **table})]
        names = [one.name for one in made]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"two experiments are named '{twice}'")
        return msgspec.convert({"experiments": made, "hosts": document.get("hosts", "loopback")}, Plan)
    except (AtollError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {error}") from None
