"""A block daemon in the test's own process, and short-named folders for its sockets."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockd.nbd.handshake import Terms
from blockd.nbd.server import Limits
from blockd.service import Service
from coordinator.contract.config import Export
from tests.support.certificates import Certificates, make_certificates

Serve = Callable[..., str]


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A private folder whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="atoll-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def serve(runtime: Path) -> Iterator[Serve]:
    """Serve exports, and return the socket's path. SERVICES has the service by that path, and PORTS the TCP
    port at which it listens, too, with ``tcp``."""
    running: list[tuple[Service, threading.Thread]] = []

    def start(
        *exports: Export, limits: Limits | None = None, terms: Terms | None = None, tcp: str | None = None
    ) -> str:
        service = Service(limits, terms)
        for export in exports:
            service.exports.open(export)
        path = str(runtime / f"nbd{len(running)}")
        service.listen(path)
        if tcp is not None:
            PORTS[path] = service.listen_tcp(tcp, 0)
        thread = threading.Thread(target=service.run)
        thread.start()
        running.append((service, thread))
        SERVICES[path] = service
        return path

    yield start
    for service, thread in running:
        service.stop()
        thread.join()
    SERVICES.clear()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Those of a server and its clients."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


SERVICES: dict[str, Service] = {}
PORTS: dict[str, int] = {}


def make_image(path: Path, size: int = 1 << 20, byte: int | None = None) -> str:
    """A file of ``size`` bytes: all ``byte``, or by default every 512-byte sector with its number in it."""
    if byte is not None:
        path.write_bytes(bytes([byte]) * size)
    else:
        path.write_bytes(b"".join(sector.to_bytes(4, "little") * 128 for sector in range(size // 512)))
    return str(path)
