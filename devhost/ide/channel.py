"""One IDE channel: command block, Device Control, two drives, interrupt line, bus master.

Source: ATA/ATAPI-6 clauses 7 (registers), 9.2-9.4 (resets), 9.16 (one drive on the cable); BMIDE 1.0.

Ranges: ``command`` (1F0h or 170h), ``control`` (3F6h or 376h), ``busmaster`` (BAR 4, +8 for the
secondary channel).

Drives both take writes to the task file, the selected one answers reads and drives INTRQ. Without
drive 1 the registers of drive 1 read 00h, as drive 0 answers for it; nothing on the cable, or
drive 0 missing, is a floating bus.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, ClassVar

import msgspec

from coordinator.contract.device import Device, Dma, Pin
from coordinator.contract.errors import RecordError
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record, pack
from devhost.ide import busmaster
from devhost.ide import registers as reg
from devhost.ide.atapi import DEVICE_RESET, AtapiDrive
from devhost.ide.busmaster import BusMaster, Cursor
from devhost.ide.drive import Drive
from devhost.ide.phases import MAX_BUFFER
from devhost.ide.records import BusMasterState, ChannelRecord

EXECUTE_DEVICE_DIAGNOSTIC = 0x90
#: data port accesses are 16 bits wide; PIIX3 turns a 32-bit one into two
WORD = 2

_SELECT = "select"  # posted writes that change which status is seen
_MASTER = "master"  # posted writes that change the bus-master registers

COMMAND_BLOCK = RegisterMap(
    Register("Data", reg.DATA, widths=(2, 4), doc="ATA/ATAPI-6 7.5"),
    Register("Error/Features", reg.FEATURES, write=Access.POSTED, doc="ATA/ATAPI-6 7.9 (Error), 7.10"),
    Register("Count", reg.COUNT, write=Access.POSTED, doc="ATA/ATAPI-6 7.14; interrupt reason 7.12"),
    Register("LbaLow", reg.LBA_LOW, write=Access.POSTED, doc="ATA/ATAPI-6 7.13"),
    Register("LbaMid", reg.LBA_MID, write=Access.POSTED, doc="ATA/ATAPI-6 7.3"),
    Register("LbaHigh", reg.LBA_HIGH, write=Access.POSTED, doc="ATA/ATAPI-6 7.2"),
    Register(
        "Device",
        reg.DEVICE,
        read=Access.SHADOW,
        write=Access.POSTED,
        hazard=_SELECT,
        plain=True,
        doc="ATA/ATAPI-6 7.7",
    ),
    Register(
        "Status/Command",
        reg.COMMAND,
        read=Access.SHADOW,
        hazard=_SELECT,
        doc="ATA/ATAPI-6 7.4; Status 7.15: a shadow while there is no INTRQ for a read to clear",
    ),
)
CONTROL_BLOCK = RegisterMap(
    Register(
        "Control",
        0,
        read=Access.SHADOW,
        write=Access.POSTED,
        hazard=_SELECT,
        doc="ATA/ATAPI-6 7.8; Alternate Status 7.1, a read without side effects",
    ),
)
BUS_MASTER = RegisterMap(
    Register(
        "BmCommand",
        busmaster.COMMAND,
        read=Access.SHADOW,
        write=Access.POSTED,
        hazard=_MASTER,
        doc="BMIDE 2.1",
    ),
    Register(
        "BmStatus", busmaster.STATUS, read=Access.SHADOW, write=Access.POSTED, hazard=_MASTER, doc="BMIDE 2.2"
    ),
    Register("BmPointer", busmaster.POINTER, span=4, widths=(1, 2, 4), write=Access.POSTED, doc="BMIDE 2.3"),
    size=8,
)


#: of a checkpoint: the channel's own state, and that of its bus master in the order of BusMasterState
_state = attrgetter(
    "control", "selected", "line", "master.command", "master.status", "master.pointer",
    "master.cursor.descriptor", "master.cursor.address", "master.cursor.left", "master.cursor.last",
)  # fmt: skip


class IdeChannel(Device):
    """``drives`` are drive 0 and drive 1; ``pin`` is the interrupt line of the cable."""

    kind: ClassVar[str] = "ide-channel"
    ranges: ClassVar[dict[str, RegisterMap]] = {
        "command": COMMAND_BLOCK,
        "control": CONTROL_BLOCK,
        "busmaster": BUS_MASTER,
    }

    #: two drives with the largest buffers (phases.py) and their registers
    record_room: ClassVar[int] = 2 * MAX_BUFFER + (32 << 10)

    def __init__(
        self,
        pin: Pin,
        dma: Dma,
        drives: tuple[Drive | None, Drive | None] = (None, None),
    ) -> None:
        self.pin = pin
        self.dma = dma
        self.master = BusMaster(dma)
        self.drives = drives
        self.fitted = [drive for drive in drives if drive is not None]
        self.control = 0
        self.selected = 0
        self.line = False
        for number, drive in enumerate(drives):
            if drive is not None:
                drive.attach(self, number)

    # ---- accesses ------------------------------------------------------------------------------------
    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        if range_name == "command":
            if offset == reg.DATA:
                return int.from_bytes(self.read_string(offset, width, 1, range_name), "little")
            read = self._read_command_block
        elif range_name == "control":
            read = self._alternate_status
        else:
            read = self.master.read
        return sum(read(offset + lane) << 8 * lane for lane in range(width))

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        if range_name == "command":
            if offset == reg.DATA:
                self.write_string(offset, width, value.to_bytes(width, "little"), range_name)
                return
            for lane in range(width):
                self._write_command_block(offset + lane, value >> 8 * lane & 0xFF)
        elif range_name == "control":
            if offset == 0:
                self._write_control(value & 0xFF)
        elif offset >= busmaster.POINTER:
            self.master.write_pointer(offset, width, value)
        else:
            for lane in range(width):
                self._write_master(offset + lane, value >> 8 * lane & 0xFF)

    def read_string(self, offset: int, width: int, count: int, range_name: str = "main") -> bytes:
        if range_name != "command" or offset != reg.DATA:
            return super().read_string(offset, width, count, range_name)
        drive = self.drives[self.selected]
        if drive is None:
            return b"\xff" * (width * count)
        if width >= WORD:
            return drive.pio_read(width * count)
        return drive.pio_read(WORD * count)[::WORD]

    def write_string(self, offset: int, width: int, data: bytes, range_name: str = "main") -> None:
        drive = self.drives[self.selected]
        if range_name != "command" or offset != reg.DATA:
            super().write_string(offset, width, data, range_name)
        elif drive is not None:
            if width < WORD:
                data = b"".join(bytes((byte, 0)) for byte in data)
            drive.pio_write(data)

    def peek(self, offset: int, range_name: str = "main") -> int | None:
        if range_name == "busmaster":
            return self.master.read(offset)
        if range_name == "control":
            return self._alternate_status(0)
        drive = self.drives[self.selected]
        if offset == reg.STATUS and drive is not None and drive.intrq:
            return None  # reading it clears the interrupt
        if offset == reg.DEVICE and drive is None:
            return None  # what an absent drive's register reads is not what was written there
        return self._read_command_block(offset)

    # ---- command block -------------------------------------------------------------------------------
    def _absent(self) -> int:
        """What an absent drive's registers read."""
        return 0 if self.selected == 1 and self.drives[0] is not None else reg.FLOATING

    def _alternate_status(self, offset: int) -> int:
        if offset:
            return 0xFF
        drive = self.drives[self.selected]
        return drive.status if drive is not None else self._absent()

    def _read_command_block(self, offset: int) -> int:
        if offset > reg.STATUS:
            return 0xFF
        drive = self.drives[self.selected]
        if drive is None:
            return self._absent()
        if offset == reg.STATUS:
            if drive.intrq:
                drive.set_interrupt(False)
            return drive.status
        if offset == reg.ERROR:
            return drive.error
        return drive.taskfile.read(offset, bool(self.control & reg.CONTROL_HOB))

    def _write_command_block(self, offset: int, value: int) -> None:
        if self.control & reg.CONTROL_SRST or offset > reg.COMMAND:
            return
        self.control &= ~reg.CONTROL_HOB  # 7.8: any command block write clears HOB
        selected = self.drives[self.selected]
        if offset == reg.COMMAND:
            self._write_command(selected, value)
            return
        if selected is not None and selected.status & (reg.BSY | reg.DRQ):
            return  # 7.1 and others: not to be written while BSY or DRQ is set
        for drive in self.fitted:
            drive.taskfile.write(offset, value)
        if offset == reg.DEVICE:
            self.selected = int(bool(value & reg.DEVICE_DEV))
            self.interrupt_changed()

    def _write_command(self, drive: Drive | None, opcode: int) -> None:
        if opcode == EXECUTE_DEVICE_DIAGNOSTIC:
            self._diagnose()
        elif drive is None:
            return
        elif opcode == DEVICE_RESET and isinstance(drive, AtapiDrive):
            drive.device_reset()
        elif not drive.status & (reg.BSY | reg.DRQ) and not drive.asleep:
            if drive.intrq:
                drive.set_interrupt(False)
            drive.execute(opcode)

    def _diagnose(self) -> None:
        """Both drives run it, whichever is selected; drive 0 is selected after (8.11)."""
        if any(drive.status & (reg.BSY | reg.DRQ) for drive in self.fitted):
            return
        for drive in self.fitted:
            drive.taskfile.device &= ~reg.DEVICE_DEV
            drive.diagnose()
        self.selected = 0
        first = self.drives[0]
        if first is not None:
            first.set_interrupt(True)
        else:
            self.interrupt_changed()

    # ---- device control, bus master, interrupt ---------------------------------------------------------
    def _write_control(self, value: int) -> None:
        was = self.control
        self.control = value & (reg.CONTROL_NIEN | reg.CONTROL_SRST | reg.CONTROL_HOB)
        if self.control & ~was & reg.CONTROL_SRST:
            for drive in self.fitted:
                drive.hold_in_reset()
        elif was & ~self.control & reg.CONTROL_SRST:
            self.selected = 0
            for drive in self.fitted:
                drive.taskfile.device = 0
                drive.reset(hard=False)
        self.interrupt_changed()

    def _write_master(self, offset: int, value: int) -> None:
        if offset == busmaster.COMMAND:
            started, stopped = self.master.write_command(value)
            if started:
                for drive in self.fitted:
                    if drive.waits_for_dma:
                        drive.dma_start()
            elif stopped:
                for drive in self.fitted:
                    drive.dma_stop()
        elif offset == busmaster.STATUS:
            self.master.write_status(value)

    def grant_bus(self, granted: bool) -> None:
        """COMMAND.BME of the PCI function: without it the bus master asks for nothing, and transfers wait."""
        self.master.granted = granted
        if granted:
            for drive in self.fitted:
                if drive.waits_for_dma:
                    drive.dma_start()

    def interrupt_changed(self) -> None:
        """The selected drive's INTRQ, unless nIEN releases the line (7.8)."""
        drive = self.drives[self.selected]
        level = drive is not None and drive.intrq and not self.control & reg.CONTROL_NIEN
        if level == self.line:
            return
        self.line = level
        if level:
            self.master.interrupt()
        self.pin.set(level)

    # ---- life ------------------------------------------------------------------------------------------
    def reset(self, hard: bool = True) -> None:
        """RESET- of the cable; the bus master is reset with the chip set."""
        self.control = 0
        self.selected = 0
        for drive in self.fitted:
            drive.reset(hard=True)
        if hard:
            self.master.reset()
        self.interrupt_changed()

    def pause(self) -> None:
        for drive in self.fitted:
            drive.pause()

    def paused(self) -> bool:
        return all(drive.paused() for drive in self.fitted)

    def resume(self) -> None:
        for drive in self.fitted:
            drive.resume()

    def checkpoint(self) -> Any:
        first, second = self.drives
        return (
            _state(self),
            first.checkpoint() if first is not None else None,
            second.checkpoint() if second is not None else None,
        )

    def restore(self, checkpoint: bytes) -> None:
        try:
            own, *drives = msgspec.msgpack.decode(checkpoint)
            control, selected, line, *master = own
            fields = {
                "control": control,
                "selected": selected,
                "line": line,
                "master": dict(zip(BusMasterState.__struct_fields__, master, strict=True)),
                "drives": tuple(
                    pack(drive.recorded(state)) if drive is not None else None
                    for drive, state in zip(self.drives, drives, strict=True)
                ),
            }
            record = msgspec.convert(fields, ChannelRecord)
        except (msgspec.MsgspecError, TypeError, ValueError) as error:
            raise RecordError(f"committed record of {self.kind}: {error}") from None
        self.load(record)

    def save(self) -> ChannelRecord:
        first, second = (pack(drive.save()) if drive is not None else None for drive in self.drives)
        master, cursor = self.master, self.master.cursor
        return ChannelRecord(
            control=self.control,
            selected=self.selected,
            line=self.line,
            master=BusMasterState(
                command=master.command,
                status=master.status,
                pointer=master.pointer,
                descriptor=cursor.descriptor,
                address=cursor.address,
                left=cursor.left,
                last=cursor.last,
            ),
            drives=(first, second),
        )

    def load(self, record: Record) -> None:
        """RecordError where the drives are others than here, or the state is impossible."""
        if not isinstance(record, ChannelRecord):
            raise RecordError(f"record of {record.kind!r} where {self.kind!r} is wanted")
        for number, (drive, state) in enumerate(zip(self.drives, record.drives, strict=True)):
            if (drive is None) != (state is None):
                raise RecordError(f"record of {self.kind}: drive {number} is on one side only")
            if drive is not None and state is not None:
                drive.load(state)
        self.control = record.control
        self.selected = record.selected
        self.line = record.line
        saved = record.master
        self.master.command, self.master.status = saved.command, saved.status
        self.master.pointer = saved.pointer
        self.master.cursor = Cursor(saved.descriptor, saved.address, saved.left, saved.last)
        self.pin.set(self.line)
        for drive in self.fitted:
            drive.load_done()
