"""Faults at named points of a migration, for experiments: ``migrate-set-parameters x-fault=POINT=WHAT``.

A point is the name of a phase (before it), or the name with ``.done`` (behind it).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.contract.errors import ConfigError, MigrationError

KINDS = ("kill", "fail", "cut", "delay", "lose", "double")
#: points of the source (before a phase; with ".done", behind it) and of the target
_PHASES = ("negotiate", "aim", "drain", "stop", "flush", "settle", "send", "verify", "release", "resume")
_TARGET = tuple(f"target.{step}" for step in ("negotiate", "receive", "load", "verify", "resume"))
POINTS = (*_PHASES, "quiesce", *(f"{phase}.done" for phase in _PHASES), *_TARGET)
#: points at which something is said that can be lost or come twice
SAYING = ("negotiate", "send", "verify", "resume", "target.accept", "target.verify", "target.resume")


@dataclass(frozen=True)
class Fault:
    """``kill``: this coordinator dies by SIGKILL; ``fail``: the phase fails; ``cut``: the connections to the
    other side break; ``delay:MS``: it takes longer; ``lose`` and ``double``: the message that the phase sends
    is lost, or sent twice."""

    point: str = ""
    kind: str = ""
    milliseconds: int = 0

    @staticmethod
    def parse(text: str) -> Fault:
        """POINT=WHAT, empty for none; ConfigError names what there is."""
        if not text:
            return Fault()
        point, equals, what = text.partition("=")
        kind, _, number = what.partition(":")
        delays = kind == "delay" and number.isascii() and number.isdigit()
        if (
            not equals
            or not point
            or kind not in KINDS
            or (number and not delays)
            or (kind == "delay" and not delays)
        ):
            raise ConfigError(f"x-fault {text}: is not POINT=WHAT with one of {', '.join(KINDS)} (delay:MS)")
        points = SAYING if kind in ("lose", "double") else POINTS
        if point not in points:
            raise ConfigError(f"x-fault {text}: the points for {kind} are {', '.join(points)}")
        return Fault(point, kind, int(number) if delays else 0)

    async def at(self, point: str, cut: Callable[[], None]) -> None:
        """The work has come to ``point``."""
        if point != self.point:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "fail":
            raise MigrationError(f"fault injected at {point}")
        elif self.kind == "cut":
            cut()
        elif self.kind == "delay":
            await asyncio.sleep(self.milliseconds / 1000)

    def copies(self, point: str) -> int:
        """How often the message of this point is sent: 1, but for a fault."""
        return {"lose": 0, "double": 2}.get(self.kind, 1) if point == self.point else 1
