"""QMP sessions: greeting, negotiation, commands one after another, events.

Source: QEMU docs/interop/qmp-spec.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

from coordinator.chardev import Chardev
from coordinator.contract.errors import AtollError
from coordinator.machine import Vm
from coordinator.media import NotFound
from coordinator.qmp import commands
from coordinator.qmp.parser import JsonError, Parser
from coordinator.version import version

log = logging.getLogger(__name__)

#: commands that wait; a peer that sends more is not read from meanwhile
MOST_WAITING = 64


class QmpError(Exception):
    """An error reply: ``kind`` is QMP's class."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


class QmpFrontend:
    """What sits at a character device: a new session with every connection."""

    def __init__(self, vm: Vm, pretty: bool = False) -> None:
        self._vm = vm
        self._indent = 4 if pretty else None
        self._session: Session | None = None
        vm.on_event.append(self.event)

    def connected(self, device: Chardev) -> None:
        self._session = Session(self._vm, device, self._indent)

    def disconnected(self, device: Chardev) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def received(self, device: Chardev, data: bytes) -> None:
        if self._session is not None:
            self._session.received(data)

    async def room(self) -> None:
        if self._session is not None:
            await self._session.room()

    def event(self, name: str, data: dict[str, Any]) -> None:
        if self._session is not None:
            self._session.event(name, data)


class Session:
    """From the greeting to the end of the connection.

    Commands are carried out in order; the reply leaves before the next one starts. A command that is
    under way when the peer goes is carried out to its end, those behind it are dropped.
    """

    def __init__(self, vm: Vm, device: Chardev, indent: int | None) -> None:
        self._vm = vm
        self._device: Chardev | None = device
        self._indent = indent
        self._parser = Parser()
        self._negotiated = False
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._fits = asyncio.Event()
        self._fits.set()
        self._worker = asyncio.create_task(self._work())
        self._send({"QMP": {"version": version(), "capabilities": []}})

    def close(self) -> None:
        self._device = None
        self._queue.put_nowait(None)

    def received(self, data: bytes) -> None:
        for value in self._parser.feed(data):
            self._queue.put_nowait(value)
        if self._queue.qsize() >= MOST_WAITING:
            self._fits.clear()

    async def room(self) -> None:
        await self._fits.wait()

    def _send(self, message: dict[str, Any]) -> None:
        if self._device is not None:
            text = json.dumps(message, indent=self._indent, allow_nan=False)
            self._device.write(text.encode() + b"\r\n")

    def event(self, name: str, data: dict[str, Any]) -> None:
        if not self._negotiated:
            return
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        message: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
            "event": name,
        }
        if data:
            message["data"] = data
        self._send(message)

    # ---- commands --------------------------------------------------------------------------------
    async def _work(self) -> None:
        while self._device is not None:
            request = await self._queue.get()
            if self._queue.qsize() < MOST_WAITING:
                self._fits.set()
            if self._device is not None:
                await self._answer(request)

    async def _answer(self, request: Any) -> None:
        ident = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
        try:
            if isinstance(request, JsonError):
                raise QmpError(str(request))
            value, after = await self._execute(request)
            self._send({"return": value, **ident})
            if after is not None:
                after()
        except QmpError as error:
            self._send_error(str(error), error.kind, ident)
        except NotFound as error:
            self._send_error(str(error), "DeviceNotFound", ident)
        except (AtollError, OSError) as error:
            self._send_error(str(error), "GenericError", ident)
        except Exception as error:  # a mistake of ours, or a name no system call takes: this session goes on
            log.info("QMP: %r", error, exc_info=error)
            self._send_error(f"the command failed: {error!r}", "GenericError", ident)

    def _send_error(self, text: str, kind: str, ident: dict[str, Any]) -> None:
        self._send({"error": {"class": kind, "desc": text}, **ident})

    async def _execute(self, request: Any) -> tuple[Any, commands.After | None]:
        if not isinstance(request, dict):
            raise QmpError("QMP input must be a JSON object")
        unknown = set(request) - {"execute", "arguments", "id"}
        if unknown:
            raise QmpError(f"QMP input member '{sorted(unknown)[0]}' is unexpected")
        name, arguments = request.get("execute"), request.get("arguments", {})
        if name is None:
            raise QmpError("QMP input lacks member 'execute'")
        if not isinstance(name, str):
            raise QmpError("QMP input member 'execute' must be a string")
        if not isinstance(arguments, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if name == "qmp_capabilities":
            return self._negotiate(arguments), None
        if not self._negotiated:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        command = commands.COMMANDS.get(name)
        if command is None:
            raise QmpError(f"The command {name} has not been found", "CommandNotFound")
        _check(command, arguments)
        if not command.early:
            await self._vm.started()
        result = await command.function(
            self._vm, **{key.replace("-", "_"): value for key, value in arguments.items()}
        )
        if isinstance(result, commands.Then):
            return result.value, result.after
        return {} if result is None else result, None

    def _negotiate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self._negotiated:
            raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        if arguments.get("enable"):
            raise QmpError("Capability 'oob' disabled")
        self._negotiated = True
        return {}


def _check(command: commands.Command, arguments: dict[str, Any]) -> None:
    for key, value in arguments.items():
        parameter = command.parameters.get(key)
        if parameter is None:
            raise QmpError(f"Parameter '{key}' is unexpected")
        if not isinstance(value, parameter.type) or (isinstance(value, bool) and parameter.type is int):
            raise QmpError(
                f"Invalid parameter type for '{key}', expected: {commands.TYPE_NAMES[parameter.type]}"
            )
    for key, parameter in command.parameters.items():
        if parameter.required and key not in arguments:
            raise QmpError(f"Parameter '{key}' is missing")
