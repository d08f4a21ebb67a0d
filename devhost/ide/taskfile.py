"""The task file: five two-deep registers and Device (ATA/ATAPI-6 6.20, "48-bit Address feature set")."""

from __future__ import annotations

from devhost.ide import registers as reg


class TaskFile:
    """``current`` and ``previous`` are indexed by register offset - 1 (Features to LBA High)."""

    __slots__ = ("current", "device", "previous")

    def __init__(self) -> None:
        self.current = [0] * 5
        self.previous = [0] * 5
        self.device = 0

    def write(self, offset: int, value: int) -> None:
        """A host write pushes the old content down (6.20: "most recently written" and "previous content")."""
        if offset == reg.DEVICE:
            self.device = value
            return
        self.previous[offset - 1] = self.current[offset - 1]
        self.current[offset - 1] = value

    def read(self, offset: int, hob: bool) -> int:
        """What the host reads of Count and LBA; ``hob`` selects the previous content."""
        if offset == reg.DEVICE:
            return self.device | reg.DEVICE_OBSOLETE
        return (self.previous if hob else self.current)[offset - 1]

    def set(self, offset: int, value: int) -> None:
        """The drive's own update."""
        self.current[offset - 1] = value

    @property
    def features(self) -> int:
        return self.current[0]

    @property
    def count(self) -> int:
        return self.current[1]

    @property
    def lba_mode(self) -> bool:
        return bool(self.device & reg.DEVICE_LBA)

    def count28(self) -> int:
        """Sectors of a 28-bit command: 0 means 256 (clause 8, READ SECTORS)."""
        return self.current[1] or 256

    def count48(self) -> int:
        """Sectors of an EXT command: 0 means 65,536."""
        return (self.previous[1] << 8 | self.current[1]) or 0x10000

    def lba28(self) -> int:
        _, _, low, mid, high = self.current
        return (self.device & 0x0F) << 24 | high << 16 | mid << 8 | low

    def lba48(self) -> int:
        _, _, low, mid, high = self.current
        _, _, low_p, mid_p, high_p = self.previous
        return high_p << 40 | mid_p << 32 | low_p << 24 | high << 16 | mid << 8 | low

    def set_lba28(self, lba: int) -> None:
        self.device = self.device & 0xF0 | lba >> 24 & 0x0F
        for offset, shift in ((reg.LBA_LOW, 0), (reg.LBA_MID, 8), (reg.LBA_HIGH, 16)):
            self.set(offset, lba >> shift & 0xFF)

    def set_lba48(self, lba: int) -> None:
        for at, shift in ((2, 0), (3, 8), (4, 16)):
            self.current[at] = lba >> shift & 0xFF
            self.previous[at] = lba >> shift + 24 & 0xFF

    def signature(self, mid: int, high: int) -> None:
        """ATA/ATAPI-6 9.12: count 01h, LBA low 01h and the type of device; Device keeps DEV only."""
        self.current = [0, 1, 1, mid, high]
        self.previous = [0] * 5
        self.device &= reg.DEVICE_DEV
