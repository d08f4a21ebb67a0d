"""Data connections in TLS: both sides show a certificate of the authority, or nothing is sent."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from coordinator.contract.errors import MigrationError
from coordinator.contract.tls import client_context, server_context
from coordinator.migrate import channel, door, pump
from coordinator.migrate.pump import Wire
from coordinator.migrate.uri import Uri
from tests.support.certificates import Certificates, make_certificates

TCP = Uri("tcp", "127.0.0.1", 0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


async def connected(
    certificates: Certificates, folder: Path, name: str, count: int = 1
) -> tuple[Sequence[socket.socket], Sequence[socket.socket]]:
    """Both ends. The source has the credentials of ``folder`` and wants a target of this name."""
    entrance = door.Door(TCP)
    admission = asyncio.ensure_future(
        entrance.admit(count, channel.Tls(server_context(str(certificates.server))))
    )
    try:
        tls = channel.Tls(client_context(str(folder), name), name)
        ours = await channel.connect(TCP, entrance.port, entrance.path, entrance.token, count, tls)
        turned_away = asyncio.ensure_future(channel.gone(ours[0]))
        await asyncio.wait({admission, turned_away}, return_when=asyncio.FIRST_COMPLETED)
        turned_away.cancel()
        if not admission.done():
            channel.close(ours)
            raise MigrationError("turned away")
        return ours, await admission
    finally:
        admission.cancel()
        await asyncio.gather(admission, return_exceptions=True)
        entrance.close()


@pytest.mark.parametrize("level", [0, 1])
def test_what_goes_in_comes_out(certificates: Certificates, level: int) -> None:
    data = os.urandom(3 << 20) + bytes(1 << 20)
    came = bytearray()

    def put(fd: int) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def take(fd: int) -> None:
        while piece := os.read(fd, 1 << 16):
            came.extend(piece)

    async def test() -> None:
        ours, theirs = await connected(certificates, certificates.client, "localhost")
        wire = Wire(level, tls=True)
        sent, got = pump.Tally(), pump.Tally()
        try:
            await asyncio.gather(
                asyncio.to_thread(pump.send, ours[0], wire, sent, put),
                asyncio.to_thread(pump.receive, theirs[0], wire, got, take),
            )
        finally:
            channel.close([*ours, *theirs])
        assert sent.bytes == got.bytes > 3 << 20
        assert (sent.bytes < len(data)) == bool(level)

    asyncio.run(test())
    assert came == data


@pytest.mark.parametrize("who", ["stranger", "anonymous"])
def test_a_source_without_a_certificate_that_counts(certificates: Certificates, who: str) -> None:
    with pytest.raises(MigrationError):
        asyncio.run(connected(certificates, getattr(certificates, who), "localhost"))


def test_a_target_of_another_name(certificates: Certificates) -> None:
    with pytest.raises(MigrationError, match="^tcp:127.0.0.1:0: guest memory: TLS: .*not valid for") as error:
        asyncio.run(connected(certificates, certificates.client, "other.example"))
    assert "\n" not in str(error.value)
