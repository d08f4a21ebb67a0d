"""Who comes through the target's door, and that a source which comes in another way than the target wants
leaves it waiting.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from coordinator.contract.errors import AtollError
from coordinator.contract.tls import server_context
from coordinator.migrate import channel, door
from coordinator.migrate.uri import Uri
from tests.migrate.conftest import Run
from tests.migrate.quiet import Quiet, World
from tests.support.certificates import Certificates, make_certificates

TCP = Uri("tcp", "127.0.0.1", 0)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def silent(entrance: door.Door) -> socket.socket:
    return socket.create_connection(("127.0.0.1", entrance.port))


async def admitted(
    entrance: door.Door, before: Callable[[], Awaitable[None]], tls: channel.Tls | None = None
) -> int:
    """How many come in of two that have the token, when ``before`` has been done."""
    admission = asyncio.ensure_future(entrance.admit(2, tls))
    try:
        await before()
        ours = await channel.connect(TCP, entrance.port, "", entrance.token, 2, None)
        theirs = await asyncio.wait_for(admission, 20)
        assert all(sock.getblocking() for sock in theirs)
        channel.close([*ours, *theirs])
        return len(theirs)
    finally:
        admission.cancel()
        entrance.close()


@pytest.mark.parametrize("strangers", [1, door.MOST + 8])
def test_who_says_nothing_keeps_nobody_waiting(strangers: int) -> None:
    """Also more of them than are let through the door at a time: the oldest have to leave."""

    async def test() -> None:
        entrance = door.Door(TCP)
        socks = [silent(entrance) for _ in range(strangers)]

        async def wait() -> None:
            if strangers > door.MOST:
                await asyncio.wait_for(asyncio.to_thread(socks[0].recv, 1), 20)

        assert await admitted(entrance, wait) == 2
        channel.close(socks)

    asyncio.run(test())


def test_a_wrong_token_and_half_a_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are closed; who takes too long is, too."""
    monkeypatch.setattr(channel, "CONNECT_SECONDS", 0.3)

    async def test() -> None:
        entrance = door.Door(TCP)
        told: list[str] = []
        entrance.on_turned_away = told.append
        wrong, half, slow = (silent(entrance) for _ in range(3))
        wrong.sendall(bytes(door.TOKEN))
        half.sendall(b"x")
        half.shutdown(socket.SHUT_WR)

        async def closed() -> None:
            for sock in (wrong, half, slow):
                assert await asyncio.to_thread(sock.recv, 1) == b""

        assert await admitted(entrance, closed) == 2
        assert told == ["it said nothing"]
        channel.close([wrong, half, slow])

    asyncio.run(test())


def test_plain_where_tls_is_wanted(certificates: Certificates) -> None:
    async def test() -> None:
        entrance = door.Door(TCP)
        told: list[str] = []
        entrance.on_turned_away = told.append
        admission = asyncio.ensure_future(
            entrance.admit(1, channel.Tls(server_context(str(certificates.server))))
        )
        with silent(entrance) as sock:
            sock.sendall(entrance.token)
            async with asyncio.timeout(20):
                while not told:
                    await asyncio.sleep(0.002)
        admission.cancel()
        await asyncio.gather(admission, return_exceptions=True)
        entrance.close()
        assert len(told) == 1 and told[0].startswith("TLS: ")

    asyncio.run(test())


# ---- sources that come in another way --------------------------------------------------------------------
async def refused(source: Quiet, target: Quiet) -> None:
    assert await source.migrates(target) == "failed"
    async with asyncio.timeout(20):
        while target.migration._target._transfer:
            await asyncio.sleep(0.002)


def test_a_file_in_the_way_of_guest_memory_stays(tmp_path: Path) -> None:
    (tmp_path / "x.ram").write_text("data")

    async def test() -> None:
        door.Door(Uri("unix", path=str(tmp_path / "x")))

    with pytest.raises(AtollError, match="x.ram is there and is no socket"):
        asyncio.run(test())
    assert (tmp_path / "x.ram").read_text() == "data"


async def waits_on(source: Quiet, target: Quiet, good: Mapping[str, object]) -> None:
    """The guest goes on here; the target waits, and takes the next one that comes as it wants."""
    assert (source.state, source.runs) == ("running", True)
    assert (target.state, target.ending.done()) == ("inmigrate", False)
    assert "\n" not in source.error
    source.migration.set(dict(good))
    source.write(77)
    assert await source.migrates(target) == "completed", source.error
    assert await target.done() == "completed"
    assert (target.runs, target.read()) == (True, 77)


def test_tls_against_plain(quiet: Run, certificates: Certificates) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        for _ in range(2):
            source.migration.set({"tls-creds": str(certificates.client), "tls-hostname": "localhost"})
            await refused(source, target)
            assert "the source wants TLS and the target has no tls-creds" in source.error
        await waits_on(source, target, {"tls-creds": ""})

    quiet(test)


def secret(world: World, certificates: Certificates) -> Quiet:
    """A target that wants TLS."""
    vm = Quiet(world, world.target().options)
    vm.state = "inmigrate"
    vm.migration.set({"tls-creds": str(certificates.server)})
    vm.migration.incoming(vm.uri)
    return vm


def test_plain_against_tls(quiet: Run, certificates: Certificates) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), secret(world, certificates)
        await refused(source, target)
        assert "the target wants TLS and the source has no tls-creds" in source.error
        good = {"tls-creds": str(certificates.client), "tls-hostname": "localhost"}
        await waits_on(source, target, good)

    quiet(test)


@pytest.mark.parametrize("who", ["stranger", "anonymous"])
def test_a_source_whose_certificate_does_not_do(quiet: Run, certificates: Certificates, who: str) -> None:
    """It is told why, by the target."""

    async def test(world: World) -> None:
        source, target = await world.source(), secret(world, certificates)
        good = {"tls-creds": str(certificates.client), "tls-hostname": "localhost"}
        source.migration.set({**good, "tls-creds": str(getattr(certificates, who))})
        await refused(source, target)
        assert "TLS: " in source.error and "tls-creds" in source.error, source.error
        await waits_on(source, target, good)

    quiet(test)


def test_a_target_of_another_name(quiet: Run, certificates: Certificates) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), secret(world, certificates)
        good = {"tls-creds": str(certificates.client), "tls-hostname": "localhost"}
        source.migration.set({**good, "tls-hostname": "other.example"})
        await refused(source, target)
        assert "not valid for" in source.error
        await waits_on(source, target, good)

    quiet(test)


def test_credentials_of_no_use_are_told_at_once(
    quiet: Run, certificates: Certificates, tmp_path: Path
) -> None:
    """At migrate-incoming, not when a source comes."""
    broken = tmp_path / "broken"
    shutil.copytree(certificates.server, broken)
    (broken / "server-key.pem").write_text("junk")

    async def test(world: World) -> None:
        for folder in (tmp_path / "missing", broken):
            vm = Quiet(world, world.target().options)
            vm.state = "inmigrate"
            vm.migration.set({"tls-creds": str(folder)})
            with pytest.raises(AtollError, match=str(folder)):
                vm.migration.incoming(vm.uri)

    quiet(test)
