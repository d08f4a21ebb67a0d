"""PIIX3 ISA bridge (82371SB function 0) and the PIIX4 power-management function's configuration.

Sources: 82371FB/SB data sheet (290550), sections 2.2 (function 0; PIRQRC 60h-63h) and 2.2.5 (XBCS);
82371AB PIIX4 data sheet (290562), chapter 7 (function 3).
"""

from __future__ import annotations

from collections.abc import Callable

from devhost.pci.function import Identity, PciFunction

PIRQRC = 0x60
PIRQ_DISABLED = 0x80
#: ISA interrupts that a PIRQ may be steered to (data sheet table of PIRQRC bits 3:0)
STEERABLE = {3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15}


class Piix3Isa(PciFunction):
    """Steers the four PCI interrupts to ISA interrupts: ``route(pirq) -> irq or None``."""

    def __init__(self, rerouted: Callable[[], None]) -> None:
        super().__init__(Identity(0x8086, 0x7000, 0x060100, multifunction=True))
        self._rerouted = rerouted
        for pirq in range(4):
            self.set(PIRQRC + pirq, 1, PIRQ_DISABLED, mask=0x8F)
            self.preset(PIRQRC + pirq, PIRQ_DISABLED)
        self.set(0x4C, 1, 0x4D, mask=0x7F)  # IORT
        self.preset(0x4C, 0x4D)
        self.set(0x4E, 2, 0x0003, mask=0x03FF)  # XBCS: RTC and keyboard decoded
        self.preset(0x4E, 0x03)
        self.set(0x69, 1, 0x02, mask=0xFE)  # TOM
        self.preset(0x69, 0x02)
        self.set(0x70, 1, PIRQ_DISABLED, mask=0xEF)  # MBIRQ0
        self.preset(0x70, PIRQ_DISABLED)
        self.set(0x82, 1, 0x00, mask=0x0F)  # DLC
        self.on_write = self._written

    def _written(self, offset: int, width: int) -> None:
        if offset < PIRQRC + 4 and offset + width > PIRQRC:
            self._rerouted()

    def route(self, pirq: int) -> int | None:
        value = self.config[PIRQRC + pirq]
        irq = value & 0x0F
        return None if value & PIRQ_DISABLED or irq not in STEERABLE else irq


PMBASE, PMREGMISC, SMBBASE, SMBHSTCFG, DEVACTB = 0x40, 0x80, 0x90, 0xD2, 0x58
PM_IO_ENABLE = 0x01


class Piix4Pm(PciFunction):
    """PIIX4 function 3: places the ACPI register block; ``moved(base or None)``."""

    def __init__(self, moved: Callable[[int | None], None]) -> None:
        super().__init__(Identity(0x8086, 0x7113, 0x068000, revision=3, interrupt_pin=1))
        self._moved = moved
        self._base: int | None = None
        self.set(PMBASE, 4, 0x1, mask=0xFFC0)
        self.set(PMREGMISC, 1, 0, mask=0x01)
        self.set(SMBBASE, 4, 0x1, mask=0xFFC0)
        self.set(SMBHSTCFG, 1, 0, mask=0x0F)
        # DEVACTB: without system management mode, firmware would wait on port B3h for ever for the
        # APMC write to be taken unless bit 25 (APMC enable, byte 5Bh bit 1) says it was done already.
        self.set(DEVACTB, 4, 0, mask=0xFFFF_FFFF)
        self.preset(DEVACTB + 3, 0x02)
        self.on_write = lambda offset, width: self.place()

    def place(self) -> None:
        base: int | None = self.get(PMBASE, 4) & 0xFFC0
        if not self.get(PMREGMISC, 1) & PM_IO_ENABLE or not base:
            base = None
        if base != self._base:
            self._base = base
            self._moved(base)

    def reset(self) -> None:
        super().reset()
        self.place()

    def restore(self, config: bytes) -> None:
        super().restore(config)
        self.place()
