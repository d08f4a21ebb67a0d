"""``atoll nbd``: options in qemu-nbd's spelling, its exit statuses, and going to the background.

What is heavy to import is imported behind the fork, so that no thread of a library is lost by it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from blockd.nbd.listen import LOOPBACK, Listener, inherited
from blockd.nbd.settings import Settings, TlsCredentials
from coordinator.contract.config import IMAGE_FORMATS, DetectZeroes, Export
from coordinator.contract.errors import AtollError, UsageError
from coordinator.contract.nbd import MAX_STRING, absolute_name

DEFAULT_PORT = 10809  # IANA's for nbd
CACHE = ("writeback", "none", "writethrough", "directsync", "unsafe")
#: qemu-nbd's options that are not here, and why
_ABSENT = {
    ("-A", "--allocation-depth"): "the allocation depth is not told",
    ("-c", "--connect"): "the kernel's client is started by nbd-client",
    ("-d", "--disconnect"): "the kernel's client is stopped by nbd-client -d",
    ("-o", "--offset"): "a part of an image cannot be served",
    ("-T", "--trace"): "there are no trace events; -v says more",
    ("--image-opts",): "FILE is the name of a file",
    ("--tls-authz",): "who has a certificate of the authority is let in",
    ("--selinux-label",): "sockets are not labelled",
}


def run(arguments: list[str]) -> int:
    """The exit status: 0, or 1 after any error, as qemu-nbd has it."""
    try:
        end = arguments.index("--") if "--" in arguments else len(arguments)
        given = _parser().parse_intermixed_args(arguments[:end])
        given.file += arguments[end + 1 :]
        if given.version:
            from importlib import metadata  # slow, and wanted only here

            print(f"atoll nbd {metadata.version('atoll')}")
            return 0
        settings = _settings(given)
        if given.list:
            from blockd.nbd.listing import show

            show(settings)
            return 0
        listeners = inherited()
        if given.fork:
            return _in_background(settings, listeners)
        _serve(settings, listeners, lambda: None)
    except AtollError as error:
        print(f"atoll nbd: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(settings: Settings, listeners: list[Listener], ready: Callable[[], None]) -> None:
    from blockd.nbd.daemon import serve

    serve(settings, listeners, ready)


# ---- options -------------------------------------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; atoll nbd --help says more")


class _Absent(argparse.Action):
    """An option of qemu-nbd's that is not here."""

    def __call__(self, parser: object, namespace: object, values: object, option: str | None = None) -> None:
        reason = next(text for flags, text in _ABSENT.items() if option in flags)
        raise UsageError(f"{option} is not supported: {reason}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="atoll nbd",
        usage="atoll nbd [OPTIONS] FILE\n       atoll nbd -L [OPTIONS]",
        description="Serve a disk image over the network block device protocol.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", nargs="*", metavar="FILE", help=argparse.SUPPRESS)
    add("-V", "--version", action="store_true", help="print the version")
    net = parser.add_argument_group("connection").add_argument
    net("-p", "--port", type=_port, metavar="PORT", help=f"TCP port (default {DEFAULT_PORT}; 0: a free one)")
    net("-b", "--bind", action="append", metavar="HOST", help="address to listen at (default: loopback)")
    net("-k", "--socket", action="append", default=[], metavar="PATH", help="UNIX socket instead of TCP")
    net("-e", "--shared", type=_count, default=1, metavar="N", help="clients at once (default 1; 0: all)")
    net("-t", "--persistent", action="store_true", help="stay when the last client leaves")
    net("-x", "--export-name", default="", metavar="NAME", help="name of the export (default: empty)")
    net("-D", "--description", default="", metavar="TEXT", help="what clients are told about it")
    net("-L", "--list", action="store_true", help="list the exports of another server")
    tls = parser.add_argument_group("TLS").add_argument
    tls("--object", action="append", default=[], metavar="tls-creds-x509,id=ID,dir=DIR,endpoint=SIDE",
        help="a folder with certificates; verify-peer=off lets clients in that have none")  # fmt: skip
    tls("--tls-creds", metavar="ID|DIR", help="the object, or folder; what has no TLS is not served then")
    tls("--tls-hostname", metavar="NAME", help="name in the server's certificate (with -L)")
    disk = parser.add_argument_group("image").add_argument
    disk("-f", "--format", metavar="FORMAT", help="raw or qcow2 (default: what the file claims to be)")
    disk("-r", "--read-only", action="store_true")
    disk("-s", "--snapshot", action="store_true", help="writes are lost at the end")
    disk("-l", "--load-snapshot", default="", metavar="ID|NAME", help="serve an internal snapshot, read-only")
    disk("-B", "--bitmap", action="append", default=[], metavar="NAME", help="tell clients of a dirty bitmap")
    disk("--discard", choices=("ignore", "off", "unmap", "on"), default="ignore", help="what a trim does")
    disk("--cache", default="writeback", choices=CACHE, help="none is writeback, directsync is writethrough")
    disk("-n", "--nocache", dest="cache", action="store_const", const="none", help="--cache=none")
    disk("--aio", choices=("threads", "native", "io_uring"), help=argparse.SUPPRESS)
    disk("--detect-zeroes", choices=("off", "on", "unmap"), default="off",
         help="make zero what is written as zeroes; unmap: and give its space back")  # fmt: skip
    disk("--allow-backing", action="append", default=[], metavar="PLACE",
         help="a file or folder elsewhere that backing files may come from; * for any")  # fmt: skip
    other = parser.add_argument_group("process").add_argument
    other("--fork", action="store_true", help="go to the background, and return when clients can connect")
    other("--pid-file", metavar="PATH", help="write the server's process id there")
    other("-v", "--verbose", action="store_true", help="say more on standard error")
    for flags in _ABSENT:
        add(*flags, action=_Absent, nargs="?", help=argparse.SUPPRESS)
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise UsageError(f"-p {text}: a port is a number up to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 31:
        raise UsageError(f"-e {text}: is no number of clients")
    return int(text)


def _settings(given: argparse.Namespace) -> Settings:
    """UsageError where options contradict each other."""
    if len(given.file) != (0 if given.list else 1):
        wanted = "-L takes no FILE" if given.list else "exactly one FILE is wanted"
        raise UsageError(f"{wanted}; atoll nbd --help says more")
    addresses: tuple[tuple[str, int], ...] = ()
    if given.port is not None or given.bind or not given.socket:
        port = DEFAULT_PORT if given.port is None else given.port
        addresses = tuple((host, port) for host in given.bind or (LOOPBACK,))
    return Settings(
        export=None if given.list else _export(given),
        sockets=tuple(os.path.abspath(path) for path in given.socket),
        addresses=addresses,
        clients=given.shared,
        persistent=given.persistent,
        credentials=_credentials(given),
        hostname=given.tls_hostname,
        pid_file=None if given.pid_file is None else os.path.abspath(given.pid_file),
        verbose=given.verbose,
    )


def _export(given: argparse.Namespace) -> Export:
    for what, text in (("-x", given.export_name), ("-D", given.description)):
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise UsageError(f"{what} {text!a}: is no UTF-8") from None
        if length > MAX_STRING:
            raise UsageError(f"{what}: {length} bytes are too long for NBD (at most {MAX_STRING})")
    if given.format not in (None, *IMAGE_FORMATS):
        raise UsageError(f"-f {given.format}: is unknown (known: {', '.join(IMAGE_FORMATS)})")
    if given.detect_zeroes == "unmap" and given.discard not in ("unmap", "on"):
        raise UsageError("--detect-zeroes=unmap needs --discard=unmap")
    if given.snapshot and (given.load_snapshot or given.bitmap or given.read_only):
        raise UsageError("-s cannot be combined with -l, -B or -r")
    if given.load_snapshot and given.bitmap:
        raise UsageError("-B cannot be combined with -l: bitmaps tell of the disk as it is now")
    return Export(
        id=given.export_name,
        file=absolute_name(given.file[0]),
        format=given.format or "auto",
        read_only=given.read_only or bool(given.load_snapshot),
        backing_allowed=tuple(p if p == "*" else absolute_name(p) for p in given.allow_backing),
        snapshot=given.snapshot,
        unsafe=given.cache == "unsafe",
        writethrough=given.cache in ("writethrough", "directsync"),
        detect_zeroes=DetectZeroes(given.detect_zeroes),
        description=given.description,
        load_snapshot=given.load_snapshot,
        bitmaps=tuple(given.bitmap),
        discard=given.discard in ("unmap", "on"),
        sectors=False,
        read_only_option="-r",
        raw_option="-f raw",
    )


def _credentials(given: argparse.Namespace) -> TlsCredentials | None:
    """What --tls-creds means: an --object's id, or else a folder."""
    side = "client" if given.list else "server"
    known: dict[str, TlsCredentials] = {}
    for text in given.object:
        name, credentials = _object(text, side)
        known[name] = credentials
    wanted = given.tls_creds
    if wanted is None:
        return None
    if wanted in known:
        return known[wanted]
    if not os.path.isdir(wanted):
        raise UsageError(f"--tls-creds {wanted}: is neither the id of an --object nor a folder")
    return TlsCredentials(os.path.abspath(wanted))


def _object(text: str, side: str) -> tuple[str, TlsCredentials]:
    """Id and credentials of an --object."""
    kind, *parts = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    if kind != "tls-creds-x509":
        raise UsageError(f"--object {kind}: is unknown (tls-creds-x509 is known)")
    values = {"id": "", "dir": "", "endpoint": "client", "verify-peer": "on"}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in values or not equals:
            known = ", ".join(f"{name}=" for name in values)
            raise UsageError(f"--object {text}: unknown property {part!r} (known: {known})")
        values[key] = value
    if not values["id"] or not values["dir"]:
        raise UsageError(f"--object {text}: needs id= and dir=")
    if values["endpoint"] != side:
        raise UsageError(f"--object {text}: needs endpoint={side} here")
    if values["verify-peer"] not in ("on", "yes", "off", "no"):
        raise UsageError(f"--object {text}: verify-peer= takes on or off")
    verify_peer = values["verify-peer"] in ("on", "yes")
    return values["id"], TlsCredentials(os.path.abspath(values["dir"]), verify_peer)


# ---- going to the background ---------------------------------------------------------------------------
def _in_background(settings: Settings, listeners: list[Listener]) -> int:
    """Fork; the parent returns when the child listens (0), or has said why it does not (1)."""
    if sys.stdout is not None:  # it may have been closed by whoever started us
        sys.stdout.flush()
    read, write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            told = pipe.read().decode("utf-8", "replace")
        if told == _READY:
            return 0
        os.waitpid(pid, 0)
        print(f"atoll nbd: {told or 'the server has died'}", file=sys.stderr)
        return 1
    os.close(read)
    os.setsid()

    def ready() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1) if settings.verbose else (0, 1, 2):
            os.dup2(null, fd)
        os.write(write, _READY.encode())
        os.close(write)

    status = 1
    try:
        _serve(settings, listeners, ready)
        status = 0
    except AtollError as error:
        try:
            os.write(write, str(error).encode("utf-8", "replace"))
        except OSError:  # it has been ready, and fails now
            print(f"atoll nbd: {error}", file=sys.stderr)
    finally:
        os._exit(status)  # what the parent is in the middle of is not the child's to end


_READY = "\0"
