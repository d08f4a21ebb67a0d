"""The state of a stopped machine, but for guest memory: taken, and put into another machine.

Order of putting: guest time, then devices (their timers are deadlines in guest time; their pins rise while
every IOAPIC entry is masked), then the interrupt fabric, then vCPUs, whose posted interrupts are those of the
record and nobody else's.
"""

from __future__ import annotations

import asyncio
import time as unix_time
from typing import Any, Literal, cast

import msgspec

from coordinator.contract import messages
from coordinator.contract._segment import ffi
from coordinator.contract.errors import RecordError
from coordinator.contract.layout import struct_get, struct_set
from coordinator.contract.segment import Segment
from coordinator.contract.state import Record, pack, unpack
from coordinator.machine import Vm

#: under the fabric's lock word, which is nobody's while the machine stands still
_FABRIC_OMITTED = frozenset({"lock"})


class FabricRecord(Record, frozen=True):
    """``struct fabric`` by name: pin levels by source, the IOAPIC."""

    kind = "fabric"

    fabric: dict[str, Any]


class TimeRecord(Record, frozen=True):
    """``guest_ns``: guest time; ``wall_ns``: UNIX time at guest time 0; ``stopped_at_ns``: UNIX time when it
    stopped."""

    kind = "time"

    guest_ns: int
    wall_ns: int
    tsc_khz: int
    stopped_at_ns: int

    def passed_ns(self, stopped_time: str) -> int:
        """How far the guest's clock goes ahead when it goes on now, by the parameter ``stopped-time``."""
        return max(0, unix_time.time_ns() - self.stopped_at_ns) if stopped_time == "passes" else 0


class MachineState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Packed records; ``devices`` by host and device name, ``vcpus`` by index. ``runstate`` is that before
    the migration. ``drives``: what the stream says of each drive, see messages.QueryDrives."""

    runstate: Literal["running", "paused", "prelaunch", "shutdown"]
    time: bytes
    fabric: bytes
    devices: dict[str, dict[str, bytes]]
    vcpus: tuple[dict[str, bytes], ...]
    drives: tuple[dict[str, Any], ...] = ()


async def capture(vm: Vm, runstate: str, stopped_at_ns: int) -> MachineState:
    """Of a machine whose vCPUs are stopped and whose devices are paused."""
    segment = vm.segment
    assert segment is not None
    time = segment.header.time
    devices, drives, vcpus = await asyncio.gather(
        _each(vm, vm.hosts, messages.SaveState),
        _each(vm, vm.hosts, messages.QueryDrives),
        _each(vm, vm.vcpus, messages.SaveState),
    )
    return MachineState(
        runstate=cast(Any, runstate),
        time=pack(
            TimeRecord(
                guest_ns=int(time.guest_ns),
                wall_ns=int(time.wall_ns),
                tsc_khz=int(time.tsc_khz),
                stopped_at_ns=stopped_at_ns,
            )
        ),
        fabric=pack(FabricRecord(fabric=struct_get(ffi, segment.fabric[0], _FABRIC_OMITTED))),
        devices=dict(zip(vm.hosts, devices, strict=True)),
        vcpus=tuple(vcpus),
        drives=tuple(entry for entries in drives for entry in entries),
    )


async def _each(vm: Vm, roles: list[str], kind: type[messages.SaveState | messages.QueryDrives]) -> list[Any]:
    """The answers of islands that are asked at once."""
    return await asyncio.gather(*(vm.command(role, kind(serial=vm.next_serial())) for role in roles))


async def apply(vm: Vm, state: MachineState) -> TimeRecord:
    """Put a state into a machine that has not run; RecordError or IslandError where it does not fit, and then
    the machine is of no use. Returns its time."""
    segment = vm.segment
    assert segment is not None
    if state.devices.keys() != set(vm.hosts):
        raise RecordError(f"the state is of device hosts {', '.join(sorted(state.devices))}")
    if len(state.vcpus) != segment.vcpus:
        raise RecordError(f"the state is of {len(state.vcpus)} vCPUs, this machine has {segment.vcpus}")
    time = unpack(state.time, TimeRecord)
    _set_time(segment, time)
    for host, records in state.devices.items():
        await vm.command(host, messages.LoadState(serial=vm.next_serial(), records=records))
    _set_fabric(segment, unpack(state.fabric, FabricRecord))
    await asyncio.gather(
        *(
            vm.command(role, messages.LoadState(serial=vm.next_serial(), records=records))
            for role, records in zip(vm.vcpus, state.vcpus, strict=True)
        )
    )
    return time


def _set_time(segment: Segment, time: TimeRecord) -> None:
    for value in (time.guest_ns, time.wall_ns, time.stopped_at_ns):
        if not 0 <= value < 1 << 63:
            raise RecordError(f"time: {value} ns is out of range")
    if not 1 <= time.tsc_khz < 1 << 32:
        raise RecordError(f"time: a TSC of {time.tsc_khz} kHz cannot be")
    segment.set_time(time.guest_ns, time.wall_ns, time.tsc_khz)


def _set_fabric(segment: Segment, record: FabricRecord) -> None:
    fabric = ffi.new("struct fabric *")
    struct_set(ffi, fabric[0], record.fabric, "fabric", _FABRIC_OMITTED)
    ffi.memmove(segment.fabric, fabric, ffi.sizeof("struct fabric"))
