"""The exports of one VM with their leases: taken together, given back with the last byte."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec

from blockd.export import Export, ExportTable
from blockd.export_image import open_image
from blockd.hostfile import read_only_hint
from blockd.image import Image
from blockd.lease.image import LeasedImage
from blockd.lease.lease import Claim, Lease, acquire
from blockd.lease.record import Owner
from coordinator.contract import config
from coordinator.contract.durable import Folder
from coordinator.contract.errors import BlockError

log = logging.getLogger(__name__)


class LeasedExports:
    """An export table whose writable disks are leased. One thread calls it."""

    def __init__(self, table: ExportTable, owner: Owner, folder_type: type[Folder] = Folder) -> None:
        self.table = table
        self.owner = owner
        self.folder_type = folder_type
        #: what each leased export is, and its lease: None while it is awaited, or cannot be kept
        self.wanted: dict[str, config.Export] = {}
        self.leases: dict[str, Lease | None] = {}
        #: called with the export and a line for the user when a lease is found to be lost, by any thread
        self.on_loss: Callable[[str, str], None] = lambda ident, text: None

    # ---- opening -----------------------------------------------------------------------------------
    def open_all(self, exports: Iterable[config.Export]) -> list[Export]:
        """Open all or none; leases are taken before any image is opened for writing."""
        exports = list(exports)
        claims = [
            Claim(each.id, each.file, each.lease is config.LeasePolicy.BREAK)
            for each in exports
            if each.leased and not each.inactive
        ]
        leases: dict[str, Lease | None] = {}
        if claims:
            with read_only_hint(exports[0].read_only_option):  # one user has written all of them
                leases = acquire(claims, self.owner, self.folder_type)
        opened: list[Export] = []
        try:
            for each in exports:
                opened.append(self.open_export(each, leases.get(each.id)))
        except BaseException:
            for export in opened:
                self._retire(export.name)
            for lease in leases.values():
                if lease is not None:
                    lease.give_back()
            raise
        for each in exports:
            self._drop(each.id)  # of another image that had this name
            if each.leased:
                self.wanted[each.id] = each
                self.leases[each.id] = leases.get(each.id)
        return opened

    def open_export(self, wanted: config.Export, lease: Lease | None) -> Export:
        """An export under a lease that is there, inactive, or without one."""
        if lease is not None:
            lease.on_loss = partial(self.on_loss, wanted.id)

        def opener(wanted: config.Export) -> Image:
            image = open_image(wanted)
            if lease is None and not wanted.inactive:
                return image
            try:
                if lease is not None:
                    lease.check()  # there was a moment at which nothing of ours was locked
                    lease.covers(wanted.file)
            except BaseException as error:
                image.close()
                if isinstance(error, OSError):
                    raise BlockError(error.strerror or str(error), error.errno or 5) from None
                raise
            return LeasedImage(image, lease)

        return self.table.open(wanted, opener)

    # ---- closing -----------------------------------------------------------------------------------
    def close(self, ident: str) -> None:
        """Retire an export; its lease goes when nothing of it can change any more."""
        try:
            self.table.close(ident)
        finally:
            self._drop(ident)

    def close_all(self) -> list[str]:
        """Retire every export, give back every lease; the errors that this brought."""
        errors = self.table.close_all()
        for ident in list(self.leases):
            self._drop(ident)
        return errors

    def _drop(self, ident: str) -> None:
        lease = self.leases.pop(ident, None)
        self.wanted.pop(ident, None)
        if lease is not None:
            lease.give_back()

    def _retire(self, ident: str) -> None:
        """For the way back from an error, which is the one that is told."""
        try:
            self.table.close(ident)
        except BlockError as error:
            log.error("%s", error)

    # ---- telling -----------------------------------------------------------------------------------
    def describe(self) -> list[dict[str, Any]]:
        return [self.row(ident) for ident in self.leases]

    def row(self, ident: str) -> dict[str, Any]:
        """One lease, for QueryLeases."""
        lease, wanted = self.leases[ident], self.wanted[ident]
        row: dict[str, Any] = {"id": ident, "file": wanted.file}
        if lease is None:
            return row | {"state": "awaited" if wanted.inactive else "none"}
        record = lease.record
        row["state"] = "lost" if lease.lost else record.state
        return row | {"epoch": record.epoch, "token": record.token, "transfer": record.transfer}


def active(wanted: config.Export) -> config.Export:
    """The export that was awaited, as it is once its lease is there."""
    return msgspec.structs.replace(wanted, lease=config.LeasePolicy.TAKE)
