"""What came out of migrations: their records, and the file that holds them (journal.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from coordinator.contract.errors import ConfigError
from coordinator.lab.journal import Journal
from coordinator.lab.plan import Experiment, Plan


class Migration(
    msgspec.Struct, frozen=True, kw_only=True, tag="migration", rename="kebab", omit_defaults=True
):
    """One migration. Times are milliseconds unless named otherwise; None where there is nothing to say.

    ``phase``: of the CD-ROM drive as it was stopped; ``aimed``: whether the drive was caught in the phase
    that was aimed at (and, but for a drain, still stood there). ``status``: QEMU's word of the source.
    ``outcome`` is "moved", "stayed" (the source went on), "recovered" (the target went on by migrate-recover)
    or "lost". ``downtime_host``: from the stop to the target's run, ``downtime_guest``: the gap in the
    guest's own clock. ``stall``: guest time from going on to the next CD read that completed. ``bytes`` of
    guest memory sent. ``passes``: comparisons of the whole CD since the migration before: right, wrong.
    ``timeline``: name and moment, in ms since the request, of what was seen.
    """

    experiment: str
    index: int
    phase: str
    status: str
    outcome: str
    aimed: bool | None = None
    stream: str = "full"
    drained: bool | None = None
    error: str = ""
    total: float = 0.0
    setup: float = 0.0
    downtime_host: float | None = None
    downtime_guest: float | None = None
    stall: float | None = None
    bytes: int = 0
    pages: int = 0
    zero_pages: int = 0
    reads: int = 0
    right: int = 0
    wrong: int = 0
    user_errors: tuple[str, ...] = ()
    kernel: tuple[str, ...] = ()
    timeline: tuple[tuple[str, float], ...] = ()


class Shares(msgspec.Struct, frozen=True, kw_only=True, tag="shares", rename="kebab"):
    """The share of guest time that the CD-ROM drive spends in each phase, and entries a second, with no
    migration going on: measured over ``seconds`` of guest time before the first one."""

    experiment: str
    seconds: float
    shares: dict[str, float]
    entries: dict[str, float]


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """First line of a file."""

    plan: Plan
    version: int = 1


Record = Shares | Migration


class Results(Journal[Record]):
    """All records of a run of migrations."""

    begin = Begin
    decoder = msgspec.json.Decoder(Begin | Shares | Migration)
    plan: Plan

    def __init__(self, plan: Plan, path: Path | None = None, resume: bool = False) -> None:
        self.migrations: list[Migration] = []
        self.shares: dict[str, Shares] = {}
        super().__init__(plan, path, resume)

    @property
    def done(self) -> Counter[str]:
        return Counter(migration.experiment for migration in self.migrations)

    def keep(self, record: Record) -> None:
        if isinstance(record, Migration):
            self.migrations.append(record)
        else:
            self.shares[record.experiment] = record

    def of(self, experiment: str) -> list[Migration]:
        return [migration for migration in self.migrations if migration.experiment == experiment]


def read(path: Path) -> tuple[list[Any], int]:
    """See Journal.read."""
    return Results.read(path)


def gathered(paths: Iterable[Path]) -> Results:
    """The shards of a run as one; ConfigError where two have the same experiment under different
    settings, or with the same seed."""
    experiments: dict[str, Experiment] = {}
    shards: dict[tuple[str, int], Path] = {}
    hosts, records = "loopback", []
    for path in paths:
        try:
            found, _ = read(path)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        for record in found:
            if not isinstance(record, Begin):
                records.append(record)
                continue
            hosts = record.plan.hosts
            for one in record.plan.experiments:
                known = experiments.setdefault(one.name, one)
                if msgspec.structs.replace(known, seed=one.seed, count=one.count) != one:
                    raise ConfigError(
                        f"{path}: experiment {one.name} has other settings than in another file"
                    )
                other = shards.setdefault((one.name, one.seed), path)
                if other is not path:
                    raise ConfigError(f"{path}: experiment {one.name}, seed {one.seed} is in {other}, too")
    made = Results(msgspec.convert({"experiments": list(experiments.values()), "hosts": hosts}, Plan))
    for record in records:
        made.add(record)
    return made
