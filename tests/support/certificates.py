"""X.509 certificates for TLS tests, laid out as QEMU's tls-creds-x509 wants them.

A folder holds ca-cert.pem and, for its side, server-cert.pem and server-key.pem or client-cert.pem and
client-key.pem. They are made by the openssl command, so nothing of ours judges them.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.tools import require_tool

_DAYS = "30"
_EXTENSIONS = """basicConstraints=CA:FALSE
keyUsage=digitalSignature
extendedKeyUsage={use}
{names}"""


@dataclass(frozen=True)
class Certificates:
    """Folders of one authority, and of one that nobody trusts."""

    #: for a server that is "localhost", 127.0.0.1 and ::1
    server: Path
    #: for a client that this server accepts
    client: Path
    #: for a client of an authority that the server does not know; it trusts our server all the same
    stranger: Path
    #: the authority alone: for a client without a certificate of its own
    anonymous: Path


def make_certificates(folder: Path) -> Certificates:
    """Make them all below ``folder``."""
    require_tool("openssl")
    ours, theirs = _Authority(folder / "ca"), _Authority(folder / "other-ca")
    made = Certificates(*(folder / name for name in ("server", "client", "stranger", "anonymous")))
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1"
    ours.sign(made.server, "server", "localhost", names)
    ours.sign(made.client, "client", "a client")
    theirs.sign(made.stranger, "client", "a stranger")
    made.anonymous.mkdir()
    for place in (made.server, made.client, made.stranger, made.anonymous):
        (place / "ca-cert.pem").write_bytes(ours.certificate.read_bytes())
    return made


class _Authority:
    """A certificate authority."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.certificate = folder / "cert.pem"
        self._key = folder / "key.pem"
        _openssl("req", "-x509", *_new_key(self._key), "-out", self.certificate, "-days", _DAYS,
                 "-subj", f"/CN=Atoll test {folder.name}",
                 "-addext", "basicConstraints=critical,CA:TRUE",
                 "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip

    def sign(self, folder: Path, side: str, name: str, names: str = "") -> None:
        """A key and a certificate of ``side``: "server" or "client"."""
        folder.mkdir(parents=True)
        request, extensions = folder / "request.pem", folder / "extensions"
        key = folder / f"{side}-key.pem"
        _openssl("req", "-new", *_new_key(key), "-out", request, "-subj", f"/CN={name}")
        extensions.write_text(_EXTENSIONS.format(use=f"{side}Auth", names=names))
        _openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key,
                 "-CAcreateserial", "-days", _DAYS, "-extfile", extensions,
                 "-out", folder / f"{side}-cert.pem")  # fmt: skip
        request.unlink()
        extensions.unlink()


def _new_key(file: Path) -> tuple[str | Path, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", file)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(("openssl", *arguments), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
