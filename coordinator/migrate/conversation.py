"""What a source and its target say to each other, as the source has it: questions that are repeated until
they are answered, a target that refuses or is gone, and the last word.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

from coordinator.contract.errors import MigrationError
from coordinator.migrate import channel, messages
from coordinator.migrate.channel import Tls
from coordinator.migrate.link import Dialer
from coordinator.migrate.uri import Uri

#: how often a target that has not answered is told again that it may run, and for how long one that was
#: given up is told to end, seconds
REMIND_SECONDS, FAREWELL_SECONDS = 0.5, 10.0
#: how long a target that has closed its connections may take to say why, and the last word to leave
REASON_SECONDS, LAST_WORD_MS = 0.3, 300

T = TypeVar("T")
S = TypeVar("S", bound=messages.Said)


def _nothing() -> None:
    pass


class Conversation:
    """Of one transfer. ``copies`` tells how often a point's message is sent (faults.py)."""

    def __init__(self, uri: Uri, transfer: str, copies: Callable[[str], int]) -> None:
        """MigrationError where there are no keys."""
        self.uri = uri
        self._link = Dialer(uri, transfer)
        self._copies = copies
        #: the data connections, and what ends when the target closes them
        self.socks: list[socket.socket] = []
        self._lost: asyncio.Task[None] | None = None
        #: the target has said that it cannot
        self.refused = False
        #: what became of a data connection at the target's door
        self._turned_away = ""

    @property
    def met(self) -> bool:
        """There is a target."""
        return self._link.met

    async def connect(self) -> None:
        """MigrationError where the address cannot be one."""
        await self._link.connect()

    async def connect_data(self, answer: messages.Accepted, count: int, tls: Tls | None) -> None:
        """By as many connections as have been announced."""
        connecting = channel.connect(self.uri, answer.port, answer.path, answer.token, count, tls)
        try:
            self.socks = await connecting
        except channel.Distrust:
            raise
        except MigrationError as error:
            raise await self._explained(error) from None
        self._lost = asyncio.ensure_future(channel.gone(self.socks[0]))

    async def redirect(self, uri: Uri) -> None:
        """The target listens somewhere else now (migrate with resume)."""
        await self._link.redirect(uri)
        self.uri = uri

    # ---- said and heard --------------------------------------------------------------------------
    async def tell(self, message: messages.AnyOfSource, point: str = "") -> None:
        """Once, but for a fault at ``point``."""
        for _ in range(self._copies(point)):
            await self._link.send(message)

    async def ask(
        self,
        point: str,
        question: messages.AnyOfSource,
        kind: type[S],
        silent: Callable[[], None] = _nothing,
        before_again: messages.AnyOfSource | None = None,
    ) -> S:
        """The answer of this kind. The question is repeated, since either may be lost on the way; ``silent``
        is called when it has to be. ``before_again`` was said before the question, and is repeated with it.
        """
        answer = asyncio.ensure_future(self._hear(kind))
        try:
            await self.tell(question, point)
            while True:
                await asyncio.wait({answer}, timeout=REMIND_SECONDS)
                if answer.done():
                    return answer.result()
                silent()
                if before_again is not None:
                    await self.tell(before_again)
                await self.tell(question)
        finally:
            answer.cancel()

    async def _hear(self, kind: type[S]) -> S:
        """The next answer of this kind; MigrationError when the target refuses."""
        while True:
            answer = await self._link.receive()
            if isinstance(answer, messages.Refused):
                self.refused = True
                raise MigrationError(f"{self.uri}: {answer.reason}")
            if isinstance(answer, messages.TurnedAway):
                self._turned_away = answer.reason
            if isinstance(answer, kind):
                return answer

    async def unless_lost(self, work: Awaitable[T]) -> T:
        """What the work gives; MigrationError when the target closes its connections first, with the reason
        that it gave, if it did."""
        assert self._lost is not None
        task = asyncio.ensure_future(work)
        failure = MigrationError(f"{self.uri}: the target is gone")
        try:
            await asyncio.wait({task, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        except MigrationError as error:
            failure = error
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        raise await self._explained(failure)

    async def _explained(self, failure: MigrationError) -> MigrationError:
        """A failure, by what the target has to say of it."""
        if self.refused:
            return failure
        with contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout(REASON_SECONDS):
                    if not self._turned_away:
                        await self._hear(messages.TurnedAway)
            except MigrationError as refusal:
                return refusal
        if self._turned_away:
            what = f"the target turned a connection away: {self._turned_away}"
            return MigrationError(f"{self.uri}: {what}; see tls-creds on both sides")
        return failure

    # ---- the end ---------------------------------------------------------------------------------
    def cut(self) -> None:
        channel.cut(self.socks)

    def hang_up(self) -> None:
        """The data connections; the target may still be talked to."""
        if self._lost is not None:
            self._lost.cancel()
        channel.close(self.socks)

    async def close(self) -> None:
        """When the last word has left, if there is somebody to hear it."""
        await self._link.close(LAST_WORD_MS if self.met else 0)

    def say_farewell(self, message: messages.Abort) -> asyncio.Task[None]:
        """For some time, as the target may be out of reach; a task, which may be cancelled."""
        task = asyncio.ensure_future(self._say_farewell(message))
        task.add_done_callback(lambda _: self._link.drop())  # where it has been cancelled before it began
        return task

    async def _say_farewell(self, message: messages.Abort) -> None:
        for _ in range(round(FAREWELL_SECONDS / REMIND_SECONDS)):
            await asyncio.sleep(REMIND_SECONDS)
            await self._link.send(message)
        await self._link.close()
