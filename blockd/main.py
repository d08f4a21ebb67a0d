"""Entry of the block daemon: as an island of a machine, or by itself from the command line.

python -m blockd.main --socket PATH --tcp [HOST:]PORT --export ID=FILE[,ro=on][,media=cdrom] ...
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import signal
import sys

import msgspec
import setproctitle
import zmq

from blockd import handout, scratch
from blockd.export_image import open_image
from blockd.lease.record import Owner
from blockd.lease.successor import released
from blockd.nbd.handshake import Terms
from blockd.nbd.listen import LOOPBACK
from blockd.places import Place, places
from blockd.service import Service
from coordinator.contract import config, messages
from coordinator.contract.errors import AtollError, UsageError
from coordinator.contract.handout import path as handout_path
from coordinator.contract.island import Control, become, enter
from coordinator.contract.nbd import absolute_name
from coordinator.contract.sandbox import Access, Sandbox
from coordinator.contract.standby import Orders
from coordinator.contract.tls import server_context

log = logging.getLogger(__name__)

ROLE = "blockd"
#: modules that are imported where they are needed, which a sandbox does not let them be
LATE = (
    "blockd.lease.judge", "blockd.nbd.file", "blockd.qcow2.check", "encodings.ascii", "encodings.idna",
    "numpy.ma", "zstandard",
)  # fmt: skip


def main(start: config.BlockdConfig) -> None:
    """Serve one machine's images until Quit, SIGTERM or the coordinator's death; as a standby, once that is
    needed.

    Says Hello when the exports are open and the socket listens, or Failed with a line for the user.
    Exits 0 when everything was durable at the end, else 1.
    """
    sandbox = _sandbox(start)
    if start.order_fds:
        start = _stand_by(start, sandbox)
    else:
        enter(ROLE, start.vm, start.parent, start.log, sandbox)
    scratch.hold(dict(zip((e.id for e in start.exports if e.snapshot), start.scratch_fds, strict=True)))
    control = Control(zmq.Context.instance(), start.runtime, ROLE)
    status = 0
    try:
        service = Service(owner=Owner(start.uuid, start.vm))
        service.end_on_signal(signal.SIGTERM)
        sandbox.seal()
        try:
            if start.replaces:
                service.take_over(start.exports)
            else:
                service.leased.open_all(start.exports)
            service.listen(config.nbd_socket(start.runtime))
            control.hello()
            service.run(control)
        finally:
            service.leased.close_all()
    except AtollError as error:
        log.error("%s", error)
        control.notify(messages.Failed(error=str(error)))
        status = 1
    control.flush()
    sys.exit(status)


def _sandbox(start: config.BlockdConfig) -> Sandbox:
    """Whatever is imported late otherwise is here by now."""
    scratches: list[Place] = []
    if start.sandbox or start.order_fds:
        for module in LATE:
            importlib.import_module(module)
    if start.sandbox:
        handout.use(handout_path(start.runtime))
        scratches = [(fd, Access.READ | Access.WRITE) for fd in start.scratch_fds]
    return Sandbox("blockd", ROLE, start.sandbox, scratches + places(start.runtime, start.exports))


def _stand_by(start: config.BlockdConfig, sandbox: Sandbox) -> config.BlockdConfig:
    """Get ready, and wait until the block daemon dies."""
    enter("standby-blockd", start.vm, start.parent, start.log, sandbox)
    _rehearse(start)
    start, log_fd = Orders(start.order_fds[0]).take(config.BlockdConfig)
    become(ROLE, start.vm, log_fd)
    return start


def _rehearse(start: config.BlockdConfig) -> None:
    """Do for the first time what takes several times as long then. The images are another's still, and are
    only looked at, without locks; what is found half changed is no error."""
    Service().close()
    with contextlib.suppress(AtollError):
        released(start.exports, start.uuid)
    for export in start.exports:
        if not export.snapshot:
            waits = msgspec.structs.replace(export, lease=config.LeasePolicy.AWAIT, read_only=False)
            with contextlib.suppress(AtollError, OSError):
                open_image(waits).close()
    gc.collect()
    gc.freeze()


def parse_export(text: str) -> config.Export:
    """ID=FILE[,ro=on|off][,media=disk|cdrom][,format=raw|qcow2|auto][,allow-backing=PLACE]; a comma in a
    file's name is doubled."""
    name, equals, rest = text.partition("=")
    if not (name and equals):
        raise UsageError(f"--export {text}: is not of the form ID=FILE[,ro=on]")
    file, *options = (part.replace("\0", ",") for part in rest.replace(",,", "\0").split(","))
    values = {"ro": "off", "media": "disk", "format": "raw", "allow-backing": ""}
    for option in options:
        key, equals, value = option.partition("=")
        known = ", ".join(f"{name}=" for name in values)
        if key not in values or not equals:
            raise UsageError(f"--export {text}: unknown option {option!r} (known: {known})")
        values[key] = value
    if values["ro"] not in ("on", "off"):
        raise UsageError(f"--export {text}: ro= takes on or off")
    try:
        media = config.Media(values["media"])
    except ValueError:
        raise UsageError(f"--export {text}: media= takes disk or cdrom") from None
    allowed = (values["allow-backing"],) if values["allow-backing"] else ()
    read_only = values["ro"] == "on"
    return config.Export(name, absolute_name(file), values["format"], read_only, media, allowed)


def parse_address(text: str) -> tuple[str, int]:
    """[HOST:]PORT; an IPv6 address stands in brackets."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--tcp {text}: is not of the form [HOST:]PORT")
    return host.removeprefix("[").removesuffix("]") or LOOPBACK, int(port)


def standalone(arguments: list[str]) -> int:
    """Serve the images named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="blockd", description="Serve disk images as NBD exports.")
    add = parser.add_argument
    add("--socket", action="append", default=[], metavar="PATH", help="UNIX socket to listen at")
    add("--tcp", action="append", default=[], metavar="[HOST:]PORT", help="TCP port (without HOST: loopback)")
    add("--tls-creds", metavar="DIR", help="folder of certificates; nothing is served without TLS then")
    form = "ID=FILE[,ro=on][,media=cdrom]"
    add("--export", action="append", required=True, metavar=form, help="an image to serve")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="blockd: %(message)s", level=logging.WARNING)
    try:
        exports = [parse_export(text) for text in options.export]
        addresses = [parse_address(text) for text in options.tcp]
        if not options.socket and not addresses:
            raise UsageError("--socket or --tcp says where to listen")
        setproctitle.setproctitle(f"atoll {ROLE} {(options.socket + options.tcp)[0]}")
        service = Service(terms=Terms(server_context(options.tls_creds) if options.tls_creds else None))
        service.end_on_signal(signal.SIGTERM, signal.SIGINT)
        for export in exports:
            service.exports.open(export)
        for path in options.socket:
            service.listen(os.path.abspath(path))
        for host, port in addresses:
            service.listen_tcp(host, port)
        service.run()
    except AtollError as error:
        print(f"blockd: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(standalone(sys.argv[1:]))
