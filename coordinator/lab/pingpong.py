"""One guest, moved to and fro between two hosts: the measurement of each migration."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator.lab.console import Guestbook, Mark
from coordinator.lab.guest import DRIVE, guest
from coordinator.lab.hosts import Host, Hosts, free_ports, network
from coordinator.lab.machine import LabError, Machine
from coordinator.lab.plan import Experiment, Policy
from coordinator.lab.qmp import Event, QmpError
from coordinator.lab.results import Migration, Shares
from coordinator.lab.waiting import in_time

MS = 1e3
#: a moment of migration is drawn from the seed: so long at most after the pass that was awaited, seconds
SPREAD = 0.25
#: an aim is at the nth entry into the phase, drawn from 1 to this
MOST_NTH = 8
#: how long a migration may take, and a source that has been released may wait for its target, seconds
MIGRATION_SECONDS, DOUBT_SECONDS = 120.0, 15.0
BOOT_SECONDS = 180.0
#: for how long shares of phases are measured, host's seconds
SHARES_SECONDS = 3.0

FINAL = ("completed", "failed", "cancelled")


def properties(experiment: Experiment) -> tuple[str, ...]:
    """The policy as options of ``atoll run``; each machine is a destination first and a source then."""
    incomplete = {Policy.RESTART: "restart", Policy.DROP: "drop"}.get(experiment.policy, "error")
    choices = {
        "migrate-stream": "full" if experiment.policy is Policy.CARRY else "v0",
        "migrate-drain": str(experiment.drain) if experiment.policy is Policy.DRAIN else "off",
        "migrate-incomplete": incomplete,
    }
    return tuple(word for name, value in choices.items() for word in ("-global", f"ide-cd.{name}={value}"))


@dataclass
class Attempt:
    """A migration as it is seen from outside, before the guest's words are looked at."""

    asked: float
    source: dict[str, Any]
    target: dict[str, Any]
    outcome: str
    error: str = ""

    @property
    def drive(self) -> dict[str, Any]:
        """What the stream says of the CD-ROM drive."""
        drives = self.source.get("x-drives") or self.target.get("x-drives") or []
        return next((drive for drive in drives if drive["id"] == DRIVE), {})


