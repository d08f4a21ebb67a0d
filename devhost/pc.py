"""Wiring of the PC: which chip answers where, and whose pin goes to whom.

The machine is QEMU's ``pc``: i440FX, PIIX3 with IDE, PIIX4 power management, 8259, IOAPIC, 8254,
MC146818, HPET, i8042, two 16550A, standard VGA, fw_cfg. Ports as in the PC AT and the PIIX3 data
sheet, table "I/O address map".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from coordinator.contract import messages
from coordinator.contract.clock import NS_PER_S, Clock, Timer
from coordinator.contract.config import Machine
from coordinator.contract.device import Device
from coordinator.contract.drives import DrivePolicy
from coordinator.contract.errors import RecordError, UsageError
from coordinator.contract.registers import RegisterMap
from coordinator.contract.state import Record, pack, unpack
from devhost import post
from devhost.a20 import KEYBOARD, PORT_92, A20Gate
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
from devhost.display import Display
from devhost.dma import SegmentDma
from devhost.drives import Drives
from devhost.firmware import acpi, fw_cfg
from devhost.irq import InterruptRequest, IoapicPin, IrqLines
from devhost.memory import ABOVE_4G, IOAPIC, LOW_RAM_LIMIT, MMIO, READ, WRITE, Layer, MemoryMap, Region, rom
from devhost.pci.i440fx import PAM_SEGMENTS, I440fx
from devhost.pci.piix3 import Piix3Isa, Piix4Pm
from devhost.service import Service
from devhost.trace import Tracer
from devhost.wall_clock import WallClock

SERIAL_PORTS = ((0x3F8, 4), (0x2F8, 3))
DEBUG_PORTS = (0x402, 0xE9)
FW_CFG_PORTS = 0x510
PCI_PORTS, RESET_PORT = 0xCF8, 0xCF9
CHIP_PAGE = 0x1000
ABOVE_1M = 0x100000
#: the last 128 KiB of firmware are also seen below 1 MiB
FIRMWARE_SHADOW = 0x20000
#: of the IOAPIC: where the HPET's timers may go
IOAPIC_PINS = 24


class Terminal:
    """Host side of a UART."""

    def __init__(self, service: Service, index: int) -> None:
        self._outlet, self._index = service.outlet, index

    def output(self, data: bytes) -> None:
        self._outlet.serial(self._index, data)

    def room_made(self) -> None:
        """The coordinator asks again by itself."""


class OwnedClock:
    """A clock whose timers say whose state they change."""

    def __init__(self, clock: Clock, fires: Callable[[], None]) -> None:
        self.clock, self._fires = clock, fires
        self.now = clock.now

    def timer(self, callback: Callable[[], None]) -> Timer:
        def fired() -> None:
            self._fires()
            callback()

        return self.clock.timer(fired)


class RestRecord(Record, frozen=True, kw_only=True):
    """Of the wiring and the host side; see ``Pc``."""

    kind = "pc"

    boot_order: str
    policies: dict[str, DrivePolicy]
    held_keys: tuple[tuple[int, tuple[str, ...]], ...]
    #: see WallClock: seconds, ns
    wall: tuple[int, int]


class Rest(Device):
    """What is committed besides the devices, as if it were one; no guest sees it."""

    kind = "pc"
    ranges: ClassVar[dict[str, RegisterMap]] = {}

    def __init__(self, pc: Pc) -> None:
        self._pc = pc

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        raise NotImplementedError

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        raise NotImplementedError

    def reset(self, hard: bool = True) -> None: ...

    def save(self) -> RestRecord:
        return self._pc.rest()

    def load(self, record: Record) -> None:
        assert isinstance(record, RestRecord)
        self._pc.load_rest(record)


class Pc:
    """All chips of the machine, wired. ``slots`` is every device by its name."""

    def __init__(self, service: Service, machine: Machine) -> None:
        self.service, self.machine = service, machine
        self.bus, self.segment = service.bus, service.segment
        #: for timers that may change any device
        self.clock = OwnedClock(service.clock, self.bus.touch_all)
        self.dma = SegmentDma(self.segment, self.segment.host(service.config.index))
        self.memory = MemoryMap(self.segment)
        self.irq = IrqLines(self.bus)
        self.slots: dict[str, Slot] = {}
        #: changes of the maps are shown to the vCPUs at the end
        self._quiet = True
        #: boot order of this boot; None before the first one
        self._boot_order: str | None = None
        #: keys that are held down: (guest time at which they are released, qcodes)
        self.held_keys: list[tuple[int, tuple[str, ...]]] = []
        self._interrupts_and_timers()
        self._inputs_and_serial()
        self._pci()
        self._firmware()
        self._rest = Slot(Rest(self), "pc", 0)
        self.bus.beside = (self._rest,)
        if machine.trace:
            self.bus.trace = Tracer(machine.trace, self.clock.now, service.outlet.trace)
        if service.commits.successor:
            self._take_over()
        else:
            self.power_on()

    # ---- helpers ---------------------------------------------------------------------------------
    def plug(self, name: str, device: Device, *ports: tuple[int, str]) -> Slot:
        """Give a device its name, and ranges of it their ports."""
        slot = self.bus.add(device, name)
        slot.absent = name in self.service.config.unplugged
        self.slots[name] = slot
        for base, range_name in ports:
            self.bus.map_ports(slot, base, range_name)
        return slot

    @property
    def present(self) -> list[Slot]:
        """Devices that have not been unplugged."""
        return [slot for slot in self.slots.values() if not slot.absent]

    def clock_of(self, *names: str) -> OwnedClock:
        """For devices of these names: what their timers change is theirs, besides interrupt lines."""
        return OwnedClock(self.clock.clock, lambda: self.bus.fired(*(self.slots[name] for name in names)))

    def memory_changed(self) -> None:
        """Let every vCPU see the memory map as it is now."""
        if not self._quiet:
            self.memory.publish()

    def ports_changed(self) -> None:
        """Let every vCPU see the port map as it is now."""
        if not self._quiet:
            self.segment.republish_map()

    def _ask_reset(self, reason: str) -> Callable[[], None]:
        """For reset lines: the coordinator resets the machine."""
        return lambda: self.service.control.notify(messages.GuestReset(reason=reason))

    def _power_off(self) -> None:
        self.service.control.notify(messages.GuestShutdown(reason="guest-shutdown"))

    def _debug_exit(self, status: int) -> None:
        self.service.control.notify(messages.GuestShutdown(reason="debug-exit", status=status))

    # ---- chips -----------------------------------------------------------------------------------
    def _interrupts_and_timers(self) -> None:
        irq, clock, machine = self.irq, self.clock_of, self.machine
        self._intr = InterruptRequest(self.bus)
        self.pic = I8259(self._intr)
        irq.pic = self.pic
        self.bus.inta = self.pic.acknowledge
        self.bus.pic = self.plug("pic", self.pic, (0x20, "master"), (0xA0, "slave"), (0x4D0, "elcr"))
        timer, clock_tick = LegacyRoute(irq.pin(0)), LegacyRoute(irq.pin(8))
        self.pit = I8254(clock("pit"), timer.chip)
        pit = self.plug("pit", self.pit, (0x40, "main"))
        self.plug("port61", Port61(self.pit), (0x61, "main")).also = (pit,)
        below = min(machine.ram, LOW_RAM_LIMIT)
        presets = cmos.contents(below, machine.ram - below, machine.vcpus)
        self.wall = WallClock(machine.rtc, self.clock.now)
        self.rtc = Mc146818(clock("rtc"), self.wall, clock_tick.chip, presets)
        self.plug("rtc", self.rtc, (0x70, "main"))
        self._direct = pins = {pin: IoapicPin(self.bus, pin) for pin in range(IOAPIC_PINS)}
        hpet = Hpet(clock("hpet"), timer.hpet, clock_tick.hpet, LegacyRoutes(timer, clock_tick), pins)
        slot = self.plug("hpet", hpet)
        first, count = self.bus.map_memory(slot, acpi.HPET_BASE, CHIP_PAGE)
        registers = Region(
            acpi.HPET_BASE, CHIP_PAGE, MMIO, host=self.bus.host, device=slot.id, first_reg=first, regs=count
        )
        self.memory.set("hpet", Layer.CHIPS, registers)
        self.memory.set("ioapic", Layer.CHIPS, Region(acpi.IOAPIC_BASE, CHIP_PAGE, IOAPIC))
        self.pm = AcpiPm(clock("acpi-pm"), irq.pin(acpi.SCI_IRQ), self._power_off)
        self.plug("acpi-pm", self.pm, (0xB2, "smi"))
        self.plug("dma", I8237(), (0x00, "first"), (0xC0, "second"), (0x80, "pages"))

    def _inputs_and_serial(self) -> None:
        self.a20 = A20Gate(self._a20_changed)
        self.keyboard = I8042(
            self.clock_of("i8042"), self.irq.pin(1), self.irq.pin(12), self.a20.pin(KEYBOARD),
            self._ask_reset("keyboard")
        )
        self.plug("i8042", self.keyboard, (0x60, "data"), (0x64, "command"))
        self.plug("port92", Port92(self.a20.pin(PORT_92), self._ask_reset("port92")), (0x92, "main"))
        self.uarts = []
        for index in range(self.machine.serials):
            base, irq = SERIAL_PORTS[index]
            uart = Ns16550(self.clock_of(f"serial{index}"), self.irq.pin(irq), Terminal(self.service, index))
            self.uarts.append(uart)
            self.plug(f"serial{index}", uart, (base, "main"))
        for port in DEBUG_PORTS:
            self.plug(f"debug{port:x}", DebugPort(partial(self.service.outlet.debug, port)), (port, "main"))
        if (debug_exit := self.machine.debug_exit) is not None:
            slot = self.plug("debug-exit", IsaDebugExit(self._debug_exit))
            self.bus.map_ports(slot, debug_exit.iobase, size=debug_exit.iosize)

    def _pci(self) -> None:
        self.host = I440fx(self._pam_changed)
        self.plug("pci", self.host, (PCI_PORTS, "main"))
        reset = self._ask_reset("cf9")
        self.plug("reset", ResetControl(lambda hard: reset()), (RESET_PORT, "main"))
        self.isa = Piix3Isa()
        self.drives = Drives(self.service, self)
        self.power = Piix4Pm(self._pm_moved)
        self.host.plug(1, 0, self.isa)
        self.host.plug(1, 1, self.drives.function)
        self.host.plug(1, 3, self.power)
        self.display: Display | None = None
        if self.machine.vga:
            self.display = Display(self)
            self.host.plug(2, 0, self.display.function)
        # what the functions of the bus are the registers of
        names = ("ide0", "ide1", "acpi-pm", "vga")
        self.slots["pci"].also = tuple(self.slots[name] for name in names if name in self.slots)

    def _pm_moved(self, base: int | None) -> None:
        self.bus.move_ports(self.slots["acpi-pm"], base, "pm")
        self.ports_changed()

    def _firmware(self) -> None:
        self.fw_cfg = fw_cfg.FwCfg(self.dma, partial(self.bus.defer, self.segment.dma_write))
        fw_cfg.describe(self.fw_cfg, self.machine)
        fw_cfg.add_acpi(self.fw_cfg, acpi.build(self.machine))
        self.plug("fw_cfg", self.fw_cfg, (FW_CFG_PORTS, "main"))
        if rom_size := self.machine.rom_size:
            self.memory.set(
                "firmware", Layer.CHIPS, rom(ABOVE_4G - rom_size, rom_size, self.segment.rom_offset)
            )

    # ---- memory that moves -------------------------------------------------------------------------
    def _pam_changed(self, pairs: list[tuple[bool, bool]]) -> None:
        """Reads and writes of C0000h-FFFFFh go to RAM or to the bus, where the firmware has E0000h-FFFFFh."""
        regions = []
        rom_size, base = self.machine.rom_size, self.segment.guest_offset
        for (gpa, size, _, _), (reads, writes) in zip(PAM_SEGMENTS, pairs, strict=True):
            region = Region(gpa, size, 0)
            if reads:
                region = Region(gpa, size, READ, base + gpa)
            elif gpa >= ABOVE_1M - min(rom_size, FIRMWARE_SHADOW):
                region = rom(gpa, size, self.segment.rom_offset + rom_size - (ABOVE_1M - gpa))
            if writes:
                region = Region(gpa, size, region.flags | WRITE, region.read_offset, base + gpa)
            regions.append(region)
        self.memory.set("pam", Layer.PAM, *regions)
        self.memory_changed()

    def _a20_changed(self, is_open: bool) -> None:
        self.memory.a20 = is_open
        self.memory_changed()

    # ---- life ----------------------------------------------------------------------------------------
    def _set_boot_order(self) -> None:
        """The order of this boot: ``once`` is for the first one."""
        boot = self.machine.boot
        order = boot.once if boot.once and self._boot_order is None else boot.order
        for address, value in cmos.boot_flags(order).items():
            self.rtc.cmos[address] = value
        self._show_boot_order(order)

    def _show_boot_order(self, order: str) -> None:
        self._boot_order = order
        fw_cfg.set_boot_order(self.fw_cfg, self.machine, order)

    def power_on(self) -> None:
        """State after power-on or reset; without firmware, as firmware leaves it."""
        self._quiet = True
        for slot in self.present:
            slot.device.reset(hard=True)
        self.segment.reset_fabric()
        self._set_boot_order()
        if self.machine.boot.direct:
            post.leave(self)
        self._show_maps()

    def _show_maps(self) -> None:
        self._quiet = False
        self.bus.publish_all()
        self.memory_changed()

    def _take_over(self) -> None:
        """Go on where a predecessor died, as if paused: Run is to come."""
        for slot in self.present:
            slot.device.pause()
        slots = [*self.slots.values(), self._rest]
        order = {"pc": 0, "pic": 2}  # the clock first; the PIC knows the levels of its inputs
        self.service.commits.load(sorted(slots, key=lambda slot: order.get(slot.name, 1)))
        self.service.commits.resume()  # first: a vCPU that waits for a time source could not take a map
        phases = {drive["id"]: drive["phase"] for drive in self.drives.describe()}
        role = f"devhost{self.bus.host}"
        self.service.control.notify(messages.TookOver(role=role, drives=phases, guest_ns=self.clock.now()))
        self.bus.show_ports()
        self._quiet = False
        self.memory_changed()
        self.irq.show()
        for pin in self._direct.values():
            pin.show()
        self._intr.show()

    def hold_keys(self, keys: tuple[str, ...], until: int) -> None:
        """Keys go down now and are released, the last one first, at guest time ``until``."""
        for key in keys:
            self.keyboard.key_event(key, True)
        self.held_keys.append((until, keys))
        self.clock.timer(self._release_keys).arm(until)

    def _release_keys(self) -> None:
        now = self.clock.now()
        due = [keys for until, keys in self.held_keys if until <= now]
        self.held_keys = [held for held in self.held_keys if held[0] > now]
        for keys in due:
            for key in reversed(keys):
                self.keyboard.key_event(key, False)

    def rest(self) -> RestRecord:
        """What a successor must know besides the devices."""
        return RestRecord(
            boot_order=self._boot_order or "",
            policies={ident: drive.policy for ident, drive in self.drives.by_id.items()},
            held_keys=tuple(self.held_keys),
            wall=divmod(self.wall.epoch, NS_PER_S),
        )

    def load_rest(self, record: RestRecord) -> None:
        self._show_boot_order(record.boot_order)
        seconds, rest = record.wall
        self.wall.epoch = seconds * NS_PER_S + rest
        for ident, policy in record.policies.items():
            self.drives.by_id[ident].policy = policy
        self.held_keys = list(record.held_keys)
        for until, _ in self.held_keys:
            self.clock.timer(self._release_keys).arm(until)

    def save(self) -> dict[str, bytes]:
        """The records of all devices by name; only while they are paused. UsageError when one is missing."""
        if absent := [name for name, slot in self.slots.items() if slot.absent]:
            raise UsageError(f"{', '.join(absent)}: unplugged by a fault; its state cannot be saved")
        return {name: pack(slot.device.save()) for name, slot in self.slots.items()}

    def load(self, records: dict[str, bytes]) -> None:
        """Go on from ``records``, in a machine of the same configuration. RecordError where devices are
        unknown, missing or not alike. The PIC comes last: it knows the levels of its inputs."""
        if records.keys() != self.slots.keys():
            different = ", ".join(sorted(records.keys() ^ self.slots.keys()))
            raise RecordError(f"devices on one side only: {different}")
        self._quiet = True
        for name in sorted(self.slots, key=lambda name: name == "pic"):
            device = self.slots[name].device
            device.load(unpack(records[name], type(device.save())))
        self._show_maps()
