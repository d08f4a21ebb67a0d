"""A drive whose medium is an NBD export: data received straight into guest memory, and a reset on the way."""

from __future__ import annotations

import select
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator

import pytest

from devhost.block_client import BlockClient
from devhost.ide.ata import AtaDrive
from devhost.ide.channel import IdeChannel
from tests.devhost.ide.rig import ERR, Rig, pattern
from tests.support.nbd_wire import WireServer, greet, receive, simple_reply, take_request

SECONDS = 20
IMAGE = bytes(pattern(1 << 20))


@pytest.fixture
def path() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="atoll-")
    yield f"{folder}/nbd"
    shutil.rmtree(folder)


def rig_with(client: BlockClient) -> Rig:
    return Rig(lambda: (AtaDrive(client), None))


def serve_completions(client: BlockClient, channel: IdeChannel, until: int) -> None:
    """What the device host's loop does, until so many requests have ended."""
    drive = channel.fitted[0]
    while until:
        ready, _, _ = select.select([client], [], [], SECONDS)
        assert ready
        for completion in client.on_readable():
            drive.complete(*completion)
            until -= 1


def test_read_and_write_by_dma(path: str) -> None:
    written: list[tuple[int, bytes]] = []

    def script(sock: socket.socket) -> None:
        greet(sock)
        for _ in range(2):
            command, _, cookie, offset, length = take_request(sock)
            if command == 0:
                sock.sendall(simple_reply(cookie, data=IMAGE[offset : offset + length]))
            else:
                written.append((offset, receive(sock, length)))
                sock.sendall(simple_reply(cookie))

    server = WireServer(path, script)
    client = BlockClient(path, "hd0")
    client.connect(SECONDS)
    rig = rig_with(client)
    rig.prds((0x8000, 0x2000), (0x2_0000, 0xE000))
    rig.taskfile(count=128, lba=64)
    rig.command(0xC8)
    rig.start()
    serve_completions(client, rig.channel, 1)
    assert rig.status & ERR == 0
    data = rig.memory.ram[0x8000:0xA000] + rig.memory.ram[0x2_0000:0x2_E000]
    assert data == IMAGE[64 * 512 : 192 * 512]
    rig.prds((0x8000, 0x400))
    rig.taskfile(count=2, lba=9)
    rig.command(0xCA)
    rig.start(to_memory=False)
    serve_completions(client, rig.channel, 1)
    assert rig.status & ERR == 0
    server.finish()
    client.close()
    assert written == [(9 * 512, bytes(data[:0x400]))]


@pytest.mark.parametrize("arrived", [0, 16, 16 + 1000])
def test_reset_while_the_reply_is_under_way(path: str, arrived: int) -> None:
    """After the reset not a byte of the old read lands in guest memory, and the next one is whole."""
    go_on = threading.Event()

    def script(sock: socket.socket) -> None:
        greet(sock)
        _, _, cookie, offset, length = take_request(sock)
        reply = simple_reply(cookie, data=IMAGE[offset : offset + length])
        sock.sendall(reply[:arrived])
        assert go_on.wait(SECONDS)
        sock.sendall(reply[arrived:])
        _, _, cookie, offset, length = take_request(sock)
        sock.sendall(simple_reply(cookie, data=IMAGE[offset : offset + length]))

    server = WireServer(path, script)
    client = BlockClient(path, "hd0")
    client.connect(SECONDS)
    rig = rig_with(client)
    rig.prds((0x8000, 0x1000), (0x2_0000, 0x1000))
    rig.taskfile(count=16)
    rig.command(0xC8)
    rig.start()
    if arrived:
        select.select([client], [], [], SECONDS)
        client.on_readable()
    rig.channel.reset()
    for address in (0x8000, 0x2_0000):
        rig.memory.write(address, b"\x77" * 0x1000)
    go_on.set()
    serve_completions(client, rig.channel, 1)
    assert rig.memory.ram[0x8000:0x9000] == rig.memory.ram[0x2_0000:0x2_1000] == b"\x77" * 0x1000
    rig.taskfile(count=1, lba=5)
    rig.command(0x20)
    serve_completions(client, rig.channel, 1)
    assert rig.words(256) == IMAGE[5 * 512 : 6 * 512]
    server.finish()
    client.close()


def test_cancelled_write_arrives_as_it_was(path: str) -> None:
    """Requests that wait for room in the socket keep the bytes they were made with."""
    seen: list[bytes] = []
    go_on = threading.Event()
    size = 8 << 20

    def script(sock: socket.socket) -> None:
        greet(sock, size=size)
        assert go_on.wait(SECONDS)
        _, _, cookie, _, length = take_request(sock)
        seen.append(receive(sock, length))
        sock.sendall(simple_reply(cookie))

    server = WireServer(path, script)
    client = BlockClient(path, "hd0")
    client.connect(SECONDS)
    data = bytearray(struct.pack("<I", 0x5A5A5A5A) * (size // 4))
    cookie = client.write(0, [memoryview(data)])
    assert client.wants_write
    client.cancel(cookie)
    data[:] = bytes(size)
    go_on.set()
    assert [completion.cookie for completion in client.drain(SECONDS)] == [cookie]
    server.finish()
    client.close()
    assert seen == [struct.pack("<I", 0x5A5A5A5A) * (size // 4)]
