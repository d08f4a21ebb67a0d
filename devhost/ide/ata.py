"""ATA disk: general features, 48-bit addresses, power management (ATA/ATAPI-6 6.2, 6.11, 6.20, clause 8)."""

from __future__ import annotations

import errno as posix
from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar

import msgspec

from coordinator.contract.errors import RecordError
from coordinator.contract.state import unpack
from devhost.ide import features, identify
from devhost.ide import registers as reg
from devhost.ide.backend import BlockBackend
from devhost.ide.drive import COMMON_FIELDS, Drive
from devhost.ide.phases import REQUEST_LIMIT, Phase, Power, Request
from devhost.ide.records import AtaState
from devhost.ide.registers import Error

SECTOR = 512
MAX_MULTIPLE = 16
#: transfer mode after power-on: multiword DMA 2
DEFAULT_MODE = 0x22

READ, WRITE, VERIFY = Request.READ, Request.WRITE, Request.VERIFY
#: how the data of a transfer command moves
PIO, MULTIPLE, DMA = "pio", "multiple", "dma"

#: opcode -> (request, way, 48-bit addresses); sections 8.24 to 8.36 and 8.61 to 8.67
TRANSFERS: dict[int, tuple[Request, str, bool]] = {
    0x20: (READ, PIO, False),
    0x21: (READ, PIO, False),  # with retries off, obsolete
    0x24: (READ, PIO, True),
    0x29: (READ, MULTIPLE, True),
    0xC4: (READ, MULTIPLE, False),
    0x25: (READ, DMA, True),
    0xC8: (READ, DMA, False),
    0xC9: (READ, DMA, False),
    0x30: (WRITE, PIO, False),
    0x31: (WRITE, PIO, False),
    0x34: (WRITE, PIO, True),
    0x39: (WRITE, MULTIPLE, True),
    0xC5: (WRITE, MULTIPLE, False),
    0x35: (WRITE, DMA, True),
    0xCA: (WRITE, DMA, False),
    0xCB: (WRITE, DMA, False),
    0x3C: (WRITE, PIO, False),  # WRITE VERIFY, obsolete
    0x40: (VERIFY, PIO, False),
    0x41: (VERIFY, PIO, False),
    0x42: (VERIFY, PIO, True),
}
MULTIPLE_OPCODES = {opcode for opcode, (_, way, _) in TRANSFERS.items() if way == MULTIPLE}
EXT_OPCODES = {opcode for opcode, (_, _, ext) in TRANSFERS.items() if ext}

#: states entered at once (the standby timer never runs out here); both codes of each (8.12, 8.17, 8.48, 8.55)
POWER_COMMANDS = {
    0xE0: Power.STANDBY,
    0x94: Power.STANDBY,
    0xE1: Power.IDLE,
    0x95: Power.IDLE,
    0xE2: Power.STANDBY,
    0x96: Power.STANDBY,
    0xE3: Power.IDLE,
    0x97: Power.IDLE,
    0xE6: Power.SLEEP,
    0x99: Power.SLEEP,
}
#: CHECK POWER MODE results (8.6)
POWER_STANDBY, POWER_ACTIVE = 0x00, 0xFF

#: where the fields of AtaState are
_FIELDS = {
    **COMMON_FIELDS,
    **{
        name: name
        for name in ("multiple", "heads", "sectors", "transfer_mode", "write_cache", "look_ahead")
    },
}
_state: Callable[[AtaDrive], tuple[Any, ...]] = attrgetter(*_FIELDS.values())


