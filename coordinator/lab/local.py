"""Carries out a plan here, one migration after another."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coordinator.lab.hosts import hosts
from coordinator.lab.pingpong import PingPong
from coordinator.lab.plan import Experiment, Plan


class Local:
    """An Executor (plan.py). What it leaves on disk is in a folder of its own, gone at the end."""

    async def run(self, plan: Plan, done: Mapping[str, int], record: Callable[[Any], None]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="atoll-lab-"))
        try:
            with hosts(plan, folder) as made:
                for experiment in plan.experiments:
                    first = done.get(experiment.name, 0)
                    if first < experiment.count:
                        await PingPong(experiment, made, folder, folder / _booted(experiment)).run(
                            first, record
                        )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _booted(experiment: Experiment) -> str:
    """Name of the file that keeps a booted guest: one for all experiments that have the same guest."""
    same = (
        experiment.ram,
        experiment.vcpus,
        experiment.cd,
        experiment.fill,
        experiment.dirty,
        experiment.dirty_rate,
        experiment.command_timeout,
    )
    return "booted-" + "-".join(map(str, same))
