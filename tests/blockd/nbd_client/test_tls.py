"""TLS at the client: qemu-nbd, nbdkit and our own server with certificates made by openssl."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blockd.nbd.handshake import Terms
from blockd.nbd.remote import NbdImage
from coordinator.contract.config import Export
from coordinator.contract.errors import BlockError
from coordinator.contract.tls import server_context
from tests.blockd.conftest import PORTS, Serve, make_image
from tests.blockd.nbd_client.conftest import Foreign, Start
from tests.blockd.nbd_client.script import MIB, name, negotiate, read
from tests.blockd.nbd_client.test_image import SIZE, exercise
from tests.support.certificates import Certificates
from tests.support.nbd_wire import IHAVEOPT, NBDMAGIC, WireServer, option_reply, receive


def tls(plain: str, folder: Path | str, **parameters: str) -> str:
    more = "".join(f"&{key.replace('_', '-')}={value}" for key, value in parameters.items())
    return f"nbds{plain.removeprefix('nbd')}{'&' if '?' in plain else '?'}tls-certificates={folder}{more}"


def refusal(uri: str) -> str:
    with pytest.raises((BlockError, OSError)) as caught:
        read(NbdImage(uri), 0, 512)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def kit(nbdkit: Start, certificates: Certificates) -> str:
    """nbdkit, which insists on TLS and on a certificate."""
    return nbdkit("--tls=require", f"--tls-certificates={certificates.server}", "--tls-verify-peer",
                  "memory", f"size={8 * SIZE}")  # fmt: skip


def test_nbdkit(kit: str, certificates: Certificates) -> None:
    image = NbdImage(tls(name(kit), certificates.client))
    exercise(image, random.Random(5), 100)
    image.close()
    assert "insists on TLS" in refusal(name(kit))
    # TLS 1.3 has the server's verdict arrive behind the handshake
    assert "cannot connect" in refusal(tls(name(kit), certificates.stranger))
    assert "cannot connect" in refusal(tls(name(kit), certificates.anonymous))


def test_many_threads(kit: str, certificates: Certificates) -> None:
    """Both directions of one TLS connection at once."""
    image = NbdImage(tls(name(kit), certificates.client))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            exercise(image, random.Random(number), 60, number * SIZE)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    image.close()


def test_qemu_nbd(qemu_nbd: Start, certificates: Certificates, tmp_path: Path) -> None:
    credentials = f"tls-creds-x509,id=tls0,dir={certificates.server},endpoint=server,verify-peer=yes"
    path = qemu_nbd("--object", credentials, "--tls-creds", "tls0", "-f", "raw", "-x", "x",
                    make_image(tmp_path / "disk", SIZE, 0))  # fmt: skip
    image = NbdImage(tls(name(path), certificates.client))
    exercise(image, random.Random(6), 60)
    image.close()
    assert "insists on TLS" in refusal(name(path))


def test_the_name_of_the_server(serve: Serve, certificates: Certificates, tmp_path: Path) -> None:
    """Its certificate is for localhost and its addresses."""
    terms = Terms(server_context(str(certificates.server)))
    path = serve(Export("x", make_image(tmp_path / "disk", MIB, 7)), terms=terms, tcp="localhost")
    port = PORTS[path]
    for good in (
        tls(f"nbd://localhost:{port}/x", certificates.client),
        tls(f"nbd://127.0.0.1:{port}/x", certificates.client),
        tls(f"nbd://127.0.0.1:{port}/x", certificates.client, tls_hostname="localhost"),
        tls(name(path), certificates.client),
        tls(name(path), certificates.client, tls_hostname="localhost"),
    ):
        image = NbdImage(good)
        assert read(image, 0, 512) == b"\7" * 512
        image.close()
    for bad in (
        tls(f"nbd://127.0.0.1:{port}/x", certificates.client, tls_hostname="elsewhere"),
        tls(f"nbd://127.0.0.2:{port}/x", certificates.client),
        tls(name(path), certificates.client, tls_hostname="elsewhere"),
    ):
        assert "mismatch" in refusal(bad) or "cannot connect" in refusal(bad)
    assert "insists on TLS" in refusal(f"nbd://localhost:{port}/x")


def test_an_authority_that_is_not_ours(serve: Serve, certificates: Certificates, tmp_path: Path) -> None:
    terms = Terms(server_context(str(certificates.server), verify_peer=False))
    path = serve(Export("x", make_image(tmp_path / "disk", MIB, 7)), terms=terms)
    image = NbdImage(tls(name(path), certificates.anonymous))
    assert read(image, 0, 512) == b"\7" * 512
    image.close()
    assert "TLS failed" in refusal(name(path).replace("nbd+", "nbds+"))  # the system does not know it
    other = tmp_path / "other"
    other.mkdir()
    foreign = certificates.stranger / "client-cert.pem"
    (other / "ca-cert.pem").write_bytes(foreign.read_bytes())
    assert "TLS failed" in refusal(tls(name(path), other))


def test_folders_that_are_none(certificates: Certificates, serve: Serve, tmp_path: Path) -> None:
    path = serve(Export("x", make_image(tmp_path / "disk", MIB, 7)))
    assert "ca-cert.pem: No such file" in refusal(tls(name(path), tmp_path / "none"))
    assert "has no TLS" in refusal(tls(name(path), certificates.client))


def test_a_server_that_pretends(runtime: Path, certificates: Certificates) -> None:
    """It agrees to TLS and talks on in plain text: nothing of that is believed."""

    def script(sock: socket.socket) -> None:
        sock.sendall(NBDMAGIC + IHAVEOPT + b"\0\3")
        receive(sock, 4)
        receive(sock, 16)
        sock.sendall(option_reply(5, 1))
        try:
            negotiate(sock)
        except (OSError, EOFError, AssertionError):
            pass

    server = WireServer(str(runtime / "s"), script)
    assert "TLS failed" in refusal(tls(name(str(runtime / "s")), certificates.client))
    server.finish()


def test_coming_back_over_tls(
    runtime: Path, foreign: Callable[..., Foreign], certificates: Certificates, tmp_path: Path
) -> None:
    file = tmp_path / "disk"
    file.write_bytes(bytes(MIB))
    path = str(runtime / "s")
    secured = ("--tls=require", f"--tls-certificates={certificates.server}")
    server = foreign("nbdkit", *secured, "file", str(file), socket=path)
    image = NbdImage(tls(name(path, reconnect_delay=60), certificates.client))
    image.write(0, b"one")
    server.kill()
    Path(path).unlink()
    server.start()
    image.write(3, b"two")
    image.flush()
    assert read(image, 0, 6) == b"onetwo"
    image.close()
