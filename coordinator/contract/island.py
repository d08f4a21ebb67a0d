"""What every process of a machine does alike: its name in ``ps``, its log, the watch over its
parent, and its control socket.

An island ends by itself when the coordinator dies, by whatever signal: a thread waits on a pidfd
of the coordinator, also while the main thread is inside the guest. Ctrl-C and the
terminal's hanging up reach the whole foreground process group, so islands ignore both signals and wait
to be told.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import sys
import threading
from typing import Any, TextIO

import msgspec
import setproctitle
import zmq

from coordinator.contract import messages
from coordinator.contract.codec import encode
from coordinator.contract.config import control_endpoint
from coordinator.contract.sandbox import Sandbox

#: libzmq's default is 100 ms and more, which a restarted peer would be felt by
RECONNECT_MS = 1
#: high-water marks that cannot be met; a full queue would drop or block silently
UNBOUNDED = 0


def enter(role: str, vm: str, parent: int, log: str | None, sandbox: Sandbox | None = None) -> None:
    """Become island ``role`` of machine ``vm``, child of ``parent``, in the first step of the sandbox."""
    setproctitle.setproctitle(f"atoll {role} {vm}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.raiseExceptions = False  # a full disk is no reason to fill it with tracebacks
    stream = open(log, "a", buffering=1, encoding="utf-8") if log else sys.stderr  # noqa: SIM115 - lives as long as we
    _log(stream, role)
    faulthandler.enable(stream)
    if sandbox is not None:
        sandbox.enter()  # before the first thread
    watch_parent(parent)


def _log(stream: TextIO, role: str) -> None:
    logging.basicConfig(
        stream=stream, format=f"%(asctime)s {role}: %(message)s", level=logging.INFO, force=True
    )


def become(role: str, vm: str, log_fd: int) -> None:
    """A standby, which has entered as such, is island ``role`` from now on, and writes to that one's log."""
    setproctitle.setproctitle(f"atoll {role} {vm}")
    for fd in (1, 2):
        os.dup2(log_fd, fd)
    stream = open(log_fd, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - lives as long as we
    _log(stream, role)
    faulthandler.enable(stream)


def watch_parent(parent: int) -> None:
    """End this process when process ``parent`` ends."""
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.poll()
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


def dealer(context: zmq.Context[Any], endpoint: str, identity: bytes) -> zmq.Socket[Any]:
    """A connected DEALER with the options that every socket of ours has."""
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.IDENTITY, identity)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.set(zmq.RCVHWM, UNBOUNDED)
    socket.set(zmq.SNDHWM, UNBOUNDED)
    socket.connect(endpoint)
    return socket


def router(context: zmq.Context[Any], endpoint: str) -> zmq.Socket[Any]:
    """A bound ROUTER that says when it cannot route, and lets a restarted peer take its name over."""
    socket = context.socket(zmq.ROUTER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    socket.set(zmq.ROUTER_HANDOVER, 1)
    socket.set(zmq.RCVHWM, UNBOUNDED)
    socket.set(zmq.SNDHWM, UNBOUNDED)
    socket.bind(endpoint)
    return socket


#: of this process's control sockets
_contexts: list[zmq.Context[Any]] = []


def leave() -> None:
    """Before the process ends: returns when the notices that were flushed are on their way.

    ZeroMQ sends from a thread of its own, which does not outlive the process.
    """
    for context in _contexts:
        if not context.closed:
            context.destroy()
    _contexts.clear()


class Control:
    """An island's end of the control channel."""

    def __init__(self, context: zmq.Context[Any], runtime: str, role: str) -> None:
        self.role = role
        _contexts.append(context)
        self.socket = dealer(context, control_endpoint(runtime), role.encode())

    def hello(self) -> None:
        """Say that this island is ready to serve."""
        self.notify(messages.Hello(role=self.role, pid=os.getpid()))

    def notify(self, notice: msgspec.Struct) -> None:
        self.socket.send(encode(notice))

    def receive(self) -> messages.AnyCommand | None:
        """The next command, or None when none is waiting."""
        try:
            frame = self.socket.recv(zmq.DONTWAIT)
        except zmq.Again:
            return None
        return messages.commands.decode(frame)

    def answer(self, command: messages.Command, value: Any = None, error: str | None = None) -> None:
        self.notify(messages.Answer(serial=command.serial, value=value, error=error))

    def flush(self, seconds: float = 1.0) -> None:
        """Let queued notices leave, see ``leave``; used once, before exit."""
        self.socket.set(zmq.LINGER, int(seconds * 1000))
        self.socket.close()
