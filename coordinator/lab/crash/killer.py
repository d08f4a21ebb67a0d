"""One guest after another, until all kills are done: each lives until it is lost, or the plan is done."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.lab.console import Guestbook, Mark
from coordinator.lab.crash import guest
from coordinator.lab.crash.islands import islands
from coordinator.lab.crash.plan import Trial
from coordinator.lab.crash.results import Ended, Kill, Record
from coordinator.lab.crash.statistics import complaints
from coordinator.lab.machine import LabError, Machine
from coordinator.lab.qmp import Event, QmpError
from coordinator.lab.waiting import in_time

MS = 1e3
#: tells a hang, on a machine of any speed
BOOT_SECONDS = 900.0
#: between two looks for an island that is not there, seconds
LOOK_SECONDS = 0.002
#: errors of one kind that a record holds at most
MOST_TEXTS = 20
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Lost(Exception):
    """The guest is: nothing more can be done to it."""


@dataclass
class Pending:
    """A kill whose record is not written yet."""

    index: int
    role: str
    how: str
    moment: float
    mark: Mark
    read_at: int
    beside: bool
    until: Mark | None = None
    event: Event | None = None
    guest_ns: int | None = None
    phases: dict[str, str] = field(default_factory=dict)
    error: str = ""
    #: follows what comes of it
    work: asyncio.Future[None] = field(default_factory=asyncio.Future)


class Killer:
    """``run`` it once. Everything it makes is in ``folder``."""

    def __init__(self, trial: Trial, folder: Path) -> None:
        self._trial, self._folder = trial, folder
        self._pending: deque[Pending] = deque()
        self._number = 0

    async def run(self, first: int, guests: int, record: Callable[[Record], None]) -> None:
        """Kills from number ``first`` on; ``guests`` have lived before."""
        self._record = record
        self._next = first
        while self._next < self._trial.kills:
            await self._one_guest(guests)
            guests += 1

    # ---- one guest -------------------------------------------------------------------------------
    async def _one_guest(self, number: int) -> None:
        self._number, first = number, self._next
        self._book = Guestbook()
        disk = self._folder / f"disk{number}.qcow2"
        options = guest.machine(self._trial, disk)
        if self._trial.hang:
            options = (*options, "-island-timeout", str(self._trial.island_timeout))
        self._name = f"crash-{uuid.uuid4().hex[:10]}"
        machine = self._machine = Machine(self._name, self._folder, options)
        machine.listen(self._book.feed)
        lost = digest = ""
        try:
            await machine.start()
            await in_time(self._book.until(self._works), BOOT_SECONDS)
            if not self._works():
                said = self._book.failed or next(iter(self._book.other[-1:]), "") or machine.last_words()
                raise LabError(f"the guest does not begin: {said}")
            self._began = self._last = time.monotonic()
            try:
                while self._next < self._trial.kills:
                    await self._kill(self._next)
                digest = await self._end_of_work()
            except Lost as error:
                if self._next == first:
                    raise LabError(f"the guest is lost before it was harmed: {error}") from None
                lost = str(error)
            self._finish(lost)
        finally:
            for pending in self._pending:
                pending.work.cancel()
            self._pending.clear()
            await machine.end()
        await self._look_at(disk, self._next - first, digest)
        disk.unlink(missing_ok=True)

    def _works(self) -> bool:
        return self._book.ready and self._book.writes and bool(self._book.passes) and bool(self._book.disk)

    async def _end_of_work(self) -> str:
        """Every island is back, the guest reads all of its CD once more and compares all of its disk; the
        digest of the disk's second half."""
        await asyncio.gather(*(pending.work for pending in self._pending))
        self._check()
        book, passes = self._book, len(self._book.passes)
        self._machine.type(b"\n")
        for what, holds in (
            ("the CD is not read to its end", lambda: len(book.passes) > passes),
            ("the disk is not compared", lambda: book.ended),
        ):
            await in_time(book.until(holds), self._trial.patience)
            if not holds():
                raise Lost(book.failed or what)
        return book.disk[-1].digest

    async def _look_at(self, disk: Path, kills: int, digest: str) -> None:
        last = self._book.disk[-1]
        found = await asyncio.to_thread(guest.checks, disk, digest)
        if not digest:
            found["blocks read on the host"] = "the guest did not come to its end"
        self._record(
            Ended(
                guest=self._number, kills=kills, rounds=last.rounds, syncs=last.syncs, compared=last.compared,
                checks=found,
            )
        )  # fmt: skip

    # ---- one kill --------------------------------------------------------------------------------
    async def _kill(self, index: int) -> None:
        """Lost: an earlier one was too much."""
        trial = self._trial
        draw = random.Random(f"{trial.seed}/{index}")
        pause = draw.uniform(0.5, 1.5) * trial.spacing / MS
        choice, how = draw.random(), "stop" if draw.random() < trial.hang else "kill"
        await asyncio.sleep(max(0.0, self._last + pause - time.monotonic()))
        role, pid = await self._victim(choice)
        self._check()
        mark = self._book.mark()
        if self._pending:
            self._pending[-1].until = mark
        since, beside = len(self._machine.qmp.events), any(one.event is None for one in self._pending)
        self._last, self._next = time.monotonic(), index + 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGNALS[how])
        pending = Pending(index, role, how, self._last, mark, self._book.reads[-1].at, beside)
        pending.work = asyncio.ensure_future(self._follow(pending, since))
        self._finish_some()
        self._pending.append(pending)

    async def _victim(self, choice: float) -> tuple[str, int]:
        """An island drawn from those that may be, as soon as it is there."""
        deadline = time.monotonic() + self._trial.patience
        role = ""
        while time.monotonic() < deadline:
            self._check()
            there = islands(self._name)
            roles = sorted(filter(self._trial.has, there))
            role = role or (roles[int(choice * len(roles))] if roles else "")
            if role in there and not any(one.role == role and one.event is None for one in self._pending):
                return role, there[role]
            await asyncio.sleep(LOOK_SECONDS)
        raise Lost(f"no {role or 'island'} to kill")

    async def _follow(self, pending: Pending, since: int) -> None:
        """What comes of it, up to the next CD read."""
        qmp = self._machine.qmp
        phases = asyncio.ensure_future(self._phases())
        replaced = await in_time(
            qmp.event(lambda event: _restarted(event, pending.role), since), self._trial.patience
        )
        if phases.done():  # else it is left alone: a command without its answer would take that of the next
            pending.phases |= phases.result()
        for event in qmp.events[since:]:
            if event.name == "X_DRIVES_TAKEN_OVER" and event.data["role"] == pending.role:
                pending.phases |= event.data["drives"]
                pending.guest_ns = event.data["guest-ns"]
        if replaced is None:
            pending.error = self._machine.last_words() if qmp.gone else f"{pending.role} is not replaced"
            return
        pending.event = replaced
        pending.guest_ns = replaced.data.get("x-guest-ns", pending.guest_ns)
        after = pending.guest_ns if pending.guest_ns is not None else pending.read_at
        if await in_time(self._book.read_after(after), self._trial.patience) is None:
            pending.error = self._book.failed or "no CD read completed"

    async def _phases(self) -> dict[str, str]:
        """Where drives of islands that are there stand, asked at once."""
        with contextlib.suppress(QmpError):
            return {
                drive["id"]: drive["phase"] for drive in await self._machine.qmp.command("x-query-phases")
            }
        return {}

    def _check(self) -> None:
        """Lost: the machine has ended, or an island or the guest did not come back."""
        if (error := next((one.error for one in self._pending if one.error), "")) or self._machine.qmp.gone:
            raise Lost(error or self._machine.last_words())
        if self._book.failed:
            raise Lost(self._book.failed)

    # ---- records ---------------------------------------------------------------------------------
    def _finish_some(self) -> None:
        """Write those, oldest first, of which all is known."""
        while self._pending and self._pending[0].until is not None:
            if not self._pending[0].work.done():
                return
            self._write(self._pending.popleft())

    def _finish(self, lost: str) -> None:
        """The guest has ended: write all. The last kill is what it was lost by."""
        now = self._book.mark()
        for pending in self._pending:
            pending.until = pending.until or now
            pending.work.cancel()
        if lost and self._pending and not any(one.error for one in self._pending):
            self._pending[-1].error = lost
        while self._pending:
            self._write(self._pending.popleft())

    def _write(self, pending: Pending) -> None:
        """What was seen from its mark to the next one's."""
        book, a, b = self._book, pending.mark, pending.until
        assert b is not None
        at, event = pending.guest_ns, pending.event
        gap = read = None
        if at is not None:
            gap = next((one.ns / 1e6 for one in book.gaps if one.since <= at <= one.at), None)
            later = next((one for one in book.reads[a.reads :] if one.at > at), None)
            read = (later.at - at) / 1e6 if later is not None else None
        disk = [book.disk[min(mark.disk, len(book.disk)) - 1] for mark in (a, b)]
        passes = book.passes[a.passes : b.passes]
        self._record(
            Kill(
                index=pending.index,
                guest=self._number,
                role=pending.role,
                how=pending.how,
                at=round(pending.moment - self._began, 4),
                at_guest=at / 1e9 if at is not None else None,
                phases=pending.phases,
                outcome="lost" if pending.error or event is None else "replaced",
                error=pending.error,
                blackout=event.data["blackout-ms"] if event is not None else None,
                gap_host=round((event.at - pending.moment) * MS, 3) if event is not None else None,
                gap_guest=gap,
                next_read=read,
                beside=pending.beside,
                reads=sum(one.count for one in book.reads[a.reads : b.reads]),
                right=sum(one.right for one in passes),
                wrong=sum(not one.right for one in passes),
                rounds=disk[1].rounds - disk[0].rounds,
                syncs=disk[1].syncs - disk[0].syncs,
                compared=disk[1].compared - disk[0].compared,
                wrong_bytes=sum(one.bytes for one in book.wrong[a.wrong : b.wrong]),
                complaints=complaints(book.kernel[a.kernel : b.kernel])[:MOST_TEXTS],
                user_errors=tuple(one.text for one in book.errors[a.errors : b.errors][:MOST_TEXTS]),
            )
        )


def _restarted(event: Event, role: str) -> bool:
    return event.name == "ISLAND_RESTARTED" and event.data["role"] == role


async def carry_out(trial: Trial, record: Callable[[Record], Any], first: int = 0, guests: int = 0) -> None:
    """Kills of a plan from number ``first`` on, with ``guests`` before; what it leaves on disk is gone at the
    end."""
    folder = Path(tempfile.mkdtemp(prefix="atoll-lab-"))
    try:
        await Killer(trial, folder).run(first, guests, record)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
