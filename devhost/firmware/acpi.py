"""The ACPI tables of the machine, as relocatable blobs.

``build(machine)`` gives the tables in one blob with the places of pointers and checksums, so that
firmware can link them through fw_cfg's table loader, and a boot without firmware can do it here.
Source: ACPI Specification 6.4, chapter 5; DSDT by aml.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from coordinator.contract.config import Machine
from devhost.firmware import aml

#: where the platform's parts stand; wiring (pc.py) and these tables must agree
PM_BASE = 0x600
SCI_IRQ = 9
HPET_BASE = 0xFED0_0000
IOAPIC_BASE = 0xFEC0_0000
LAPIC_BASE = 0xFEE0_0000
PCI_WINDOW = (0xE000_0000, 0xFEBF_FFFF)
RESET_PORT, RESET_VALUE = 0xCF9, 0x0E
#: ISA interrupts that a PCI link may use
LINK_IRQS = (5, 10, 11)
PCI_SLOTS = 32

_HEADER = struct.Struct("<4sIBB6s8sI4sI")
HEADER_SIZE = _HEADER.size


@dataclass
class Blob:
    """Tables in a row. ``pointers`` are places of 32-bit fields that hold an offset in the blob, to be made
    absolute; ``checksums`` are (field offset, start, length)."""

    data: bytearray = field(default_factory=bytearray)
    pointers: list[int] = field(default_factory=list)
    checksums: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, signature: bytes, revision: int, body: bytes, align: int = 8) -> int:
        """Append a table with the standard header; returns its offset."""
        self.data += bytes(-len(self.data) % align)
        start = len(self.data)
        length = HEADER_SIZE + len(body)
        self.data += (
            _HEADER.pack(signature, length, revision, 0, b"ATOLL ", b"ATOLLPC ", 1, b"ATOL", 1) + body
        )
        self.checksums.append((start + 9, start, length))
        return start

    def point(self, at: int, target: int) -> None:
        """The 32-bit field at ``at`` points to ``target`` in the blob."""
        struct.pack_into("<I", self.data, at, target)
        self.pointers.append(at)

    def linked(self, base: int) -> bytes:
        """The bytes as they are to lie at guest-physical ``base``."""
        data = bytearray(self.data)
        for at in self.pointers:
            struct.pack_into("<I", data, at, struct.unpack_from("<I", data, at)[0] + base)
        for at, start, length in self.checksums:
            data[at] = 0
            data[at] = -sum(data[start : start + length]) & 0xFF
        return bytes(data)


@dataclass(frozen=True)
class Tables:
    blob: Blob
    rsdt: int

    def rsdp(self, base: int) -> bytes:
        """Root pointer, revision 0 (5.2.5.3)."""
        data = bytearray(struct.pack("<8sB6sBI", b"RSD PTR ", 0, b"ATOLL ", 0, base + self.rsdt))
        data[8] = -sum(data) & 0xFF
        return bytes(data)


def build(machine: Machine) -> Tables:
    """FACS, DSDT, FADT, MADT, HPET, RSDT."""
    blob = Blob()
    blob.data += struct.pack("<4sI", b"FACS", 64) + bytes(56)
    facs = 0
    dsdt = blob.add(b"DSDT", 1, dsdt_body(machine))
    fadt = blob.add(b"FACP", 3, fadt_body(machine.vga))
    blob.point(fadt + 36, facs)
    blob.point(fadt + 40, dsdt)
    tables = [fadt, blob.add(b"APIC", 1, madt_body(machine.vcpus)), blob.add(b"HPET", 1, hpet_body())]
    rsdt = blob.add(b"RSDT", 1, bytes(4 * len(tables)))
    for i, table in enumerate(tables):
        blob.point(rsdt + HEADER_SIZE + 4 * i, table)
    return Tables(blob, rsdt)


def _register(space: int, bits: int, address: int, access: int = 0) -> bytes:
    """Generic address structure (5.2.3.2)."""
    return struct.pack("<BBBBQ", space, bits, 0, access, address)


def fadt_body(vga: bool) -> bytes:
    """FADT revision 3 (5.2.9). SMI_CMD is 0: the machine is always in ACPI mode."""
    pm1a_event, pm1a_control, pm_timer, gpe0 = PM_BASE, PM_BASE + 4, PM_BASE + 8, PM_BASE + 0xC
    flags = (
        1 << 0 | 1 << 2 | 1 << 5 | 1 << 10
    )  # WBINVD, PROC_C1, SLP_BUTTON is a control method, RESET_REG_SUP
    no_c2, no_c3, century = 0xFFF, 0xFFF, 0x32
    boot_arch = 0x3 if vga else 0x7  # legacy devices, 8042, no VGA
    body = struct.pack("<IIBBHIBBBB", 0, 0, 0, 0, SCI_IRQ, 0, 0, 0, 0, 0)
    body += struct.pack("<8I", pm1a_event, 0, pm1a_control, 0, 0, pm_timer, gpe0, 0)
    body += struct.pack("<BBBBBBBB", 4, 2, 0, 4, 4, 0, 0, 0)
    body += struct.pack("<HHHHBBBBBHBI", no_c2, no_c3, 0, 0, 0, 0, 0, 0, century, boot_arch, 0, flags)
    body += _register(1, 8, RESET_PORT, 1) + bytes([RESET_VALUE]) + bytes(3) + bytes(16)
    body += _register(1, 32, pm1a_event) + bytes(12) + _register(1, 16, pm1a_control) + bytes(12)
    body += bytes(12) + _register(1, 32, pm_timer) + _register(1, 32, gpe0) + bytes(12)
    assert len(body) == 244 - HEADER_SIZE
    return body


def madt_body(vcpus: int) -> bytes:
    """Local APICs, the IOAPIC, ISA overrides, NMI on LINT1 (5.2.12)."""
    body = struct.pack("<II", LAPIC_BASE, 1)  # PCAT_COMPAT
    for cpu in range(vcpus):
        body += struct.pack("<BBBBI", 0, 8, cpu, cpu, 1)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, IOAPIC_BASE, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
    for source in sorted({SCI_IRQ, *LINK_IRQS}):
        body += struct.pack("<BBBBIH", 2, 10, 0, source, source, 0xD)  # level, active high
    return body + struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)


def hpet_body() -> bytes:
    """HPET description (IA-PC HPET Specification 1.0a, 3.2.4): 3 timers, 64-bit, legacy capable."""
    return struct.pack("<I", 0x8086A201) + _register(0, 0, HPET_BASE) + struct.pack("<BHB", 0, 0x80, 0)


def dsdt_body(machine: Machine) -> bytes:
    return b"".join(
        (
            aml.name("\\_S5_", aml.package(aml.ZERO, aml.ZERO, aml.ZERO, aml.ZERO)),
            aml.scope(
                "\\_SB",
                _pci_root(machine.serials),
                *(_link(pirq) for pirq in range(4)),
                _processors(machine.vcpus),
                _hpet(),
            ),
        )
    )


def _processors(vcpus: int) -> bytes:
    return b"".join(
        aml.device(
            f"C{cpu:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(cpu))
        )
        for cpu in range(vcpus)
    )


def _hpet() -> bytes:
    return aml.device(
        "HPET",
        aml.name("_HID", aml.eisa_id("PNP0103")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resources(aml.memory32(HPET_BASE, 0x400))),
    )


def _pci_root(serials: int) -> bytes:
    routes = [
        aml.package(
            aml.integer(slot << 16 | 0xFFFF),
            aml.integer(pin),
            aml.name_string(f"LNK{'ABCD'[(slot + pin - 1) % 4]}"),
            aml.ZERO,
        )
        for slot in range(1, PCI_SLOTS)
        for pin in range(4)
    ]
    crs = aml.resources(
        aml.bus_numbers(0, 0xFF),
        aml.io(0xCF8, 8),
        aml.word_io(0, 0xCF7),
        aml.word_io(0xD00, 0xFFFF),
        aml.dword_memory(0xA0000, 0xBFFFF, cacheable=True),
        aml.dword_memory(*PCI_WINDOW),
    )
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_ADR", aml.ZERO),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", crs),
        aml.name("_PRT", aml.package(*routes)),
        _isa(serials),
    )


def _isa(serials: int) -> bytes:
    """The ISA bridge, its steering registers, and what sits behind it."""
    ports = ((0x3F8, 4), (0x2F8, 3))[:serials]
    return aml.device(
        "ISA",
        aml.name("_ADR", aml.integer(1 << 16)),
        aml.operation_region("P60C", aml.PCI_CONFIG, 0x60, 4),
        aml.byte_fields("P60C", "PRQA", "PRQB", "PRQC", "PRQD"),
        _isa_device("KBD", "PNP0303", aml.io(0x60, 1), aml.io(0x64, 1), aml.irq(1)),
        _isa_device("MOU", "PNP0F13", aml.irq(12)),
        _isa_device("RTC", "PNP0B00", aml.io(0x70, 8), aml.irq(8)),
        *(
            _isa_device(f"COM{number}", "PNP0501", aml.io(base, 8), aml.irq(irq), uid=number)
            for number, (base, irq) in enumerate(ports, 1)
        ),
    )


def _isa_device(label: str, hid: str, *descriptors: bytes, uid: int = 0) -> bytes:
    return aml.device(
        label,
        aml.name("_HID", aml.eisa_id(hid)),
        aml.name("_UID", aml.integer(uid)),
        aml.name("_CRS", aml.resources(*descriptors)),
    )


def _link(pirq: int) -> bytes:
    """PCI interrupt link device on a PIIX3 steering register (6.2.2, PNP0C0F)."""
    letter = "ABCD"[pirq]
    register = aml.name_string(f"\\_SB.PCI0.ISA.PRQ{letter}")
    disabled = aml.integer(0x80)
    return aml.device(
        f"LNK{letter}",
        aml.name("_HID", aml.eisa_id("PNP0C0F")),
        aml.name("_UID", aml.integer(pirq)),
        aml.name("_PRS", aml.resources(aml.interrupts(*LINK_IRQS))),
        aml.method(
            "_STA",
            0,
            aml.when(aml.bit_and(register, disabled), aml.returns(aml.integer(0x9))),
            aml.returns(aml.integer(0xB)),
        ),
        aml.method("_DIS", 0, aml.bit_or(register, disabled, register)),
        aml.method(
            "_CRS",
            0,
            aml.name("BUF0", aml.resources(aml.interrupts(0))),
            aml.dword_field(aml.name_string("BUF0"), 5, "IRQN"),
            aml.bit_and(register, aml.integer(0xF), aml.name_string("IRQN")),
            aml.returns(aml.name_string("BUF0")),
        ),
        aml.method(
            "_SRS", 1, aml.dword_field(aml.ARG0, 5, "IRQN"), aml.store(aml.name_string("IRQN"), register)
        ),
    )
