"""Intel 440FX host bridge (82441FX PMC): configuration mechanism 1 and the PAM registers.

Source: 82441FX PCI and Memory Controller data sheet (290549), sections 3.1 (CONFADD, CONFDATA) and
3.2.13 (PAM); PCI Local Bus Specification 3.0, section 3.2.2.3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from coordinator.contract.device import Device
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.pci.function import Identity, PciFunction

PAM0 = 0x59
#: the 13 PAM segments: (address, size, register, shift of the two enable bits)
PAM_SEGMENTS = [(0xF0000, 0x10000, PAM0, 4)] + [
    (0xC0000 + 0x4000 * i, 0x4000, PAM0 + 1 + i // 2, 4 * (i % 2)) for i in range(12)
]
PAM_READ, PAM_WRITE = 1, 2


class I440fxRecord(Record, frozen=True, kw_only=True):
    kind = "i440fx"
    confadd: int
    functions: dict[int, bytes]


class I440fx(Device):
    """Host bridge and configuration access to every function of bus 0.

    ``pam_changed(list of 13 (read enabled, write enabled))`` follows ``PAM_SEGMENTS``.
    """

    kind = "i440fx"
    ranges: ClassVar = {
        "main": RegisterMap(
            Register("CONFADD", 0, widths=(1, 2, 4), write=Access.POSTED, doc="82441FX 3.1.1"),
            Register("CONFADD+", 1, span=3, widths=(1, 2), doc="only whole dwords reach CONFADD"),
            Register("CONFDATA", 4, span=4, widths=(1, 2, 4), doc="82441FX 3.1.2"),
        )
    }

    def __init__(self, pam_changed: Callable[[list[tuple[bool, bool]]], None]) -> None:
        self.confadd = 0
        self.functions: dict[int, PciFunction] = {}
        self._pam_changed = pam_changed
        self.bridge = PciFunction(Identity(0x8086, 0x1237, 0x060000, revision=2))
        self.bridge.set(PAM0, 1, 0, mask=0x30)
        for register in range(PAM0 + 1, PAM0 + 7):
            self.bridge.set(register, 1, 0, mask=0x33)
        self.bridge.set(0x72, 1, 0x02, mask=0x00)  # SMRAM: no system management mode here
        self.bridge.on_write = self._bridge_written
        self.plug(0, 0, self.bridge)

    def plug(self, slot: int, function: int, pci: PciFunction) -> None:
        """Put a function on bus 0."""
        self.functions[slot << 3 | function] = pci

    def _bridge_written(self, offset: int, width: int) -> None:
        if offset < PAM0 + 7 and offset + width > PAM0:
            self.show_pam()

    def show_pam(self) -> None:
        """Tell wiring the 13 pairs of enable bits."""
        pairs = []
        for _, _, register, shift in PAM_SEGMENTS:
            bits = self.bridge.config[register] >> shift
            pairs.append((bool(bits & PAM_READ), bool(bits & PAM_WRITE)))
        self._pam_changed(pairs)

    def _target(self) -> PciFunction | None:
        if not self.confadd & 0x8000_0000 or self.confadd & 0x00FF_0000:
            return None
        return self.functions.get(self.confadd >> 8 & 0xFF)

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        if offset < 4:
            return self.confadd >> 8 * offset & (1 << 8 * width) - 1
        target = self._target()
        if target is None:
            return (1 << 8 * width) - 1
        return target.read((self.confadd & 0xFC) + offset - 4, width)

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        if offset < 4:
            if offset == 0 and width == 4:
                self.confadd = value & 0x80FF_FFFC
            return
        target = self._target()
        if target is not None:
            target.write((self.confadd & 0xFC) + offset - 4, width, value)

    def reset(self, hard: bool = True) -> None:
        self.confadd = 0
        for function in self.functions.values():
            function.reset()
        self.show_pam()

    def save(self) -> I440fxRecord:
        return I440fxRecord(
            confadd=self.confadd, functions={where: bytes(f.config) for where, f in self.functions.items()}
        )

    def load(self, record: Record) -> None:
        assert isinstance(record, I440fxRecord)
        self.confadd = record.confadd
        for where, config in record.functions.items():
            self.functions[where].restore(config)
        self.show_pam()
