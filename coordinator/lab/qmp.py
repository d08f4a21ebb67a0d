"""A client of QMP: commands one at a time, events kept with the moment at which they came.

Source: QEMU docs/interop/qmp-spec.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from coordinator.contract.errors import AtollError

#: longest line that is taken from a machine, bytes
LONGEST = 16 << 20


class QmpError(AtollError):
    """The machine refuses a command, or is gone (``gone``)."""

    def __init__(self, text: str, gone: bool = False) -> None:
        super().__init__(text)
        self.gone = gone


@dataclass(frozen=True)
class Event:
    """``at``: host's monotonic clock, seconds."""

    name: str
    data: dict[str, Any]
    at: float


class Qmp:
    """One session. ``connect`` before anything else."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._reply: asyncio.Future[Any] | None = None
        self._lock = asyncio.Lock()
        self._news = asyncio.Event()
        self.events: list[Event] = []
        self.gone = False
        self._task = asyncio.ensure_future(self._read())

    @classmethod
    async def connect(cls, path: str) -> Qmp:
        """OSError when nobody listens there (yet)."""
        qmp = cls(*await asyncio.open_unix_connection(path, limit=LONGEST))
        await qmp.command("qmp_capabilities")
        return qmp

    async def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := await self._reader.readline():
                self._take(json.loads(line))
        self.gone = True
        self._news.set()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(QmpError("the machine has gone", gone=True))

    def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self.events.append(Event(message["event"], message.get("data", {}), time.monotonic()))
            self._news.set()
        elif self._reply is not None and not self._reply.done() and "QMP" not in message:
            if "error" in message:
                self._reply.set_exception(QmpError(message["error"].get("desc", "refused")))
            else:
                self._reply.set_result(message.get("return"))

    async def command(self, command: str, **arguments: Any) -> Any:
        """The reply; QmpError when it is refused, or there is nobody."""
        async with self._lock:
            if self.gone:
                raise QmpError("the machine has gone", gone=True)
            self._reply = asyncio.get_running_loop().create_future()
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
            try:
                self._writer.write(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
                await self._writer.drain()
                return await self._reply
            except OSError:
                raise QmpError("the machine has gone", gone=True) from None
            finally:
                self._reply = None

    async def event(self, wanted: Callable[[Event], bool], since: int = 0) -> Event | None:
        """The first event from number ``since`` on that is wanted; None when the machine goes before."""
        while True:
            for event in self.events[since:]:
                if wanted(event):
                    return event
            since = len(self.events)
            if self.gone:
                return None
            self._news.clear()
            await self._news.wait()

    async def close(self) -> None:
        self._task.cancel()
        self._writer.close()
        await asyncio.gather(self._task, return_exceptions=True)
