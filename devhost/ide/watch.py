"""Where a drive stands, by name: how long it has stood there, and how it is caught at a named place.

``observe`` comes at the end of each event of the drive's channel, which is when a guest could see the
change. A block request is the exception: it is due and made within one event, so the drive asks
(``Drive.on_request``) before it makes one, and an armed watch stops it there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coordinator.contract.drives import DrivePhase
from devhost.ide import registers as reg
from devhost.ide.atapi import PACKET, AtapiDrive
from devhost.ide.drive import Drive
from devhost.ide.phases import Phase, Request

#: places that are entered with a block request
OF_REQUESTS = (DrivePhase.DMA_TRANSFER, DrivePhase.MEDIUM, DrivePhase.FLUSH)
#: a drive that is to be caught in a transfer makes requests of this size, so that it has places inside, bytes
SMALL_REQUEST = 16 * 1024

_SIMPLE = {
    Phase.PIO_IN: DrivePhase.PIO_IN,
    Phase.PIO_OUT: DrivePhase.PIO_OUT,
    Phase.INCOMPLETE: DrivePhase.INCOMPLETE,
}


def name_of(drive: Drive) -> DrivePhase:
    """The drive's place."""
    phase = drive.phase
    if phase is Phase.IDLE:
        if drive.status & reg.BSY:
            return DrivePhase.RESET
        if drive.status & reg.DRQ:
            return DrivePhase.LOST
        return DrivePhase.INTERRUPT_PENDING if drive.intrq else DrivePhase.IDLE
    if phase is Phase.MEDIUM:
        if drive.request is Request.FLUSH:
            return DrivePhase.FLUSH
        return DrivePhase.DMA_TRANSFER if drive.direct else DrivePhase.MEDIUM
    if phase is Phase.DMA_WAIT:
        if drive.begun or drive.position:
            return DrivePhase.DMA_STALLED
        return DrivePhase.PACKET_COMPLETE if drive.opcode == PACKET else DrivePhase.DMA_AWAITED
    if phase is Phase.PACKET:
        assert isinstance(drive, AtapiDrive)
        return DrivePhase.PACKET_PARTIAL if drive.packet_filled else DrivePhase.PACKET_AWAITED
    return _SIMPLE[phase]


class PhaseWatch:
    """Of one drive. ``now`` is guest time; ``caught`` is told when the armed place is reached, ``entered`` of
    every change."""

    def __init__(self, drive: Drive, now: Callable[[], int]) -> None:
        self.drive = drive
        self.now = now
        self.caught: Callable[[DrivePhase], None] = lambda phase: None
        self.entered: Callable[[], None] = lambda: None
        self.phase = name_of(drive)
        self._station = (self.phase, 0)
        self._armed: DrivePhase | None = None
        self._left = 0
        self._usual_limit = drive.request_limit
        drive.on_request = self._requesting
        self.restart()

    # ---- counters ----------------------------------------------------------------------------------
    def restart(self) -> None:
        """Count from now on."""
        self._from = self._since = self.now()
        self._ns: dict[DrivePhase, int] = {}
        self._entries: dict[DrivePhase, int] = {}

    def observe(self) -> None:
        """An event of the channel has ended."""
        phase = name_of(self.drive)
        station = (phase, self.drive.burst_end)  # each burst of a PIO command is a place
        if station == self._station:
            return
        self._station = station
        self._count()
        self.phase = phase
        self._entries[phase] = self._entries.get(phase, 0) + 1
        if phase not in OF_REQUESTS and self._arrived(phase):
            self.drive.caught = True
            self.caught(phase)
        self.entered()

    def _count(self) -> None:
        now = self.now()
        self._ns[self.phase] = self._ns.get(self.phase, 0) + now - self._since
        self._since = now

    def counters(self) -> dict[str, Any]:
        """Guest time and entries by phase since ``restart``."""
        self._count()
        return {
            "guest_ns": self._since - self._from,
            "ns": {phase.value: ns for phase, ns in self._ns.items() if ns},
            "entries": {phase.value: n for phase, n in self._entries.items()},
        }

    # ---- aim ---------------------------------------------------------------------------------------
    def arm(self, phase: DrivePhase, nth: int) -> None:
        """Catch the drive when it enters ``phase`` for the ``nth`` time from now on."""
        self._armed, self._left = phase, nth
        if phase is DrivePhase.DMA_TRANSFER:
            self.drive.request_limit = min(self._usual_limit, SMALL_REQUEST)

    def disarm(self) -> None:
        self._armed = None
        self.drive.request_limit = self._usual_limit

    def _arrived(self, phase: DrivePhase) -> bool:
        if phase is not self._armed:
            return False
        self._left -= 1
        if self._left:
            return False
        self.disarm()
        return True

    def _requesting(self) -> bool:
        if self._armed is None:
            return False
        phase = name_of(self.drive)
        if phase not in OF_REQUESTS or not self._arrived(phase):
            return False
        self.drive.caught = True
        self.caught(phase)
        return True

    # ---- for people --------------------------------------------------------------------------------
    def command(self) -> dict[str, Any] | None:
        """What is under way, see QueryPhases."""
        drive = self.drive
        if drive.phase is Phase.IDLE:
            return None
        cursor = drive.bus.master.cursor
        about: dict[str, Any] = {
            "opcode": drive.opcode,
            "position": drive.position,
            "length": len(drive.buffer),
            "remaining": drive.remaining,
            "descriptor": cursor.descriptor,
            "region_left": cursor.left,
        }
        if isinstance(drive, AtapiDrive) and drive.opcode == PACKET:
            about["packet"] = bytes(drive.packet[: drive.packet_filled]).hex()
        return about
