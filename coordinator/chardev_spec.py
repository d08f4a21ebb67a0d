"""Character devices as the command line names them: -serial, -monitor, -qmp and -chardev."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.cli.options import KeyValues, nearest
from coordinator.contract.errors import UsageError

KINDS = ("stdio", "file", "socket", "null")
_SHORT = ("stdio", "mon:stdio", "file:", "unix:", "tcp:", "chardev:", "null", "none")


@dataclass(frozen=True)
class ChardevSpec:
    """``kind`` is one of KINDS; the other fields are of some kinds only."""

    kind: str
    id: str = ""
    path: str = ""
    host: str = ""
    port: int = 0
    server: bool = False
    #: wait for the first client before the guest runs
    wait: bool = False
    append: bool = False
    #: shares the terminal with the monitor (mon:stdio)
    mux: bool = False

    @property
    def where(self) -> str:
        """What it occupies, for messages and to find two that want the same."""
        return self.path or (f"{self.host}:{self.port}" if self.port else self.kind)


def from_properties(kv: KeyValues) -> ChardevSpec:
    """-chardev BACKEND,id=ID,..."""
    kind = kv.choice("backend", KINDS, "null")
    server = kv.flag("server")
    spec = ChardevSpec(
        kind=kind, id=kv.need("id"), path=kv.take("path") or "", host=kv.take("host") or "127.0.0.1",
        port=kv.number("port", 0, 0, 65535), server=server, wait=kv.flag("wait", server),
        append=kv.flag("append"), mux=kv.flag("mux"),
    )  # fmt: skip
    kv.ignore(
        "signal",
        "logfile",
        "logappend",
        "nodelay",
        "delay",
        "reconnect",
        "telnet",
        "ipv4",
        "ipv6",
        "abstract",
        "tight",
    )
    kv.done(("backend", "id", "path", "host", "port", "server", "wait", "append", "mux"))
    if kind == "socket" and not spec.path and not spec.port:
        raise UsageError(f"-chardev socket,id={spec.id}: needs path= or host= and port=")
    if kind == "file" and not spec.path:
        raise UsageError(f"-chardev file,id={spec.id}: needs path=")
    return spec


def parse_device(option: str, text: str, chardevs: dict[str, ChardevSpec] | None = None) -> ChardevSpec:
    """The short form of -serial, -monitor and -qmp: ``unix:PATH,server=on,wait=off`` and the like."""
    kind, _, rest = text.partition(":")
    if text in ("null", "none", "vc") or kind == "vc":
        return ChardevSpec("null")
    if text in ("stdio", "mon:stdio"):
        return ChardevSpec("stdio", mux=text != "stdio")
    if kind == "file" and rest:
        return ChardevSpec("file", path=rest)
    if kind == "chardev" and rest:
        if not chardevs or rest not in chardevs:
            raise UsageError(f"-{option} {text}: there is no -chardev id={rest} before it")
        return chardevs[rest]
    if kind in ("unix", "tcp") and rest:
        return _socket(option, text, kind, rest)
    raise UsageError(f"-{option} {text}: unknown device; the nearest known one is {nearest(text, _SHORT)}")


def _socket(option: str, text: str, kind: str, rest: str) -> ChardevSpec:
    kv = KeyValues(option, rest, implied="where")
    where = kv.need("where")
    server = kv.flag("server")
    wait = kv.flag("wait", server)
    kv.ignore("nodelay", "delay", "reconnect")
    kv.done(("server", "wait"))
    if kind == "unix":
        return ChardevSpec("socket", path=where, server=server, wait=wait)
    host, _, port = where.rpartition(":")
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UsageError(f"-{option} {text}: say tcp:HOST:PORT")
    return ChardevSpec("socket", host=host or "127.0.0.1", port=int(port), server=server, wait=wait)
