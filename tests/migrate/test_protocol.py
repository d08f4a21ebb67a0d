"""Both sides of a migration in one process, with a fault at every point: never do two run, and before the
commit point the source goes on, after it the target does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import zmq
import zmq.asyncio

from coordinator.contract import durable
from coordinator.contract.codec import encode
from coordinator.contract.errors import ConfigError
from coordinator.migrate import decision, faults, keys, messages
from coordinator.migrate.link import Dialer, Listener
from coordinator.migrate.source import PHASES
from tests.migrate.quiet import Canceller, Quiet, World

Run = Callable[[Callable[[World], Awaitable[None]]], None]

NAMES = [phase.name for phase in PHASES]
#: in the order in which they come
ORDER = [
    point for name in NAMES for point in (name, *(["quiesce"] if name == "stop" else []), f"{name}.done")
]
COMMITTED = ORDER[ORDER.index("release") + 1 :]
BEFORE = ORDER[: ORDER.index("release") + 1]
#: the connections are there, and somebody works with them or looks at them
CONNECTED = ORDER[ORDER.index("negotiate.done") : ORDER.index("verify") + 1]


def test_points_are_those_of_the_phases() -> None:
    assert set(faults.POINTS) == set(ORDER) | {
        point for point in faults.POINTS if point.startswith("target.")
    }


async def went_on(source: Quiet, target: Quiet, why: str) -> None:
    """The source has the guest, and the target ends; a second attempt to another target succeeds."""
    assert (source.state, source.runs) == ("running", True)
    assert why in source.error
    if not target.migration._target._transfer:
        again = target  # it has not heard of the first attempt
    else:
        assert "incoming migration" in await target.ended()
        again = source.world.target()
    source.write(77)
    assert await source.migrates(again) == "completed"
    await moved(source, again)


async def moved(source: Quiet, target: Quiet) -> None:
    assert await target.done() == "completed"
    assert (source.state, source.runs) == ("postmigrate", False)
    assert (target.state, target.runs, target.read()) == ("running", True, 77)
    assert target.epoch == source.epoch + 1
    assert list(decision.folder().glob("*")) == []


@pytest.mark.parametrize("point", BEFORE)
def test_source_fails(quiet: Run, point: str) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        assert await source.migrates(target, f"{point}=fail") == "failed"
        await went_on(source, target, f"fault injected at {point}")

    quiet(test)


@pytest.mark.parametrize("point", COMMITTED)
def test_source_fails_when_the_guest_is_released(quiet: Run, point: str) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.write(77)
        assert await source.migrates(target, f"{point}=fail") == "completed"
        await moved(source, target)

    quiet(test)


@pytest.mark.parametrize("point", ORDER)
def test_source_loses_its_connections(quiet: Run, point: str) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.write(77)
        status = await source.migrates(target, f"{point}=cut")
        if point in CONNECTED:
            assert status == "failed"
            await went_on(source, target, "")
        else:
            assert status == "completed"
            await moved(source, target)

    quiet(test)


@pytest.mark.parametrize(
    "point", [*ORDER, *(point for point in faults.POINTS if point.startswith("target."))]
)
def test_a_delay_changes_nothing(quiet: Run, point: str) -> None:
    async def test(world: World) -> None:
        source = await world.source()
        target = world.target(f"{point}=delay:40")
        source.write(77)
        assert await source.migrates(target, f"{point}=delay:40") == "completed"
        await moved(source, target)

    quiet(test)


@pytest.mark.parametrize("point", ORDER)
def test_cancel(quiet: Run, point: str) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.write(77)
        source.migration.migrate(target.uri)
        canceller = Canceller(source.migration, point)
        source.migration._source._fault = canceller
        status = await source.done()
        assert canceller.called
        if point in COMMITTED:
            assert canceller.refused is not None and "migrate-recover" in canceller.refused
            assert status == "completed"
            await moved(source, target)
        else:
            assert (canceller.refused, status) == (None, "cancelled")
            await went_on(source, target, "")

    quiet(test)


@pytest.mark.parametrize("kind", ["lose", "double"])
@pytest.mark.parametrize("point", faults.SAYING)
def test_messages_are_lost_or_come_twice(quiet: Run, point: str, kind: str) -> None:
    async def test(world: World) -> None:
        source = await world.source()
        target = world.target(f"{point}={kind}")
        source.write(77)
        assert await source.migrates(target, f"{point}={kind}") == "completed"
        await moved(source, target)

    quiet(test)


@pytest.mark.parametrize("point", ["target.negotiate", "target.receive", "target.load", "target.verify"])
@pytest.mark.parametrize("kind", ["fail", "cut"])
def test_target_fails(quiet: Run, point: str, kind: str) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target(f"{point}={kind}")
        source.write(77)
        status = await source.migrates(target)
        if (point, kind) == ("target.negotiate", "cut"):  # there are no connections yet
            assert status == "completed"
            await moved(source, target)
        else:
            assert status == "failed"
            await went_on(source, target, f"fault injected at {point}" if kind == "fail" else "")

    quiet(test)


def test_target_fails_when_it_has_been_told_to_run(quiet: Run) -> None:
    """Nobody has the guest then, and both say so."""

    async def test(world: World) -> None:
        source, target = await world.source(), world.target("target.resume=fail")
        assert await source.migrates(target) == "failed"
        assert (source.state, source.runs) == ("postmigrate", False)
        assert "fault injected at target.resume" in source.error
        assert "fault injected at target.resume" in await target.ended()
        with pytest.raises(Exception, match="has been migrated away"):
            await source.cont()
        with pytest.raises(Exception, match="has been migrated away"):
            await source.reset()
        assert world.running == []

    quiet(test)


@pytest.mark.parametrize("seed", range(24))
def test_any_message_may_be_lost_or_come_twice(
    quiet: Run, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    for end in (Dialer, Listener):
        send: Any = end.send

        async def unreliable(self: Any, message: Any, send: Any = send) -> Any:
            result = True
            for _ in range(rng.choice((0, 0, 1, 1, 2))):
                result = await send(self, message)
            return result

        monkeypatch.setattr(end, "send", unreliable)

    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.write(77)
        assert await source.migrates(target) == "completed"
        await moved(source, target)

    quiet(test)


@pytest.mark.parametrize("seed", range(12))
def test_the_control_connection_breaks_at_any_time(
    quiet: Run, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back with another connection behind the same name, and nothing is lost for good."""
    rng = random.Random(seed)
    receive = Dialer.receive

    async def breaking(self: Dialer) -> Any:
        self._socket.disconnect(self._endpoint)
        await asyncio.sleep(rng.random() * 0.02)
        self._socket.connect(self._endpoint)
        return await receive(self)

    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.write(77)
        monkeypatch.setattr(Dialer, "receive", breaking)
        assert await source.migrates(target) == "completed"
        await moved(source, target)

    quiet(test)


