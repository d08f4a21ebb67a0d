"""A QMP client for our own commands: one request at a time, events kept for whoever asks.

Source: QEMU docs/interop/qmp-spec.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from coordinator.contract.errors import AtollError, IslandError

#: how long a machine may take to answer, seconds
PATIENCE = 60.0


class QmpClient:
    """A connection to a machine; IslandError when it is gone, or has an error to tell."""

    def __init__(self, path: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._rest = b""
        self._id = 0
        try:
            self._socket.connect(str(path))
            self._receive()  # the greeting
            self.command("qmp_capabilities")
        except (OSError, AtollError) as error:
            self._socket.close()
            reason = getattr(error, "strerror", None) or error
            raise IslandError(f"{path}: the machine does not answer: {reason}") from None

    def command(self, name: str, **arguments: Any) -> Any:
        """The value that a command returns; underscores in argument names become hyphens."""
        self._id += 1
        request: dict[str, Any] = {"execute": name, "id": self._id}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while True:
                message = self._receive()
                if "event" in message:
                    self.events.append(message)
                elif message.get("id") != self._id:
                    pass  # the answer to one whose caller was interrupted
                elif "error" in message:
                    raise IslandError(message["error"]["desc"])
                else:
                    return message["return"]
        except OSError as error:
            raise IslandError(f"the machine does not answer: {error.strerror or error}") from None

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            data = self._socket.recv(1 << 16)
            if not data:
                raise IslandError("the machine has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._socket.close()
