"""TLS for NBD and migration: credentials in a folder laid out as QEMU's tls-creds-x509 wants it.

    ca-cert.pem                      whom to trust
    ca-crl.pem                       certificates that are not to be trusted any more; may be missing
    server-cert.pem server-key.pem   the server's own
    client-cert.pem client-key.pem   the client's own; may be missing where the server does not ask

Source: NBD protocol, "TLS support"; QEMU's manual, "TLS setup for network services".
"""

from __future__ import annotations

import os
import ssl

from coordinator.contract.errors import BlockError

_AUTHORITY = "ca-cert.pem"
_REVOKED = "ca-crl.pem"


def server_context(folder: str, verify_peer: bool = True) -> ssl.SSLContext:
    """What a server needs; with ``verify_peer`` a client must have a certificate of that authority.
    BlockError in one line when something is missing or does not fit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0  # nobody comes back by one, and a silent connection stays silent
    _load_own(context, folder, "server")
    if verify_peer:
        context.verify_mode = ssl.CERT_REQUIRED
        _load_authority(context, folder)
    return context


def client_context(folder: str | None, hostname: str | None) -> ssl.SSLContext:
    """What a client needs. The server must have a certificate of the folder's authority (without a folder: of
    one that the system trusts), in the name of ``hostname`` where that is given. BlockError in one line."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = hostname is not None
    if folder is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return context
    _load_authority(context, folder)
    if os.path.exists(os.path.join(folder, "client-cert.pem")):
        _load_own(context, folder, "client")
    return context


def _load_own(context: ssl.SSLContext, folder: str, side: str) -> None:
    """The certificate and key of one side."""
    certificate, key = _file(folder, f"{side}-cert.pem"), _file(folder, f"{side}-key.pem")
    try:
        # a key with a pass phrase must not make the daemon ask its terminal for it
        context.load_cert_chain(certificate, key, password=b"")
    except (ssl.SSLError, ValueError) as error:
        raise _unusable(f"{certificate} and {key}", error) from None


def _load_authority(context: ssl.SSLContext, folder: str) -> None:
    """Whose certificates of the other side are good."""
    authority = _file(folder, _AUTHORITY)
    try:
        context.load_verify_locations(authority)
    except (ssl.SSLError, ValueError) as error:
        raise _unusable(authority, error) from None
    revoked = os.path.join(folder, _REVOKED)
    if os.path.exists(revoked):
        try:
            context.load_verify_locations(_file(folder, _REVOKED))
        except (ssl.SSLError, ValueError) as error:
            raise _unusable(revoked, error) from None
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _file(folder: str, name: str) -> str:
    """The path of a file that can be read."""
    path = os.path.join(folder, name)
    try:
        with open(path, "rb"):
            return path
    except OSError as error:
        raise BlockError(f"TLS: {path}: {error.strerror}", error.errno or 5) from None


def _unusable(what: str, error: Exception) -> BlockError:
    reason = getattr(error, "reason", None) or str(error)
    return BlockError(f"TLS: {what}: cannot be used: {reason.replace('_', ' ').lower()}", 22)
