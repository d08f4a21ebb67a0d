"""query-migrate by the names of QEMU's schema (MigrationInfo, MigrationStats)."""

from __future__ import annotations

from typing import Any

from coordinator.migrate.ram import Counts
from coordinator.migrate.status import Status


def test_from_nothing_to_the_end() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    status = Status(lambda name, data: events.append((name, data)))
    assert status.describe() == {}
    status.move("setup")
    assert status.describe()["status"] == "setup"  # before any phase
    assert "ram" not in status.describe()
    status.set_up()
    status.move("active")
    status.stopped()
    status.pages, status.counts = 10, lambda: Counts(normal=3, zero=2, bytes=12500)
    status.passed()
    told = status.describe()
    assert {"expected-downtime", "setup-time", "total-time"} <= told.keys() and "downtime" not in told
    ram = told["ram"]
    assert (ram["total"], ram["remaining"], ram["transferred"]) == (40960, 5 * 4096, 12500)
    assert (ram["normal"], ram["duplicate"], ram["normal-bytes"], ram["page-size"]) == (3, 2, 12288, 4096)
    assert ram["mbps"] >= 0
    status.resumed()
    status.move("completed")
    status.move("completed")
    assert "downtime" in status.describe()
    assert events == [
        ("MIGRATION", {"status": "setup"}),
        ("MIGRATION", {"status": "active"}),
        ("MIGRATION_PASS", {"pass": 1}),
        ("MIGRATION", {"status": "completed"}),
    ]


def test_a_failure_has_its_reason() -> None:
    status = Status(lambda name, data: None)
    status.fail("why")
    assert (status.describe()["status"], status.describe()["error-desc"]) == ("failed", "why")
