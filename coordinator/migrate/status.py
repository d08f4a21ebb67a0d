"""How far a migration is, by the names of QEMU's query-migrate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from coordinator.contract.segment import PAGE
from coordinator.migrate.ram import Counts

MS = 1000.0
#: states from which nothing follows
FINAL = ("none", "completed", "failed", "cancelled")


class Status:
    """Of one migration, from its beginning. ``state`` is QEMU's MigrationStatus. Times are seconds of the
    host."""

    def __init__(self, event: Callable[[str, dict[str, Any]], None]) -> None:
        self._event = event
        self.state = "none"
        self._phases: list[tuple[str, float]] = []
        #: names this migration on both sides, and the record of its commit point
        self.transfer = ""
        self.error: str | None = None
        self.counts: Callable[[], Counts] = Counts
        #: pages to send in all
        self.pages = 0
        self._started = time.monotonic()
        self._stopped = self._set_up = self._resumed = self._ended = 0.0
        #: more about the last migration, for query-migrate: what the stream says of each drive
        self.drives: list[dict[str, Any]] = []
        #: and, where the guest has come here: UNIX time and guest time of its stop and of its going on, ns
        self.times: dict[str, int] = {}
        #: and, where it was aimed at a phase, whether that came
        self.aimed: bool | None = None
        #: and, where drives were asked to drain: see messages.DrainDrives of the contract
        self.drains: list[dict[str, Any]] = []

    @property
    def phase(self) -> str:
        """The phase of ours that is under way."""
        return self._phases[-1][0] if self._phases else ""

    @phase.setter
    def phase(self, name: str) -> None:
        self._phases.append((name, time.monotonic()))

    # ---- what happens ----------------------------------------------------------------------------
    def move(self, state: str) -> None:
        """Another state, which listeners are told of."""
        if state != self.state:
            self.state = state
            if state in FINAL:
                self._ended = time.monotonic()
            self._event("MIGRATION", {"status": state})

    def fail(self, reason: str) -> None:
        self.error = reason
        self.move("failed")

    def set_up(self) -> None:
        self._set_up = time.monotonic()

    def stopped(self) -> None:
        """The guest stands still."""
        self._stopped = time.monotonic()

    def resumed(self) -> None:
        """It runs again, here or there."""
        self._resumed = time.monotonic()

    def passed(self) -> None:
        """A round of guest memory begins; stop-copy has one."""
        self._event("MIGRATION_PASS", {"pass": 1})

    # ---- what is told ----------------------------------------------------------------------------
    def describe(self) -> dict[str, Any]:
        """The value of query-migrate."""
        if self.state == "none":
            return {}
        result: dict[str, Any] = {"status": self.state}
        if self.error is not None:
            result["error-desc"] = self.error
        now = self._ended or time.monotonic()
        result["total-time"] = round((now - self._started) * MS)
        if self._set_up:
            result["setup-time"] = round((self._set_up - self._started) * MS)
        if self._stopped:
            downtime = ((self._resumed or now) - self._stopped) * MS
            result["downtime" if self._resumed else "expected-downtime"] = round(downtime)
        result["x-phase"] = self.phase
        result["x-phases"] = self._spent(now)
        if self.transfer:
            result["x-transfer"] = self.transfer
        result["x-drives"] = self.drives
        if self.times:
            result["x-times"] = self.times
        if self.aimed is not None:
            result["x-aimed"] = self.aimed
        if self.drains:
            result["x-drains"] = self.drains
        if self.pages or self.counts().bytes:
            result["ram"] = self._ram(now)
        return result

    def _spent(self, now: float) -> dict[str, float]:
        """How long each phase has taken, milliseconds, in their order."""
        spent: dict[str, float] = {}
        ends = [begun for _, begun in self._phases[1:]] + [now]
        for (name, begun), end in zip(self._phases, ends, strict=False):
            spent[name] = round(spent.get(name, 0.0) + (end - begun) * MS, 1)
        return spent

    def _ram(self, now: float) -> dict[str, Any]:
        counts = self.counts()
        seconds = max(now - (self._stopped or self._started), 1e-6)
        done = counts.normal + counts.zero
        return {
            "transferred": counts.bytes,
            "remaining": max(0, self.pages - done) * PAGE,
            "total": self.pages * PAGE,
            "duplicate": counts.zero,
            "skipped": 0,
            "normal": counts.normal,
            "normal-bytes": counts.normal * PAGE,
            "dirty-pages-rate": 0,
            "mbps": counts.bytes * 8 / 1e6 / seconds,
            "dirty-sync-count": 1,
            "postcopy-requests": 0,
            "page-size": PAGE,
            "multifd-bytes": counts.bytes,
            "pages-per-second": round(done / seconds),
        }
