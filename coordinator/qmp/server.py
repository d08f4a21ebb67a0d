"""QMP sessions: greeting, negotiation, commands one after another, events.

Source: QEMU docs/interop/qmp-spec.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import time
from typing import Any

from coordinator.chardev import Chardev
from coordinator.contract.errors import AtollError
from coordinator.machine import Vm
from coordinator.media import NotFound
from coordinator.qmp import commands
from coordinator.qmp.parser import JsonError, Parser


def version() -> dict[str, Any]:
    """The reply of query-version. The number is Atoll's own."""
    major, minor, micro = (int(part) for part in importlib.metadata.version("atoll").split(".")[:3])
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "atoll"}


class QmpError(Exception):
    """An error reply: ``kind`` is QMP's class."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


class QmpFrontend:
    """One session at a time at a character device."""

    def __init__(self, vm: Vm, pretty: bool = False) -> None:
        self._vm = vm
        self._indent = 4 if pretty else None
        self._parser = Parser()
        self._negotiated = False
        self._device: Chardev | None = None
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        vm.on_event.append(self.event)

    # ---- device ----------------------------------------------------------------------------------
    def connected(self, device: Chardev) -> None:
        self._device = device
        self._parser, self._negotiated = Parser(), False
        self._queue = asyncio.Queue()
        self._worker = asyncio.create_task(self._work())
        self._send({"QMP": {"version": version(), "capabilities": []}})

    def disconnected(self, device: Chardev) -> None:
        self._device = None
        if self._worker is not None:
            self._worker.cancel()

    def received(self, device: Chardev, data: bytes) -> None:
        for value in self._parser.feed(data):
            self._queue.put_nowait(value)

    def _send(self, message: dict[str, Any]) -> None:
        if self._device is not None:
            self._device.write(json.dumps(message, indent=self._indent).encode() + b"\r\n")

    def event(self, name: str, data: dict[str, Any]) -> None:
        if not self._negotiated:
            return
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        message: dict[str, Any] = {"timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000}, "event": name}
        if data:
            message["data"] = data
        self._send(message)

    # ---- commands --------------------------------------------------------------------------------
    async def _work(self) -> None:
        """Commands are carried out in order; the reply leaves before the next one starts."""
        while True:
            request = await self._queue.get()
            ident = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
            after = None
            try:
                if isinstance(request, JsonError):
                    raise QmpError(str(request))
                value, after = await self._execute(request)
                self._send({"return": value, **ident})
            except QmpError as error:
                self._send({"error": {"class": error.kind, "desc": str(error)}, **ident})
            except NotFound as error:
                self._send({"error": {"class": "DeviceNotFound", "desc": str(error)}, **ident})
            except (AtollError, OSError) as error:
                self._send({"error": {"class": "GenericError", "desc": str(error)}, **ident})
            if after is not None:
                await after()

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
        result = await command.function(self._vm, **{key.replace("-", "_"): value for key, value in arguments.items()})
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
            raise QmpError(f"Invalid parameter type for '{key}', expected: {commands.TYPE_NAMES[parameter.type]}")
    for key, parameter in command.parameters.items():
        if parameter.required and key not in arguments:
            raise QmpError(f"Parameter '{key}' is missing")
