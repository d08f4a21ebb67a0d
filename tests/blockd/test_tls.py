"""TLS at the NBD server ("NBD_OPT_STARTTLS", "TLS support"): what is told and served without it, whose
certificates are good, and that nothing crosses from plain to encrypted. libnbd's and QEMU's clients judge."""

from __future__ import annotations

import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from blockd.nbd.handshake import Terms
from blockd.nbd.server import Limits
from coordinator.contract.config import Export
from coordinator.contract.errors import BlockError
from coordinator.contract.tls import server_context
from tests.blockd.conftest import PORTS, SERVICES, Serve, make_image
from tests.support.certificates import Certificates
from tests.support.nbd_wire import IHAVEOPT, WireClient
from tests.support.tools import run_tool

ERR = 1 << 31
ACK = (1, b"")
UNSUP, POLICY, INVALID, TLS_REQUIRED = ERR | 1, ERR | 2, ERR | 3, ERR | 5
STARTTLS = 5
SECRET = "secret-name"


class Served(NamedTuple):
    path: str
    port: int
    file: str


@pytest.fixture
def terms(certificates: Certificates) -> Terms:
    return Terms(server_context(str(certificates.server)))


@pytest.fixture
def served(serve: Serve, terms: Terms, tmp_path: Path) -> Served:
    """One disk, at a UNIX socket and at TCP, behind TLS with certificates on both sides."""
    file = make_image(tmp_path / "disk")
    path = serve(Export(SECRET, file), terms=terms, tcp="localhost")
    return Served(path, PORTS[path], file)


def client_side(folder: Path, side: str | None = "client") -> ssl.SSLContext:
    """Python's own client with the certificates of a folder."""
    context = ssl.create_default_context(cafile=str(folder / "ca-cert.pem"))
    if side is not None:
        context.load_cert_chain(folder / f"{side}-cert.pem", folder / f"{side}-key.pem")
    return context


def secured(client: WireClient, context: ssl.SSLContext) -> None:
    assert client.option(STARTTLS) == [ACK]
    client.sock = context.wrap_socket(client.sock, server_hostname="localhost")


# ---- by the book ---------------------------------------------------------------------------------------
def test_libnbd(served: Served, certificates: Certificates, tmp_path: Path) -> None:
    uri = f"nbds://localhost:{served.port}/{SECRET}?tls-certificates={certificates.client}"
    told = run_tool("nbdinfo", uri)
    assert "with TLS" in told and "export-size: 1048576" in told
    copy = tmp_path / "copy"
    run_tool("nbdcopy", uri, str(copy))
    assert copy.read_bytes() == Path(served.file).read_bytes()
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(256)) * 4096)
    run_tool("nbdcopy", "--flush", str(noise), uri)
    assert Path(served.file).read_bytes() == noise.read_bytes()
    assert SECRET in run_tool("nbdinfo", "--list", uri)


def test_qemu(served: Served, certificates: Certificates) -> None:
    credentials = f"tls-creds-x509,id=tls0,endpoint=client,dir={certificates.client}"
    target = f"driver=nbd,host=localhost,port={served.port},export={SECRET},tls-creds=tls0"
    script = ("write -P 7 4k 64k", "read -P 7 4k 64k")
    commands = [word for command in script for word in ("-c", command)]
    told = run_tool("qemu-io", "--object", credentials, "--image-opts", *commands, target)
    assert "failed" not in told
    assert Path(served.file).read_bytes()[4096:69632] == b"\7" * 65536
    at = ("-b", "localhost", "-p", str(served.port), "--object", credentials, "--tls-creds", "tls0")
    assert f"export: '{SECRET}'" in run_tool("qemu-nbd", "-L", *at)


def test_requests_inside(served: Served, certificates: Certificates) -> None:
    """A payload of many TLS records, both ways, and what was pipelined."""
    with WireClient(served.path) as client:
        secured(client, client_side(certificates.client))
        assert client.go(SECRET)[-1] == ACK
        data = bytes(range(251)) * 2000
        assert client.request(1, 1024, len(data), data=data) == 0
        for at in range(0, 100 * 512, 512):
            client.send_request(0, 1024 + at, 512, at)
        for at in range(0, 100 * 512, 512):
            assert client.simple_reply(512) == (0, at, data[at : at + 512])
        assert client.read(1024, len(data)) == data
        client.send_request(2)
        assert client.sock.recv(1) == b""  # by TLS's own farewell: a bare end would be an error
    assert Path(served.file).read_bytes()[1024 : 1024 + len(data)] == data


def test_only_once(served: Served, certificates: Certificates) -> None:
    with WireClient(served.path) as client:
        secured(client, client_side(certificates.client))
        assert client.option(STARTTLS)[0][0] == INVALID
        assert client.go(SECRET)[-1] == ACK


