"""QMP commands about migration.

Source: QEMU's QAPI schema, migration.json (names, fields and error texts that clients look at).
"""

from __future__ import annotations

from typing import Any

from coordinator.contract import messages
from coordinator.contract.errors import ConfigError
from coordinator.machine import Vm


async def migrate(
    vm: Vm, uri: str, blk: bool = False, inc: bool = False, detach: bool = True, resume: bool = False
) -> None:
    if blk or inc:
        raise ConfigError("disks do not travel: they must be on storage that both sides reach")
    if resume:
        await vm.migration.resume(uri)
    else:
        vm.migration.migrate(uri)


async def migrate_incoming(vm: Vm, uri: str) -> None:
    vm.migration.incoming(uri)


async def migrate_cancel(vm: Vm) -> None:
    vm.migration.cancel()


async def migrate_recover(vm: Vm, uri: str) -> None:
    await vm.migration.recover(uri)


async def query_migrate(vm: Vm) -> dict[str, Any]:
    return vm.migration.query()


async def query_migrate_parameters(vm: Vm) -> dict[str, Any]:
    return vm.migration.parameters.as_dict()


async def migrate_set_parameters(vm: Vm, **values: Any) -> None:
    vm.migration.set({name.replace("_", "-"): value for name, value in values.items()})


async def query_phases(vm: Vm, reset: bool = False) -> list[dict[str, Any]]:
    """Where each drive is, and for how long it has been in each phase: see QueryPhases in
    contract/messages.py."""
    found: list[dict[str, Any]] = []
    for host in vm.hosts:
        found += await vm.command(host, messages.QueryPhases(serial=vm.next_serial(), reset=reset))
    return found
