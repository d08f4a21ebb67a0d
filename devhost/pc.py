"""Wiring of the PC: which chip answers where, and whose pin goes to whom.

The machine is QEMU's ``pc``: i440FX, PIIX3 with IDE, PIIX4 power management, 8259, IOAPIC, 8254,
MC146818, HPET, i8042, two 16550A, standard VGA, fw_cfg. Ports as in the PC AT and the PIIX3 data
sheet, table "I/O address map".
"""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np

from coordinator.contract import messages
from coordinator.contract.config import Machine, Rtc
from coordinator.contract.device import Device
from devhost.bus import Slot
from devhost.chips import cmos
from devhost.chips.acpi_pm import AcpiPm
from devhost.chips.debug_port import DebugPort
from devhost.chips.hpet import Hpet
from devhost.chips.i8042 import I8042
from devhost.chips.i8237 import I8237
from devhost.chips.i8254 import I8254
from devhost.chips.i8259 import I8259
from devhost.chips.isa_debug_exit import IsaDebugExit
from devhost.chips.legacy_route import LegacyRoute, LegacyRoutes
from devhost.chips.mc146818 import Mc146818
from devhost.chips.ns16550 import Ns16550
from devhost.chips.port61 import Port61
from devhost.chips.port92 import Port92
from devhost.chips.reset_control import ResetControl
from devhost.dma import SegmentDma
from devhost.drives import Drives
from devhost.firmware import acpi, fw_cfg
from devhost.irq import InterruptRequest, IrqLines
from devhost.memory import IOAPIC, MMIO, READ, WRITE, MemoryMap, Region, ram, rom
from devhost.pci.function import Bar, Identity, PciFunction
from devhost.pci.i440fx import PAM_SEGMENTS, I440fx
from devhost.pci.piix3 import Piix3Isa, Piix4Pm
from devhost.service import Service
from devhost.vga.vga import FIRST as VGA_FIRST
from devhost.vga.vga import Vga, Window

log = logging.getLogger(__name__)

SERIAL_PORTS = ((0x3F8, 4), (0x2F8, 3))
VBE_PORTS = 0x1CE
FW_CFG_PORTS = 0x510
PCI_PORTS = 0xCF8
#: the last 128 KiB of firmware are also seen below 1 MiB
FIRMWARE_SHADOW = 0x20000
FOUR_GIB = 1 << 32
#: layers of the memory map; a higher one covers a lower one
RAM, PAM, CARDS, CHIPS = 0, 1, 2, 3


class Terminal:
    """Host side of a UART."""

    def __init__(self, service: Service, index: int) -> None:
        self._service, self._index = service, index

    def output(self, data: bytes) -> None:
        self._service.serial_output(self._index, data)

    def room_made(self) -> None:
        """The coordinator asks again by itself."""


class A20Gate:
    """The two switches of address line 20: keyboard controller and port 92h. Either opens it."""

    def __init__(self, pc: Pc) -> None:
        self._pc = pc
        self._levels = [True, True]

    def pin(self, number: int) -> A20Pin:
        return A20Pin(self, number)

    def set(self, number: int, level: bool) -> None:
        self._levels[number] = level
        self._pc.show_a20(any(self._levels))


class A20Pin:
    def __init__(self, gate: A20Gate, number: int) -> None:
        self._gate, self._number = gate, number

    def set(self, level: bool) -> None:
        self._gate.set(self._number, level)


class IoapicPin:
    """A pin that goes to the IOAPIC alone."""

    def __init__(self, bus: Any, pin: int, source: int) -> None:
        self._bus, self._pin, self._source = bus, pin, source

    def set(self, level: bool) -> None:
        self._bus.defer(self._bus.segment.pin_set, self._pin, self._source, level)


