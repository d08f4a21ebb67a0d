"""The QMP commands, one function each, in one table with their parameters.

Source: QEMU's QAPI schema (names, fields and error texts that clients look at).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from coordinator import census, media, screen
from coordinator.contract import messages
from coordinator.contract.errors import ConfigError, IslandError
from coordinator.machine import Vm
from coordinator.migrate.parameters import Parameters
from coordinator.qmp import dumping, migration, snapshots
from coordinator.version import version

After = Callable[[], None]
TYPE_NAMES: dict[type, str] = {str: "string", bool: "boolean", int: "integer", list: "array", dict: "object"}


@dataclass(frozen=True)
class Then:
    """A reply, and what is done once it has been sent."""

    value: Any
    after: After


@dataclass(frozen=True)
class Parameter:
    type: type
    required: bool = True


def _optional(kind: type) -> Parameter:
    return Parameter(kind, required=False)


@dataclass(frozen=True)
class Command:
    """``early``: can be carried out while the machine is still starting."""

    function: Callable[..., Awaitable[Any]]
    parameters: dict[str, Parameter] = field(default_factory=dict)
    early: bool = False


# ---- queries ------------------------------------------------------------------------------------------
async def query_commands(vm: Vm) -> Any:
    return [{"name": name} for name in sorted([*COMMANDS, "qmp_capabilities"])]


async def query_status(vm: Vm) -> Any:
    return {"status": vm.state, "running": vm.state == "running", "singlestep": False}


async def query_version(vm: Vm) -> Any:
    return version()


async def query_name(vm: Vm) -> Any:
    return {"name": vm.machine.name}


async def query_uuid(vm: Vm) -> Any:
    return {"UUID": vm.machine.uuid}


async def query_cpus_fast(vm: Vm) -> Any:
    return [
        {
            "cpu-index": i,
            "qom-path": f"/machine/unattached/device[{i}]",
            "thread-id": vm.islands[f"vcpu{i}"].pid,
            "props": {"socket-id": 0, "core-id": i, "thread-id": 0},
            "target": "x86_64",
        }
        for i in range(vm.machine.vcpus)
    ]


async def query_islands(vm: Vm) -> Any:
    return census.describe(vm)


async def query_block(vm: Vm) -> Any:
    return await media.describe(vm)


# ---- life ---------------------------------------------------------------------------------------------
async def stop(vm: Vm) -> None:
    await vm.stop()


async def cont(vm: Vm) -> None:
    await vm.cont()


async def quit_(vm: Vm) -> Then:
    return Then({}, vm.quit)


async def system_reset(vm: Vm) -> None:
    await vm.reset()


async def system_powerdown(vm: Vm) -> None:
    await vm.command("devhost0", messages.PowerButton(serial=vm.next_serial()))
    vm.event("POWERDOWN")


async def inject_nmi(vm: Vm) -> None:
    for role in vm.vcpus:
        await vm.command(role, messages.InjectNmi(serial=vm.next_serial()))


# ---- media --------------------------------------------------------------------------------------------
def _which(device: str | None, ident: str | None) -> str:
    name = ident if ident is not None else device
    if name is None or (ident is not None and device is not None):
        raise ConfigError("Need exactly one of 'device' and 'id'")
    return name


async def eject(vm: Vm, device: str | None = None, id: str | None = None, force: bool = False) -> None:
    await media.eject(vm, _which(device, id), force)


async def open_tray(vm: Vm, device: str | None = None, id: str | None = None, force: bool = False) -> None:
    await media.open_tray(vm, _which(device, id), force)


async def close_tray(vm: Vm, device: str | None = None, id: str | None = None) -> None:
    await media.close_tray(vm, _which(device, id))


async def change_medium(
    vm: Vm, filename: str, device: str | None = None, id: str | None = None, format: str | None = None,
    force: bool = False, read_only_mode: str | None = None,
) -> None:  # fmt: skip
    if read_only_mode not in (None, "retain", "read-only"):
        raise IslandError("a CD-ROM medium is read-only; say read-only-mode=retain")
    await media.change(vm, _which(device, id), filename, format, force)


# ---- console ------------------------------------------------------------------------------------------
async def screendump(
    vm: Vm, filename: str, format: str = "ppm", device: str | None = None, head: int | None = None
) -> None:
    if format not in screen.FORMATS:
        raise ConfigError(f"Parameter 'format' does not accept value '{format}'")
    await screen.dump(vm, filename, format)


async def send_key(vm: Vm, keys: list[Any], hold_time: int = 100) -> None:
    names = []
    for key in keys:
        if not isinstance(key, dict) or key.get("type") != "qcode" or not isinstance(key.get("data"), str):
            raise ConfigError("Parameter 'keys' takes objects like {'type': 'qcode', 'data': 'ret'}")
        names.append(key["data"])
    command = messages.SendKeys(serial=vm.next_serial(), keys=tuple(names), hold_ms=hold_time)
    await vm.command("devhost0", command)


async def human_monitor_command(vm: Vm, command_line: str, cpu_index: int = 0) -> str:
    from coordinator.monitor import execute

    return await execute(vm, command_line, cpu_index)


_DRIVE = {"device": _optional(str), "id": _optional(str)}
_FORCE = {"force": _optional(bool)}
_SNAPSHOT = {"job-id": Parameter(str), "tag": Parameter(str), "devices": Parameter(list)}

COMMANDS: dict[str, Command] = {
    "query-commands": Command(query_commands, early=True),
    "query-status": Command(query_status, early=True),
    "query-version": Command(query_version, early=True),
    "query-name": Command(query_name, early=True),
    "query-uuid": Command(query_uuid, early=True),
    "query-cpus-fast": Command(query_cpus_fast),
    "query-block": Command(query_block),
    "query-islands": Command(query_islands),
    "dump-guest-memory": Command(
        dumping.dump_guest_memory,
        {"paging": Parameter(bool), "protocol": Parameter(str), "detach": _optional(bool)}
        | {"begin": _optional(int), "length": _optional(int), "format": _optional(str)},
    ),
    "query-dump": Command(dumping.query_dump, early=True),
    "query-dump-guest-memory-capability": Command(dumping.query_capability, early=True),
    "stop": Command(stop),
    "cont": Command(cont),
    "quit": Command(quit_, early=True),
    "system_reset": Command(system_reset),
    "system_powerdown": Command(system_powerdown),
    "inject-nmi": Command(inject_nmi),
    "eject": Command(eject, _DRIVE | _FORCE),
    "blockdev-open-tray": Command(open_tray, _DRIVE | _FORCE),
    "blockdev-close-tray": Command(close_tray, _DRIVE),
    "blockdev-change-medium": Command(
        change_medium,
        _DRIVE | _FORCE
        | {"filename": Parameter(str), "format": _optional(str), "read-only-mode": _optional(str)},
    ),
    "migrate": Command(
        migration.migrate,
        {"uri": Parameter(str)}
        | {name: _optional(bool) for name in ("blk", "inc", "detach", "resume")},
    ),
    "migrate-incoming": Command(migration.migrate_incoming, {"uri": Parameter(str)}),
    "migrate_cancel": Command(migration.migrate_cancel),
    "migrate-recover": Command(migration.migrate_recover, {"uri": Parameter(str)}),
    "migrate-set-parameters": Command(
        migration.migrate_set_parameters,
        {name: _optional(type(value)) for name, value in Parameters().as_dict().items()},
        early=True,
    ),
    "query-migrate": Command(migration.query_migrate, early=True),
    "query-migrate-parameters": Command(migration.query_migrate_parameters, early=True),
    "x-query-phases": Command(migration.query_phases, {"reset": _optional(bool)}),
    "snapshot-save": Command(snapshots.save, _SNAPSHOT | {"vmstate": Parameter(str)}),
    "snapshot-load": Command(snapshots.load, _SNAPSHOT | {"vmstate": Parameter(str)}),
    "snapshot-delete": Command(snapshots.delete, _SNAPSHOT),
    "query-jobs": Command(snapshots.query_jobs, early=True),
    "job-dismiss": Command(snapshots.job_dismiss, {"id": Parameter(str)}, early=True),
    "screendump": Command(
        screendump,
        {"filename": Parameter(str), "format": _optional(str)}
        | {"device": _optional(str), "head": _optional(int)},
    ),
    "send-key": Command(send_key, {"keys": Parameter(list), "hold-time": _optional(int)}),
    "human-monitor-command": Command(
        human_monitor_command, {"command-line": Parameter(str), "cpu-index": _optional(int)}, early=True
    ),
}  # fmt: skip
