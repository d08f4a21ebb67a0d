"""Intel 440FX host bridge (82441FX PMC): configuration mechanism 1 and the PAM registers.

Source: 82441FX PCI and Memory Controller data sheet (290549), sections 3.1 (CONFADD, CONFDATA) and
3.2 (configuration registers); PCI Local Bus Specification 3.0, section 3.2.2.3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from coordinator.contract.device import Device
from coordinator.contract.errors import RecordError
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U32
from devhost.pci.function import COMMAND, STATUS, Identity, PciFunction

CONFADD, CONFDATA = 0, 4
#: CONFADD: enable, then bus, device and function, register; the rest reads 0
CONFADD_ENABLE, CONFADD_BUS, CONFADD_MASK = 0x8000_0000, 0x00FF_0000, 0x80FF_FFFC

PAM0 = 0x59
PAM_REGISTERS = 7
#: the 13 PAM segments: (address, size, register, shift of the two enable bits)
PAM_SEGMENTS = [(0xF0000, 0x10000, PAM0, 4)] + [
    (0xC0000 + 0x4000 * i, 0x4000, PAM0 + 1 + i // 2, 4 * (i % 2)) for i in range(12)
]
PAM_READ, PAM_WRITE = 1, 2
SMRAM = 0x72


class I440fxRecord(Record, frozen=True, kw_only=True):
    """``functions``: configuration space by device << 3 | function, of all of bus 0."""

    kind: ClassVar[str] = "i440fx"
    confadd: U32
    functions: dict[int, bytes]


class I440fx(Device):
    """Host bridge and configuration access to every function of bus 0.

    ``pam_changed(list of 13 (read enabled, write enabled))`` follows ``PAM_SEGMENTS``.
    """

    kind = "i440fx"
    ranges: ClassVar = {
        "main": RegisterMap(
            Register("CONFADD", CONFADD, widths=(1, 2, 4), write=Access.POSTED, doc="82441FX 3.1.1"),
            Register("CONFADD+", CONFADD + 1, span=3, widths=(1, 2), doc="as a dword only is it CONFADD"),
            Register("CONFDATA", CONFDATA, span=4, widths=(1, 2, 4), doc="82441FX 3.1.2"),
        )
    }

    def __init__(self, pam_changed: Callable[[list[tuple[bool, bool]]], None]) -> None:
        self.confadd = 0
        self.functions: dict[int, PciFunction] = {}
        self._pam_changed = pam_changed
        self.bridge = _bridge()
        self.bridge.on_write = self._bridge_written
        self.plug(0, 0, self.bridge)

    def plug(self, slot: int, function: int, pci: PciFunction) -> None:
        """Put a function on bus 0."""
        self.functions[slot << 3 | function] = pci

    def _bridge_written(self, offset: int, width: int) -> None:
        if offset < PAM0 + PAM_REGISTERS and offset + width > PAM0:
            self._show_pam()

    def _show_pam(self) -> None:
        pairs = []
        for _, _, register, shift in PAM_SEGMENTS:
            bits = self.bridge.config[register] >> shift
            pairs.append((bool(bits & PAM_READ), bool(bits & PAM_WRITE)))
        self._pam_changed(pairs)

    def all_ram(self) -> None:
        """C0000h-FFFFFh reads and writes RAM, as firmware leaves it once it has moved there."""
        for register in range(PAM0, PAM0 + PAM_REGISTERS):
            self.bridge.write(register, 1, 0x33)

    def _target(self) -> PciFunction | None:
        if not self.confadd & CONFADD_ENABLE or self.confadd & CONFADD_BUS:
            return None
        return self.functions.get(self.confadd >> 8 & 0xFF)

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        nothing = (1 << 8 * width) - 1
        if offset < CONFDATA:  # 3.1.1: byte and word accesses pass it by
            return self.confadd if offset == CONFADD and width == 4 else nothing
        target = self._target()
        return nothing if target is None else target.read((self.confadd & 0xFC) + offset - CONFDATA, width)

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        if offset < CONFDATA:
            if offset == CONFADD and width == 4:
                self.confadd = value & CONFADD_MASK
            return
        target = self._target()
        if target is not None:
            target.write((self.confadd & 0xFC) + offset - CONFDATA, width, value)

    def reset(self, hard: bool = True) -> None:
        self.confadd = 0
        for function in self.functions.values():
            function.reset()
        self._show_pam()

    def save(self) -> I440fxRecord:
        return I440fxRecord(
            confadd=self.confadd, functions={where: bytes(f.config) for where, f in self.functions.items()}
        )

    def load(self, record: Record) -> None:
        """RecordError where the functions are others than here."""
        assert isinstance(record, I440fxRecord)
        if record.functions.keys() != self.functions.keys():
            raise RecordError("record of i440fx: other PCI functions than here")
        for where, config in record.functions.items():
            self.functions[where].check(config)
        self.confadd = record.confadd & CONFADD_MASK
        for where, config in record.functions.items():
            self.functions[where].restore(config)
        self._show_pam()


def _bridge() -> PciFunction:
    """Function 0:0.0 as far as software asks for it (3.2)."""
    bridge = PciFunction(Identity(0x8086, 0x1237, 0x060000, revision=2))
    bridge.register(COMMAND, 2, 0x0006, mask=0x0100)  # PCICMD: memory and master always on
    bridge.register(STATUS, 2, 0x0280)  # PCISTS: medium DEVSEL#, fast back-to-back
    bridge.register(PAM0, 1, 0x00, mask=0x30)
    for register in range(PAM0 + 1, PAM0 + PAM_REGISTERS):
        bridge.register(register, 1, 0x00, mask=0x33)
    bridge.register(SMRAM, 1, 0x02)  # there is no system management mode to open it for
    return bridge
