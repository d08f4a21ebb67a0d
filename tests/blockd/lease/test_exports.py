"""What becomes of the requests of clients when a lease is about to go."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from blockd.image import Buffer
from blockd.lease.transfer import Source
from blockd.nbd.server import Connection
from blockd.raw import RawImage
from coordinator.contract.config import Export
from tests.blockd.conftest import SERVICES, Serve, runtime, serve
from tests.blockd.lease.support import TAKE, make_files
from tests.support.nbd_wire import WireClient

__all__ = ["runtime", "serve"]
WRITE = 1


def connect(path: str) -> WireClient:
    client = WireClient(path)
    assert client.go("hd0")[-1] == (1, b"")
    return client


@pytest.mark.parametrize("direct", [False, True])
def test_prepare_finishes_the_request_under_way_and_discards_the_rest(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """One write is in the image, another waits behind it. The hold on the first ends when its session has
    been told to end; the second is never done, also when the lease comes back."""
    hold, begun = threading.Event(), threading.Event()
    write, interrupt = RawImage.write, Connection.interrupt

    def held_write(image: RawImage, offset: int, data: Buffer, fua: bool = False) -> None:
        begun.set()
        hold.wait()
        write(image, offset, data, fua)

    def noted_interrupt(connection: Connection) -> None:
        interrupt(connection)
        hold.set()

    file = make_files(tmp_path, "x")["x"]
    monkeypatch.setattr(RawImage, "write", held_write)
    monkeypatch.setattr(Connection, "interrupt", noted_interrupt)
    if not direct:
        monkeypatch.setattr(RawImage, "direct", lambda image: None)
    path = serve()
    leased = SERVICES[path].leased
    leased.open_all([Export("hd0", file, lease=TAKE)])
    source = Source(leased)
    old = connect(path)
    # FUA is nothing for the short way
    old.send_request(WRITE, 0, 512, flags=1, data=b"1" * 512)
    begun.wait()
    old.send_request(WRITE, 512, 512, data=b"2" * 512)
    source.prepare("T")
    assert Path(file).read_bytes()[:1024] == b"1" * 512 + bytes(512)
    source.abort("T")
    with connect(path) as new:
        assert new.read(0, 1024) == b"1" * 512 + bytes(512)
        assert new.request(WRITE, 512, 512, data=b"3" * 512) == 0
    assert Path(file).read_bytes()[:1024] == b"1" * 512 + b"3" * 512
    old.sock.close()
    assert leased.close_all() == []


def test_the_short_way_ends_with_the_lease(serve: Serve, tmp_path: Path) -> None:
    """Batches that C serves are refused, too; reads go on."""
    file = make_files(tmp_path, "x")["x"]
    path = serve()
    leased = SERVICES[path].leased
    leased.open_all([Export("hd0", file, lease=TAKE)])
    with connect(path) as client:
        assert client.request(WRITE, 0, 512, data=b"1" * 512) == 0
        next(tmp_path.glob("*.lease-*")).unlink()
        assert client.request(WRITE, 0, 512, data=b"2" * 512) == 1  # EPERM
        assert client.read(0, 512) == b"1" * 512
    assert leased.describe()[0]["state"] == "lost"
    (error,) = leased.close_all()
    assert "the lease is lost" in error
