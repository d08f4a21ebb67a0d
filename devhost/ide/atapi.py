"""ATAPI CD-ROM drive: the PACKET protocol, tray and medium; the packet commands are in atapi_commands.py.

Sources: ATA/ATAPI-6 8.23 (PACKET), 9.8 and 9.9 (protocol), 8.10 (DEVICE RESET); MMC-5.

Byte count limit (8.23.4): FFFFh means FFFEh; an odd limit is rounded down unless the rest fits in it;
0 with a PIO data command is an abort (so is 1, which rounds to it). The packet is asked for without an
interrupt, as word 0 of IDENTIFY PACKET DEVICE says.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar

import msgspec

from coordinator.contract.drives import Incomplete, Stream
from coordinator.contract.errors import RecordError
from coordinator.contract.state import unpack_any
from devhost.ide import atapi_commands, cd_sector, features, identify, old_record, sense
from devhost.ide import registers as reg
from devhost.ide.ata import DEFAULT_MODE, POWER_ACTIVE, POWER_COMMANDS, POWER_STANDBY
from devhost.ide.backend import BlockBackend, Buffer
from devhost.ide.drive import COMMON_FIELDS, Drive
from devhost.ide.phases import REQUEST_LIMIT, Phase, Power, Request
from devhost.ide.records import AtapiState, OldAtapiState, RegisterState, SenseState, UnitState
from devhost.ide.registers import Error
from devhost.ide.sense import Sense

BLOCK = 2048
PACKET_SIZE = 12
FEATURE_DMA, FEATURE_OVERLAP = 0x01, 0x02
PACKET, DEVICE_RESET = 0xA0, 0x08
#: media larger than the largest CD (99 minutes) are DVDs
LARGEST_CD = 99 * 60 * 75

#: media events of GET EVENT STATUS NOTIFICATION (MMC-5 table 256)
EVENT_EJECT_REQUEST, EVENT_NEW_MEDIA, EVENT_MEDIA_REMOVAL = 1, 2, 3

UNIT_FIELDS = UnitState.__struct_fields__
#: where the fields of AtapiState are, with those of its unit in place of it
_FIELDS = {
    **COMMON_FIELDS,
    **{name: name for name in (*UNIT_FIELDS, "packet", "packet_filled", "byte_limit", "shape")},
}
_state: Callable[[AtapiDrive], tuple[Any, ...]] = attrgetter(*_FIELDS.values())


class AtapiDrive(Drive):
    """A CD/DVD-ROM drive with a tray. ``backend`` is the medium, None when there is none.

    ``on_tray`` is told of every move of the tray. For the host: ``open_tray``, ``close_tray``, ``insert``.
    """

    sector_size: ClassVar[int] = BLOCK
    signature: ClassVar[tuple[int, int]] = (0x14, 0xEB)
    reset_status: ClassVar[int] = 0  # 9.12: DRDY stays clear until the first command

    def __init__(
        self,
        backend: BlockBackend | None = None,
        *,
        model: str = "ATOLL CD-ROM",
        serial: str = "",
        on_tray: Callable[[bool], None] = lambda is_open: None,
        request_limit: int = REQUEST_LIMIT,
    ) -> None:
        self.model = model
        self.serial = serial
        self.on_tray = on_tray
        self.tray_open = False
        self._power_on()
        super().__init__(backend, request_limit=request_limit)

    def _power_on(self) -> None:
        self.packet = bytearray(PACKET_SIZE)
        self.packet_filled = 0
        self.byte_limit = 0
        self.shape = 0
        self.sense = sense.GOOD
        self.attention: list[str] = []
        self.events: list[int] = []
        self.prevent = 0
        self.retries, self.recovery = atapi_commands.DEFAULT_RETRIES, 0
        self.current_lba = 0
        self.transfer_mode = DEFAULT_MODE

    def reset(self, hard: bool) -> None:
        """A hardware reset is a unit attention and unlocks the tray; SRST ends the command only."""
        if hard:
            self._power_on()
            self.attention = ["reset"]
        super().reset(hard)

    # ---- medium ----------------------------------------------------------------------------------
    @property
    def loaded(self) -> bool:
        """A medium is in and the tray is closed."""
        return self.backend is not None and not self.tray_open

    @property
    def blocks(self) -> int:
        """Capacity in 2,048-byte blocks; 0 without a medium."""
        return self.backend.size // BLOCK if self.backend is not None else 0

    @property
    def is_dvd(self) -> bool:
        return self.blocks > LARGEST_CD

    @property
    def locked(self) -> bool:
        """PREVENT ALLOW MEDIUM REMOVAL, plain or persistent."""
        return bool(self.prevent)

    def open_tray(self, force: bool = False) -> bool:
        """Open from the host's side. A locked tray stays shut unless forced: the guest is asked to eject
        (MMC-5 6.7.2.5). Returns whether the tray is open now."""
        if self.tray_open:
            return True
        if self.locked and not force:
            self._event(EVENT_EJECT_REQUEST)
            return False
        self._move_tray(True)
        return True

    def close_tray(self) -> None:
        if self.tray_open:
            self._move_tray(False)

    def insert(self, backend: BlockBackend | None) -> None:
        """Put a medium in, or take it out; with the tray closed the guest sees both changes at once."""
        was_loaded = self.loaded
        self._drop_request()
        self.backend = backend
        if was_loaded or self.loaded:
            self._medium_changed(was_loaded)

    def _move_tray(self, to_open: bool) -> None:
        was_loaded = self.loaded
        if to_open:
            self._drop_request()
        self.tray_open = to_open
        if was_loaded or self.loaded:
            self._medium_changed(was_loaded)
        self.on_tray(to_open)

    def _drop_request(self) -> None:
        """The medium leaves under a command: it ends NOT READY."""
        if self.request is not Request.NONE:
            self._cancel()
            self.check(sense.TRAY_OPEN)

    def _medium_changed(self, was_loaded: bool) -> None:
        self.current_lba = 0
        if was_loaded:
            self._event(EVENT_MEDIA_REMOVAL)
        if self.loaded:
            self._event(EVENT_NEW_MEDIA)
            if "medium" not in self.attention:
                self.attention.append("medium")

    def _event(self, event: int) -> None:
        """Queue a media event; one that is waiting already is not doubled."""
        if event in self.events:
            self.events.remove(event)
        self.events.append(event)

    def no_medium(self) -> Sense:
        return sense.TRAY_OPEN if self.tray_open else sense.TRAY_CLOSED_NO_MEDIUM

    def eject(self) -> None:
        """START STOP UNIT with LoEj."""
        if not self.tray_open:
            self._move_tray(True)

    # ---- ATA commands ------------------------------------------------------------------------------
    def execute(self, opcode: int) -> None:
        self.opcode = opcode
        self.error = 0
        if opcode == PACKET:
            self._packet()
        elif (power := POWER_COMMANDS.get(opcode)) is not None:
            self.power = power
            self._ata_good()
        elif (handler := ATA_COMMANDS.get(opcode)) is not None:
            handler(self)
        else:
            self._ata_abort()

    def device_reset(self) -> None:
        """DEVICE RESET is taken also while BSY, and raises no interrupt (8.10). DEV is kept."""
        self.diagnose()
        self.bus.interrupt_changed()

    def _ata_good(self) -> None:
        self.end_command()
        self.status = reg.READY
        self.set_interrupt(True)

    def _ata_abort(self) -> None:
        self.end_command()
        self.error = int(Error.ABRT)
        self.status = reg.READY | reg.ERR
        self.set_interrupt(True)

    def _signature_abort(self) -> None:
        """IDENTIFY DEVICE and READ SECTORS: ABRT, with the signature in place (8.15.5, 8.34.5)."""
        self.taskfile.signature(*self.signature)
        self._ata_abort()

    def _identify(self) -> None:
        self.use_dma = False
        self.send(
            identify.cdrom(
                number=self.number, transfer_mode=self.transfer_mode, model=self.model, serial=self.serial
            )
        )

    def _set_features(self) -> None:
        setting, mode = self.taskfile.features, self.taskfile.count
        if setting == features.SET_TRANSFER_MODE and features.transfer_mode_known(mode):
            self.transfer_mode = mode
        elif setting not in (features.KEEP_SETTINGS, features.REVERT_SETTINGS):
            self._ata_abort()
            return
        self._ata_good()

    def _check_power(self) -> None:
        self.taskfile.set(reg.COUNT, POWER_STANDBY if self.power is Power.STANDBY else POWER_ACTIVE)
        self._ata_good()

    # ---- PACKET --------------------------------------------------------------------------------------
    def _packet(self) -> None:
        if self.taskfile.features & FEATURE_OVERLAP:
            self._ata_abort()
            return
        self.use_dma = bool(self.taskfile.features & FEATURE_DMA)
        self.byte_limit = self.taskfile.current[3] | self.taskfile.current[4] << 8
        self.packet[:] = bytes(PACKET_SIZE)
        self.packet_filled = 0
        self.phase = Phase.PACKET
        self.status = reg.READY | reg.DRQ
        self._reason(reg.REASON_COD)

    def _reason(self, value: int) -> None:
        self.taskfile.set(reg.COUNT, value)

    def pio_write(self, data: Buffer) -> None:
        if self.phase is not Phase.PACKET:
            super().pio_write(data)
            return
        take = min(len(data), PACKET_SIZE - self.packet_filled)
        self.packet[self.packet_filled : self.packet_filled + take] = data[:take]
        self.packet_filled += take
        if self.packet_filled == PACKET_SIZE:
            self._evaluate()

    def _evaluate(self) -> None:
        self.status = reg.BUSY
        self.power = Power.ACTIVE
        atapi_commands.execute(self, bytes(self.packet))

    def good(self) -> None:
        """End the packet command with GOOD status."""
        self._end_packet(0, reg.READY)

    def check(self, reason: Sense) -> None:
        """End it with CHECK CONDITION; the sense data waits for REQUEST SENSE (MMC-5 4.1.5)."""
        self.sense = reason
        abort = int(Error.ABRT) if reason.key in (sense.ILLEGAL_REQUEST, sense.ABORTED_COMMAND) else 0
        self._end_packet(reason.key << 4 | abort, reg.READY | reg.ERR)

    def _end_packet(self, error: int, status: int) -> None:
        self.end_command()
        self.error = error
        self.status = status
        self._reason(reg.REASON_IO | reg.REASON_COD)
        self.set_interrupt(True)

    def reply(self, data: bytes, allocation: int) -> None:
        """Send the first ``allocation`` bytes of a result."""
        data = data[:allocation]
        if not data:
            self.good()
        elif self._transfer_possible():
            self._reason(reg.REASON_IO)
            self.send(data)

    def want(self, length: int) -> None:
        """Ask the host for a parameter list."""
        if self._transfer_possible():
            self._reason(0)
            self.receive(length, interrupt=True)

    def read_blocks(self, lba: int, count: int, shape: int = 0) -> None:
        """Read from the medium: plain 2,048-byte blocks (``shape`` 0), or these fields of raw sectors."""
        if lba + count > self.blocks:
            self.check(sense.LBA_OUT_OF_RANGE._replace(information=lba))
        elif not count:
            self.good()
        elif self._transfer_possible():
            self.shape = shape
            self.current_lba = lba + count
            self._reason(reg.REASON_IO)
            self.begin_medium(Request.READ, lba * BLOCK, count * BLOCK, direct=self.use_dma and not shape)

    def _transfer_possible(self) -> bool:
        if self.use_dma or self.byte_limit > 1:
            return True
        self.check(sense.ABORTED)
        return False

    def announce_burst(self, left: int) -> int:
        if self.opcode != PACKET:
            return left
        limit = min(self.byte_limit, 0xFFFE)
        length = left if left <= limit else limit & ~1
        self.taskfile.set(reg.LBA_MID, length & 0xFF)
        self.taskfile.set(reg.LBA_HIGH, length >> 8)
        self._reason(reg.REASON_IO if self.to_host else 0)
        return length

    def shaped(self, data: bytearray) -> bytearray:
        if not self.shape:
            return data
        raw = cd_sector.raw_sectors(data, self.offset // BLOCK)
        start, end = cd_sector.field_range(self.shape)
        return bytearray(raw[:, start:end].tobytes())

    def received(self) -> None:
        atapi_commands.received(self, bytes(self.packet), bytes(self.buffer))

    def finished(self) -> None:
        if self.opcode == PACKET:
            self.good()
        else:  # IDENTIFY PACKET DEVICE: no interrupt after the last block
            self.end_command()
            self.status = reg.READY

    def failed(self, errno: int) -> None:
        if self.backend is None:
            self.check(self.no_medium())
        else:
            self.check(sense.UNRECOVERED_READ._replace(information=self.offset // BLOCK))

    # ---- state --------------------------------------------------------------------------------------
    def resume(self) -> None:
        super().resume()
        if self.phase is Phase.INCOMPLETE:
            self._complete()

    def _complete(self) -> None:
        """The machine starts with a DMA command that an old record left out, see docs/migration.md."""
        choice, known = self.policy.incomplete, self.packet_filled == PACKET_SIZE
        if choice is Incomplete.DROP:
            self._clear_command()  # DRQ stays, and nothing will ever come of it
        elif choice is Incomplete.RESTART and known:
            self._evaluate()
        else:
            self.check(sense.NO_SEEK_COMPLETE)

    def save(self) -> AtapiState | OldAtapiState:
        state = self._whole()
        return old_record.older(state) if self.policy.stream is Stream.V0 else state

    def checkpoint(self) -> tuple[Any, ...]:
        return _state(self)

    def recorded(self, checkpoint: list[Any]) -> AtapiState:
        fields = dict(zip(_FIELDS, checkpoint, strict=True))
        unit = {name: fields.pop(name) for name in UNIT_FIELDS}
        unit["sense"] = dict(zip(SenseState.__struct_fields__, unit["sense"], strict=True))
        return msgspec.convert({**fields, "unit": unit}, AtapiState)

    def _whole(self) -> AtapiState:
        key, asc, ascq, information = self.sense
        unit = UnitState(
            sense=SenseState(key=key, asc=asc, ascq=ascq, information=information),
            attention=tuple(self.attention),
            events=tuple(self.events),
            tray_open=self.tray_open,
            prevent=self.prevent,
            retries=self.retries,
            recovery=self.recovery,
            current_lba=self.current_lba,
            transfer_mode=self.transfer_mode,
        )
        return AtapiState(
            **self.save_common(),
            unit=unit,
            packet=bytes(self.packet),
            packet_filled=self.packet_filled,
            byte_limit=self.byte_limit,
            shape=self.shape,
        )

    def load(self, blob: bytes) -> None:
        record: RegisterState = unpack_any(blob, AtapiState, OldAtapiState)
        state = old_record.newer(record) if isinstance(record, OldAtapiState) else record
        assert isinstance(state, AtapiState)
        unit = state.unit
        if (
            any(name not in sense.ATTENTION for name in unit.attention)
            or state.phase == Phase.PACKET.value
            and state.packet_filled >= PACKET_SIZE
            or state.phase == Phase.INCOMPLETE.value
            and not (state.use_dma and state.opcode == PACKET and state.packet_filled in (0, PACKET_SIZE))
            or state.request not in (Request.NONE.value, Request.READ.value)
            or state.phase in (Phase.PIO_IN.value, Phase.PIO_OUT.value)
            and state.opcode == PACKET
            and state.byte_limit < 2
            or state.shape
            and not cd_sector.fields_contiguous(state.shape)
        ):
            raise RecordError(f"record of IDE drive {self.number}: impossible command state")
        self.load_common(state)
        self.packet[:] = state.packet
        self.packet_filled = state.packet_filled
        self.byte_limit = state.byte_limit
        self.shape = state.shape
        self.sense = Sense(unit.sense.key, unit.sense.asc, unit.sense.ascq, unit.sense.information)
        self.attention, self.events = list(unit.attention), list(unit.events)
        self.tray_open, self.prevent = unit.tray_open, unit.prevent
        self.retries, self.recovery = unit.retries, unit.recovery
        self.current_lba = unit.current_lba
        self.transfer_mode = unit.transfer_mode


ATA_COMMANDS: dict[int, Callable[[AtapiDrive], None]] = {
    0x20: AtapiDrive._signature_abort,
    0x98: AtapiDrive._check_power,
    0xA1: AtapiDrive._identify,
    0xE5: AtapiDrive._check_power,
    0xE7: AtapiDrive._ata_good,  # FLUSH CACHE: nothing is ever cached
    0xEC: AtapiDrive._signature_abort,
    0xEF: AtapiDrive._set_features,
}
