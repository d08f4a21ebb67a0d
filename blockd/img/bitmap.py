"""``atoll img bitmap``: the dirty bitmaps that an image keeps. Its changes are made all or none."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Sequence
from typing import Any

from blockd.img import common
from blockd.qcow2.bitmap_edit import BitmapSet
from blockd.qcow2.image import Qcow2Image
from blockd.qcow2.operations import at_rest
from coordinator.contract.errors import BlockError, UsageError

#: (what is to be done, bitmap that is merged)
Action = tuple[str, str | None]


class _Do(argparse.Action):
    """Appends to the list of what is to be done, in the order of the command line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        done: list[Action] = [*namespace.actions]
        done.append((str(self.const), values if isinstance(values, str) else None))
        namespace.actions = done


def run(arguments: list[str]) -> int:
    parser = common.Parser("bitmap", "The dirty bitmaps that an image keeps.")
    parser.format_option()
    about = {
        "add": "a new one",
        "remove": "forget it",
        "clear": "let it mark nothing",
        "enable": "let it follow changes",
        "disable": "let it not follow changes any more",
    }
    for name, text in about.items():
        parser.add_argument(
            f"--{name}", action=_Do, dest="actions", nargs=0, const=name, help=text, default=[]
        )
    parser.add_argument(
        "--merge",
        action=_Do,
        dest="actions",
        const="merge",
        metavar="SOURCE",
        default=[],
        help="mark what another one marks",
    )
    parser.add_argument("-g", "--granularity", type=common.size, help="bytes of each bit of a new one")
    parser.add_argument("-b", "--source-file", dest="source", metavar="FILE", help="image of the one merged")
    parser.format_option("-F", "source_format", "format of that image")
    parser.chain_option()
    parser.add_argument("file", nargs="?")
    parser.add_argument("bitmap", nargs="?")
    given = parser.parse_intermixed_args(arguments)
    _check(given)
    source = None
    if given.source is not None:
        source = common.open_qcow2(given.source, given.source_format, True, "bitmaps", backed=False)
    try:
        image = common.open_qcow2(given.file, given.format, False, "bitmaps", backed=False)
        try:
            with at_rest(image):
                _change(image, source, given)
        finally:
            image.close()
    finally:
        if source is not None:
            source.close()
    return 0


def _check(given: argparse.Namespace) -> None:
    wanted = {action for action, _ in given.actions}
    if given.file is None or given.bitmap is None:
        raise UsageError("bitmap: Expecting filename and bitmap name")
    if not wanted:
        raise UsageError(
            "bitmap: Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        )
    if given.granularity is not None and "add" not in wanted:
        raise UsageError("bitmap: granularity only supported with --add")
    if given.source_format is not None and given.source is None:
        raise UsageError("bitmap: -F only supported with -b")
    if given.source is not None and "merge" not in wanted:
        raise UsageError("bitmap: Merge bitmap source file only supported with --merge")


def _change(image: Qcow2Image, source: Qcow2Image | None, given: argparse.Namespace) -> None:
    known = BitmapSet(image)
    name: str = given.bitmap
    enabled = not any(action == "disable" for action, _ in given.actions)
    for action, other in given.actions:
        try:
            if action == "add":
                known.add(name, given.granularity, enabled)
            elif action == "remove":
                known.remove(name)
            elif action == "clear":
                known.clear(name)
            elif action in ("enable", "disable"):
                known.enable(name, action == "enable")
            elif other is not None:
                known.merge(name, known if source is None else BitmapSet(source), other)
        except BlockError as error:
            text = f"Operation {action} on bitmap {name} failed: {error}"
            raise BlockError(text, error.errno or errno.EINVAL) from None
    known.save()
