"""Background jobs, as QMP tells of them: query-jobs, job-dismiss, JOB_STATUS_CHANGE.

Source: QEMU's QAPI schema, job.json (JobStatus, its names and order, and error texts).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from coordinator.contract.errors import AtollError, ConfigError

#: a job's id: as QEMU's id_wellformed has it
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
#: what follows ``running`` when all went well, and when not
_AFTER_SUCCESS, _AFTER_FAILURE = ("waiting", "pending", "concluded"), ("aborting", "concluded")


@dataclass
class Job:
    """``status`` is QEMU's JobStatus; ``error`` one line when it failed."""

    id: str
    type: str
    status: str = "undefined"
    error: str | None = None

    def describe(self) -> dict[str, Any]:
        """JobInfo."""
        row: dict[str, Any] = {
            "id": self.id,
            "type": self.type,
            "status": self.status,
            "current-progress": int(self.status == "concluded"),
            "total-progress": 1,
        }
        return row if self.error is None else row | {"error": self.error}


class Jobs:
    """All jobs of a machine, oldest first; a concluded one stays until it is dismissed."""

    def __init__(
        self, event: Callable[[str, dict[str, Any]], None], spawn: Callable[[Awaitable[None]], None]
    ) -> None:
        self._event, self._spawn = event, spawn
        self._jobs: dict[str, Job] = {}

    def check(self, ident: str) -> None:
        """ConfigError when this cannot be the id of a new job."""
        if not _ID.fullmatch(ident):
            raise ConfigError(f"Invalid job ID '{ident}'")
        if ident in self._jobs:
            raise ConfigError(f"Job ID '{ident}' already in use")

    def begin(self, ident: str, kind: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do something in the background; its failure is the job's. ConfigError as for ``check``."""
        self.check(ident)
        job = self._jobs[ident] = Job(ident, kind)
        self._move(job, "created")
        self._move(job, "running")
        self._spawn(self._follow(job, work))

    async def _follow(self, job: Job, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except (AtollError, OSError) as error:
            job.error = (str(error).splitlines() or [type(error).__name__])[0]
        for status in _AFTER_SUCCESS if job.error is None else _AFTER_FAILURE:
            self._move(job, status)

    def _move(self, job: Job, status: str) -> None:
        job.status = status
        self._event("JOB_STATUS_CHANGE", {"status": status, "id": job.id})

    def query(self) -> list[dict[str, Any]]:
        return [job.describe() for job in self._jobs.values()]

    def dismiss(self, ident: str) -> None:
        """Forget a concluded job; ConfigError when it is not, or there is none."""
        job = self._jobs.get(ident)
        if job is None:
            raise ConfigError("Job not found")
        if job.status != "concluded":
            raise ConfigError(f"Job '{ident}' in state '{job.status}' cannot accept command verb 'dismiss'")
        del self._jobs[ident]
        self._move(job, "null")
