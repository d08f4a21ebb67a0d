"""Results that nobody measured, for tests of what is made from them."""

from __future__ import annotations

from typing import Any

from coordinator.contract.drives import DrivePhase
from coordinator.lab.plan import Experiment, Plan, Policy
from coordinator.lab.results import Migration, Results, Shares

CARRY = Experiment(name="carry", count=3)
DROP = Experiment(name="drop at packet-complete", policy=Policy.DROP, aim=DrivePhase.PACKET_COMPLETE, count=2)
PLAN = Plan(experiments=(CARRY, DROP))
LIBATA = "ata2.00: exception Emask 0x0 SAct 0x0 SErr 0x0 action 0x6 frozen"


def migration(experiment: str = "carry", index: int = 0, **fields: Any) -> Migration:
    """One that went well, but for ``fields``."""
    known: dict[str, Any] = {
        "phase": "idle",
        "status": "completed",
        "outcome": "moved",
        "total": 60.0,
        "downtime_host": 40.0,
        "downtime_guest": 45.0,
        "stall": 3.0,
        "bytes": 60_000_000,
        "right": 2,
        "timeline": (("set up", 5.0), ("stopped", 10.0), ("runs", 50.0), ("read", 53.0)),
    }
    return Migration(experiment=experiment, index=index, **{**known, **fields})


def results() -> Results:
    """Two experiments: nothing is noticed under carry, drop stalls once and is lost once."""
    made = Results(PLAN)
    made.add(
        Shares(experiment="carry", seconds=3.0, shares={"idle": 0.9, "medium": 0.1}, entries={"idle": 80.0})
    )
    for index, (phase, stall) in enumerate((("idle", 1.0), ("packet-complete", 2.0), ("idle", 6.0))):
        made.add(migration(index=index, phase=phase, stall=stall))
    at = {"phase": "packet-complete", "aimed": True, "stream": "v0"}
    made.add(migration(DROP.name, 0, stall=34_000.0, kernel=(LIBATA, "clocksource: Switched"), **at))
    made.add(migration(DROP.name, 1, stall=None, outcome="lost", error="no read completed", **at))
    return made
