"""``info TOPIC``: what the monitor can tell of the machine."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from coordinator import census, media
from coordinator.contract import messages
from coordinator.machine import Vm
from coordinator.migrate import snapshot
from coordinator.migrate.snapshot import Snapshot
from coordinator.monitor import registers
from coordinator.version import version

_ACTIVITY = ("running", "halted", "waiting for SIPI", "shut down")


@dataclass(frozen=True)
class Topic:
    show: Callable[[Vm, int], Awaitable[str]]
    about: str


async def _status(vm: Vm, cpu: int) -> str:
    return f"VM status: {vm.state}\n"


async def _version(vm: Vm, cpu: int) -> str:
    numbers = version()["qemu"]
    return f"{numbers['major']}.{numbers['minor']}.{numbers['micro']} (atoll)\n"


async def _cpus(vm: Vm, cpu: int) -> str:
    assert vm.segment is not None
    text = ""
    for i in range(vm.machine.vcpus):
        block = vm.segment.vcpu(i)
        mark = "*" if i == cpu else " "
        state = _ACTIVITY[block.arch.activity] if block.arch.activity < len(_ACTIVITY) else "?"
        if vm.loss(i) is not None:
            state = "dead"
        text += (
            f"{mark} CPU #{i}: {state}, pid={vm.islands[f'vcpu{i}'].pid}, instructions={block.instructions}\n"
        )
    return text


async def _registers(vm: Vm, cpu: int) -> str:
    async with vm.paused():
        return registers.describe(vm, cpu)


async def _block(vm: Vm, cpu: int) -> str:
    text = ""
    for drive in await media.describe(vm):
        inserted = drive.get("inserted")
        what = (
            f"{inserted['file']} ({inserted['drv']}{', read-only' if inserted['ro'] else ''})"
            if inserted
            else "[not inserted]"
        )
        text += f"{drive['device']}: {what}\n"
        if drive["removable"]:
            lock, tray = (
                "locked" if drive["locked"] else "not locked",
                "open" if drive["tray_open"] else "closed",
            )
            text += f"    Removable device: {lock}, tray {tray}\n"
    return text


async def _pic(vm: Vm, cpu: int) -> str:
    text: str = await vm.command("devhost0", messages.DescribeChip(serial=vm.next_serial(), what="pic"))
    return text + _ioapic(vm)


def _ioapic(vm: Vm) -> str:
    """Redirection table by 82093AA section 3.2.4."""
    assert vm.segment is not None
    fabric = vm.segment.fabric
    modes = ("fixed", "lowest", "SMI", "?", "NMI", "INIT", "?", "ExtINT")
    text = f"ioapic0: id={fabric.ioapic.id:#x} select={fabric.ioapic.select:#x}\n"
    for pin in range(24):
        entry = fabric.ioapic.redirection[pin]
        text += (
            f"  pin {pin:<2} {entry:016x} vec={entry & 0xFF:<3} {modes[entry >> 8 & 7]:<6}"
            f" {'logical ' if entry >> 11 & 1 else 'physical'} dest={entry >> 56:#04x}"
            f" {'level' if entry >> 15 & 1 else 'edge ':<5} {'masked' if entry >> 16 & 1 else ''}"
            f"{' high' if fabric.pin_sources[pin] else ''}\n"
        )
    return text


def _bits(words: Any) -> str:
    vectors = [word * 64 + bit for word in range(4) for bit in range(64) if words[word] >> bit & 1]
    return " ".join(f"{v:#x}" for v in vectors) or "(none)"


async def _lapic(vm: Vm, cpu: int) -> str:
    """Registers by their names in SDM volume 3A, table 11-1."""
    assert vm.segment is not None
    apic = vm.segment.vcpu(cpu).arch.apic
    text = f"local APIC of CPU {cpu}: id={apic.id:#x} base={apic.base_msr:#x}\n"
    for name in ("timer", "lint0", "lint1", "error", "pmc", "thermal", "cmci"):
        lvt = getattr(apic, f"lvt_{name}")
        text += f"  LVT {name:<8} {lvt:08x} vec={lvt & 0xFF:#04x}{' masked' if lvt >> 16 & 1 else ''}\n"
    text += f"  TPR={apic.tpr:#x} SVR={apic.svr:#x} LDR={apic.ldr:#x} DFR={apic.dfr:#x} ESR={apic.esr:#x}\n"
    text += f"  ICR={apic.icr_high:08x}{apic.icr_low:08x}"
    text += f" timer initial={apic.timer_initial} divide={apic.timer_divide:#x}\n"
    return text + f"  IRR {_bits(apic.irr)}\n  ISR {_bits(apic.isr)}\n"


async def _mtree(vm: Vm, cpu: int) -> str:
    """The memory map in force, by the segment."""
    assert vm.segment is not None
    text = ""
    for region in vm.segment.memory_map():
        kind = {0: "nothing", 1: "rom", 2: "write only", 3: "ram"}[region.flags & 3]
        if region.flags & 4:
            kind = vm.segment.device_name(region.device) + (" (reads memory)" if region.flags & 1 else "")
        elif region.flags & 8:
            kind = "ioapic"
        text += f"  {region.gpa:016x}-{region.gpa + region.size - 1:016x} {kind}\n"
    return text


async def _snapshots(vm: Vm, cpu: int) -> str:
    """Those that can be loaded, then what single disks have besides, as QEMU lists them."""
    disks = await snapshot.disks(vm)
    if not any(disk.snapshots for disk in disks):
        return "There is no snapshot available.\n"
    whole = [
        each
        for disk in disks
        for each in disk.snapshots
        if each.size and all((other := d.named(each.name)) and other.date_ns == each.date_ns for d in disks)
    ]
    text = "List of snapshots present on all disks:\n" + _listed(whole, "--") if whole else ""
    names = {each.name for each in whole}
    for disk in disks:
        if rest := [each for each in disk.snapshots if each.name not in names]:
            text += f"\nList of partial (non-loadable) snapshots on '{disk.id}':\n{_listed(rest)}"
    return text.lstrip("\n")


def _listed(rows: list[Snapshot], ident: str = "") -> str:
    text = f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}\n"
    for row in rows:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.date_ns // 10**9))
        seconds, ms = divmod(row.clock_ns // 10**6, 1000)
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{ms:03d}"
        text += f"{ident or row.id:<9} {row.name:<16} {_human(row.size):>8}{date:>20}{clock:>13}{'':>11}\n"
    return text


def _human(size: float) -> str:
    """Three digits and a unit."""
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1000:
        size, unit = size / 1024, next(units)
    return f"{size:.3g} {unit}"


async def _islands(vm: Vm, cpu: int) -> str:
    """The processes of the machine, and where to read of vCPUs that have died."""
    text = f"{'role':<16} {'pid':>8} {'state':<6} {'uptime':>10} {'restarts':>8} {'memory':>10} {'CPU':>9}\n"
    for row in census.describe(vm):
        text += f"{row['role']:<16.16} {row['pid']:>8} "
        if row["alive"]:
            seconds, mebibytes = row["uptime-ms"] / 1000, row["memory"].get("resident", 0) >> 20
            text += f"{row['state']:<6} {seconds:>8.1f} s {row['restarts']:>8} {mebibytes:>6} MiB"
            text += f" {row['cpu-ms'] / 1000:>7.1f} s\n"
        else:
            text += f"{'dead':<6} {'':>10} {row['restarts']:>8}\n"
    losses = [loss for index in range(vm.machine.vcpus) if (loss := vm.loss(index)) is not None]
    return text + "".join(f"{loss.role}: its last state is in {loss.report}\n" for loss in losses)


TOPICS: dict[str, Topic] = {
    "status": Topic(_status, "running or not"),
    "cpus": Topic(_cpus, "the vCPUs and their processes"),
    "registers": Topic(_registers, "registers of the CPU"),
    "block": Topic(_block, "drives and media"),
    "pic": Topic(_pic, "8259 pair and IOAPIC"),
    "lapic": Topic(_lapic, "local APIC of the CPU"),
    "mtree": Topic(_mtree, "the guest-physical memory map"),
    "version": Topic(_version, "version of Atoll"),
    "snapshots": Topic(_snapshots, "snapshots of the whole machine, and of single disks"),
    "islands": Topic(_islands, "the processes of this machine"),
}
