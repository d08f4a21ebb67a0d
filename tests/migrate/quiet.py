"""Coordinators in one process, without islands: the migration's own code between real Vms, some hundredths of
a second a migration. Whatever happens, ``World`` notes whether two of them have run at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.contract import messages as island
from coordinator.contract.config import Machine
from coordinator.contract.errors import ConfigError, IslandError
from coordinator.contract.segment import PAGE, Segment
from coordinator.machine import Vm
from coordinator.migrate.manager import Manager
from coordinator.migrate.status import FINAL
from coordinator.policy import Options

RAM = 1 << 20
#: tells a hang
PATIENCE = 20.0


class World:
    """All machines of a test, and whether two have ever run at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: list[Quiet] = []
        self.clashes: list[str] = []

    @property
    def running(self) -> list[str]:
        return [vm.machine.name for vm in self.machines if vm.runs]

    def changed(self) -> None:
        if len(self.running) > 1:
            self.clashes.append(" and ".join(self.running))

    async def source(self, **options: Any) -> Quiet:
        vm = Quiet(self, Options(**options))
        await vm.cont()
        return vm

    def target(self, fault: str = "", stopped_time: str = "stands", **options: Any) -> Quiet:
        vm = Quiet(self, Options(incoming="defer", **options))
        vm.state = "inmigrate"
        vm.migration.set({"x-fault": fault, "stopped-time": stopped_time})
        vm.migration.incoming(vm.uri)
        return vm

    async def close(self) -> None:
        for vm in self.machines:
            await vm.shut()


class Quiet(Vm):
    """A Vm whose islands answer at once; a guest is a number in its memory."""

    def __init__(self, world: World, options: Options) -> None:
        self.world = world
        self.runs = False
        #: what islands were told, without serials
        self.told: list[tuple[str, type[island.Command]]] = []
        #: called with (role, command) before an island answers
        self.before: Callable[[str, island.Command], None] = lambda role, command: None
        machine = Machine(name=f"m{len(world.machines)}", vcpus=2, ram=RAM, vga=False)
        super().__init__(machine, options, lambda segment: None, world.folder)
        self.crew.segment = Segment.create(vcpus=2, ram=RAM)
        self.migration = Manager(self)
        self.uri = f"unix:{world.folder / machine.name}"
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.on_event.append(lambda name, data: self.events.append((name, data)))
        world.machines.append(self)

    async def command(self, role: str, command: island.Command) -> Any:
        await asyncio.sleep(0)
        if self.ending.done():
            raise IslandError("the machine has ended")
        self.told.append((role, type(command)))
        self.before(role, command)
        match command:
            case island.Run() if role == "vcpu0":
                self.runs = True
                self.world.changed()
            case island.Stop() if role == "vcpu0":
                self.runs = False
            case island.DescribeCpu():
                return {"1.ecx": 1}
            case island.DrainDrives():
                return {"drained": True, "cancelled": False, "waited_ns": 0, "drives": []}
            case island.SaveState():
                return {"state": b""}
            case island.QueryDrives() | island.QueryLeases():
                return []
        return None

    # ---- what tests ask --------------------------------------------------------------------------
    def write(self, number: int) -> None:
        assert self.segment is not None
        self.segment.ram[5 * PAGE] = number

    def read(self) -> int:
        assert self.segment is not None
        return int(self.segment.ram[5 * PAGE])

    async def migrates(self, target: Quiet, fault: str = "") -> str:
        """Status at the end."""
        self.migration.set({"x-fault": fault})
        self.migration.migrate(target.uri)
        return await self.done()

    async def done(self) -> str:
        async with asyncio.timeout(PATIENCE):
            while self.migration.status is None or self.migration.status.state not in FINAL:
                await asyncio.sleep(0.002)
        return self.status

    async def ended(self) -> str:
        """The error that the machine has ended with."""
        async with asyncio.timeout(PATIENCE):
            return (await asyncio.shield(self.ending)).error or ""

    @property
    def status(self) -> str:
        return self.migration.status.state if self.migration.status is not None else ""

    @property
    def error(self) -> str:
        return (self.migration.status.error if self.migration.status is not None else "") or ""

    async def shut(self) -> None:
        """As session.py does at the end of a run; once."""
        if self.crew.leaving:
            return
        if not self.ending.done():
            self.quit()
        self.runs = False
        await self.migration.close()
        await self.close()


class Canceller:
    """In the place of a Fault: cancels at a point, as QMP would."""

    def __init__(self, manager: Manager, point: str) -> None:
        self.manager, self.point = manager, point
        self.refused: str | None = None
        self.called = False

    async def at(self, point: str, cut: Callable[[], None]) -> None:
        if point == self.point:
            self.called = True
            asyncio.get_running_loop().call_soon(self._cancel)
            await asyncio.sleep(0.02)

    def _cancel(self) -> None:
        try:
            self.manager.cancel()
            self.manager.cancel()  # once more, while the way back is being gone
        except ConfigError as error:
            self.refused = str(error)

    def copies(self, point: str) -> int:
        return 1
