"""QMP sessions with a machine that is none. Source: QEMU docs/interop/qmp-spec."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from coordinator.contract import messages
from coordinator.contract.errors import IslandError
from coordinator.qmp.server import MOST_WAITING, QmpFrontend
from tests.coordinator.fakes import FakeDevice, FakeVm, settle


class Client:
    def __init__(self, negotiate: bool = True) -> None:
        vm: Any = FakeVm()
        self.vm = vm
        self.device = FakeDevice()
        self.frontend = QmpFrontend(vm)
        self.frontend.connected(self.device)
        self.greeting = self._lines()[0]
        self.negotiate = negotiate

    def _lines(self) -> list[Any]:
        return [json.loads(line) for line in self.device.take().decode().split("\r\n") if line]

    async def send(self, *requests: Any) -> list[Any]:
        """Objects, or bytes as they are; returns what came back."""
        if self.negotiate:
            self.negotiate = False
            assert await self.send({"execute": "qmp_capabilities"}) == [{"return": {}}]
        for request in requests:
            data = request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n"
            self.frontend.received(self.device, data)
        await settle()
        return self._lines()


def session(test: Callable[[Client], Awaitable[None]], **options: bool) -> None:
    async def go() -> None:
        client = Client(**options)
        await test(client)
        client.frontend.disconnected(client.device)
        await settle()

    asyncio.run(go())


def test_greeting_and_negotiation() -> None:
    async def test(client: Client) -> None:
        assert set(client.greeting["QMP"]) == {"version", "capabilities"}
        (reply,) = await client.send({"execute": "query-status"})
        assert reply["error"]["class"] == "CommandNotFound" and "qmp_capabilities" in reply["error"]["desc"]
        client.vm.event("STOP")  # before the negotiation nobody is told
        assert await client.send({"execute": "qmp_capabilities"}) == [{"return": {}}]
        (reply,) = await client.send({"execute": "qmp_capabilities"})
        assert reply["error"]["class"] == "CommandNotFound"
        assert (await client.send({"execute": "query-status"}))[0]["return"]["status"] == "running"

    session(test, negotiate=False)


def test_an_unknown_capability_is_refused() -> None:
    async def test(client: Client) -> None:
        (reply,) = await client.send({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
        assert "error" in reply
        assert await client.send({"execute": "qmp_capabilities"}) == [{"return": {}}]

    session(test, negotiate=False)


@pytest.mark.parametrize("ident", [1, "one", None, {"a": [1]}, [1.5]])
def test_the_id_comes_back(ident: Any) -> None:
    async def test(client: Client) -> None:
        assert await client.send({"execute": "query-name", "id": ident}) == [
            {"return": {"name": "fake"}, "id": ident}
        ]
        (reply,) = await client.send({"execute": "nope", "id": ident})
        assert reply["id"] == ident

    session(test)


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        ([1], "GenericError"),
        ("text", "GenericError"),
        ({}, "GenericError"),
        ({"execute": 5}, "GenericError"),
        ({"execute": "stop", "extra": 1}, "GenericError"),
        ({"execute": "stop", "arguments": [1]}, "GenericError"),
        ({"execute": "stop", "arguments": None}, "GenericError"),
        ({"execute": "nope"}, "CommandNotFound"),
        ({"execute": "stop", "arguments": {"x": 1}}, "GenericError"),
        ({"execute": "eject", "arguments": {"device": "ide1-cd0", "force": "yes"}}, "GenericError"),
        ({"execute": "eject", "arguments": {}}, "GenericError"),
        ({"execute": "eject", "arguments": {"device": "other"}}, "DeviceNotFound"),
        ({"execute": "screendump"}, "GenericError"),
        ({"execute": "send-key", "arguments": {"keys": [], "hold-time": True}}, "GenericError"),
        (b"\xff\n", "GenericError"),
        (b'{"execute": "stop", "execute": "cont"}\n', "GenericError"),
    ],
)
def test_errors(request_: Any, kind: str) -> None:
    async def test(client: Client) -> None:
        (reply,) = await client.send(request_)
        assert reply["error"]["class"] == kind
        assert client.vm.done == []
        assert (await client.send({"execute": "query-name"})) == [{"return": {"name": "fake"}}]

    session(test)


def test_what_goes_wrong_in_a_command_is_told_and_the_session_goes_on() -> None:
    async def test(client: Client) -> None:
        for failure, text in (
            (IslandError("too bad"), "too bad"),
            (ZeroDivisionError("why"), "ZeroDivisionError"),
        ):
            client.vm.answers[messages.PowerButton] = failure
            (reply,) = await client.send({"execute": "system_powerdown"})
            assert reply["error"]["class"] == "GenericError" and text in reply["error"]["desc"]
        assert len(await client.send({"execute": "stop"})) == 2  # event and reply

    session(test)


def test_events_have_a_time_and_only_sometimes_data() -> None:
    async def test(client: Client) -> None:
        await client.send()
        client.vm.event("STOP")
        client.vm.event("RESET", {"guest": True, "reason": "guest-reset"})
        plain, full = client._lines()
        assert plain["event"] == "STOP" and "data" not in plain
        assert set(plain["timestamp"]) == {"seconds", "microseconds"}
        assert 0 <= plain["timestamp"]["microseconds"] < 1_000_000
        assert full["data"] == {"guest": True, "reason": "guest-reset"}

    session(test)


def test_quit_replies_first() -> None:
    async def test(client: Client) -> None:
        await client.send()
        client.vm.quit = lambda: client.vm.done.append(client.device.output)
        assert await client.send({"execute": "quit"}) == [{"return": {}}]
        assert client.vm.done == [b'{"return": {}}\r\n']

    session(test)


def test_commands_for_islands_wait_for_the_start_and_others_do_not() -> None:
    async def test(client: Client) -> None:
        client.vm.up.clear()
        assert len(await client.send({"execute": "query-status"})) == 1
        assert await client.send({"execute": "stop"}) == []
        client.vm.up.set()
        assert len(await client.send()) == 2

    session(test)


def test_a_peer_that_goes_drops_what_waits_but_not_what_is_under_way() -> None:
    async def test(client: Client) -> None:
        gate = asyncio.Event()
        stop = client.vm.stop

        async def slow() -> None:
            await gate.wait()
            await stop()

        client.vm.stop = slow
        assert await client.send({"execute": "stop"}, {"execute": "cont"}) == []
        client.frontend.disconnected(client.device)
        client.frontend.connected(client.device)  # the next client
        gate.set()
        await settle()
        assert client.vm.done == ["stop"]
        (greeting,) = client._lines()
        assert "QMP" in greeting

    session(test)


def test_a_flood_is_held_back() -> None:
    async def test(client: Client) -> None:
        await client.send()
        client.vm.up.clear()
        client.frontend.received(client.device, b'{"execute": "stop"}\n' * (MOST_WAITING + 1))
        waiting = asyncio.ensure_future(client.frontend.room())
        await settle()
        assert not waiting.done()
        client.vm.up.set()
        await settle(2000)
        assert waiting.done() and len(client.vm.done) == MOST_WAITING + 1

    session(test)


def test_pretty() -> None:
    async def go() -> None:
        vm: Any = FakeVm()
        device = FakeDevice()
        frontend = QmpFrontend(vm, pretty=True)
        frontend.connected(device)
        assert b'{\n    "QMP": {' in device.output
        frontend.disconnected(device)
        await settle()

    asyncio.run(go())
