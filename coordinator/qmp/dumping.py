"""QMP commands about dumps of guest memory.

Source: QEMU's QAPI schema, dump.json (names, fields and error texts that clients look at).
"""

from __future__ import annotations

from typing import Any

from coordinator.dump import FORMATS
from coordinator.machine import Vm


async def dump_guest_memory(
    vm: Vm, paging: bool, protocol: str, detach: bool = False, begin: int | None = None,
    length: int | None = None, format: str = "elf",
) -> None:  # fmt: skip
    wanted, fd = vm.dumps.begin(paging, protocol, begin, length, format)
    if detach:
        vm.spawn(vm.dumps.run_detached(wanted, fd))
    else:
        await vm.dumps.run(wanted, fd)


async def query_dump(vm: Vm) -> dict[str, Any]:
    progress: dict[str, Any] = vm.dumps.progress.describe()
    return progress


async def query_capability(vm: Vm) -> dict[str, Any]:
    return {"formats": list(FORMATS)}
