"""The proxy, between real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator

from coordinator.lab.proxy import Proxy, Shape

LOOPBACK = "127.0.0.1"


@contextlib.asynccontextmanager
async def echo(shape: Shape, seed: int = 1) -> AsyncIterator[tuple[Proxy, int]]:
    """A server that says everything again, behind a proxy: the proxy and its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, LOOPBACK, 0)
    proxy = Proxy(LOOPBACK, LOOPBACK, shape, seed)
    await proxy.start({0: server.sockets[0].getsockname()[1]})
    try:
        yield proxy, proxy.ports[0]
    finally:
        await proxy.stop()
        server.close()


async def ask(port: int, data: bytes) -> bytes:
    """What comes back, to the end."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port)

    async def send() -> None:
        with contextlib.suppress(OSError):
            writer.write(data)
            await writer.drain()
            writer.write_eof()

    sending = asyncio.ensure_future(send())
    found = b""
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 16):
            found += piece
    await sending
    writer.close()
    return found


def test_all_bytes_come_through_in_order() -> None:
    data = random.Random(1).randbytes(3_000_001)

    async def go() -> list[bytes]:
        async with echo(Shape(delay=0.001)) as (_, port):
            return await asyncio.gather(*(ask(port, data[i:]) for i in range(3)))

    assert asyncio.run(go()) == [data[i:] for i in range(3)]


def test_delay_is_there_both_ways() -> None:
    async def go() -> float:
        async with echo(Shape(delay=0.05)) as (_, port):
            began = time.monotonic()
            assert await ask(port, b"x") == b"x"
            return time.monotonic() - began

    assert asyncio.run(go()) >= 0.1


def test_rate_is_not_exceeded() -> None:
    async def go() -> float:
        async with echo(Shape(rate=1e6)) as (_, port):
            began = time.monotonic()
            assert len(await ask(port, bytes(200_000))) == 200_000
            return time.monotonic() - began

    assert asyncio.run(go()) >= 0.2


def test_connections_that_break_do_so_for_both_sides() -> None:
    async def go() -> tuple[int, int, list[bytes]]:
        async with echo(Shape(loss=1.0, loss_within=1000)) as (proxy, port):
            found = [await ask(port, bytes(5000)) for _ in range(3)]
            return proxy.connections, proxy.broken, found

    connections, broken, found = asyncio.run(go())
    assert connections == broken == 3 and all(len(data) < 5000 for data in found)


def test_which_connections_break_is_the_seeds_choice() -> None:
    async def go(seed: int) -> list[bool]:
        async with echo(Shape(loss=0.5, loss_within=1), seed) as (_, port):
            return [await ask(port, b"hello") == b"hello" for _ in range(20)]

    first = asyncio.run(go(3))
    assert asyncio.run(go(3)) == first and 0 < sum(first) < 20


def test_a_target_that_is_not_there_is_a_closed_connection() -> None:
    async def go() -> bytes:
        async with echo(Shape()) as (_, _port):
            proxy = Proxy(LOOPBACK, LOOPBACK, Shape())
            await proxy.start({0: 1})  # nobody listens at port 1
            try:
                return await ask(proxy.ports[0], b"x")
            finally:
                await proxy.stop()

    assert asyncio.run(go()) == b""