class AtaDrive(Drive):
    """A fixed disk of 512-byte sectors."""

    sector_size: ClassVar[int] = SECTOR
    signature: ClassVar[tuple[int, int]] = (0x00, 0x00)
    reset_status: ClassVar[int] = reg.READY

    def __init__(
        self,
        backend: BlockBackend,
        *,
        model: str = "ATOLL HARDDISK",
        serial: str = "",
        request_limit: int = REQUEST_LIMIT,
    ) -> None:
        self.model = model
        self.serial = serial
        self.total = backend.size // SECTOR
        self.geometry = identify.default_geometry(self.total)
        self._defaults()
        super().__init__(backend, request_limit=request_limit)

    def _defaults(self) -> None:
        self.multiple = 0
        self.heads, self.sectors = self.geometry.heads, self.geometry.sectors
        self.transfer_mode = DEFAULT_MODE
        self.write_cache = True
        self.look_ahead = True

    def reset(self, hard: bool) -> None:
        """Settings survive SRST, as after SET FEATURES 66h."""
        if hard:
            self._defaults()
        super().reset(hard)

    # ---- commands --------------------------------------------------------------------------------
    def execute(self, opcode: int) -> None:
        self.opcode = opcode
        self.error = 0
        transfer = TRANSFERS.get(opcode)
        if transfer is not None:
            self._transfer(*transfer)
        elif (power := POWER_COMMANDS.get(opcode)) is not None:
            self.power = power
            self._good()
        elif (handler := COMMANDS.get(opcode)) is not None:
            handler(self)
        else:
            self._fail(Error.ABRT)

    def _transfer(self, request: Request, way: str, ext: bool) -> None:
        if way == MULTIPLE and not self.multiple:
            self._fail(Error.ABRT)  # 8.29: READ/WRITE MULTIPLE disabled
            return
        if request is WRITE and self.backend is not None and self.backend.read_only:
            self._fail(Error.WP | Error.ABRT)
            return
        count = self.taskfile.count48() if ext else self.taskfile.count28()
        lba = self._address(ext)
        if lba is None or lba + count > self.total:
            self._fail(Error.IDNF)
            return
        self.power = Power.ACTIVE
        self.use_dma = way == DMA
        self.begin_medium(request, lba * SECTOR, count * SECTOR, direct=self.use_dma)

    def _address(self, ext: bool) -> int | None:
        """LBA of the task file, or None for a CHS address that does not exist."""
        if ext:
            return self.taskfile.lba48()
        if self.taskfile.lba_mode:
            return self.taskfile.lba28()
        _, _, sector, low, high = self.taskfile.current
        head = self.taskfile.device & 0x0F
        if not 1 <= sector <= self.sectors or head >= self.heads:
            return None
        return ((high << 8 | low) * self.heads + head) * self.sectors + sector - 1

    def _flush(self) -> None:
        self.begin_medium(Request.FLUSH)

    def _identify(self) -> None:
        cylinders = max(1, min(65535, self.total // (self.heads * self.sectors)))
        self.send(
            identify.disk(
                number=self.number,
                total=self.total,
                default=self.geometry,
                current=identify.Geometry(cylinders, self.heads, self.sectors),
                multiple=self.multiple,
                max_multiple=MAX_MULTIPLE,
                transfer_mode=self.transfer_mode,
                write_cache=self.write_cache,
                look_ahead=self.look_ahead,
                model=self.model,
                serial=self.serial,
            )
        )

    def _set_multiple(self) -> None:
        """8.47: a power of two up to word 47; 0 turns the mode off, a wrong count does so too."""
        count = self.taskfile.count
        if count > MAX_MULTIPLE or count & count - 1:
            self.multiple = 0
            self._fail(Error.ABRT)
        else:
            self.multiple = count
            self._good()

    def _initialize_parameters(self) -> None:
        """8.16 of ATA/ATAPI-5: sectors a track, and heads - 1, of the CHS translation."""
        if not self.taskfile.count:
            self._fail(Error.ABRT)
            return
        self.sectors = self.taskfile.count
        self.heads = (self.taskfile.device & 0x0F) + 1
        self._good()

    def _set_features(self) -> None:
        setting = self.taskfile.features
        if setting == features.SET_TRANSFER_MODE and features.transfer_mode_known(self.taskfile.count):
            self.transfer_mode = self.taskfile.count
        elif setting in (0x02, 0x82):
            turned_off = self.write_cache and setting == 0x82
            self.write_cache = setting == 0x02
            if turned_off:  # 8.46.4: what is in the cache is written first
                self._flush()
                return
        elif setting in (0xAA, 0x55):
            self.look_ahead = setting == 0xAA
        elif setting not in (features.KEEP_SETTINGS, features.REVERT_SETTINGS):
            self._fail(Error.ABRT)
            return
        self._good()

    def _native_max(self) -> None:
        """8.33: the last address, 28 bits or fewer."""
        self.taskfile.set_lba28(min(self.total, 0x1000_0000) - 1)
        self._good()

    def _native_max_ext(self) -> None:
        self.taskfile.set_lba48(self.total - 1)
        self._good()

    def _check_power(self) -> None:
        self.taskfile.set(reg.COUNT, POWER_STANDBY if self.power is Power.STANDBY else POWER_ACTIVE)
        self._good()

    def _seek(self) -> None:
        lba = self._address(ext=False)
        if lba is None or lba >= self.total:
            self._fail(Error.IDNF)
        else:
            self._good()

    def _recalibrate(self) -> None:
        self._good()

    def _nop(self) -> None:
        """8.23: always ends with ABRT."""
        self._fail(Error.ABRT)

    # ---- ends --------------------------------------------------------------------------------------
    def _good(self) -> None:
        self.end_command()
        self.status = reg.READY
        self.set_interrupt(True)

    def _fail(self, error: int, status: int = 0) -> None:
        self.end_command()
        self.error = int(error)
        self.status = reg.READY | reg.ERR | status
        self.set_interrupt(True)

    def finished(self) -> None:
        if self.request is WRITE and not self.write_cache:
            self._flush()
        elif self.phase is Phase.PIO_IN:  # 9.5: no interrupt after the last block
            self.end_command()
            self.status = reg.READY
        else:
            self._good()

    def failed(self, errno: int) -> None:
        """A read error is UNC at the first sector of the request; a failed write is a device fault."""
        lba = self.offset // SECTOR
        if self.opcode in EXT_OPCODES:
            self.taskfile.set_lba48(lba)
        elif self.taskfile.lba_mode:
            self.taskfile.set_lba28(lba)
        if self.request in (READ, VERIFY):
            self._fail(Error.UNC)
        elif errno in (posix.EROFS, posix.EPERM, posix.EACCES):
            self._fail(Error.WP | Error.ABRT)
        else:
            self._fail(Error.ABRT, reg.DF)

    def announce_burst(self, left: int) -> int:
        block = self.multiple * SECTOR if self.opcode in MULTIPLE_OPCODES else SECTOR
        return min(left, block)

    # ---- state --------------------------------------------------------------------------------------
    def save(self) -> AtaState:
        return AtaState(
            **self.save_common(),
            multiple=self.multiple,
            heads=self.heads,
            sectors=self.sectors,
            transfer_mode=self.transfer_mode,
            write_cache=self.write_cache,
            look_ahead=self.look_ahead,
        )

    def checkpoint(self) -> tuple[Any, ...]:
        return _state(self)

    def recorded(self, checkpoint: list[Any]) -> AtaState:
        return msgspec.convert(dict(zip(_FIELDS, checkpoint, strict=True)), AtaState)

    def load(self, blob: bytes) -> None:
        state = unpack(blob, AtaState)
        if (
            state.multiple == 0
            and state.opcode in MULTIPLE_OPCODES
            or state.phase in (Phase.PACKET.value, Phase.INCOMPLETE.value)
        ):
            raise RecordError(f"record of IDE drive {self.number}: impossible command state")
        self.load_common(state)
        self.multiple = state.multiple
        self.heads, self.sectors = state.heads, state.sectors
        self.transfer_mode = state.transfer_mode
        self.write_cache, self.look_ahead = state.write_cache, state.look_ahead


COMMANDS: dict[int, Callable[[AtaDrive], None]] = {
    0x00: AtaDrive._nop,
    0x27: AtaDrive._native_max_ext,
    0x91: AtaDrive._initialize_parameters,
    0x98: AtaDrive._check_power,
    0xC6: AtaDrive._set_multiple,
    0xE5: AtaDrive._check_power,
    0xE7: AtaDrive._flush,
    0xEA: AtaDrive._flush,
    0xEC: AtaDrive._identify,
    0xEF: AtaDrive._set_features,
    0xF8: AtaDrive._native_max,
    **dict.fromkeys(range(0x10, 0x20), AtaDrive._recalibrate),
    **dict.fromkeys(range(0x70, 0x80), AtaDrive._seek),
}
