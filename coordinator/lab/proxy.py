"""A TCP proxy that makes a network worse: delay, a limited rate, connections that break.

The kernel's own means (netem) are not everywhere, and need rights. ``python -m coordinator.lab.proxy --listen
ADDRESS --to ADDRESS PORT...`` forwards each port to the same port; it says "ready" when it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import time
from dataclasses import dataclass

#: bytes that are read at once, and that may be on their way in one direction
PIECE = 64 << 10
IN_FLIGHT = 64


@dataclass(frozen=True)
class Shape:
    """``delay``: seconds, each way; ``loss``: share of connections that break, after a random number of bytes
    up to ``loss_within``; ``rate``: bytes a second and direction of each connection, 0 for no limit."""

    delay: float = 0.0
    loss: float = 0.0
    rate: float = 0.0
    loss_within: int = 1 << 20


class Proxy:
    """Between clients of ``listen`` and servers at ``to``. Which connections break is drawn from ``seed``."""

    def __init__(self, listen: str, to: str, shape: Shape, seed: int = 0) -> None:
        self._listen, self._to, self._shape = listen, to, shape
        self._random = random.Random(seed)
        self._servers: list[asyncio.Server] = []
        #: connections so far, and how many of them were broken
        self.connections = self.broken = 0

    async def start(self, ports: dict[int, int]) -> None:
        """``ports``: ours, and the one it leads to; OSError where one is taken."""
        for ours, theirs in ports.items():

            async def accept(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int = theirs
            ) -> None:
                await self._connection(reader, writer, port)

            self._servers.append(await asyncio.start_server(accept, self._listen, ours))

    @property
    def ports(self) -> list[int]:
        return [server.sockets[0].getsockname()[1] for server in self._servers]

    async def stop(self) -> None:
        for server in self._servers:
            server.close()

    async def _connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int
    ) -> None:
        self.connections += 1
        budget = None
        if self._random.random() < self._shape.loss:
            budget = self._random.randrange(self._shape.loss_within)
        try:
            await asyncio.sleep(self._shape.delay)
            far_reader, far_writer = await asyncio.open_connection(self._to, port)
        except OSError:
            writer.transport.abort()
            return
        ways = [
            asyncio.ensure_future(self._carry(reader, far_writer, budget)),
            asyncio.ensure_future(self._carry(far_reader, writer, None)),
        ]
        try:
            await asyncio.gather(*ways)
        except (OSError, _Broken) as error:
            self.broken += isinstance(error, _Broken)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for end in (writer, far_writer):
                end.transport.abort()
        finally:
            for end in (writer, far_writer):
                end.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None
    ) -> None:
        """One direction, to its end; _Broken when ``budget`` bytes have passed."""
        due: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)
        delivery = asyncio.ensure_future(self._deliver(due, writer))
        free = time.monotonic()
        try:
            while data := await reader.read(PIECE):
                if budget is not None:
                    budget -= len(data)
                    if budget <= 0:
                        raise _Broken
                if self._shape.rate:
                    free = max(free, time.monotonic()) + len(data) / self._shape.rate
                    await asyncio.sleep(free - time.monotonic())
                await due.put((time.monotonic() + self._shape.delay, data))
            await due.put((time.monotonic() + self._shape.delay, b""))
            await delivery
        finally:
            delivery.cancel()

    async def _deliver(self, due: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            at, data = await due.get()
            await asyncio.sleep(at - time.monotonic())
            if not data:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


class _Broken(Exception):
    """This connection is one of those that break."""


async def _serve(arguments: argparse.Namespace) -> None:
    shape = Shape(arguments.delay / 1000, arguments.loss, arguments.rate * 1e6)
    proxy = Proxy(arguments.listen, arguments.to, shape, arguments.seed)
    await proxy.start({port: port for port in arguments.ports})
    print("ready", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="proxy", description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--delay", type=float, default=0.0, help="ms, each way")
    parser.add_argument("--loss", type=float, default=0.0, help="share of connections that break")
    parser.add_argument("--rate", type=float, default=0.0, help="MB a second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("ports", type=int, nargs="+")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
