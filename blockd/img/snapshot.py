"""``atoll img snapshot``: internal snapshots of an image."""

from __future__ import annotations

import argparse

from blockd.img import common
from blockd.img.info import snapshot_lines, snapshot_row
from blockd.opening import probe
from blockd.qcow2 import operations, snapshots
from blockd.qcow2.image import Qcow2Image


def run(arguments: list[str]) -> int:
    parser = common.Parser("snapshot", "Internal snapshots of an image.")
    parser.format_option()
    parser.quiet_option()
    parser.share_option("list also while another process writes")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("-l", dest="list", action="store_true", help="list all")
    action.add_argument("-c", dest="create", metavar="NAME", help="make one")
    action.add_argument("-a", dest="apply", metavar="NAME", help="make the disk what it was")
    action.add_argument("-d", dest="delete", metavar="NAME", help="forget one")
    parser.chain_option()
    parser.add_argument("file")
    given = parser.parse_intermixed_args(arguments)
    listing = not (given.create or given.apply or given.delete)
    if listing and (given.format or probe(given.file)) == "raw":
        return 0  # which has none
    image = common.open_qcow2(
        given.file,
        given.format,
        listing,
        "snapshots",
        allowed=given.allow_backing,
        backed=False,
        locked=not (listing and given.force_share),
    )
    try:
        if not listing:
            with common.told_of(given.file):
                _change(image, given)
        else:
            known = snapshots.load(image.host, image.header)
            if known:
                print("\n".join(snapshot_lines([snapshot_row(s) for s in known])))
    finally:
        image.close()
    return 0


def _change(image: Qcow2Image, given: argparse.Namespace) -> None:
    if given.create:
        operations.create(image, given.create)
    elif given.apply:
        operations.apply(image, given.apply)
    else:
        operations.delete(image, given.delete)