# ---- the record -----------------------------------------------------------------------------------------
class Broken(durable.Folder):
    """Fails at one of its operations."""

    at = ""

    def create(self, name: str, data: bytes) -> bool:
        if self.at == "create":
            raise OSError(28, "No space left on device")
        return super().create(name, data)

    def sync(self) -> None:
        if self.at == "sync":
            raise OSError(5, "Input/output error")
        super().sync()


def broken(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    monkeypatch.setattr(Broken, "at", at)
    for name in ("decide", "decided"):
        monkeypatch.setattr(
            decision.decision, name, partial(getattr(decision.decision, name), folder_type=Broken)
        )


def test_a_record_that_cannot_be_made_keeps_the_guest_here(
    quiet: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        with monkeypatch.context() as patch:
            broken(patch, "create")
            assert await source.migrates(target) == "failed"
        assert list(decision.folder().glob("*")) == []
        await went_on(source, target, "No space left on device; the guest stays here")

    quiet(test)


def test_a_record_that_is_there_counts_durable_or_not(quiet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others could have seen it: the source must not go on."""

    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.write(77)
        with monkeypatch.context() as patch:
            broken(patch, "sync")
            assert await source.migrates(target) == "completed"
        await moved(source, target)

    quiet(test)


def test_target_goes_on_by_the_record_of_a_source_that_is_no_more(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.write(77)
        source.migration.set({"x-fault": "resume=delay:60000"})
        source.migration.migrate(target.uri)
        async with asyncio.timeout(10):
            while not (source.migration._source.committed and target.migration._target.in_doubt):
                await asyncio.sleep(0.01)
            record = decision.place(source.migration._source.transfer)
            while not record.exists():
                await asyncio.sleep(0.01)
        decision.release("foreign", 1, "another", "")
        foreign = decision.place("foreign")
        for wrong, what in ((foreign, "another migration"), (record.with_name("none"), "of no machine")):
            with pytest.raises(Exception, match=what):
                await target.migration.recover(f"file:{wrong}")
        (world.folder / "junk").write_bytes(b"\xff{")
        with pytest.raises(Exception, match="junk"):
            await target.migration.recover(f"file:{world.folder / 'junk'}")
        assert not target.runs
        await target.migration.recover(f"file:{record}")
        assert await target.done() == "completed"
        assert target.runs and target.read() == 77
        await source.shut()
        foreign.unlink()
        record.unlink()

    quiet(test)


def test_target_at_another_address(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.write(77)
        source.migration.set({"x-fault": "resume=delay:150"})
        source.migration.migrate(target.uri)
        async with asyncio.timeout(10):
            while not source.migration._source.committed:
                await asyncio.sleep(0.005)
        other = f"{target.uri}-other"
        await target.migration.recover(other)
        with pytest.raises(ConfigError, match="tcp: or unix:"):
            await source.migration.resume(f"file:{world.folder}/x")
        await source.migration.resume(other)
        assert await source.done() == "completed"
        await moved(source, target)

    quiet(test)


def test_nothing_to_recover_or_to_resume(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        with pytest.raises(ConfigError, match="no migration that waits"):
            await target.migration.recover("file:/nowhere")
        with pytest.raises(ConfigError, match="no migration that waits"):
            await source.migration.recover("file:/nowhere")
        with pytest.raises(ConfigError, match="no paused migration"):
            await source.migration.resume(target.uri)
        source.migration.cancel()
        target.migration.cancel()
        assert await source.migrates(target) == "completed"
        with pytest.raises(ConfigError, match="migrated away already"):
            source.migration.migrate(target.uri)
        with pytest.raises(ConfigError, match="no paused migration"):
            await source.migration.resume(target.uri)

    quiet(test)


# ---- who else comes -------------------------------------------------------------------------------------
def test_a_second_source_is_refused_and_does_not_disturb(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target("target.load=delay:150")
        source.write(77)
        source.migration.migrate(target.uri)
        async with asyncio.timeout(10):
            while target.migration.status.phase != "load":
                await asyncio.sleep(0.002)
        # a stranger to the other two: it may run all the while
        stranger = World(world.folder / "..")
        other = await stranger.source()
        assert await other.migrates(target) == "failed"
        assert "another machine is coming here" in other.error
        assert other.runs
        assert await source.done() == "completed"
        await moved(source, target)
        await stranger.close()

    quiet(test)


OFFER = messages.Offer(
    transfer="stranger",
    protocol=messages.PROTOCOL,
    epoch=1,
    description=b"",
    channels=1,
    compression="none",
    tls=False,
)


class Peer:
    """A client of a target that says what it likes."""

    def __init__(self, uri: str, name: str, pair: keys.Pair) -> None:
        self.socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.ROUTING_ID, name.encode())
        self.socket.curve_publickey, self.socket.curve_secretkey = pair.public, pair.secret
        self.socket.curve_serverkey = keys.own().public
        self.socket.connect(uri.replace("unix:", "ipc://"))

    async def hears(self) -> Any:
        return messages.of_target.decode(await asyncio.wait_for(self.socket.recv(), 10))


def test_junk_and_stale_messages_are_dropped(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target("target.verify=delay:100")
        peer = Peer(target.uri, "stranger", keys.own())
        for junk in (
            b"",
            b"\xff" * 1000,
            b"\x81\xa4type\xa5offer",
            encode({"type": "offer"}),
            b"\x91" * 2000,
        ):
            await peer.socket.send(junk)
        await peer.socket.send_multipart([b"one", b"two", b"three"])
        stale = [
            messages.Abort(transfer="stranger", reason="stale"),
            messages.Released(transfer="stranger", epoch=1),
            messages.Heard(transfer="stranger"),
            messages.State(transfer="stranger", state=b""),
            messages.Complete(transfer="stranger", normal=0, zero=0),
        ]
        for message in stale:
            await peer.socket.send(encode(message))
        source.write(77)
        source.migration.migrate(target.uri)
        async with asyncio.timeout(10):
            while not target.migration._target._transfer:
                await asyncio.sleep(0.002)
        transfer = source.migration._source.transfer
        for message in (
            *stale,
            messages.Released(transfer=transfer, epoch=7),
        ):  # of the right one, of no epoch of it
            await peer.socket.send(encode(message))
        assert await source.done() == "completed"
        await moved(source, target)
        peer.socket.close()

    quiet(test)


def test_a_word_of_another_epoch_lets_nobody_run(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        source.migration.set({"x-fault": "verify.done=delay:200"})
        source.migration.migrate(target.uri)
        async with asyncio.timeout(10):
            while not target.migration._target.in_doubt:
                await asyncio.sleep(0.002)
        peer = Peer(target.uri, "stranger", keys.own())
        transfer = source.migration._source.transfer
        for epoch in (0, 2, -1):
            await peer.socket.send(encode(messages.Released(transfer=transfer, epoch=epoch)))
        await peer.socket.send(encode(OFFER))
        assert isinstance(await peer.hears(), messages.Refused)  # so those before have been read
        assert not target.runs
        assert await source.done() == "completed"
        peer.socket.close()

    quiet(test)


def test_an_unknown_key_gets_nothing(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        peer = Peer(target.uri, "stranger", keys.Pair(*zmq.curve_keypair()))
        offer = messages.Offer(
            transfer="stranger",
            protocol=messages.PROTOCOL,
            epoch=1,
            description=b"",
            channels=1,
            compression="none",
            tls=False,
        )
        await peer.socket.send(encode(offer))
        source.write(77)
        assert await source.migrates(target) == "completed"  # nobody else has come
        await moved(source, target)
        with pytest.raises(zmq.Again):
            await peer.socket.recv(zmq.DONTWAIT)
        peer.socket.close()

    quiet(test)


def test_a_source_whose_key_is_not_known_is_told(quiet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        server, stranger = keys.own().public, keys.Pair(*zmq.curve_keypair())
        monkeypatch.setattr(keys, "own", lambda: stranger)
        monkeypatch.setattr(keys, "of_host", lambda host, local: server)
        assert await source.migrates(target) == "failed"
        assert "does not know our key; copy" in source.error
        assert source.runs

    quiet(test)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("unix:{folder}/nobody", "nobody listens there"),
        ("tcp:127.0.0.1:1", "nobody listens there"),
        ("tcp:127.0.0.1:0", "nobody listens there"),
        ("tcp:no.such.host.invalid:4444", "no.such.host.invalid"),
        ("unix:{folder}/" + "x" * 200, "cannot be connected to"),
    ],
)
def test_nobody_there(quiet: Run, where: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.migrate.link.REFUSED_SECONDS", 0.1)
    monkeypatch.setattr(keys, "of_host", lambda host, local: keys.own().public)

    async def test(world: World) -> None:
        source = await world.source()
        source.migration.migrate(where.format(folder=world.folder))
        assert await source.done() == "failed"
        assert why in source.error and "\n" not in source.error
        assert source.runs

    quiet(test)


@pytest.mark.parametrize("last", [b"", b"\xff\0\0\0\0\0\0\0\x01\x7f\x03"])
def test_the_old_listener_is_just_dying(quiet: Run, last: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware cases, item 25: to connect succeeds, what is written first fails; or half a greeting (ZMTP,
    RFC 23) comes first. The whole handshake is made again, with the one that listens next."""
    monkeypatch.setattr("coordinator.migrate.link.REFUSED_SECONDS", 10)

    async def test(world: World) -> None:
        source = await world.source()
        came: list[None] = []

        async def dying(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            came.append(None)
            writer.write(last)
            with contextlib.suppress(OSError):
                await writer.drain()
            writer.close()

        path = world.folder / "m1"
        old = await asyncio.start_unix_server(dying, path)
        source.write(77)
        source.migration.migrate(f"unix:{path}")
        async with asyncio.timeout(10):
            while len(came) < 3:
                await asyncio.sleep(0.002)
        old.close()
        await old.wait_closed()
        path.unlink()
        target = world.target()
        assert target.uri == f"unix:{path}"
        assert await source.done() == "completed", source.error
        await moved(source, target)

    quiet(test)


def test_somebody_else_listens_there(quiet: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QMP socket, say."""
    monkeypatch.setattr("coordinator.migrate.link.REFUSED_SECONDS", 0.1)

    async def test(world: World) -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'{"QMP": {}}\r\n')
            with contextlib.suppress(OSError):
                await reader.read()
            writer.close()

        server = await asyncio.start_unix_server(greet, world.folder / "qmp")
        source = await world.source()
        source.migration.migrate(f"unix:{world.folder}/qmp")
        assert await source.done() == "failed"
        assert "no machine that waits" in source.error
        server.close()

    quiet(test)


def test_listening_removes_nothing(quiet: Run) -> None:
    """To bind a ZeroMQ socket would remove whatever has the name."""

    async def test(world: World) -> None:
        precious = world.folder / "precious"
        precious.write_text("data")
        target = world.target()
        target.migration.status.state = "completed"
        for path, why in (
            (precious, "is no socket"),
            (world.folder / "m0", "somebody listens"),
            (world.folder / "no/x", "No such"),
        ):
            fresh = Quiet(world, target.options)
            fresh.state = "inmigrate"
            if why == "No such":
                with pytest.raises(Exception, match="cannot listen"):
                    fresh.migration.incoming(f"unix:{path}")
            else:
                with pytest.raises(Exception, match=why):
                    fresh.migration.incoming(f"unix:{path}")
        assert precious.read_text() == "data"

    quiet(test)


def test_a_source_that_dies_between_answer_and_connection(quiet: Run) -> None:
    async def test(world: World) -> None:
        source, target = await world.source(), world.target()
        description = b""

        def keep(message: Any) -> None:
            nonlocal description
            description = message.description

        send = Dialer.send

        async def spy(self: Dialer, message: Any) -> None:
            if isinstance(message, messages.Offer):
                keep(message)
            await send(self, message)

        Dialer.send = spy  # type: ignore[method-assign]
        try:
            assert await source.migrates(target, "negotiate.done=fail") == "failed"
        finally:
            Dialer.send = send  # type: ignore[method-assign]
        lonely = world.target()
        peer = Peer(lonely.uri, "dying", keys.own())
        offer = messages.Offer(
            transfer="dying",
            protocol=messages.PROTOCOL,
            epoch=1,
            description=description,
            channels=1,
            compression="none",
            tls=False,
        )
        await peer.socket.send(encode(offer))
        assert isinstance(await peer.hears(), messages.Accepted)
        peer.socket.close()
        assert "the source is gone" in await lonely.ended()

    quiet(test)
