"""A guest that is held for a migration: what it asked for before, what others ask of it meanwhile, and a
cancel in the middle.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from coordinator.contract import messages as island
from coordinator.contract.errors import IslandError
from tests.migrate.conftest import Run
from tests.migrate.quiet import Quiet, World


def says(vm: Quiet, notice: Any, when: type[island.Command] = island.Stop) -> None:
    """The device host sends ``notice`` right before it answers a command, as a guest brings it about that
    stops the next moment."""
    sent: list[Any] = []

    def before(role: str, command: island.Command) -> None:
        if role == "devhost0" and isinstance(command, when) and not sent:
            sent.append(notice)
            vm.noticed(notice)

    vm.before = before


def test_a_reset_under_way_happens_here(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        says(source, island.GuestReset(reason="guest-reset"))
        assert await source.migrates(target) == "completed"
        resets = [name for name, _ in source.events if name == "RESET"]
        assert resets == ["RESET"]
        told = [kind for role, kind in source.told if role == "vcpu0"]
        assert told.index(island.Reset) < told.index(island.SaveState)
        assert told.count(island.Reset) == 1 and told[-1] is island.SaveState
        assert not any(kind is island.Reset for _, kind in target.told)
        assert target.runs and not source.runs

    quiet(test)


def test_a_reset_under_way_when_the_migration_fails(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        says(source, island.GuestReset(reason="guest-reset"))
        assert await source.migrates(target, "settle=fail") == "failed"
        assert [kind for role, kind in source.told if role == "vcpu0"].count(island.Reset) == 1
        assert source.runs and source.state == "running"

    quiet(test)


def test_a_shutdown_under_way_ends_the_machine_here(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        says(source, island.GuestShutdown(reason="guest-shutdown"))
        assert await source.migrates(target) == "failed"
        assert (await source.ending).reason == "guest-shutdown"
        assert "incoming migration" in await target.ended()
        assert world.running == []

    quiet(test)


def test_a_shutdown_under_way_travels_with_no_shutdown(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(no_shutdown=True), world.target(no_shutdown=True)
        says(source, island.GuestShutdown(reason="guest-shutdown"))
        assert await source.migrates(target) == "completed"
        await target.done()
        assert (source.state, target.state) == ("postmigrate", "shutdown")
        assert [name for name, _ in source.events].count("SHUTDOWN") == 1
        assert world.running == []

    quiet(test)


@pytest.mark.parametrize("at", [("vcpu0", island.Stop), ("vcpu1", island.Stop), ("devhost0", island.Stop)])
def test_a_cancel_while_the_guest_is_being_stopped(quiet: Run, at: tuple[str, type]) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()

        def before(role: str, command: island.Command) -> None:
            if (role, type(command)) == at:
                source.before = lambda role, command: None
                source.migration.cancel()

        source.before = before
        assert await source.migrates(target) == "cancelled"
        assert source.state == "running" and source.runs
        assert source.segment is not None and source.segment.time_runs()
        last = {role: kind for role, kind in source.told if kind in (island.Stop, island.Run)}
        assert set(last.values()) == {island.Run}

    quiet(test)


def test_nothing_else_moves_the_guest_meanwhile(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.migration.set({"x-fault": "verify=delay:60000"})
        source.migration.migrate(target.uri)
        async with asyncio.timeout(10):
            while source.migration.status.phase != "verify":
                await asyncio.sleep(0.002)
        for act in (source.cont, source.stop, source.reset):
            with pytest.raises(IslandError, match="not finalized"):
                await asyncio.wait_for(act(), 5)
        with pytest.raises(IslandError, match="not finalized"):
            async with source.paused():
                pass
        for act in (target.cont, target.reset):
            with pytest.raises(IslandError, match="waiting for its migration"):
                await asyncio.wait_for(act(), 5)
        await target.stop()  # is nothing, as for a machine that does not run
        source.migration.cancel()
        assert await source.done() == "cancelled"
        assert source.runs and not target.runs

    quiet(test)


@pytest.mark.parametrize("runstate", ["paused", "prelaunch"])
def test_a_guest_that_stands_goes_on_standing(quiet: Run, runstate: str) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        await source.stop()
        source.state = runstate
        assert await source.migrates(target) == "completed"
        await target.done()
        assert (source.state, target.state) == ("postmigrate", "paused")
        assert world.running == []
        await target.cont()
        assert world.running == [target.machine.name]

    quiet(test)


def test_start_paused_holds_at_the_target(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target(start_paused=True)
        assert await source.migrates(target) == "completed"
        await target.done()
        assert target.state == "paused" and world.running == []

    quiet(test)


@pytest.mark.parametrize("kind", ["stands", "passes"])
def test_stopped_time(quiet: Run, kind: str) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target(stopped_time=kind)
        assert await source.migrates(target, "send=delay:120") == "completed"
        await target.done()
        times = target.migration.status.times
        gap = times["guest-resumed"] - times["guest-stopped"]
        host = times["resumed-at"] - times["stopped-at"]
        assert host >= 120_000_000
        assert gap == 0 if kind == "stands" else (120_000_000 <= gap <= host)

    quiet(test)


def test_there_and_back_many_times(quiet: Run) -> None:
    async def test(world: World) -> None:
        machine = await world.source()
        for number in range(1, 13):
            machine.write(number)
            target = world.target()
            assert await machine.migrates(target) == "completed"
            await target.done()
            assert target.read() == number and target.epoch == number + 1
            machine = target

    quiet(test)


def test_a_machine_that_has_come_can_leave_and_cancel(quiet: Run) -> None:
    async def test(world: World) -> None:
        first, second, third = await world.source(), world.target(), world.target()
        assert await first.migrates(second) == "completed"
        await second.done()
        second.migration.set({"x-fault": "send=delay:60000"})
        second.migration.migrate(third.uri)
        async with asyncio.timeout(10):
            while second.migration.status.phase != "send":
                await asyncio.sleep(0.002)
        second.migration.cancel()
        assert await second.done() == "cancelled"
        assert world.running == [second.machine.name]

    quiet(test)


def test_the_end_of_either_side_tells_the_other(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.migration.set({"x-fault": "verify.done=delay:60000"})
        source.migration.migrate(target.uri)
        async with asyncio.timeout(10):
            while not target.migration._target.in_doubt:
                await asyncio.sleep(0.002)
        await source.shut()
        assert "its machine ends" in await target.ended()

        source, target = await world.source(), world.target("target.load=delay:60000")
        source.migration.set({"x-fault": ""})
        source.migration.migrate(target.uri)
        async with asyncio.timeout(10):
            while target.migration.status.phase != "load":
                await asyncio.sleep(0.002)
        await target.shut()
        assert await source.done() == "failed"
        assert source.runs and "its machine ends" in source.error

    quiet(test)