def test_a_server_without_tls(serve: Serve, tmp_path: Path) -> None:
    with WireClient(serve(Export("hd0", make_image(tmp_path / "disk")))) as client:
        assert client.option(STARTTLS)[0][0] == POLICY
        assert client.option(STARTTLS, b"data")[0][0] == INVALID
        assert client.go("hd0")[-1] == ACK


# ---- nothing in plain ----------------------------------------------------------------------------------
def test_everything_else_is_refused_before(served: Served) -> None:
    name = struct.pack(">I", len(SECRET)) + SECRET.encode()
    with WireClient(served.path) as client:
        wish, queries = name + bytes(2), name + bytes(4)
        options = {3: b"", 6: wish, 7: wish, 8: b"", 9: queries, 10: queries, 99: b"?"}
        for option, data in options.items():
            ((kind, text),) = client.option(option, data)
            assert kind == TLS_REQUIRED and SECRET.encode() not in text
        assert client.option(STARTTLS, b"x")[0][0] == INVALID
        client.send_option(1, SECRET.encode())
        assert client.closed_by_server()
    with WireClient(served.path) as client:
        assert client.option(2) == [ACK] and client.closed_by_server()


def test_clients_without_tls(served: Served) -> None:
    told = run_tool("nbdinfo", f"nbd://localhost:{served.port}/{SECRET}", status=1)
    assert "TLS" in told
    told = run_tool("qemu-img", "info", f"nbd://localhost:{served.port}/{SECRET}", status=1)
    assert "TLS" in told


@pytest.mark.parametrize("option", [3, 6, 7, 8])
def test_plain_text_behind_starttls_is_never_looked_at(served: Served, option: int) -> None:
    """The fault of many servers: what somebody between the two has put behind STARTTLS in plain is taken as
    if it had come encrypted."""
    with WireClient(served.path) as client:
        data = struct.pack(">I", len(SECRET)) + SECRET.encode() + b"\0\0"
        injected = IHAVEOPT + struct.pack(">II", option, len(data)) + data
        client.sock.sendall(IHAVEOPT + struct.pack(">II", STARTTLS, 0) + injected)
        assert client.option_reply() == (STARTTLS, *ACK)
        rest = b""
        try:
            while piece := client.sock.recv(4096):
                rest += piece
        except ConnectionError:
            pass
        assert SECRET.encode() not in rest and len(rest) <= 7  # an alert at most


def test_plain_text_before_the_clients_tls(served: Served, certificates: Certificates) -> None:
    """The same with a client that knows nothing of it: its handshake fails."""
    with WireClient(served.path) as client:
        client.sock.sendall(IHAVEOPT + struct.pack(">II", STARTTLS, 0) + IHAVEOPT + struct.pack(">II", 3, 0))
        assert client.option_reply() == (STARTTLS, *ACK)
        with pytest.raises(OSError):
            client_side(certificates.client).wrap_socket(client.sock, server_hostname="localhost")


def test_what_follows_the_end_is_encrypted_too(served: Served, certificates: Certificates) -> None:
    """The daemon ends while a session is open: the last that comes is TLS, byte for byte."""
    with WireClient(served.path) as client:
        assert client.option(STARTTLS) == [ACK]
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_side(certificates.client).wrap_bio(incoming, outgoing, server_hostname="localhost")
        pump(client.sock, tls.do_handshake, incoming, outgoing)
        name = struct.pack(">I", len(SECRET)) + SECRET.encode() + b"\0\0"
        tls.write(IHAVEOPT + struct.pack(">II", 7, len(name)) + name)
        replies = b""
        while not replies.endswith(struct.pack(">III", 7, 1, 0)):
            replies += pump(client.sock, lambda: tls.read(4096), incoming, outgoing)
        SERVICES[served.path].stop()
        raw = b""
        while piece := client.sock.recv(4096):
            raw += piece
        kinds = []
        while raw:
            kind, _, length = struct.unpack(">BHH", raw[:5])
            kinds.append(kind)
            raw = raw[5 + length :]
        assert kinds and set(kinds) <= {21, 23}  # RFC 8446, 5.1: alert, application data


def pump(
    sock: socket.socket, step: Callable[[], Any], incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO
) -> Any:
    """Do a step of TLS, with what it wants to send and receive."""
    while True:
        try:
            done = step()
        except ssl.SSLWantReadError:
            sock.sendall(outgoing.read())
            incoming.write(receive_some(sock))
            continue
        if outgoing.pending:
            sock.sendall(outgoing.read())
        return done


def receive_some(sock: socket.socket) -> bytes:
    piece = sock.recv(65536)
    if not piece:
        raise EOFError("the server has closed the connection")
    return piece


