"""Bringing the drives to where a migration wants them: by their policies, by a drain, or at an armed phase.

Nothing here stops a drive for good: a drain and a catch are undone by CancelDrain, DisarmPhase and Run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from coordinator.contract import messages
from coordinator.contract.drives import DrivePhase, DrivePolicy, properties, set_property
from coordinator.contract.errors import UsageError
from devhost.ide import registers as reg
from devhost.ide.atapi import DEVICE_RESET, AtapiDrive
from devhost.ide.channel import EXECUTE_DEVICE_DIAGNOSTIC, IdeChannel
from devhost.ide.drive import Drive
from devhost.ide.watch import PhaseWatch
from devhost.service import LATER

if TYPE_CHECKING:
    from devhost.pc import Pc

NS_PER_MS = 1_000_000
#: commands that end others; they never wait
RESETS = (DEVICE_RESET, EXECUTE_DEVICE_DIAGNOSTIC)
#: no command is under way, or none that could go on
AT_REST = frozenset(
    (
        DrivePhase.IDLE,
        DrivePhase.INTERRUPT_PENDING,
        DrivePhase.RESET,
        DrivePhase.INCOMPLETE,
        DrivePhase.LOST,
    )
)
#: of a CD-ROM drive no packet is half-way and no DMA is waited for: an old record holds the PIO buffer
CD_AT_REST = AT_REST | {DrivePhase.PIO_IN, DrivePhase.PIO_OUT}


@dataclass
class Drain:
    """One that is not answered yet: ``deadlines`` is guest time by drive id."""

    command: messages.DrainDrives
    began: int
    deadlines: dict[str, int]


class Quiesce:
    """Of the drives of one machine; handles the commands that concern it."""

    def __init__(self, pc: Pc) -> None:
        self._service, self._clock = pc.service, pc.clock
        self._drives: dict[str, Drive] = dict(pc.drives.by_id)
        self._watches = {ident: PhaseWatch(drive, pc.clock.now) for ident, drive in self._drives.items()}
        self._slots = [pc.slots[f"ide{number}"] for number in range(len(pc.drives.channels))]
        for channel, slot in zip(pc.drives.channels, self._slots, strict=True):
            mine = [watch for watch in self._watches.values() if watch.drive in channel.fitted]
            slot.settled = partial(_observe, mine)
        for ident, watch in self._watches.items():
            watch.caught = partial(self._caught, ident)
            watch.entered = self._look
        #: drives whose next command waits
        self._gated: set[Drive] = set()
        self._drain: Drain | None = None
        self._bound = pc.clock.timer(self._look)
        self._armed: tuple[str, DrivePhase] | None = None
        self._held: str | None = None
        self._timeout = pc.clock.timer(self._timed_out)

    def table(self) -> dict[type[messages.Command], Callable[[Any], Any]]:
        return {
            messages.SetDriveProperty: self._set_property,
            messages.DrainDrives: self._begin_drain,
            messages.CancelDrain: lambda command: self.end_drain(),
            messages.ArmPhase: self._arm,
            messages.DisarmPhase: lambda command: self.disarm(),
            messages.QueryPhases: self._query,
        }

    # ---- policies ------------------------------------------------------------------------------------
    def _set_property(self, command: messages.SetDriveProperty) -> dict[str, dict[str, str]]:
        set_property(DrivePolicy(), command.driver, command.name, command.value)  # wrong though nobody has it
        if command.drive is not None:
            chosen = [command.drive]
            if _driver(self._drive(command.drive)) != command.driver:
                raise UsageError(f"drive {command.drive} is not of driver {command.driver}")
        else:
            chosen = [ident for ident, drive in self._drives.items() if _driver(drive) == command.driver]
        changed = {
            ident: set_property(self._drives[ident].policy, command.driver, command.name, command.value)
            for ident in chosen
        }
        for ident, policy in changed.items():
            self._drives[ident].policy = policy
        return {ident: properties(command.driver, policy) for ident, policy in changed.items()}

    def _drive(self, ident: str) -> Drive:
        drive: Drive | None = self._drives.get(ident)
        if drive is None:
            raise UsageError(f"there is no drive {ident}; choose one of {', '.join(self._drives)}")
        return drive

    def _query(self, command: messages.QueryPhases) -> list[dict[str, Any]]:
        found = []
        for ident, watch in self._watches.items():
            drive = watch.drive
            watch.observe()
            found.append(
                {
                    "id": ident,
                    "driver": _driver(drive),
                    "phase": watch.phase.value,
                    "properties": properties(_driver(drive), drive.policy),
                    "command": watch.command(),
                    **watch.counters(),
                }
            )
            if command.reset:
                watch.restart()
        return found

    # ---- drain -----------------------------------------------------------------------------------------
    def _begin_drain(self, command: messages.DrainDrives) -> Any:
        if self._drain is not None:
            raise UsageError("a drain is under way")
        now = self._clock.now()
        deadlines = {}
        for ident, drive in self._drives.items():
            bound = drive.policy.drain_ms if command.bound_ms is None else command.bound_ms
            if bound is not None:
                deadlines[ident] = now + bound * NS_PER_MS
        if self._held in deadlines:  # whoever is to drain is not kept
            self.disarm()
        self._drain = Drain(command, now, deadlines)
        self._gated = {self._drives[ident] for ident in deadlines}
        self._show_gates()
        self._look()
        return LATER

    def _at_rest(self, ident: str) -> bool:
        rest = CD_AT_REST if isinstance(self._drives[ident], AtapiDrive) else AT_REST
        return self._watches[ident].phase in rest

    def _look(self) -> None:
        """A drive has moved, or a bound has come: answer if the drain is over."""
        if self._drain is None:
            return
        now = self._clock.now()
        busy = [
            deadline
            for ident, deadline in self._drain.deadlines.items()
            if deadline > now and not self._at_rest(ident)
        ]
        if busy and self._service.segment.time_runs():
            self._bound.arm(min(busy))
        else:
            self.answer_drain()

    def answer_drain(self, cancelled: bool = False) -> None:
        """Say how far the drain has come; new commands go on waiting."""
        if self._drain is None:
            return
        drain, self._drain = self._drain, None
        self._bound.cancel()
        drives = [
            {"id": ident, "phase": self._watches[ident].phase.value, "drained": self._at_rest(ident)}
            for ident in drain.deadlines
        ]
        value = {
            "drained": all(drive["drained"] for drive in drives),
            "cancelled": cancelled,
            "waited_ns": self._clock.now() - drain.began,
            "drives": drives,
        }
        self._service.control.answer(drain.command, value)

    def end_drain(self) -> None:
        """New commands are taken again."""
        self.answer_drain(cancelled=True)
        self._gated.clear()
        self._show_gates()

    # ---- aim -------------------------------------------------------------------------------------------
    def _arm(self, command: messages.ArmPhase) -> None:
        self._drive(command.drive)
        self.disarm()
        self._armed = (command.drive, command.phase)
        self._hold_ns = command.hold_ms * NS_PER_MS
        self._timeout.arm(self._clock.now() + command.timeout_ms * NS_PER_MS)
        self._watches[command.drive].arm(command.phase, command.nth)

    def _caught(self, ident: str, phase: DrivePhase) -> None:
        self._held = ident
        self._service.keep_reply()
        self._show_gates()
        now = self._clock.now()
        self._timeout.arm(now + self._hold_ns)
        self._service.control.notify(messages.PhaseReached(drive=ident, phase=phase, guest_ns=now))

    def _timed_out(self) -> None:
        assert self._armed is not None
        (ident, phase), held = self._armed, self._held is not None
        self.disarm()
        self._service.control.notify(messages.PhaseMissed(drive=ident, phase=phase, held=held))

    def disarm(self) -> None:
        """Nothing is armed, and nobody is held."""
        if self._armed is None:
            return
        watch, held = self._watches[self._armed[0]], self._held is not None
        self._armed = self._held = None
        self._timeout.cancel()
        watch.disarm()
        self._show_gates()
        self._service.release_replies()
        if held:
            watch.drive.release()

    # ---- the machine stops and goes on -----------------------------------------------------------------
    def stopped(self) -> None:
        """No access will come for now: a drain has come as far as it will, and a catch keeps."""
        self.answer_drain()
        if self._held is not None:
            self._timeout.cancel()

    def running(self) -> None:
        self.end_drain()
        if self._held is not None:
            self.disarm()

    # ---- gates -----------------------------------------------------------------------------------------
    def _show_gates(self) -> None:
        held = self._drives[self._held] if self._held is not None else None
        for slot in self._slots:
            channel = slot.device
            assert isinstance(channel, IdeChannel)
            if held in channel.fitted:
                slot.gate = lambda range_name, offset, data: True
            elif self._gated.intersection(channel.fitted):
                slot.gate = partial(self._gate, channel)
            else:
                slot.gate = None

    def _gate(self, channel: IdeChannel, range_name: str, offset: int, data: bytes | None) -> bool:
        """Whether this access would begin a command of a drive that drains."""
        if data is None or range_name != "command" or offset != reg.COMMAND or data[0] in RESETS:
            return False
        drive = channel.drives[channel.selected]
        return drive in self._gated and not drive.status & (reg.BSY | reg.DRQ)


def _driver(drive: Drive) -> str:
    return "ide-cd" if isinstance(drive, AtapiDrive) else "ide-hd"


def _observe(watches: list[PhaseWatch]) -> None:
    for watch in watches:
        watch.observe()
