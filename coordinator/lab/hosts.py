"""The two hosts of a plan, and the network between them.

``loopback``: two coordinators on this one, by 127.0.0.1. ``namespaces``: two network namespaces with a veth
pair, where the user may make them. Both have a configuration folder of the laboratory's own, so that keys and
records of the user are left alone. A worse network is a proxy (proxy.py) on another address of the target's
host, at the same ports.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq

from coordinator.contract.errors import ConfigError
from coordinator.lab.plan import Experiment, Plan

#: how long a proxy may take to start, seconds
PROXY_SECONDS = 20.0


@dataclass(frozen=True)
class Host:
    """``enter``: a command that runs another one there; ``address`` is its own, ``detour`` that of the proxy
    in front of it."""

    enter: tuple[str, ...]
    address: str
    detour: str


@dataclass(frozen=True)
class Hosts:
    """Both, and the environment of processes on either."""

    sides: tuple[Host, Host]
    environment: dict[str, str]


LOOPBACK = Host((), "127.0.0.1", "127.0.0.2")


@contextlib.contextmanager
def hosts(plan: Plan, folder: Path) -> Iterator[Hosts]:
    """For as long as the plan runs; ConfigError where they cannot be made."""
    if plan.hosts == "loopback":
        yield _known((LOOPBACK, LOOPBACK), folder)
        return
    names = [f"atoll-lab-{os.getpid()}-{side}" for side in range(2)]
    with contextlib.ExitStack() as undo:
        sides = _namespaces(names, undo)
        yield _known(sides, folder)


def _known(sides: tuple[Host, Host], folder: Path) -> Hosts:
    """With a pair of keys that both hosts share, and each other's addresses as known peers."""
    place = folder / "config" / "atoll" / "migration"
    (place / "peers").mkdir(parents=True, mode=0o700)
    public, secret = zmq.curve_keypair()
    (place / "key").touch(mode=0o600)
    (place / "key").write_bytes(secret + b"\n")
    (place / "key.pub").write_bytes(public + b"\n")
    for side in sides:
        for address in (side.address, side.detour):
            (place / "peers" / f"{address}.pub").write_bytes(public + b"\n")
    environment = {"XDG_CONFIG_HOME": str(folder / "config"), "XDG_STATE_HOME": str(folder / "state")}
    return Hosts(sides, environment)


def _namespaces(names: list[str], undo: contextlib.ExitStack) -> tuple[Host, Host]:
    if shutil.which("ip") is None:
        raise ConfigError("hosts = namespaces: the command ip is missing (Debian's package iproute2)")
    sides = []
    for name in names:
        _ip("netns", "add", name)
        undo.callback(_quietly, "netns", "delete", name)
    #: an interface's name has at most 15 characters, and is the namespace's own once it is there
    _ip(
        "link",
        "add",
        "veth-lab0",
        "netns",
        names[0],
        "type",
        "veth",
        "peer",
        "name",
        "veth-lab1",
        "netns",
        names[1],
    )
    for side, name in enumerate(names):
        host = Host(("ip", "netns", "exec", name), f"10.77.0.{1 + side}", f"10.77.0.{11 + side}")
        for address in (host.address, host.detour):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", f"veth-lab{side}")
        for device in ("lo", f"veth-lab{side}"):
            _ip("-n", name, "link", "set", device, "up")
        sides.append(host)
    return sides[0], sides[1]


def _ip(*words: str) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(
            f"hosts = namespaces: ip {' '.join(words[:2])}: {reason}; hosts = loopback needs no rights"
        )


def _quietly(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=False)


def free_ports(count: int) -> list[int]:
    """Ports that nobody used a moment ago."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


@contextlib.asynccontextmanager
async def network(experiment: Experiment, target: Host, ports: list[int]) -> AsyncIterator[str]:
    """The address at which the target is to be reached: its own, or a proxy's that spoils the way to it."""
    if not experiment.shaped:
        yield target.address
        return
    command = [
        *target.enter, sys.executable, "-P", "-m", "coordinator.lab.proxy",
        "--listen", target.detour, "--to", target.address, "--seed", str(experiment.seed),
        "--delay", str(experiment.delay), "--loss", str(experiment.loss), "--rate", str(experiment.rate),
        *map(str, ports),
    ]  # fmt: skip
    proxy = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert proxy.stdout is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PROXY_SECONDS):
                if await proxy.stdout.readline() == b"ready\n":
                    yield target.detour
                    return
        raise ConfigError(f"the proxy at {target.detour} does not start")
    finally:
        with contextlib.suppress(ProcessLookupError):
            proxy.terminate()
        await proxy.wait()
