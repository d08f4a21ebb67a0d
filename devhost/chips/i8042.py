"""8042 keyboard controller with keyboard and mouse: ports 60h and 64h, IRQ1, IRQ12, A20, reset.

Sources: IBM PS/2 Hardware Interface Technical Reference, 84F9735, "Keyboard and auxiliary device
controller"; commands DDh and DFh (A20) are those of the HP Vectra controller that all PCs took over.

The status register is a SHADOW, so that guests may poll it; nothing posted can change it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

from msgspec import Meta

from coordinator.contract.clock import Clock
from coordinator.contract.device import Pin
from coordinator.contract.registers import Access, Register, RegisterMap
from coordinator.contract.state import Record
from devhost.chips.common import U8, ByteDevice
from devhost.chips.keycodes import BREAK, TRANSLATION
from devhost.chips.ps2_keyboard import Keyboard, KeyboardState
from devhost.chips.ps2_mouse import Mouse, MouseState

# status register
OBF = 0x01
SYSTEM_FLAG = 0x04
LAST_WAS_COMMAND = 0x08
NOT_INHIBITED = 0x10
AUX_OBF = 0x20
# controller command byte
KBD_INT = 0x01
AUX_INT = 0x02
KBD_DISABLE = 0x10
AUX_DISABLE = 0x20
TRANSLATE = 0x40
# output port
P2_RESET = 0x01
P2_A20 = 0x02
P2_KBD_OBF = 0x10
P2_AUX_OBF = 0x20
P2_IDLE = 0xCC  # keyboard clock and data, and two that nothing uses

# where the byte in the output buffer is from
NONE, FROM_CONTROLLER, FROM_KEYBOARD, FROM_MOUSE = range(4)

SELF_TEST_OK = 0x55
INTERFACE_OK = 0x00
NO_PASSWORD = 0xF1
INPUT_PORT = 0x80  # keyboard not locked

#: commands that wait for a byte at port 60h
WRITE_RAM = range(0x60, 0x80)
WRITE_OUTPUT_PORT = 0xD1
WRITE_KBD_BUFFER = 0xD2
WRITE_AUX_BUFFER = 0xD3
WRITE_AUX = 0xD4

#: command byte when nobody has set up the controller yet: as firmware leaves it
DEFAULT_COMMAND_BYTE = TRANSLATE | AUX_INT | KBD_INT


class I8042Record(Record, frozen=True, kw_only=True):
    """``waiting`` are controller bytes that wait for the output buffer, each after its source."""

    kind: ClassVar[str] = "i8042"
    ram: Annotated[bytes, Meta(min_length=32, max_length=32)]
    buffer: U8
    source: Annotated[int, Meta(ge=NONE, le=FROM_MOUSE)]
    waiting: tuple[tuple[Annotated[int, Meta(ge=FROM_CONTROLLER, le=FROM_MOUSE)], U8], ...]
    expect: U8
    a20: bool
    break_seen: bool
    last_was_command: bool
    keyboard: KeyboardState
    mouse: MouseState


class I8042(ByteDevice):
    """``a20`` is output port bit 1, high at reset; ``reset_line`` is called when bit 0 is pulled low."""

    kind = "i8042"
    ranges = {
        "data": RegisterMap(Register("DATA", 0, doc="port 60h: output buffer, input buffer")),
        "command": RegisterMap(Register("STATUS/COMMAND", 0, read=Access.SHADOW, doc="port 64h")),
    }

    def __init__(
        self, clock: Clock, irq1: Pin, irq12: Pin, a20: Pin, reset_line: Callable[[], None]
    ) -> None:
        self._irq1, self._irq12, self._a20_pin = irq1, irq12, a20
        self._reset_line = reset_line
        self._paused = False
        self.keyboard = Keyboard(clock)
        self.mouse = Mouse()
        self.keyboard.on_data = self.mouse.on_data = self._fill
        self._power_on()

    def _power_on(self) -> None:
        #: the controller's RAM; byte 0 is the command byte
        self.ram = bytearray(32)
        self.ram[0] = DEFAULT_COMMAND_BYTE
        self.buffer = 0
        self.source = NONE
        self.waiting: list[tuple[int, int]] = []
        self.expect = 0
        self.a20 = True
        self.break_seen = False
        self.last_was_command = False

    # ---- host side -------------------------------------------------------------------------------
    def key_event(self, qcode: str, down: bool) -> None:
        """A key of the keyboard; names of `keycodes.QCODES`."""
        self.keyboard.key_event(qcode, down)

    def mouse_event(self, dx: int, dy: int, dz: int, buttons: int) -> None:
        """See `Mouse.event`."""
        self.mouse.event(dx, dy, dz, buttons)

    # ---- the output buffer -----------------------------------------------------------------------
    def _fill(self) -> None:
        """Put the next byte into the output buffer if it is free: controller, keyboard, mouse."""
        if self.source != NONE or self._paused:
            return
        if self.waiting:
            self.source, self.buffer = self.waiting.pop(0)
        elif (byte := self._keyboard_byte()) is not None:
            self.source, self.buffer = FROM_KEYBOARD, byte
        elif not self.ram[0] & AUX_DISABLE and (byte := self.mouse.take()) is not None:
            self.source, self.buffer = FROM_MOUSE, byte
        self._update_irqs()

    def _keyboard_byte(self) -> int | None:
        """"Translate": set 2 becomes set 1, F0h the high bit of the byte after it."""
        while not self.ram[0] & KBD_DISABLE and (byte := self.keyboard.take()) is not None:
            if not self.ram[0] & TRANSLATE:
                return byte
            if byte == BREAK:
                self.break_seen = True
                continue
            high = 0x80 if self.break_seen else 0
            self.break_seen = False
            return TRANSLATION[byte] | high
        return None

    def _update_irqs(self) -> None:
        full, aux = self.source != NONE, self.source == FROM_MOUSE
        self._irq1.set(full and not aux and bool(self.ram[0] & KBD_INT))
        self._irq12.set(aux and bool(self.ram[0] & AUX_INT))

    def _reply(self, value: int, source: int = FROM_CONTROLLER) -> None:
        self.waiting.append((source, value))
        # a guest that only writes cannot make the queue grow
        del self.waiting[:-16]

    # ---- the bus ---------------------------------------------------------------------------------
    def peek(self, offset: int, range_name: str = "main") -> int:
        """The status register. The input buffer is always empty."""
        status = NOT_INHIBITED | self.ram[0] & SYSTEM_FLAG
        if self.source != NONE:
            status |= OBF
        if self.source == FROM_MOUSE:
            status |= AUX_OBF
        if self.last_was_command:
            status |= LAST_WAS_COMMAND
        return status

    def read_byte(self, offset: int, range_name: str) -> int:
        if offset:
            return 0xFF
        if range_name == "command":
            return self.peek(0)
        value, self.source = self.buffer, NONE
        self._update_irqs()
        self._fill()
        return value

    def write_byte(self, offset: int, value: int, range_name: str) -> None:
        if offset:
            return
        self.last_was_command = range_name == "command"
        if range_name == "command":
            self.expect = 0
            self._command(value)
        else:
            command, self.expect = self.expect, 0
            self._data(command, value)
        self._fill()
        self._update_irqs()

    def _command(self, value: int) -> None:
        if 0x20 <= value < 0x40:
            self._reply(self.ram[value & 0x1F])
        elif value in WRITE_RAM or WRITE_OUTPUT_PORT <= value <= WRITE_AUX:
            self.expect = value
        elif value in _REPLIES:
            self._reply(_REPLIES[value])
            if value == 0xAA:
                self.ram[0] |= SYSTEM_FLAG
        elif value in _COMMAND_BYTE:
            clear, enable = _COMMAND_BYTE[value]
            self.ram[0] = self.ram[0] & ~clear | enable
        elif value == 0xD0:
            self._reply(self._output_port())
        elif value in (0xDD, 0xDF):
            self._set_a20(value == 0xDF)
        elif value >= 0xF0 and not value & P2_RESET:  # "pulse output port bits"
            self._reset_line()

    def _data(self, command: int, value: int) -> None:
        """A byte at port 60h: the parameter of ``command``, else for the keyboard."""
        if command in WRITE_RAM:
            self.ram[command & 0x1F] = value
        elif command == WRITE_OUTPUT_PORT:
            self._set_a20(bool(value & P2_A20))
            if not value & P2_RESET:
                self._reset_line()
        elif command == WRITE_KBD_BUFFER:
            self._reply(value, FROM_KEYBOARD)
        elif command == WRITE_AUX_BUFFER:
            self._reply(value, FROM_MOUSE)
        elif command == WRITE_AUX:
            self.ram[0] &= ~AUX_DISABLE  # sending enables the interface
            self.mouse.write(value)
        else:
            self.ram[0] &= ~KBD_DISABLE
            self.keyboard.write(value)

    def _output_port(self) -> int:
        port = P2_IDLE | P2_RESET | (P2_A20 if self.a20 else 0)
        if self.source == FROM_MOUSE:
            return port | P2_AUX_OBF
        return port | (P2_KBD_OBF if self.source != NONE else 0)

    def _set_a20(self, level: bool) -> None:
        self.a20 = level
        self._a20_pin.set(level)

    # ---- state -----------------------------------------------------------------------------------
    def reset(self, hard: bool = True) -> None:
        self._power_on()
        self.keyboard.power_on()
        self.mouse.power_on()
        self._a20_pin.set(True)
        self._update_irqs()

    def pause(self) -> None:
        """Keys and movement stay in the devices' own queues."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._fill()

    def save(self) -> I8042Record:
        return I8042Record(
            ram=bytes(self.ram),
            buffer=self.buffer,
            source=self.source,
            waiting=tuple(self.waiting),
            expect=self.expect,
            a20=self.a20,
            break_seen=self.break_seen,
            last_was_command=self.last_was_command,
            keyboard=self.keyboard.save(),
            mouse=self.mouse.save(),
        )

    def load(self, record: Record) -> None:
        assert isinstance(record, I8042Record)
        self.ram = bytearray(record.ram)
        self.buffer, self.source = record.buffer, record.source
        self.waiting = list(record.waiting)
        self.expect = record.expect
        self.a20 = record.a20
        self.break_seen = record.break_seen
        self.last_was_command = record.last_was_command
        self.keyboard.load(record.keyboard)
        self.mouse.load(record.mouse)
        self._a20_pin.set(self.a20)
        self._update_irqs()


#: commands that only answer
_REPLIES = {
    0xA4: NO_PASSWORD,
    0xA9: INTERFACE_OK,
    0xAA: SELF_TEST_OK,
    0xAB: INTERFACE_OK,
    0xC0: INPUT_PORT,
    0xE0: 0x00,  # test inputs
}

#: commands that change the command byte: (bits to clear, bits to set)
_COMMAND_BYTE = {
    0xA7: (0, AUX_DISABLE),
    0xA8: (AUX_DISABLE, 0),
    0xAD: (0, KBD_DISABLE),
    0xAE: (KBD_DISABLE, 0),
}
