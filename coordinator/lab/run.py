"""A plan from beginning to end: carried out, recorded, shown while it runs; Ctrl-C ends it in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from coordinator.lab.plan import Executor
from coordinator.lab.progress import Progress, milliseconds
from coordinator.lab.results import Migration, Record, Results, Shares
from coordinator.lab.statistics import verdict


def in_order(work: Coroutine[Any, Any, None], progress: Progress) -> bool:
    """Whether it came to its end; False when a signal ended it."""

    async def carry_out() -> bool:
        task = asyncio.create_task(work)
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if not task.cancelling():  # a second one does not disturb the end that the first one began
                task.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop)
        try:
            await task
        except asyncio.CancelledError:
            return False
        return True

    progress.note("starting the guest")
    try:
        return asyncio.run(carry_out())
    finally:
        progress.end()


def run(results: Results, executor: Executor, progress: Progress) -> bool:
    """As ``in_order``. What was measured is in ``results`` in any case."""

    def record(found: Record) -> None:
        results.add(found)
        if isinstance(found, Migration):
            progress.step(described(found))
        elif isinstance(found, Shares):
            progress.note(f"{found.experiment}: the guest reads")

    return in_order(executor.run(results.plan, results.done, record), progress)


def described(migration: Migration) -> str:
    """In a line."""
    return (
        f"{migration.experiment} {migration.index + 1}: {migration.phase}, "
        f"{verdict(migration) if migration.outcome == 'moved' else migration.outcome}, "
        f"down {milliseconds(migration.downtime_host)}, next read {milliseconds(migration.stall)}"
    )