class Pc:
    """All chips of the machine, wired."""

    def __init__(self, service: Service, machine: Machine) -> None:
        self.service, self.machine = service, machine
        self.bus, self.clock, self.segment = service.bus, service.clock, service.segment
        self.dma = SegmentDma(self.segment, self.segment.host(service.config.index))
        self.memory = MemoryMap(self.segment)
        self.irq = IrqLines(self.bus)
        self.slots: dict[str, Slot] = {}
        self._building = True
        self._a20 = True
        self._pam: list[tuple[bool, bool]] = [(False, False)] * len(PAM_SEGMENTS)
        self._interrupts_and_timers()
        self._inputs_and_serial()
        self._pci()
        self._firmware()
        if machine.trace:
            self.bus.trace = self._trace
        self._building = False
        self.power_on()

    # ---- helpers ---------------------------------------------------------------------------------
    def _plug(self, name: str, device: Device, *ports: tuple[int, str]) -> Slot:
        slot = self.bus.add(device, name)
        self.slots[name] = slot
        for base, range_name in ports:
            self.bus.map_ports(slot, base, range_name)
        return slot

    def _publish(self) -> None:
        """The memory map has changed: let every vCPU see it."""
        if not self._building:
            self.memory.publish()

    def ports_changed(self) -> None:
        """The port map has changed."""
        if not self._building:
            self.segment.republish_map()

    def _trace(self, device: str, register: str, width: int, value: int, write: bool) -> None:
        if any(fnmatch.fnmatch(device, pattern) for pattern in self.machine.trace):
            log.info("%s %s %s %d: %#x", device, "write" if write else "read", register, width, value)

    def ask_reset(self, reason: str) -> Callable[[], None]:
        """For reset lines: the coordinator resets the machine."""
        return lambda: self.service.control.notify(messages.GuestReset(reason=reason))

    def _power_off(self) -> None:
        self.service.control.notify(messages.GuestShutdown(reason="guest-shutdown"))

    def _debug_exit(self, status: int) -> None:
        self.service.control.notify(messages.GuestShutdown(reason="debug-exit", status=status))

    # ---- chips -----------------------------------------------------------------------------------
    def _interrupts_and_timers(self) -> None:
        irq, clock = self.irq, self.clock
        self.pic = I8259(InterruptRequest(self.bus))
        irq.pic = self.pic
        self.bus.inta = self.pic.acknowledge
        self._plug("pic", self.pic, (0x20, "master"), (0xA0, "slave"), (0x4D0, "elcr"))
        timer, clock_tick = LegacyRoute(irq.pin(0)), LegacyRoute(irq.pin(8))
        pit = I8254(clock, timer.chip)
        self._plug("pit", pit, (0x40, "main"))
        self._plug("port61", Port61(pit), (0x61, "main"))
        below = min(self.machine.ram, 0xC000_0000)
        presets = cmos.contents(below, self.machine.ram - below, self.machine.vcpus, self._boot_order())
        self.rtc = Mc146818(clock, wall_clock(self.machine.rtc, clock.now), clock_tick.chip, presets)
        self._plug("rtc", self.rtc, (0x70, "main"))
        pins = {pin: IoapicPin(self.bus, pin, 1) for pin in range(24)}
        hpet = Hpet(clock, timer.hpet, clock_tick.hpet, LegacyRoutes(timer, clock_tick), pins)
        slot = self._plug("hpet", hpet)
        first, count = self.bus.map_memory(slot, acpi.HPET_BASE, 0x1000)
        hpet_region = Region(acpi.HPET_BASE, 0x1000, MMIO, host=self.bus.host, device=slot.id, first_reg=first, regs=count)
        self.memory.set("hpet", CHIPS, hpet_region)
        self.memory.set("ioapic", CHIPS, Region(acpi.IOAPIC_BASE, 0x1000, IOAPIC))
        self.pm = AcpiPm(clock, irq.pin(acpi.SCI_IRQ), self._power_off)
        self._plug("acpi-pm", self.pm, (0xB2, "smi"))
        self._plug("dma", I8237(), (0x00, "first"), (0xC0, "second"), (0x80, "pages"))

    def _boot_order(self) -> str:
        return self.machine.boot.order

    def _inputs_and_serial(self) -> None:
        gate = A20Gate(self)
        self.keyboard = I8042(self.clock, self.irq.pin(1), self.irq.pin(12), gate.pin(0), self.ask_reset("keyboard"))
        self._plug("i8042", self.keyboard, (0x60, "data"), (0x64, "command"))
        self._plug("port92", Port92(gate.pin(1), self.ask_reset("port92")), (0x92, "main"))
        self.uarts = []
        for index in range(self.machine.serials):
            base, irq = SERIAL_PORTS[index]
            uart = Ns16550(self.clock, self.irq.pin(irq), Terminal(self.service, index))
            self.uarts.append(uart)
            self._plug(f"serial{index}", uart, (base, "main"))
        for port in (0x402, 0xE9):
            device = DebugPort(lambda data, port=port: self.service.debug_output(port, data))
            self._plug(f"debug{port:x}", device, (port, "main"))
        if (debug_exit := self.machine.debug_exit) is not None:
            slot = self._plug("debug-exit", IsaDebugExit(self._debug_exit))
            self.bus.map_ports(slot, debug_exit.iobase, size=debug_exit.iosize)

    def _pci(self) -> None:
        self.host = I440fx(self._pam_changed)
        self._plug("pci", self.host, (PCI_PORTS, "main"))
        self._plug("reset", ResetControl(lambda hard: self.ask_reset("cf9")()), (0xCF9, "main"))
        self.isa = Piix3Isa(lambda: None)
        self.host.plug(1, 0, self.isa)
        self.drives = Drives(self.service, self)
        self.host.plug(1, 1, self.drives.function)
        self.host.plug(1, 3, Piix4Pm(self._pm_moved))
        self.vga: Vga | None = None
        if self.machine.vga:
            self._vga()

    def _pm_moved(self, base: int | None) -> None:
        slot = self.slots["acpi-pm"]
        self.bus.move_ports(slot, base, "pm")
        self.ports_changed()

    def _vga(self) -> None:
        self.vga = Vga(self.segment.vram, self.clock, self._vga_window)
        slot = self._plug("vga", self.vga, (VGA_FIRST, "main"), (VBE_PORTS, "vbe"))
        linear = self.vga.linear.size
        function = PciFunction(Identity(0x1234, 0x1111, 0x030000, revision=2))
        function.add_bar(0, Bar(linear, False, self._frame_buffer_moved, prefetchable=True))
        function.add_bar(2, Bar(0x1000, False, self._vga_mmio_moved))
        rom_size = self._load_option_rom()
        if rom_size:
            function.add_bar(6, Bar(rom_size, False, self._option_rom_moved))
        self.vga_function = function
        self.host.plug(2, 0, function)
        self.bus.map_memory(slot, 0xA0000, 0x20000, "window")

    def _load_option_rom(self) -> int:
        """Put the VGA BIOS behind the firmware in ROM; returns the size of its BAR, a power of two."""
        if self.machine.vga_rom is None:
            return 0
        with open(self.machine.vga_rom, "rb") as file:
            image = file.read()
        at = self.machine.rom_size
        self.segment.rom[at : at + len(image)] = np.frombuffer(image, np.uint8)
        return max(0x1000, 1 << (len(image) - 1).bit_length())

    # ---- memory that moves -------------------------------------------------------------------------
    def _vga_window(self, window: Window) -> None:
        slot = self.slots.get("vga")
        if slot is None:
            return
        if window.kind == "planar":
            first, count = self.bus.map_memory(slot, 0xA0000, 0x20000, "window")
            region = Region(0xA0000, 0x20000, MMIO, host=self.bus.host, device=slot.id, first_reg=first, regs=count)
            self.memory.set("vga-window", CARDS, region)
        else:
            at = self.segment.vram_offset + window.offset
            self.memory.set("vga-window", CARDS, ram(window.base, window.size, at))
        self._publish()

    def _frame_buffer_moved(self, base: int | None) -> None:
        assert self.vga is not None
        self._place("vga-linear", base and ram(base, self.vga.linear.size, self.segment.vram_offset))

    def _vga_mmio_moved(self, base: int | None) -> None:
        slot = self.slots["vga"]
        if base is None:
            self.bus.unmap_memory(slot, "mmio")
            self._place("vga-mmio", None)
            return
        first, count = self.bus.map_memory(slot, base, 0x1000, "mmio")
        region = Region(base, 0x1000, MMIO, host=self.bus.host, device=slot.id, first_reg=first, regs=count)
        self._place("vga-mmio", region)

    def _option_rom_moved(self, base: int | None) -> None:
        size = self.vga_function.bars[6].size
        self._place("vga-rom", base and rom(base, size, self.segment.rom_offset + self.machine.rom_size))

    def _place(self, layer: str, region: Region | int | None) -> None:
        if isinstance(region, Region):
            self.memory.set(layer, CARDS, region)
        else:
            self.memory.remove(layer)
        self._publish()

    def _pam_changed(self, pairs: list[tuple[bool, bool]]) -> None:
        """Reads and writes of C0000h-FFFFFh go to RAM or to ROM by PAM."""
        self._pam = pairs
        self._show_pam()
        self._publish()

    def _show_pam(self) -> None:
        regions = []
        rom_size, base = self.machine.rom_size, self.segment.guest_offset
        for (gpa, size, _, _), (reads, writes) in zip(PAM_SEGMENTS, self._pam, strict=True):
            if self.machine.boot.direct:
                reads = writes = True
            flags, read_at, write_at = 0, base + gpa, base + gpa
            if reads:
                flags |= READ
            elif gpa >= 0xE0000 and rom_size >= FIRMWARE_SHADOW:
                flags |= READ
                read_at = self.segment.rom_offset + rom_size - (0x100000 - gpa)
            if writes:
                flags |= WRITE
            regions.append(Region(gpa, size, flags, read_at, write_at))
        self.memory.set("pam", PAM, *regions)
        if rom_size:
            self.memory.set("firmware", CHIPS, rom(FOUR_GIB - rom_size, rom_size, self.segment.rom_offset))

    def show_a20(self, is_open: bool) -> None:
        """With the gate shut the second megabyte is the first (docs/quirks.md: only there)."""
        if is_open == self._a20:
            return
        self._a20 = is_open
        if is_open:
            self.memory.remove("a20")
        else:
            self.memory.set("a20", CHIPS, ram(0x100000, 0x100000, self.segment.guest_offset))
        self._publish()

    # ---- firmware ----------------------------------------------------------------------------------
    def _firmware(self) -> None:
        config = fw_cfg.FwCfg(self.dma)
        machine = self.machine
        fw_cfg.describe(config, machine)
        fw_cfg.add_acpi(config, acpi.build(machine))
        self._plug("fw_cfg", config, (FW_CFG_PORTS, "main"))

    # ---- reset ---------------------------------------------------------------------------------------
    def power_on(self) -> None:
        """State after power-on or reset; without firmware, as firmware leaves it."""
        self._building = True
        for slot in self.slots.values():
            slot.device.reset(hard=True)
        self.segment.reset_fabric()
        if self.vga is not None:
            self._vga_window(self.vga.window())
        self._show_pam()
        if self.machine.boot.direct:
            self._as_firmware_leaves_it()
        self._building = False
        self.bus.publish_all()
        self._publish()

    def _as_firmware_leaves_it(self) -> None:
        """PCI resources, interrupt steering, IDE decode, ACPI base, PIC and timer as a BIOS sets them."""
        steering = (10, 10, 11, 11)
        for pirq, irq in enumerate(steering):
            self.isa.write(0x60 + pirq, 1, irq)
        elcr = sum(1 << irq for irq in {*steering, acpi.SCI_IRQ})
        for port in (0, 1):
            self.pic.write(port, 1, elcr >> 8 * port & 0xFF, "elcr")
        pm = self.host.functions[1 << 3 | 3]
        pm.write(0x40, 4, acpi.PM_BASE | 1)
        pm.write(0x80, 1, 1)
        pm.write(0x3C, 1, acpi.SCI_IRQ)
        self.drives.as_firmware_leaves_it()
        if self.vga is not None:
            self.vga_function.write(0x10, 4, 0xFD00_0000)
            self.vga_function.write(0x18, 4, 0xFEBF_0000)
            self.vga_function.write(0x04, 2, 0x3)
        for range_name, base, cascade in (("master", 0x08, 0x04), ("slave", 0x70, 0x02)):
            self.pic.write(0, 1, 0x11, range_name)
            for word in (base, cascade, 0x01, 0xFF):
                self.pic.write(1, 1, word, range_name)


def wall_clock(rtc: Rtc, guest_now: Callable[[], int]) -> Callable[[], int]:
    """Civil time in ns since 1970 for the RTC: follows the host, or guest time from the start on."""
    start = time.time_ns()
    if rtc.base == "localtime":
        offset = datetime.now().astimezone().utcoffset()
        start += int(offset.total_seconds()) * 1_000_000_000 if offset else 0
    elif rtc.base != "utc":
        moment = datetime.fromisoformat(rtc.base)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        start = int(moment.timestamp()) * 1_000_000_000
    if rtc.clock == "vm":
        return lambda: start + guest_now()
    began = time.monotonic_ns()
    return lambda: start + time.monotonic_ns() - began
