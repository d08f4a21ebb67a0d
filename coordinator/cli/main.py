"""``atoll``: find the subcommand and report errors as one line."""

from __future__ import annotations

import importlib
import os
import sys

from coordinator.contract.errors import AtollError

#: subcommand -> (module with ``run(arguments) -> exit status``, what it does)
SUBCOMMANDS = {
    "run": ("coordinator.cli.run", "run a machine; options are spelled as qemu-system-x86_64 spells them"),
    "img": ("blockd.img.main", "make, look at, check, convert and change disk images, as qemu-img does"),
    "nbd": ("blockd.nbd.command", "serve a disk image over the network, as qemu-nbd does"),
    "migrate": ("coordinator.cli.migrate", "move a running machine to another coordinator, or into a file"),
    "top": ("coordinator.cli.top", "show the processes of a running machine, again and again"),
    "lab": ("coordinator.cli.lab", "migrate a guest again and again, and measure each migration"),
    "pieces": ("coordinator.pieces", "fetch firmware and guest pieces from Debian's packages into the cache"),
}


def usage() -> str:
    lines = ["usage: atoll COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<10} {about}" for name, (_, about) in SUBCOMMANDS.items()]
    return "\n".join([*lines, "", "atoll COMMAND --help says more; atoll --version names the version."])


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the ``atoll`` script; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    if arguments[0] in ("-h", "-help", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-version", "--version", "version"):
        from importlib import metadata  # slow, and wanted only here

        print(f"atoll {metadata.version('atoll')}")
        return 0
    name, *rest = arguments
    if name not in SUBCOMMANDS:
        from coordinator.cli.options import nearest

        print(
            f"atoll: unknown command '{name}'; did you mean '{nearest(name, SUBCOMMANDS)}'?", file=sys.stderr
        )
        return 2
    module = importlib.import_module(SUBCOMMANDS[name][0])
    try:
        status: int = module.run(rest)
    except AtollError as error:
        print(f"atoll {name}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status


if __name__ == "__main__":
    sys.exit(main())
