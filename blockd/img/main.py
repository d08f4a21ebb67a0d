"""``atoll img COMMAND``: find the subcommand, report errors in one line, qemu-img's exit statuses."""

from __future__ import annotations

import importlib
import logging
import os
import sys

from coordinator.contract.errors import AtollError

#: subcommand -> what it does; each is a module here with ``run(arguments) -> exit status``
COMMANDS = {
    "bench": "time requests to an image",
    "bitmap": "add, remove, clear, enable, disable and merge dirty bitmaps",
    "check": "check an image, and repair it",
    "commit": "write what an image has over its backing file into that file",
    "compare": "compare the content of two images",
    "convert": "copy an image into another format",
    "create": "make a new image",
    "info": "what an image is",
    "lease": "who may write an image; --break takes it from one who is gone",
    "map": "where the data of an image lies",
    "rebase": "give an image another backing file",
    "resize": "change the size of an image",
    "snapshot": "make, apply, delete and list internal snapshots",
}
#: exit status of an error where it is not 1, since 1 is an answer
_ERROR_STATUS = {"compare": 2}


def usage() -> str:
    lines = ["usage: atoll img COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<10} {about}" for name, about in COMMANDS.items()]
    return "\n".join([*lines, "", "atoll img COMMAND --help says more."])


def run(arguments: list[str]) -> int:
    """The exit status."""
    if not arguments or arguments[0] in ("-h", "-help", "--help", "help"):
        print(usage())
        return 0 if arguments else 1
    name, *rest = arguments
    if name not in COMMANDS:
        return _failed(name, f"unknown command '{name}'; atoll img --help lists them")
    # an error is told once, by the command that has it
    logging.getLogger("blockd.nbd.client").addFilter(lambda record: record.levelno < logging.ERROR)
    module = importlib.import_module(f"blockd.img.{name}")
    try:
        status: int = module.run(rest)
        if sys.stdout is not None:  # it may have been closed by whoever started us
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except AtollError as error:
        return _failed(name, str(error))
    except OSError as error:
        reason = error.strerror if error.strerror else str(error)
        return _failed(name, reason if error.filename is None else f"{error.filename}: {reason}")
    except MemoryError:
        return _failed(name, os.strerror(12))
    return status


def _failed(name: str, text: str) -> int:
    print(f"atoll img: {text}", file=sys.stderr)
    return _ERROR_STATUS.get(name, 1)
