"""Two 8259A interrupt controllers, cascaded at IR2 as on every PC, with the edge/level registers.

Sources:
  8259A   Intel 8259A datasheet, 231468-003 (the chapters are named, they have no numbers)
  PIIX3   Intel 82371FB/82371SB datasheet, 290550, section 2.5.4 "Interrupt controller registers"

An IR line in edge mode sets its request with the rising edge and loses it when it falls before the
acknowledge (8259A, "Edge and level triggered modes"), which gives the default IR7.
"""

from __future__ import annotations

from operator import attrgetter
from typing import ClassVar

import msgspec

from coordinator.contract.device import Pin
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U8, ByteDevice

# ICW1, 8259A "Initialization command words"
ICW1_IC4 = 0x01
ICW1_SNGL = 0x02
ICW1_SELECT = 0x10
# ICW4
ICW4_AEOI = 0x02
ICW4_SFNM = 0x10
# OCW2 commands: R, SL, EOI in bits 7..5
OCW2_EOI = 0x20
OCW2_SL = 0x40
OCW2_ROTATE = 0x80
# OCW3
OCW3_SELECT = 0x08
OCW3_RIS = 0x01
OCW3_RR = 0x02
OCW3_POLL = 0x04
OCW3_SMM = 0x20
OCW3_ESMM = 0x40

CASCADE_IR = 2
#: PIIX3 2.5.4.7 and 2.5.4.8: IRQ0, 1, 2, 8 and 13 are always edge triggered
ELCR_WRITABLE = (0xF8, 0xDE)


