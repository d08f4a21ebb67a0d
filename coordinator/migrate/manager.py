"""A machine's migrations: what QMP asks for, and what is under way. One at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from coordinator.contract.errors import AtollError, ConfigError
from coordinator.crew import Ending
from coordinator.machine import Vm
from coordinator.migrate import disks, file, uri
from coordinator.migrate.parameters import Parameters
from coordinator.migrate.source import Source, reason
from coordinator.migrate.status import FINAL, Status
from coordinator.migrate.target import Target

DEFER = "defer"


class Manager:
    """``vm.migration`` for QMP, the monitor and the command line."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self.parameters = Parameters()
        self.status: Status | None = None
        self._source: Source | None = None
        self._target: Target | None = None
        self._task: asyncio.Task[None] | None = None

    # ---- asked for -------------------------------------------------------------------------------
    async def resume(self, where: str) -> None:
        """The target that a released guest goes to is somewhere else now (migrate with resume); ConfigError
        when there is no such migration, MigrationError when that cannot be an address."""
        place = uri.parse(where)
        if self._source is None or not self._source.committed or self._idle:
            raise ConfigError("Cannot resume if there is no paused migration")
        if place.kind == "file":
            raise ConfigError("a paused migration goes on over tcp: or unix:")
        await self._source.redirect(place)

    def migrate(self, where: str) -> None:
        """Begin to move the machine away; ConfigError when that cannot even begin."""
        place = uri.parse(where)
        if self._vm.state == "inmigrate":
            raise ConfigError("Guest is waiting for an incoming migration")
        self._begin()
        if self._vm.state == "postmigrate":
            raise ConfigError("Guest has been migrated away already")
        status = self.status = Status(self._vm.event)
        self._source = self._target = None
        if place.kind == "file":
            self._run(status, self._to_file(Path(place.path), status))
        else:
            self._source = Source(self._vm, place, self.parameters, status)
            status.transfer = self._source.transfer
            self._run(status, self._source.run())

    def incoming(self, where: str) -> None:
        """Wait for the machine (-incoming, migrate-incoming); ConfigError or MigrationError when that cannot
        be."""
        if where == DEFER:
            return
        place = uri.parse(where, "incoming")
        if self._vm.state != "inmigrate":
            raise ConfigError("'-incoming' was not specified on the command line")
        if self._task is not None:
            raise ConfigError("The incoming migration has already been started")
        status = self.status = Status(self._vm.event)
        if place.kind == "file":
            work: Awaitable[None] = self._from_file(Path(place.path), status)
        else:
            self._target = Target(self._vm, place, self.parameters, status)
            work = self._target.run()
        self._run(status, work, self._lost)

    def cancel(self) -> None:
        """Go back, if there is a way back; ConfigError when there is none any more. Nothing happens while no
        migration is under way, or one to here."""
        if self._task is None or self.status is None or self._idle or self._vm.state == "inmigrate":
            return
        if self._source is not None and self._source.committed:
            raise ConfigError("the guest has been released to the target; migrate-recover goes on there")
        if self.status.state != "cancelling":  # a second one would interrupt the way back
            self.status.move("cancelling")
            self._task.cancel()

    async def recover(self, where: str) -> None:
        """On a target that waits for its source's word: listen at another address, or take the word from the
        source's record (file:PATH)."""
        if self._target is None or not self._target.in_doubt or self._idle:
            raise ConfigError("migrate-recover: there is no migration that waits for its source")
        place = uri.parse(where, "migrate-recover")
        if place.kind == "file":
            await self._target.recover(Path(place.path))
        else:
            self._target.listen_at(place)

    def query(self) -> dict[str, Any]:
        return self.status.describe() if self.status is not None else {}

    def set(self, values: dict[str, Any]) -> None:
        """migrate-set-parameters."""
        self.parameters = self.parameters.changed(values)

    # ---- under way -------------------------------------------------------------------------------
    @property
    def _idle(self) -> bool:
        return self.status is None or self.status.state in FINAL

    def _begin(self) -> None:
        if self._task is not None and not self._task.done():
            raise ConfigError("There's a migration process in progress")

    def _run(
        self, status: Status, work: Awaitable[None], failed: Callable[[str], None] = lambda reason: None
    ) -> None:
        status.move("setup")
        self._task = asyncio.ensure_future(self._follow(status, work, failed))

    async def _follow(self, status: Status, work: Awaitable[None], failed: Callable[[str], None]) -> None:
        """A migration to its end, which is told by its status."""
        try:
            async with self._vm.media_lock:
                self._vm.media_held = True
            await work
            status.move("completed")
        except asyncio.CancelledError:
            status.move("cancelled")
        except Exception as error:
            status.fail(reason(error))
            failed(reason(error))
        finally:
            self._vm.media_held = False

    def _lost(self, why: str) -> None:
        """A machine that does not come is no machine."""
        self._vm.end(Ending("internal-error", 1, f"incoming migration: {why}"))

    async def _to_file(self, path: Path, status: Status) -> None:
        await disks.SourceDisks(self._vm, "").check(unleased=True)
        async with self._vm.frozen() as frozen:
            status.stopped()
            status.move("active")
            async with file.created(path) as target:
                counts = await file.write(self._vm, frozen, target, str(path))
            status.counts = lambda: counts
            frozen.after = "postmigrate"  # nothing is waited for since the file has its name

    async def _from_file(self, path: Path, status: Status) -> None:
        status.move("active")
        with file.opened(path) as source:
            state, stopped = await file.read(self._vm, source, str(path))
        await disks.take(self._vm)
        await self._vm.arrived(state.runstate, stopped.passed_ns(self.parameters.stopped_time))
        status.resumed()

    async def close(self) -> None:
        """The machine ends: whatever is under way ends with it, and a peer is told."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(AtollError, asyncio.CancelledError):
                await self._task
        if self._target is not None:
            self._target.close()
