"""PIIX3 IDE function (82371SB function 1): configuration space, legacy decode, bus-master base.

Source: 82371FB/SB data sheet (290550), 2.3: IDETIM 40h-41h (primary), 42h-43h (secondary), SIDETIM
44h, BMIBA 20h. The legacy ports of a channel (1F0h and 3F6h, 170h and 376h) are decoded while
COMMAND.IOSE and bit 15 of its IDETIM are set; both are 0 after reset.
"""

from __future__ import annotations

from collections.abc import Callable

from devhost.pci.function import COMMAND, COMMAND_IO, COMMAND_MASTER, STATUS, Bar, Identity, PciFunction

IDETIM, SIDETIM = 0x40, 0x44
IDE_DECODE_ENABLE = 0x8000
#: default transaction timing with decode on, as firmware sets it; for boots without firmware
IDETIM_ENABLED = 0x8000

BUS_MASTER_BAR = 4
BUS_MASTER_SIZE = 16
#: (command block, control block, ISA interrupt) of primary and secondary channel; +8 in BAR 4 for the second
LEGACY = ((0x1F0, 0x3F6, 14), (0x170, 0x376, 15))


class Piix3Ide(PciFunction):
    """``decoded(channel, on)`` is called when legacy decoding changes, ``moved(base or None)`` for BAR 4,
    ``granted(on)`` when bus mastering is switched."""

    def __init__(
        self,
        decoded: Callable[[int, bool], None],
        moved: Callable[[int | None], None],
        granted: Callable[[bool], None],
    ) -> None:
        super().__init__(Identity(0x8086, 0x7010, 0x010180))
        self._decoded, self._granted = decoded, granted
        self._on = [False, False]
        self._mastering = True
        self.set(COMMAND, 2, 0, mask=COMMAND_IO | COMMAND_MASTER)  # 2.3.3: IOSE and BME alone
        self.set(STATUS, 2, 0x0280)
        self.set(IDETIM, 4, 0, mask=0xFFFF_FFFF)
        self.set(SIDETIM, 1, 0, mask=0xFF)
        self.add_bar(BUS_MASTER_BAR, Bar(BUS_MASTER_SIZE, io=True, moved=moved))
        self.on_write = lambda offset, width: self.decode()

    def decode(self) -> None:
        """Tell of channels whose legacy ports appear or vanish, and of bus mastering."""
        for channel in (0, 1):
            timing = self.get(IDETIM + 2 * channel, 2)
            on = bool(self.get(COMMAND, 2) & COMMAND_IO and timing & IDE_DECODE_ENABLE)
            if on != self._on[channel]:
                self._on[channel] = on
                self._decoded(channel, on)
        if self.bus_master != self._mastering:
            self._mastering = self.bus_master
            self._granted(self._mastering)

    def reset(self) -> None:
        super().reset()
        self.decode()

    def restore(self, config: bytes) -> None:
        super().restore(config)
        self.decode()
