"""A machine's own QMP socket, in its private runtime folder: how ``atoll migrate`` finds it by name.

Any number of clients, each with a session of its own; only the machine's user can reach it.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from coordinator.chardev import SocketDevice
from coordinator.chardev_spec import ChardevSpec
from coordinator.contract.errors import ConfigError
from coordinator.machine import Vm
from coordinator.qmp.server import QmpFrontend

SOCKET = "qmp"


class Door(SocketDevice):
    """Listens at ``folder/qmp``."""

    def __init__(self, vm: Vm, folder: Path) -> None:
        super().__init__(ChardevSpec("socket", path=str(folder / SOCKET), server=True))
        self._vm = vm
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        try:
            self._server = await asyncio.start_unix_server(self._greet, self.spec.path)
            os.chmod(self.spec.path, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot listen on {self.spec.path}: {error.strerror}") from None

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        device = SocketDevice(self.spec)
        device.lossy = False
        frontend = QmpFrontend(self._vm)
        device.frontend = frontend
        try:
            await device.serve(reader, writer)
        finally:
            self._clients.discard(task)
            self._vm.on_event.remove(frontend.event)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for client in list(self._clients):
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
