"""Warm standbys: for each kind of island that can be replaced, a process that has done all but take over.

One waits for each kind, whichever island of it dies. The next is started when it has been taken; who dies
before that one is ready is followed by a process that starts from nothing, and guest time stands still
longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from coordinator.contract import standby
from coordinator.contract.errors import IslandError
from coordinator.islands import Island

log = logging.getLogger(__name__)

#: of one kind in a row that end by themselves: then it is done without
MOST_LOST = 3


class Standbys:
    """Of one machine. ``configs`` says what one of a kind would be started with now: its module, and the
    configuration of some island of that kind."""

    def __init__(self, configs: dict[str, Callable[[], tuple[str, Any]]], folder: Path) -> None:
        self._configs = configs
        self._folder = folder
        self._waiting: dict[str, tuple[Island, socket.socket]] = {}
        self._lost = dict.fromkeys(configs, 0)
        self._closed = False

    def pids(self) -> dict[str, int]:
        """Those that wait, by role."""
        return {island.role: island.pid for island, _ in self._waiting.values()}

    def warm(self) -> None:
        """Have one of each kind."""
        for kind in self._configs:
            if kind not in self._waiting and self._lost[kind] < MOST_LOST and not self._closed:
                try:
                    self._start(kind)
                except (IslandError, OSError) as error:
                    log.error("no standby: %s", error)

    def _start(self, kind: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        role, path = f"standby-{kind}", self._folder / f"standby-{kind}.log"
        module, config = self._configs[kind]()
        config = msgspec.structs.replace(config, log=str(path), order_fds=(theirs.fileno(),))
        try:
            island = Island(role, module, config, path)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._waiting[kind] = island, ours
        asyncio.get_running_loop().add_reader(island.pidfd, self._died, kind)

    def take(self, role: str, kind: str, config: msgspec.Struct, log_file: Path) -> Island | None:
        """The standby, as island ``role`` from now on; None where there is none."""
        if kind not in self._waiting:
            return None
        island, sock = self._forget(kind)
        with sock:
            try:
                fd = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                try:
                    standby.give(sock, config, fd)
                finally:
                    os.close(fd)
            except OSError as error:
                log.info("the standby of %s is of no use: %s", role, error.strerror)
                island.kill()
                island.close()
                return None
        self._lost[kind] = 0
        island.role, island.log = role, log_file
        return island

    def _forget(self, kind: str) -> tuple[Island, socket.socket]:
        island, sock = self._waiting.pop(kind)
        asyncio.get_running_loop().remove_reader(island.pidfd)
        return island, sock

    def _died(self, kind: str) -> None:
        island, sock = self._forget(kind)
        sock.close()
        self._lost[kind] += 1
        log.warning("%s; %s", island.epitaph(), island.last_words() or "its log is empty")
        island.close()
        self.warm()

    def close(self) -> None:
        """End those that wait: they have nothing to lose."""
        self._closed = True
        for kind in list(self._waiting):
            island, sock = self._forget(kind)
            with contextlib.closing(sock):
                island.kill()
                island.reap(1.0)
            island.close()
