"""What came out of kills: their records, those of the guests that bore them, and the file (journal.py)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from coordinator.lab.crash.plan import Trial
from coordinator.lab.journal import Journal


class Kill(msgspec.Struct, frozen=True, kw_only=True, tag="kill", rename="kebab", omit_defaults=True):
    """One kill, and what was seen from it until the next one. Times are milliseconds unless named otherwise;
    None where there is nothing to say.

    ``guest``: number of the guest; ``how``: "kill" or "stop". ``at``: seconds of the host's clock since the
    guest began its work, ``at_guest``: of the guest's. ``phases``: where each drive stood, by its id.
    ``outcome``: "replaced" or "lost", with ``error``. ``blackout``: from the death seen to the successor that
    serves, by ISLAND_RESTARTED; ``gap_host``: from the signal to that event here; ``gap_guest``: the step of
    the guest's clock around the kill, if there was one (of 8 ms or more). ``next_read``: guest time to the
    next CD read that completed. ``beside``: other islands were being replaced at the time.
    ``reads``: of the CD, ``right`` and ``wrong``: passes over all of it; ``rounds``, ``syncs``, ``compared``:
    of the disk: rounds, flushes told to be done, bytes compared; ``wrong_bytes`` of those. ``complaints``: of
    the kernel about its hardware; ``user_errors``: of the programs' calls.
    """

    index: int
    guest: int
    role: str
    how: str
    at: float
    at_guest: float | None = None
    phases: dict[str, str] = {}
    outcome: str = "replaced"
    error: str = ""
    blackout: float | None = None
    gap_host: float | None = None
    gap_guest: float | None = None
    next_read: float | None = None
    beside: bool = False
    reads: int = 0
    right: int = 0
    wrong: int = 0
    rounds: int = 0
    syncs: int = 0
    compared: int = 0
    wrong_bytes: int = 0
    complaints: tuple[str, ...] = ()
    user_errors: tuple[str, ...] = ()

    @property
    def errors(self) -> list[str]:
        """All that should not be."""
        said = [*self.complaints, *self.user_errors]
        if self.outcome != "replaced":
            said.insert(0, f"{self.outcome}: {self.error}")
        if self.wrong:
            said.append(f"{self.wrong} passes over the CD with a wrong hash")
        if self.wrong_bytes:
            said.append(f"{self.wrong_bytes} wrong bytes on the disk")
        return said


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended", rename="kebab"):
    """The end of a guest that has borne its ``kills``. ``rounds``, ``syncs``, ``compared`` are the disk's of
    its whole life; ``checks``: name and finding, "" for none, of what was looked at afterwards."""

    guest: int
    kills: int
    rounds: int
    syncs: int
    compared: int
    checks: dict[str, str]


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="plan"):
    """First line of a file."""

    plan: Trial
    version: int = 1


Record = Kill | Ended


class Crashes(Journal[Record]):
    """All records of a run."""

    begin = Begin
    decoder = msgspec.json.Decoder(Begin | Kill | Ended)
    plan: Trial

    def __init__(self, plan: Trial, path: Path | None = None, resume: bool = False) -> None:
        self.kills: list[Kill] = []
        self.ended: list[Ended] = []
        super().__init__(plan, path, resume)

    def keep(self, record: Record) -> None:
        if isinstance(record, Kill):
            self.kills.append(record)
        else:
            self.ended.append(record)
