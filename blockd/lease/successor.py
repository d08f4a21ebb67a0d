"""A block daemon that follows one of the same machine that has died: whose are the images now?

Leases that the dead process held are taken as any dead holder's are. Those that it had released are the
destination's, which is not known from anything but the decision on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from blockd.lease.judge import decision_of, decision_path
from blockd.lease.slot import Slot
from coordinator.contract import config
from coordinator.contract.durable import Folder
from coordinator.contract.errors import BlockError


def released(
    exports: Iterable[config.Export], uuid: str, folder_type: type[Folder] = Folder
) -> dict[str, dict[str, Any]]:
    """What ``Source.release`` would have answered, by export that is another's now; BlockError."""
    gone = {}
    for export in exports:
        if not export.leased or export.inactive:
            continue
        slot = Slot(export.file, folder_type)
        try:
            seen = slot.look()
        except OSError as error:
            text = f"{export.file}: cannot look for leases: {error.strerror}"
            raise BlockError(text, error.errno or 5) from None
        for found in seen:
            record = found.record
            if record is None or record.state != "transferring" or record.uuid != uuid:
                continue
            decision = decision_of(slot, record)
            if decision is not None and decision.verdict == "released" and record.token in decision.tokens:
                gone[export.id] = {
                    "transfer": decision.transfer, "epoch": decision.epoch,
                    "decision": decision_path(slot, record),
                }  # fmt: skip
    return gone