# ---- whose certificates --------------------------------------------------------------------------------
def alert(path: str, context: ssl.SSLContext) -> str:
    """What a client is told that is not let in; with TLS 1.3 that comes behind its handshake."""
    with WireClient(path) as client, pytest.raises(OSError) as caught:
        secured(client, context)
        client.sock.recv(1)
    return str(caught.value).lower()


def test_a_client_of_another_authority(served: Served, certificates: Certificates) -> None:
    assert "unknown ca" in alert(served.path, client_side(certificates.stranger))
    uri = f"nbds://localhost:{served.port}/{SECRET}?tls-certificates={certificates.stranger}"
    run_tool("nbdinfo", uri, status=1)


def test_a_client_without_certificate(served: Served, certificates: Certificates) -> None:
    assert "certificate required" in alert(served.path, client_side(certificates.anonymous, None))


def test_a_client_with_a_servers_certificate(served: Served, certificates: Certificates) -> None:
    assert "certificate" in alert(served.path, client_side(certificates.server, "server"))


def test_without_verification_all_are_let_in(
    serve: Serve, certificates: Certificates, tmp_path: Path
) -> None:
    terms = Terms(server_context(str(certificates.server), verify_peer=False))
    path = serve(Export(SECRET, make_image(tmp_path / "disk")), terms=terms, tcp="localhost")
    uri = f"nbds://localhost:{PORTS[path]}/{SECRET}?tls-certificates={certificates.anonymous}"
    assert "with TLS" in run_tool("nbdinfo", uri)


def test_a_revoked_certificate(serve: Serve, certificates: Certificates, tmp_path: Path) -> None:
    folder = tmp_path / "server"
    shutil.copytree(certificates.server, folder)
    revoke(certificates, certificates.client / "client-cert.pem", folder / "ca-crl.pem", tmp_path)
    terms = Terms(server_context(str(folder)))
    path = serve(Export(SECRET, make_image(tmp_path / "disk")), terms=terms)
    assert "revoked" in alert(path, client_side(certificates.client))


def revoke(certificates: Certificates, certificate: Path, to: Path, scratch: Path) -> None:
    """A list of the authority that names one certificate."""
    authority = certificates.server.parent / "ca"
    (scratch / "index").touch()
    (scratch / "config").write_text(
        f"[ca]\ndefault_ca=it\n[it]\ndatabase={scratch}/index\ndefault_md=sha256\ndefault_crl_days=9\n"
    )
    common = ("openssl", "ca", "-config", str(scratch / "config"), "-cert", str(authority / "cert.pem"),
              "-keyfile", str(authority / "key.pem"))  # fmt: skip
    for action in (("-revoke", str(certificate)), ("-gencrl", "-out", str(to))):
        done = subprocess.run((*common, *action), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ca-cert.pem", None, "No such file"),
        ("server-cert.pem", None, "No such file"),
        ("server-key.pem", None, "No such file"),
        ("ca-cert.pem", "nothing", "cannot be used"),
        ("server-cert.pem", "nothing", "cannot be used"),
        ("server-key.pem", "nothing", "cannot be used"),
        ("ca-crl.pem", "nothing", "cannot be used"),
    ],
)
def test_credentials_that_cannot_be_used(
    certificates: Certificates, tmp_path: Path, name: str, content: str | None, words: str
) -> None:
    folder = tmp_path / "server"
    shutil.copytree(certificates.server, folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(BlockError, match=words) as caught:
        server_context(str(folder))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_of_another_certificate(certificates: Certificates, tmp_path: Path) -> None:
    folder = tmp_path / "server"
    shutil.copytree(certificates.server, folder)
    shutil.copy(certificates.client / "client-key.pem", folder / "server-key.pem")
    with pytest.raises(BlockError, match="cannot be used"):
        server_context(str(folder))


# ---- bounds --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01\x10\x00", bytes(100)])
def test_the_handshake_has_a_limit(serve: Serve, terms: Terms, tmp_path: Path, said: bytes) -> None:
    """Nothing, the begin of a record that does not go on, and what is no TLS."""
    limits = Limits(handshake_seconds=0.2)
    with WireClient(serve(Export("hd0", make_image(tmp_path / "d")), limits=limits, terms=terms)) as client:
        assert client.option(STARTTLS) == [ACK]
        client.sock.sendall(said)
        while not client.closed_by_server():
            pass  # an alert


def test_the_end_while_a_handshake_of_tls_is_open(served: Served) -> None:
    """CVE-2024-7409: a client in its handshake at shutdown."""
    with WireClient(served.path) as client:
        assert client.option(STARTTLS) == [ACK]
        SERVICES[served.path].stop()
        while not client.closed_by_server():
            pass  # an alert

