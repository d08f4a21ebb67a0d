"""PIIX3 ISA bridge (82371SB function 0) and the PIIX4 power-management function's configuration.

Sources: 82371FB/SB data sheet (290550), section 2.2 (function 0); 82371AB PIIX4 data sheet (290562),
chapter 7 (function 3).
"""

from __future__ import annotations

from collections.abc import Callable

from devhost.pci.function import COMMAND, COMMAND_IO, STATUS, Identity, PciFunction

IORT, XBCS, PIRQRC, TOM, MBIRQ, MBDMA, PCSC, APICBASE, DLC, SMICNTL = (
    0x4C, 0x4E, 0x60, 0x69, 0x70, 0x76, 0x78, 0x80, 0x82, 0xA0,
)  # fmt: skip
PIRQ_DISABLED = 0x80
#: (offset, width, value after reset, writable bits) of function 0, section 2.2
_REGISTERS = (
    (COMMAND, 2, 0x0007, 0x0108),  # PCICMD: I/O, memory and master are always on
    (STATUS, 2, 0x0200, 0x0000),  # PCISTS: medium DEVSEL#
    (IORT, 1, 0x4D, 0x7F),
    (XBCS, 2, 0x0003, 0x03FF),  # RTC and keyboard controller decoded
    *((PIRQRC + pirq, 1, PIRQ_DISABLED, 0x8F) for pirq in range(4)),
    (TOM, 1, 0x02, 0xFE),
    (MBIRQ, 1, PIRQ_DISABLED, 0xEF),
    (MBDMA, 1, 0x04, 0x8F),
    (MBDMA + 1, 1, 0x04, 0x8F),
    (PCSC, 2, 0x0002, 0xFFFF),
    (APICBASE, 1, 0x00, 0x7F),
    (DLC, 1, 0x00, 0x0F),
    (SMICNTL, 1, 0x08, 0x1F),
)


class Piix3Isa(PciFunction):
    """Registers alone: no PCI device here raises INTx that PIRQRC would steer."""

    def __init__(self) -> None:
        super().__init__(Identity(0x8086, 0x7000, 0x060100, multifunction=True))
        for offset, width, value, mask in _REGISTERS:
            self.register(offset, width, value, mask)


PMBASE, PMREGMISC, SMBBASE, SMBHSTCFG, DEVACTB = 0x40, 0x80, 0x90, 0xD2, 0x58
PM_IO_ENABLE = 0x01
PM_BASE_MASK = 0xFFC0


class Piix4Pm(PciFunction):
    """PIIX4 function 3: places the ACPI register block; ``moved(base or None)``."""

    def __init__(self, moved: Callable[[int | None], None]) -> None:
        super().__init__(Identity(0x8086, 0x7113, 0x068000, revision=3, interrupt_pin=1))
        self._moved = moved
        self._base: int | None = None
        self.register(COMMAND, 2, 0, mask=COMMAND_IO)
        self.register(STATUS, 2, 0x0280)
        self.register(PMBASE, 4, 0x1, mask=PM_BASE_MASK)
        self.register(PMREGMISC, 1, 0, mask=PM_IO_ENABLE)
        self.register(SMBBASE, 4, 0x1, mask=0xFFF0)
        self.register(SMBHSTCFG, 1, 0, mask=0x0F)
        # DEVACTB: without system management mode, firmware would wait on port B3h for ever for the
        # APMC write to be taken unless bit 25 (APMC enable, byte 5Bh bit 1) says it was done already.
        self.register(DEVACTB, 4, 0x0200_0000, mask=0xFFFF_FFFF)
        self.on_write = lambda offset, width: self._place()

    def _place(self) -> None:
        base: int | None = self.get(PMBASE, 4) & PM_BASE_MASK
        if not self.get(PMREGMISC, 1) & PM_IO_ENABLE or not base:
            base = None
        if base != self._base:
            self._base = base
            self._moved(base)

    def place_at(self, base: int) -> None:
        """As firmware does."""
        self.write(PMBASE, 4, base)
        self.write(PMREGMISC, 1, PM_IO_ENABLE)

    def reset(self) -> None:
        super().reset()
        self._place()

    def restore(self, config: bytes) -> None:
        super().restore(config)
        self._place()
