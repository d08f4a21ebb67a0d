"""What the power-on self test leaves in the chips, for a boot without firmware.

PCI resources, interrupt steering, IDE decode and the ACPI base as SeaBIOS sets them on this board;
PIC, PIT and CMOS as any PC BIOS does (IBM PC AT Technical Reference, POST); text mode 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from devhost.firmware import acpi
from devhost.pci.function import INTERRUPT_LINE
from devhost.pci.piix3 import PIRQRC

if TYPE_CHECKING:
    from devhost.pc import Pc

#: ISA interrupt of PIRQA to PIRQD
STEERING = (10, 10, 11, 11)
#: (range, first vector, ICW3) of the 8259 pair; ICW1 11h: edge, cascade, ICW4; ICW4 01h: 8086 mode
PICS = (("master", 0x08, 0x04), ("slave", 0x70, 0x02))
ICW1, ICW4, ALL_MASKED = 0x11, 0x01, 0xFF
#: counter 0, both bytes, mode 2, the longest count: 18.2 interrupts a second
PIT_CONTROL, PIT_TICK = 3, 0x34


def leave(pc: Pc) -> None:
    """Set the chips of ``pc``, which are fresh from reset."""
    pc.host.all_ram()
    for pirq, irq in enumerate(STEERING):
        pc.isa.write(PIRQRC + pirq, 1, irq)
    levels = sum(1 << irq for irq in {*STEERING, acpi.SCI_IRQ})
    for port in (0, 1):
        pc.pic.write(port, 1, levels >> 8 * port & 0xFF, "elcr")
    for range_name, first_vector, cascade in PICS:
        pc.pic.write(0, 1, ICW1, range_name)
        for word in (first_vector, cascade, ICW4, ALL_MASKED):
            pc.pic.write(1, 1, word, range_name)
    pc.pit.write(PIT_CONTROL, 1, PIT_TICK)
    for byte in (0, 0):
        pc.pit.write(0, 1, byte)
    pc.power.place_at(acpi.PM_BASE)
    pc.power.write(INTERRUPT_LINE, 1, acpi.SCI_IRQ)
    pc.drives.as_firmware_leaves_it()
    if pc.display is not None:
        pc.display.as_firmware_leaves_it()
