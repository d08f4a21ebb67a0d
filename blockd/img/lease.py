"""``atoll img lease``: who may write an image, and taking that away from one who is gone for good."""

from __future__ import annotations

import os
from typing import Any

from blockd.img import common
from blockd.lease.judge import abandoned, decision_of
from blockd.lease.lease import Claim, acquire
from blockd.lease.record import Owner
from blockd.lease.slot import Found, Slot
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import is_network_name


def run(arguments: list[str]) -> int:
    parser = common.Parser("lease", "Who may write an image.")
    parser.output_option()
    parser.add_argument(
        "--break", dest="by_force", action="store_true", help="take the lease away from a holder that is gone"
    )
    parser.add_argument("file")
    given = parser.parse_intermixed_args(arguments)
    if is_network_name(given.file):
        raise BlockError(f"{given.file}: an export has no lease; only its server knows who writes it", 95)
    slot = Slot(given.file)
    try:
        os.stat(given.file)
        seen = slot.look()
    except OSError as error:
        raise BlockError(f"{given.file}: {error.strerror}", error.errno or 5) from None
    row = _row(slot, given.file, seen[-1] if seen else None)
    if given.by_force and seen:
        lease = acquire([Claim("image", given.file, by_force=True)], Owner("", "atoll img lease"))["image"]
        if lease is None:
            raise BlockError(f"{given.file}: its folder cannot be written, so the lease stays", 13)
        lease.give_back()
    if given.output == "json":
        common.print_json(row)
    else:
        print(_text(row) + ("; broken" if given.by_force and seen else ""))
    return 0


def _row(slot: Slot, file: str, found: Found | None) -> dict[str, Any]:
    row: dict[str, Any] = {"filename": file, "state": "none"}
    if found is None:
        return row
    row["record"] = slot.path(found.serial)
    record = found.record
    if record is None:
        return row | {"state": "damaged"}
    state: str = record.state
    if record.state == "transferring":
        decision = decision_of(slot, record)
        row["transfer"] = record.transfer
        if decision is not None and decision.verdict == "released":
            state = "released"
    return row | {
        "state": state,
        "epoch": record.epoch,
        "vm": record.vm,
        "uuid": record.uuid,
        "host": record.host,
        "pid": record.pid,
        "holder-dead": state != "released" and abandoned(record, locked=False),
    }


def _text(row: dict[str, Any]) -> str:
    file = row["filename"]
    if row["state"] == "none":
        return f"{file}: no lease"
    if row["state"] == "damaged":
        return f"{file}: the lease {row['record']} is damaged, or of another version"
    text = f"{file}: epoch {row['epoch']}, VM '{row['vm']}' on host {row['host']} (pid {row['pid']})"
    if row["state"] == "released":
        return f"{text}, handed over by transfer {row['transfer']} and not taken yet"
    if row["state"] == "transferring":
        text += f", being handed over by transfer {row['transfer']}"
    return text + (", which is dead" if row["holder-dead"] else "")
