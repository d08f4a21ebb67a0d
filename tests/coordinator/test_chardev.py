"""Character devices: their spelling and other ends. Source: qemu-system-x86_64(1), -chardev and -serial."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coordinator import chardev
from coordinator.chardev import CUT_BACKLOG, Chardev, SocketDevice
from coordinator.chardev_spec import ChardevSpec, from_properties, parse_device
from coordinator.cli.options import KeyValues
from coordinator.contract.errors import ConfigError, UsageError
from coordinator.terminal import StdioDevice
from tests.coordinator.fakes import settle


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("null", ChardevSpec("null")), ("none", ChardevSpec("null")), ("vc", ChardevSpec("null")),
        ("vc:80Cx24C", ChardevSpec("null")), ("stdio", ChardevSpec("stdio")),
        ("mon:stdio", ChardevSpec("stdio", mux=True)), ("file:/a b", ChardevSpec("file", path="/a b")),
        ("unix:/s", ChardevSpec("socket", path="/s")),
        ("unix:/s,server=on", ChardevSpec("socket", path="/s", server=True, wait=True)),
        ("unix:/s,server=on,wait=off", ChardevSpec("socket", path="/s", server=True)),
        ("unix:/s,server,nowait", ChardevSpec("socket", path="/s", server=True)),
        ("unix:/a,,b,server", ChardevSpec("socket", path="/a,b", server=True, wait=True)),
        ("tcp::4444,server,nowait,nodelay", ChardevSpec("socket", host="127.0.0.1", port=4444, server=True)),
        ("tcp:localhost:1", ChardevSpec("socket", host="localhost", port=1)),
    ],
)  # fmt: skip
def test_short_forms(text: str, spec: ChardevSpec) -> None:
    assert parse_device("serial", text) == spec


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "file:",
        "pipe:x",
        "tcp:x",
        "tcp:h:0",
        "tcp:h:65536",
        "tcp:h:５",
        "chardev:x",
        "unix:/s,sever",
    ],
)
def test_no_short_forms(text: str) -> None:
    with pytest.raises(UsageError):
        parse_device("serial", text)


def test_long_form() -> None:
    text = "socket,id=q,path=/s,server=on,wait=off"
    assert from_properties(KeyValues("chardev", text, implied="backend")) == ChardevSpec(
        "socket", id="q", path="/s", host="127.0.0.1", server=True
    )


class Peer:
    """A frontend that keeps what it is told."""

    def __init__(self) -> None:
        self.log: list[str | bytes] = []

    def connected(self, device: Chardev) -> None:
        self.log.append("connected")

    def disconnected(self, device: Chardev) -> None:
        self.log.append("disconnected")

    def received(self, device: Chardev, data: bytes) -> None:
        self.log.append(data)

    async def room(self) -> None: ...


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def server(path: Path) -> tuple[SocketDevice, Peer]:
    device, peer = SocketDevice(ChardevSpec("socket", path=str(path), server=True)), Peer()
    device.frontend = peer
    return device, peer


def test_one_client_after_another(tmp_path: Path) -> None:
    async def test() -> None:
        device, peer = server(tmp_path / "s")
        await device.open()
        first_in, first = await asyncio.open_unix_connection(str(tmp_path / "s"))
        await until(lambda: peer.log == ["connected"])
        second_in, second = await asyncio.open_unix_connection(str(tmp_path / "s"))  # waits its turn
        second.write(b"2")
        first.write(b"1")
        await until(lambda: b"1" in peer.log)
        device.write(b"to the first")
        assert await first_in.readexactly(12) == b"to the first"
        first.close()
        await until(lambda: b"2" in peer.log)
        assert peer.log == ["connected", b"1", "disconnected", "connected", b"2"]
        device.write(b"to the second")
        assert await second_in.readexactly(13) == b"to the second"
        await device.close()
        assert await second_in.read() == b"" and not (tmp_path / "s").exists()
        second.close()

    run(test)


def test_a_dead_socket_is_replaced_a_living_one_is_not(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "s"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        device, _ = server(path)
        await device.open()
        other, _ = server(path)
        with pytest.raises(ConfigError, match="in use by another process"):
            await other.open()
        await other.close()
        assert path.exists()
        await device.close()
        path.write_text("a file")
        with pytest.raises(ConfigError, match="not a socket"):
            await server(path)[0].open()
        assert path.read_text() == "a file"

    run(test)


def test_a_serial_line_loses_bytes_a_monitor_is_cut(tmp_path: Path) -> None:
    async def test() -> None:
        async def one(lossy: bool) -> None:
            device, peer = server(tmp_path / "s")
            device.lossy = lossy
            await device.open()
            _, client = await asyncio.open_unix_connection(str(tmp_path / "s"))
            await until(lambda: peer.log)
            for _ in range(CUT_BACKLOG // (1 << 20) + 4):
                device.write(bytes(1 << 20))
            await settle()
            if lossy:
                assert peer.log == ["connected"]
            else:
                await until(lambda: "disconnected" in peer.log)
            client.transport.abort()
            await device.close()

        for lossy in (True, False):
            await one(lossy)

    run(test)


def test_client(tmp_path: Path) -> None:
    async def test() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "s"))
            listener.listen()
            device, peer = SocketDevice(ChardevSpec("socket", path=str(tmp_path / "s"))), Peer()
            device.frontend = peer
            await device.open()
            await device.wait()
            with listener.accept()[0] as connection:
                connection.sendall(b"hello")
                await until(lambda: b"hello" in peer.log)
            await until(lambda: "disconnected" in peer.log)
            device.write(b"nobody is there")
            await device.close()

    run(test)


def test_closing_what_was_never_opened() -> None:
    async def test() -> None:
        for kind in ("null", "file", "stdio", "socket"):
            await chardev.make(ChardevSpec(kind, path="/nowhere/at/all")).close()

    run(test)


def test_file_truncates_or_appends(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "f"
        for append, expected in ((False, b"new"), (True, b"newnew")):
            device = chardev.make(ChardevSpec("file", path=str(path), append=append))
            await device.open()
            device.write(b"new")
            await device.close()
            device.write(b"late")  # after the end: nothing
            assert path.read_bytes() == expected

    run(test)


def test_standard_input_ends_without_ado() -> None:
    async def test() -> None:
        reader, writer = os.pipe()
        out_reader, out_writer = os.pipe()
        device, peer = StdioDevice(ChardevSpec("stdio"), reader, out_writer), Peer()
        device.frontend = peer
        await device.open()
        os.write(writer, b"in")
        os.close(writer)
        await until(lambda: b"in" in peer.log)
        device.write(b"out")
        await device.close()
        assert os.read(out_reader, 10) == b"out"
        for fd in (reader, out_reader, out_writer):
            os.close(fd)

    run(test)
