"""The writable disks of a machine that moves: their leases go with it, all or none (blockd/lease).

A disk without a lease cannot be kept from two writers, so it is refused by name unless the user says that it
is safe.
"""

from __future__ import annotations

from typing import Any

import msgspec

from coordinator.contract import messages as island
from coordinator.contract.config import Drive, LeasePolicy, Media, export_of
from coordinator.contract.errors import IslandError, MigrationError
from coordinator.machine import Vm
from coordinator.migrate.messages import LeasedImage, Leases

BLOCKD = "blockd"
#: how often a release that failed is tried again before it is taken back
ATTEMPTS = 3


def written(vm: Vm) -> list[Drive]:
    """Drives whose images this machine changes."""
    return [d for d in vm.machine.drives if d.file is not None and d.media is Media.DISK and not d.read_only]


async def _rows(vm: Vm) -> dict[str, dict[str, Any]]:
    """blockd's word on each leased image, by drive."""
    rows = await vm.command(BLOCKD, island.QueryLeases(serial=vm.next_serial()))
    return {row["id"]: row for row in rows}


class SourceDisks:
    """The old side."""

    def __init__(self, vm: Vm, transfer: str) -> None:
        self._vm, self._transfer = vm, transfer
        #: where the record of the release will lie; None where no disk is leased
        self.decision: str | None = None
        self.leases: Leases | None = None

    async def check(self, unleased: bool) -> None:
        """MigrationError names a disk that cannot go along. ``unleased``: the user answers for those without
        a lease."""
        rows = await _rows(self._vm)
        for drive in written(self._vm):
            state = rows.get(drive.id, {}).get("state", "none")
            if drive.snapshot:
                raise MigrationError(
                    f"drive {drive.id}: what is written to it stays here (-snapshot); it cannot move"
                )
            if state != "held" and not unleased:
                raise MigrationError(
                    f"drive {drive.id}: {drive.file} has no lease ({state}), so both sides could write it; "
                    "unleased-disks=allow if you know that they will not"
                )

    async def prepare(self) -> None:
        """Drain and close the leased images, with the guest stopped. After an error all is as before."""
        rows = await _rows(self._vm)
        if not any(row["state"] == "held" for row in rows.values()):
            return
        command = island.PrepareTransfer(serial=self._vm.next_serial(), transfer=self._transfer)
        told = await self._vm.command(BLOCKD, command)
        self.decision = told["decision"]
        self.leases = Leases(
            epoch=told["epoch"],
            images=tuple(LeasedImage(row["id"], row["epoch"], row["token"]) for row in told["images"]),
        )

    async def abort(self) -> None:
        """Everything as before ``prepare``."""
        if self.leases is not None:
            command = island.AbortTransfer(serial=self._vm.next_serial(), transfer=self._transfer)
            await self._vm.command(BLOCKD, command)

    async def release(self) -> None:
        """The commit point. MigrationError: it was not reached, for certain."""
        assert self.leases is not None
        for attempt in range(ATTEMPTS):
            command = island.ReleaseTransfer(
                serial=self._vm.next_serial(), transfer=self._transfer, epoch=self.leases.epoch
            )
            try:
                await self._vm.command(BLOCKD, command)
                return
            except IslandError as error:
                failure = error
            if attempt + 1 == ATTEMPTS:
                await self._take_back(failure)

    async def _take_back(self, failure: IslandError) -> None:
        """What is not known is found out by taking it back: that fails where it has been released."""
        try:
            await self.abort()
        except IslandError:
            return
        self.leases = None
        raise MigrationError(str(failure))


class TargetDisks:
    """The new side."""

    def __init__(self, vm: Vm, transfer: str, leases: Leases | None) -> None:
        self._vm, self._transfer, self._leases = vm, transfer, leases

    async def check(self) -> None:
        """Both sides mean the same images, on storage that both reach; MigrationError names it."""
        if self._leases is None:
            return
        command = island.CheckTransfer(serial=self._vm.next_serial(), transfer=self._transfer)
        rows = await self._vm.command(BLOCKD, command)
        ours = {row["id"]: (row["epoch"], row["token"]) for row in rows}
        theirs = {image.id: (image.epoch, image.token) for image in self._leases.images}
        for ident in sorted(ours.keys() | theirs.keys()):
            if ours.get(ident) != theirs.get(ident):
                raise MigrationError(f"drive {ident}: its image here is not the one that the source writes")

    async def grant(self) -> None:
        """The leases pass, and writes are served. IslandError where the source has not released them."""
        if self._leases is not None:
            command = island.GrantTransfer(
                serial=self._vm.next_serial(), transfer=self._transfer, epoch=self._leases.epoch
            )
            await self._vm.command(BLOCKD, command)
        self._vm.crew.awaits_disks = False

    @property
    def leased(self) -> bool:
        return self._leases is not None


async def take(vm: Vm) -> None:
    """A machine from a file takes the leases of its disks itself."""
    exports = [export_of(drive, incoming=True) for drive in vm.machine.drives if drive.file is not None]
    awaited = [export for export in exports if export.inactive]
    if awaited:
        taken = tuple(msgspec.structs.replace(export, lease=LeasePolicy.TAKE) for export in awaited)
        await vm.command(BLOCKD, island.AcquireLeases(serial=vm.next_serial(), exports=taken))
    vm.crew.awaits_disks = False
