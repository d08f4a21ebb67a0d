"""A plan from beginning to end: carried out, recorded, shown while it runs; Ctrl-C ends it in order."""

from __future__ import annotations

import asyncio
import signal

from coordinator.lab.plan import Executor
from coordinator.lab.progress import Progress
from coordinator.lab.results import Migration, Record, Results, Shares


def run(results: Results, executor: Executor, progress: Progress) -> bool:
    """Whether it came to its end; False when a signal ended it. What was measured is in ``results`` in any
    case."""

    def record(found: Record) -> None:
        results.add(found)
        if isinstance(found, Migration):
            progress.migrated(found)
        elif isinstance(found, Shares):
            progress.note(f"{found.experiment}: the guest reads")

    async def carry_out() -> bool:
        work = asyncio.create_task(executor.run(results.plan, results.done, record))
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if not work.cancelling():  # a second one does not disturb the end that the first one began
                work.cancel()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, stop)
        try:
            await work
        except asyncio.CancelledError:
            return False
        return True

    progress.note("starting the guest")
    try:
        return asyncio.run(carry_out())
    finally:
        progress.end()
