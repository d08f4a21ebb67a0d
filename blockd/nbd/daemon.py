"""``atoll nbd`` at work: one image, served until its clients have gone or a signal comes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

import setproctitle

from blockd.nbd.handshake import Terms
from blockd.nbd.listen import Listener
from blockd.nbd.server import Limits
from blockd.nbd.settings import Settings
from blockd.service import Service
from coordinator.contract.errors import BlockError
from coordinator.contract.tls import server_context

log = logging.getLogger(__name__)


def serve(settings: Settings, listeners: list[Listener], ready: Callable[[], None]) -> None:
    """Until the end; ``ready`` is called when clients can connect. With ``listeners`` that exist already no
    others are made. BlockError in one line."""
    assert settings.export is not None
    level = logging.INFO if settings.verbose else logging.WARNING
    logging.basicConfig(format="atoll nbd: %(message)s", level=level)
    setproctitle.setproctitle(f"atoll nbd {settings.export.file}")
    credentials = settings.credentials
    tls = None if credentials is None else server_context(credentials.folder, credentials.verify_peer)
    limits = Limits(connections=settings.clients or sys.maxsize, queue=True)
    service = Service(limits, Terms(tls, shared=settings.clients != 1), settings.persistent)
    service.end_on_signal(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    try:
        service.exports.open(settings.export)
        _listen(service, settings, listeners)
        _write_pid(settings.pid_file)
    except BaseException:
        service.close()
        raise
    ready()
    try:
        service.run()
    finally:
        if settings.pid_file is not None and os.path.isfile(settings.pid_file):
            os.unlink(settings.pid_file)


def _listen(service: Service, settings: Settings, listeners: list[Listener]) -> None:
    if listeners:
        service.listen_at(listeners)
        return
    for path in settings.sockets:
        service.listen(path)
        log.info("listening at %s", path)
    for host, port in settings.addresses:
        log.info("listening at %s port %d", host, service.listen_tcp(host, port))


def _write_pid(file: str | None) -> None:
    if file is None:
        return
    try:
        with open(file, "w", encoding="ascii") as out:
            out.write(f"{os.getpid()}\n")
    except OSError as error:
        raise BlockError(f"{file}: cannot be written: {error.strerror}", error.errno or 5) from None
