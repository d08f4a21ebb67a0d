"""QMP commands about snapshots of the whole machine, and about jobs.

Source: QEMU's QAPI schema, migration.json and job.json (names, fields and error texts that clients look at).
``vmstate`` and ``devices`` are ids of drives.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from coordinator.contract.errors import ConfigError
from coordinator.machine import Vm
from coordinator.migrate import snapshot


def _names(devices: list[Any]) -> list[str]:
    if not all(isinstance(name, str) for name in devices):
        raise ConfigError("Parameter 'devices' takes names of drives")
    return devices


def _begin(vm: Vm, job_id: str, kind: str, work: Coroutine[Any, Any, None]) -> None:
    try:
        vm.jobs.begin(job_id, kind, lambda: work)
    except BaseException:
        work.close()
        raise


async def save(vm: Vm, job_id: str, tag: str, vmstate: str, devices: list[Any]) -> None:
    _begin(vm, job_id, "snapshot-save", snapshot.save(vm, tag, vmstate, _names(devices)))


async def load(vm: Vm, job_id: str, tag: str, vmstate: str, devices: list[Any]) -> None:
    _begin(vm, job_id, "snapshot-load", snapshot.load(vm, tag, vmstate, _names(devices)))


async def delete(vm: Vm, job_id: str, tag: str, devices: list[Any]) -> None:
    _begin(vm, job_id, "snapshot-delete", snapshot.delete(vm, tag, _names(devices)))


async def query_jobs(vm: Vm) -> list[dict[str, Any]]:
    return vm.jobs.query()


async def job_dismiss(vm: Vm, id: str) -> None:
    vm.jobs.dismiss(id)
