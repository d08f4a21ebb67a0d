"""The small ports: 92h, CF9h, E9h, isa-debug-exit, the DMA controllers."""

from __future__ import annotations

from coordinator.contract.device import ListPin
from coordinator.contract.registers import Access
from coordinator.contract.state import pack, unpack
from devhost.chips.debug_port import DebugPort
from devhost.chips.i8237 import I8237, I8237Record
from devhost.chips.isa_debug_exit import IsaDebugExit
from devhost.chips.port92 import Port92, Port92Record
from devhost.chips.reset_control import ResetControl


def test_port_92() -> None:
    """PIIX3 2.5.5.3: bit 1 is A20; INIT on 0 -> 1 of bit 0, again only after a 0."""
    a20, inits = ListPin(), []
    port = Port92(a20, lambda: inits.append(1))
    port.write(0, 1, 0x02)
    assert a20.level and port.read(0, 1) == 0x02
    port.write(0, 1, 0x03)
    port.write(0, 1, 0x03)
    assert len(inits) == 1
    port.write(0, 1, 0x00)
    assert not a20.level
    port.write(0, 1, 0xFF)
    assert len(inits) == 2 and port.read(0, 1) == 0x03
    copy_pin = ListPin()
    copy = Port92(copy_pin, lambda: inits.append(1))
    copy.load(unpack(pack(port.save()), Port92Record))
    assert copy_pin.level and len(inits) == 2
    port.reset()
    assert not a20.level and port.read(0, 1) == 0


def test_reset_control() -> None:
    """PIIX3 2.5.7: bit 1 chooses hard or soft, the 0 -> 1 transition of bit 2 resets."""
    resets: list[bool] = []
    port = ResetControl(resets.append)
    port.write(0, 1, 0x02)
    assert resets == [] and port.read(0, 1) == 0x02
    port.write(0, 1, 0x06)
    assert resets == [True]
    port.write(0, 1, 0x06)
    assert resets == [True]
    port.reset()
    port.write(0, 1, 0x04)
    assert resets == [True, False]
    port.write(0, 1, 0x00)
    port.write(0, 1, 0x0E)  # what the FADT's reset register asks for
    assert resets == [True, False, True]


def test_debug_port() -> None:
    text = bytearray()
    port = DebugPort(text.extend)
    assert port.read(0, 1) == 0xE9
    port.write(0, 1, ord("a"))
    port.write_string(0, 1, b"bcd")
    assert text == b"abcd"
    register = DebugPort.ranges["main"].at(0)
    assert register is not None and register.write is Access.POSTED


def test_isa_debug_exit() -> None:
    left: list[int] = []
    port = IsaDebugExit(left.append)
    assert port.read(0, 1) == 0
    port.write(0, 1, 0x10)
    port.write(0, 4, 0xFFFF_FFFF)
    assert left == [0x21, 0xFF]


def test_dma_addresses_and_pointer() -> None:
    """8237A, "Clear first/last flip-flop", "Base and current registers": low byte, then high."""
    dma = I8237()
    dma.write(0x0C, 1, 0, "first")
    dma.write(0x04, 1, 0x34, "first")
    dma.write(0x04, 1, 0x12, "first")
    assert [dma.read(0x04, 1, "first") for _ in range(2)] == [0x34, 0x12]
    dma.read(0x04, 1, "first")
    dma.write(0x0C, 1, 0, "first")
    assert dma.read(0x04, 1, "first") == 0x34


def test_dma_masks() -> None:
    """"Mask register": set by reset and master clear; single, all, and clear commands."""
    dma = I8237()
    for name, step in (("first", 1), ("second", 2)):
        assert dma.read(15 * step, 1, name) & 0x0F == 0x0F
        dma.write(10 * step, 1, 2, name)
        assert dma.read(15 * step, 1, name) & 0x0F == 0x0B
        dma.write(14 * step, 1, 0, name)
        assert dma.read(15 * step, 1, name) & 0x0F == 0
        dma.write(15 * step, 1, 5, name)
        assert dma.read(15 * step, 1, name) & 0x0F == 5
        assert dma.read(8 * step, 1, name) == 0  # no request, no terminal count
        dma.write(13 * step, 1, 0, name)
        assert dma.read(15 * step, 1, name) & 0x0F == 0x0F


def test_page_registers_read_back() -> None:
    dma = I8237()
    for port in range(16):
        dma.write(port, 1, 0xA0 + port, "pages")
    assert [dma.read(port, 1, "pages") for port in range(16)] == list(range(0xA0, 0xB0))
    other = I8237()
    other.load(unpack(pack(dma.save()), I8237Record))
    assert other.read(7, 1, "pages") == 0xA7 and other.peek(0, "pages") == 0xA0