class PingPong:
    """All migrations of one experiment. ``state``: a file to keep the booted guest in, for whoever needs it
    again."""

    def __init__(self, experiment: Experiment, hosts: Hosts, folder: Path, state: Path) -> None:
        self._experiment, self._hosts, self._folder, self._state = experiment, hosts, folder, state
        self._options = guest(experiment).options
        self._book = Guestbook()
        self._machine: Machine | None = None
        self._standby: asyncio.Task[Machine] | None = None
        self._number = 0
        #: which of the hosts the guest is at; the next target is at the other one
        self._here = 0
        #: all that have been made and not ended
        self._alive: set[Machine] = set()

    async def run(self, first: int, record: Callable[[Any], None]) -> None:
        """Migrations from number ``first`` on."""
        try:
            await self._revive()
            if first == 0:
                record(await self._shares())
            for index in range(first, self._experiment.count):
                record(await self._one(index))
        finally:
            await self._close()

    # ---- machines ----------------------------------------------------------------------------------
    def _machine_at(self, side: int, *options: str) -> Machine:
        self._number += 1
        host = self._hosts.sides[side]
        name = f"lab{self._number}"
        words = (*self._options, *properties(self._experiment), *options)
        machine = Machine(name, self._folder, words, host.enter, self._hosts.environment)
        self._alive.add(machine)
        return machine

    async def _end(self, machine: Machine) -> None:
        await machine.end()
        self._alive.discard(machine)

    def _prepare_next(self) -> None:
        """Let the next target start while the guest runs."""

        async def start() -> Machine:
            machine = self._machine_at(self._here ^ 1, "-incoming", "defer")
            await machine.start()
            return machine

        self._standby = asyncio.ensure_future(start())

    async def _target(self) -> Machine:
        if self._standby is None:
            self._prepare_next()
        assert self._standby is not None
        machine = await self._standby
        self._standby = None
        return machine

    async def _revive(self) -> None:
        """A guest that reads: from the state file, which is made at first."""
        if not self._state.exists():
            await self._boot()
        self._book = Guestbook()
        machine = self._machine = self._machine_at(self._here, "-incoming", f"file:{self._state}")
        machine.listen(self._book.feed)
        await machine.start()
        if await in_time(self._book.read_after(0), BOOT_SECONDS) is None:
            raise LabError(f"the guest does not read: {self._book.failed or machine.last_words()}")

    async def _boot(self) -> None:
        book = Guestbook()
        machine = self._machine_at(0)
        machine.listen(book.feed)
        try:
            await machine.start()
            await in_time(book.until_ready(), BOOT_SECONDS)
            await in_time(book.passes_after(0), BOOT_SECONDS)
            if not book.passes or not book.passes[0].right:
                said = book.failed or next(iter(book.other[-1:]), "") or machine.last_words()
                raise LabError(f"the guest does not read its CD: {said}")
            await machine.qmp.command("migrate", uri=f"file:{self._state}")
            done = await in_time(machine.qmp.event(_migrated), MIGRATION_SECONDS)
            if done is None or done.data["status"] != "completed":
                status = await machine.qmp.command("query-migrate")
                raise LabError(
                    f"the booted guest cannot be kept: {status.get('error-desc', 'no reason given')}"
                )
        finally:
            await self._end(machine)

    async def _close(self) -> None:
        if self._standby is not None:
            self._standby.cancel()
            await asyncio.gather(self._standby, return_exceptions=True)
        await asyncio.gather(*map(self._end, list(self._alive)))

    # ---- before --------------------------------------------------------------------------------------
    async def _shares(self) -> Shares:
        """Where the drive spends its time while nobody disturbs it."""
        assert self._machine is not None
        await self._machine.qmp.command("x-query-phases", reset=True)
        await asyncio.sleep(SHARES_SECONDS)
        drives = await self._machine.qmp.command("x-query-phases")
        drive = next(drive for drive in drives if drive["id"] == DRIVE)
        seconds = max(drive["guest_ns"], 1) / 1e9
        return Shares(
            experiment=self._experiment.name,
            seconds=seconds,
            shares={phase: ns / 1e9 / seconds for phase, ns in drive["ns"].items() if ns},
            entries={phase: count / seconds for phase, count in drive["entries"].items() if count},
        )

    # ---- one migration ----------------------------------------------------------------------------
    async def _one(self, index: int) -> Migration:
        """The guest runs before and after it, if need be from its booted state again."""
        draw = random.Random(f"{self._experiment.seed}/{self._experiment.name}/{index}")
        if self._machine is None:
            await self._revive()
        source = self._machine
        assert source is not None
        target = await self._target()
        ports = free_ports(2)
        host = self._hosts.sides[self._here ^ 1]
        async with network(self._experiment, host, ports) as address:
            await self._set_up(source, target, host, ports, draw.randint(1, MOST_NTH))
            await asyncio.sleep(draw.uniform(0, SPREAD))
            mark = self._book.mark()
            attempt = await self._migrate(source, target, f"tcp:{address}:{ports[0]}")
        if attempt.outcome in ("moved", "recovered"):
            await self._end(source)  # now all that it had to say is here
            target.listen(self._book.feed)
            self._machine = target
            self._here ^= 1
        else:
            await self._end(target)
        times = attempt.target.get("x-times", {})
        after = times.get("guest-resumed", self._book.reads[-1].at)
        lives = attempt.outcome != "lost" and await self._goes_on(after)
        if not lives and self._machine is not None:
            await self._end(self._machine)
            self._machine = None
        if index + 1 < self._experiment.count:
            self._prepare_next()
        if lives:
            await in_time(self._book.passes_after(len(self._book.passes)), self._experiment.patience)
        return self._judged(index, attempt, mark, lives)

    async def _set_up(self, source: Machine, target: Machine, host: Host, ports: list[int], nth: int) -> None:
        """Parameters of both, and the target listens."""
        experiment = self._experiment
        common = {
            "multifd_channels": experiment.streams,
            "multifd_compression": experiment.compression,
            "stopped_time": experiment.stopped_time,
        }
        for_target = experiment.fault.startswith("target.")
        aim = f"{DRIVE}={experiment.aim.value}:{nth}" if experiment.aim is not None else ""
        fault = "" if for_target else experiment.fault
        await source.qmp.command("migrate-set-parameters", **common, x_aim=aim, x_fault=fault)
        await target.qmp.command(
            "migrate-set-parameters",
            **common,
            x_data_port=ports[1],
            x_fault=experiment.fault if for_target else "",
        )
        await target.qmp.command("migrate-incoming", uri=f"tcp:{host.address}:{ports[0]}")

    async def _migrate(self, source: Machine, target: Machine, uri: str) -> Attempt:
        """Until it is clear who has the guest, and that one runs."""
        asked, since = time.monotonic(), len(source.qmp.events)
        attempt = Attempt(asked, {}, {}, "lost")
        with contextlib.suppress(QmpError):
            await source.qmp.command("migrate", uri=uri)
            await in_time(source.qmp.event(_migrated_or_in_doubt, since), MIGRATION_SECONDS)
            await in_time(source.qmp.event(_migrated, since), DOUBT_SECONDS)
        with contextlib.suppress(QmpError):
            attempt.source = await source.qmp.command("query-migrate")
        recovered = False
        with contextlib.suppress(QmpError):
            if attempt.source.get("status") not in FINAL:
                recovered = await self._recovered(target)
            attempt.target = await target.qmp.command("query-migrate")
        if "completed" in (attempt.source.get("status"), attempt.target.get("status")):
            attempt.outcome = "recovered" if recovered else "moved"
        elif attempt.source.get("status") in FINAL:
            attempt.outcome = "stayed"
        attempt.error = attempt.source.get("error-desc", "") or attempt.target.get("error-desc", "")
        return attempt

    async def _recovered(self, target: Machine) -> bool:
        """A target that has everything but its source's word is shown the source's record."""
        word = await in_time(target.qmp.event(_migrated_or_in_doubt), DOUBT_SECONDS)
        if word is None or word.data["status"] in FINAL:
            return False
        records = sorted(
            (self._folder / "state" / "atoll" / "released").glob("*"), key=lambda p: p.stat().st_mtime
        )
        for place in reversed(records):
            with contextlib.suppress(QmpError):
                await target.qmp.command("migrate-recover", uri=f"file:{place}")
                await in_time(target.qmp.event(_migrated), DOUBT_SECONDS)
                return True
        return False

    async def _goes_on(self, after: int) -> bool:
        return await in_time(self._book.read_after(after), self._experiment.patience) is not None

    # ---- after --------------------------------------------------------------------------------------
    def _judged(self, index: int, attempt: Attempt, mark: Mark, lives: bool) -> Migration:
        """What was seen since ``mark``."""
        book, source, times = self._book, attempt.source, attempt.target.get("x-times", {})
        stopped, resumed = times.get("guest-stopped"), times.get("guest-resumed")
        stall = gap = host = None
        if times:
            host = (times["resumed-at"] - times["stopped-at"]) / 1e6
            first = next((read for read in book.reads[mark.reads :] if read.at > resumed), None)
            stall = (first.at - resumed) / 1e6 if first is not None else None
            gaps = [
                gap.ns / 1e6 for gap in book.gaps[mark.gaps :] if gap.since <= stopped and gap.at >= resumed
            ]
            gap = gaps[0] if gaps else None
        drive, aim = attempt.drive, self._experiment.aim
        passes = book.passes[mark.passes :]
        drains = source.get("x-drains")
        ram = source.get("ram", {})
        return Migration(
            experiment=self._experiment.name,
            index=index,
            phase=drive.get("phase", "unknown"),
            stream=drive.get("stream", ""),
            aimed=(source.get("x-aimed", False) and (bool(drains) or drive.get("phase") == aim.value))
            if aim
            else None,
            drained=all(drain["drained"] for drain in drains) if drains else None,
            status=source.get("status", "gone"),
            outcome=attempt.outcome if lives else "lost",
            error=attempt.error or ("" if lives else self._why(attempt)),
            total=source.get("total-time", 0),
            setup=source.get("setup-time", 0),
            downtime_host=host,
            downtime_guest=gap,
            stall=stall,
            bytes=ram.get("transferred", 0),
            pages=ram.get("normal", 0),
            zero_pages=ram.get("duplicate", 0),
            reads=sum(read.count for read in book.reads[mark.reads :]),
            right=sum(one.right for one in passes),
            wrong=sum(not one.right for one in passes),
            user_errors=tuple(text.text for text in book.errors[mark.errors :]),
            kernel=tuple(text.text for text in book.kernel[mark.kernel :]),
            timeline=self._timeline(attempt, stall),
        )

    def _why(self, attempt: Attempt) -> str:
        """A guest that is lost without a word of either machine's."""
        if attempt.outcome == "lost":
            return "neither side has the guest"
        return f"no read completed: {self._book.failed or 'patience is at an end'}"

    def _timeline(self, attempt: Attempt, stall: float | None) -> tuple[tuple[str, float], ...]:
        """Moments of one migration, ms since it was asked for."""
        times = attempt.target.get("x-times")
        if not times:
            return ()
        unix = time.time() - time.monotonic()
        stopped, resumed = (
            (times[name] / 1e9 - unix - attempt.asked) * MS for name in ("stopped-at", "resumed-at")
        )
        found = [("set up", attempt.source.get("setup-time", 0.0)), ("stopped", stopped), ("runs", resumed)]
        if stall is not None:
            found.append(("read", resumed + stall))
        return tuple(found)


def _migrated(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data["status"] in FINAL


def _migrated_or_in_doubt(event: Event) -> bool:
    return event.name == "MIGRATION" and event.data["status"] in (*FINAL, "postcopy-paused")