class PicState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One 8259A. ``expect`` is the ICW that the next write with A0=1 is (0: it is OCW1)."""

    imr: U8
    latch: U8
    lines: U8
    isr: U8
    elcr: U8
    icw1: U8
    icw2: U8
    icw3: U8
    icw4: U8
    expect: U8
    lowest: U8
    rotate_aeoi: bool
    special_mask: bool
    poll: bool
    read_isr: bool


_STATE = attrgetter(*PicState.__struct_fields__)


class I8259Record(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "i8259"
    master: PicState
    slave: PicState


class Pic:
    """One 8259A; the pair wires INT and CAS."""

    def __init__(self) -> None:
        self.lines = 0
        self.reset()

    def reset(self) -> None:
        self.elcr = 0
        self.imr = 0
        self.latch = 0
        self.isr = 0
        self.icw1 = self.icw2 = self.icw3 = self.icw4 = 0
        self.expect = 0
        self.lowest = 7
        self.rotate_aeoi = self.special_mask = self.poll = self.read_isr = False

    def set_line(self, ir: int, level: bool) -> None:
        bit = 1 << ir
        if level:
            self.latch |= bit & ~self.lines
            self.lines |= bit
        else:
            self.lines &= ~bit
            self.latch &= ~bit

    @property
    def irr(self) -> int:
        """The interrupt request register: latched edges, and the lines of level inputs."""
        return self.latch & ~self.elcr | self.lines & self.elcr

    @property
    def single(self) -> bool:
        return bool(self.icw1 & ICW1_SNGL)

    def _first(self, bits: int) -> int | None:
        """The bit of highest priority: the one after ``lowest``, going round."""
        if not bits:
            return None
        for step in range(1, 9):
            ir = self.lowest + step & 7
            if bits >> ir & 1:
                return ir
        return None

    def _rank(self, ir: int) -> int:
        return ir - self.lowest - 1 & 7

    def pending(self, cascade: bool) -> int | None:
        """The request that INT announces, or None. ``cascade``: this is a master with a slave."""
        request = self._first(self.irr & ~self.imr)
        if request is None:
            return None
        in_service = self.isr
        if self.special_mask:  # "Special mask mode": a masked level in service inhibits nothing
            in_service &= ~self.imr
        if cascade and self.icw4 & ICW4_SFNM:  # "Special fully nested mode": the slave may ask again
            in_service &= ~(1 << CASCADE_IR)
        served = self._first(in_service)
        if served is not None and self._rank(served) <= self._rank(request):
            return None
        return request

    def accept(self, ir: int) -> None:
        """The end of the INTA sequence for ``ir``."""
        bit = 1 << ir
        self.latch &= ~bit
        if self.icw4 & ICW4_AEOI:
            if self.rotate_aeoi:
                self.lowest = ir
        else:
            self.isr |= bit

    def vector(self, ir: int) -> int:
        return self.icw2 & 0xF8 | ir

    def status(self) -> int:
        return self.isr if self.read_isr else self.irr

    def command(self, value: int) -> None:
        """A write with A0=0."""
        if value & ICW1_SELECT:
            self._icw1(value)
        elif value & OCW3_SELECT:
            self._ocw3(value)
        else:
            self._ocw2(value)

    def _icw1(self, value: int) -> None:
        """"Initialization command words 1 and 2": the list (a) to (f). LTIM has no effect (PIIX3 2.5.4.1)."""
        self.icw1 = value
        self.latch = 0
        self.imr = 0
        self.isr = 0
        self.lowest = 7
        self.special_mask = self.read_isr = self.poll = self.rotate_aeoi = False
        if not value & ICW1_IC4:
            self.icw4 = 0
        self.expect = 2

    def _ocw2(self, value: int) -> None:
        rotate, specific, eoi = value & OCW2_ROTATE, value & OCW2_SL, value & OCW2_EOI
        level: int | None = value & 7
        if not eoi:
            if rotate and specific:  # set priority command
                self.lowest = value & 7
            elif not specific:  # rotate in automatic EOI mode, set or clear
                self.rotate_aeoi = bool(rotate)
            return
        if not specific:
            # "End of interrupt": masked bits of ISR are not cleared by it in special mask mode
            level = self._first(self.isr & ~self.imr if self.special_mask else self.isr)
        if level is None:
            return
        self.isr &= ~(1 << level)
        if rotate:
            self.lowest = level

    def _ocw3(self, value: int) -> None:
        if value & OCW3_ESMM:
            self.special_mask = bool(value & OCW3_SMM)
        if value & OCW3_POLL:
            self.poll = True
        elif value & OCW3_RR:
            self.read_isr = bool(value & OCW3_RIS)

    def data(self, value: int) -> None:
        """A write with A0=1: OCW1, or the ICW that the sequence has come to."""
        if self.expect == 0:
            self.imr = value
        elif self.expect == 2:
            self.icw2 = value
            self.expect = 3 if not self.single else self._after_icw3()
        elif self.expect == 3:
            self.icw3 = value
            self.expect = self._after_icw3()
        else:
            self.icw4 = value
            self.expect = 0

    def _after_icw3(self) -> int:
        return 4 if self.icw1 & ICW1_IC4 else 0

    def save(self) -> PicState:
        return PicState(*_STATE(self))

    def load(self, state: PicState) -> None:
        for name in PicState.__struct_fields__:
            setattr(self, name, getattr(state, name))
        self.lowest &= 7


_PAIR = RegisterMap(
    Register("ICW1/OCW2/OCW3", 0, write=Access.POSTED, doc="8259A, fig. 7, 8; reads IRR, ISR, poll word"),
    # a mask that takes effect late would make spurious interrupts: SYNC
    Register("ICW2-4/OCW1", 1, doc="8259A, fig. 7 and 8; reads IMR"),
)


class I8259(ByteDevice):
    """The pair. ``intr`` is the master's INT; the CPU answers it with `acknowledge`."""

    kind = "i8259"
    ranges = {
        "master": _PAIR,  # ports 20h, 21h
        "slave": _PAIR,  # ports A0h, A1h
        "elcr": RegisterMap(  # ports 4D0h, 4D1h
            Register("ELCR1", 0, doc="PIIX3 2.5.4.7"),
            Register("ELCR2", 1, doc="PIIX3 2.5.4.8"),
        ),
    }

    def __init__(self, intr: Pin) -> None:
        self._intr = intr
        self._intr_level: bool | None = None
        self.master = Pic()
        self.slave = Pic()
        self._chips = {"master": self.master, "slave": self.slave}

    # ---- pins ------------------------------------------------------------------------------------
    def set_input(self, irq: int, level: bool) -> None:
        """IRQ 0 to 15 of the board; IRQ2 is the cascade and has no pin."""
        if irq >= 8:
            self.slave.set_line(irq - 8, level)
        elif irq != CASCADE_IR:
            self.master.set_line(irq, level)
        self._update()

    def _update(self) -> None:
        """Carry the slave's INT to IR2 and the master's to the CPU."""
        if not self.master.single:
            self.master.set_line(CASCADE_IR, self.slave.pending(False) is not None)
        level = self.master.pending(not self.master.single) is not None
        if level is not self._intr_level:  # each device's pin comes by here
            self._intr_level = level
            self._intr.set(level)

    # ---- the CPU ---------------------------------------------------------------------------------
    def acknowledge(self) -> int:
        """The INTA sequence: the vector. Without a request it is the default IR7 (no ISR bit)."""
        request = self.master.pending(not self.master.single)
        if request is None:
            vector = self.master.vector(7)
        else:
            self.master.accept(request)
            vector = self.master.vector(request)
            if request == CASCADE_IR and not self.master.single:
                vector = self._acknowledge_slave()
        self._update()
        return vector

    def _acknowledge_slave(self) -> int:
        request = self.slave.pending(False)
        # INT of the slave falls in the sequence: what is left to announce is a new edge at IR2
        self.master.set_line(CASCADE_IR, False)
        if request is None:
            return self.slave.vector(7)
        self.slave.accept(request)
        return self.slave.vector(request)

    def _poll(self, chip: Pic) -> int:
        """"Poll command": the read is the acknowledge; bit 7 says whether there was a request."""
        chip.poll = False
        request = chip.pending(chip is self.master and not chip.single)
        if request is None:
            return 0
        chip.accept(request)
        if chip is self.slave:
            self.master.set_line(CASCADE_IR, False)
        self._update()
        return 0x80 | request

    # ---- the bus ---------------------------------------------------------------------------------
    def read_byte(self, offset: int, range_name: str) -> int:
        if offset > 1:
            return 0xFF
        if range_name == "elcr":
            return (self.master, self.slave)[offset].elcr
        chip = self._chips[range_name]
        if chip.poll:
            return self._poll(chip)
        return chip.imr if offset else chip.status()

    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        if offset > 1:
            return
        if range_name == "elcr":
            chip = (self.master, self.slave)[offset]
            chip.elcr = value & ELCR_WRITABLE[offset]
        elif offset:
            self._chips[range_name].data(value)
        else:
            self._chips[range_name].command(value)
        self._update()

    def summary(self) -> list[str]:
        """For the monitor's ``info pic``: a line a chip."""
        return [
            f"{name}: irr={pic.irr:02x} imr={pic.imr:02x} isr={pic.isr:02x} base={pic.icw2 & 0xF8:02x}"
            f" elcr={pic.elcr:02x} lowest={pic.lowest}"
            for name, pic in self._chips.items()
        ]

    # ---- state -----------------------------------------------------------------------------------
    def reset(self, hard: bool = True) -> None:
        """The 8259A has no reset pin; the board's reset leaves it as at power-on. The lines stay."""
        self.master.reset()
        self.slave.reset()
        self._intr_level = None
        self._update()

    def save(self) -> I8259Record:
        return I8259Record(master=self.master.save(), slave=self.slave.save())

    def load(self, record: Record) -> None:
        assert isinstance(record, I8259Record)
        self.master.load(record.master)
        self.slave.load(record.slave)
        self._intr_level = None
        self._update()
