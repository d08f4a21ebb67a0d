"""One ``atoll run`` of the laboratory: its process, its control socket, its console."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from coordinator.contract.errors import AtollError
from coordinator.lab.qmp import Qmp, QmpError

#: a machine that does not come within this time is given up, seconds: the host may be busy
START_SECONDS = 60.0
#: how long one may take to end by itself, seconds
END_SECONDS = 20.0
CONNECT_PAUSE = 0.01


#: prctl(2)
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _end_with_parent() -> None:
    """In the child: no machine outlives a laboratory that was killed."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class LabError(AtollError):
    """The laboratory itself cannot go on."""


class Machine:
    """``start`` it, then use ``qmp``. What the guest says goes to whoever ``listen``s, and waits until
    somebody does."""

    def __init__(
        self,
        name: str,
        folder: Path,
        options: Sequence[str],
        enter: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``enter``: a command that runs another one where this host of the plan is (hosts.py)."""
        self.name = name
        self._folder = folder
        self._socket = folder / f"{name}.qmp"
        self._errors = folder / f"{name}.err"
        self._command = [
            *enter, sys.executable, "-P", "-m", "coordinator.cli.main", "run", "-name", name,
            "-serial", "stdio", "-qmp", f"unix:{self._socket},server=on,wait=off", *options,
        ]  # fmt: skip
        self._environment = dict(environment or {})
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._heard = bytearray()
        self._ear: Callable[[bytes], None] | None = None
        self._qmp: Qmp | None = None

    async def start(self) -> None:
        """Returns when it takes commands; LabError with its own words when it does not come."""
        environment = {**os.environ, **self._environment, "XDG_RUNTIME_DIR": str(self._folder)}
        with self._errors.open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the laboratory, which ends it in order
                preexec_fn=_end_with_parent,
            )
        self._pump = asyncio.ensure_future(self._listen())
        try:
            async with asyncio.timeout(START_SECONDS):
                while self._qmp is None:
                    try:
                        self._qmp = await Qmp.connect(str(self._socket))
                    except (OSError, QmpError):
                        if self._process.returncode is not None:
                            raise LabError(f"{self.name} does not start: {self.last_words()}") from None
                        await asyncio.sleep(CONNECT_PAUSE)
        except TimeoutError:
            raise LabError(f"{self.name} does not start within {START_SECONDS:.0f} s") from None

    async def _listen(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        while data := await self._process.stdout.read(1 << 16):
            if self._ear is None:
                self._heard += data
            else:
                self._ear(data)

    def listen(self, ear: Callable[[bytes], None]) -> None:
        """Hear all of the console, from its beginning."""
        self._ear = ear
        if self._heard:
            ear(bytes(self._heard))
            self._heard.clear()

    def type(self, text: bytes) -> None:
        """Input of the guest's console."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(text)

    @property
    def qmp(self) -> Qmp:
        assert self._qmp is not None, "start comes first"
        return self._qmp

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def last_words(self) -> str:
        """The last line of its standard error."""
        with contextlib.suppress(OSError):
            lines = [line for line in self._errors.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return "it says nothing"

    async def end(self) -> None:
        """In order where it listens, else by force; all of its console has been heard afterwards."""
        if self._process is None:
            return
        if self._qmp is not None:
            with contextlib.suppress(QmpError, TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await self._qmp.command("quit")
            await self._qmp.close()
            self._qmp = None
        elif self.runs:
            self._process.terminate()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()
        if self._pump is not None:
            await self._pump
        for path in (self._socket, self._errors):
            path.unlink(missing_ok=True)
