"""The five policies side by side: the plan of ``atoll lab compare``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from coordinator.contract.drives import DrivePhase
from coordinator.lab.plan import Experiment, Plan, Policy

#: under ``drop`` each hit costs the guest half a minute; so many are enough to show it
DROP_COUNT = 50


def plan(
    base: Experiment,
    policies: Sequence[Policy],
    aims: Sequence[DrivePhase | None],
    drop_count: int = DROP_COUNT,
    hosts: str = "loopback",
) -> Plan:
    """One experiment for each policy and aim, but for those like ``base``."""
    made = []
    for aim in aims:
        for policy in policies:
            name = policy.value if aim is None else f"{policy.value} at {aim.value}"
            count = min(base.count, drop_count) if policy is Policy.DROP else base.count
            made.append(msgspec.structs.replace(base, name=name, policy=policy, aim=aim, count=count))
    return msgspec.convert({"experiments": made, "hosts": hosts}, Plan)
