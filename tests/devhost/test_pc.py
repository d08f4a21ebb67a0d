"""The whole PC at its ports: who answers where, what firmware would do, reset, records of everything."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from coordinator.contract.config import Boot
from coordinator.contract.errors import ConfigError, RecordError
from coordinator.contract.messages import GuestReset, GuestShutdown, TraceLines
from coordinator.contract.registers import Access
from devhost.memory import READ, WRITE
from devhost.vga.render import render
from tests.devhost.machine import RAM, ROM, Board, machine

IDE, PM, VGA = (1, 1), (1, 3), (2, 0)
MIB = 1 << 20


@pytest.fixture
def board() -> Board:
    return Board()


def direct(**changes: object) -> Board:
    return Board(machine(boot=Boot(direct=True), rom_size=0, **changes))


# ---- who answers where -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("port", "device"),
    [
        (0x20, "pic"), (0xA1, "pic"), (0x4D0, "pic"), (0x40, "pit"), (0x43, "pit"), (0x61, "port61"),
        (0x70, "rtc"), (0x60, "i8042"), (0x64, "i8042"), (0x92, "port92"), (0x3F8, "serial0"),
        (0x2FF, "serial1"), (0x00, "dma"), (0x80, "dma"), (0xC0, "dma"), (0xB2, "acpi-pm"),
        (0x402, "debug402"), (0xE9, "debuge9"), (0x510, "fw_cfg"), (0x51B, "fw_cfg"), (0x501, "debug-exit"),
        (0x502, "debug-exit"), (0xCF8, "pci"), (0xCFF, "pci"), (0xCF9, "reset"), (0x3C0, "vga"),
        (0x3DA, "vga"), (0x1CE, "vga"), (0x1F0, "nobody"), (0x376, "nobody"), (0x600, "nobody"),
        (0x3E8, "nobody"), (0x378, "nobody"),
    ],
)  # fmt: skip
def test_ports_after_reset(board: Board, port: int, device: str) -> None:
    assert board.device(port) == device


def test_port_cf9_is_the_reset_register_and_dwords_at_cf8_are_pci_s(board: Board) -> None:
    """The vCPU takes a whole dword from CF8h because the register there says that it takes one."""
    address, reset = (
        board.segment.regs[board.segment.ports[0xCF8]],
        board.segment.regs[board.segment.ports[0xCF9]],
    )
    assert address.widths & 4 and reset.widths == 1
    board.out(0xCF8, 0x8000_0E00, 4)  # a byte 0Eh would be there
    assert board.host.notices == [] and board.inp(0xCF8, 4) == 0x8000_0E00
    board.out(0xCF9, 0x02)
    board.out(0xCF9, 0x06)
    assert board.host.notices == [GuestReset(reason="cf9")]
    assert board.inp(0xCF8, 4) == 0x8000_0E00


def test_no_second_serial_port() -> None:
    board = Board(machine(serials=1))
    assert board.device(0x2F8) == "nobody" and board.device(0x3F8) == "serial0"


def test_no_display() -> None:
    """-vga none: neither ports nor function, and the hole of the display stays one."""
    board = Board(machine(vga=False))
    assert board.device(0x3C0) == "nobody" and board.config_read(*VGA, 0, 4) == 0xFFFF_FFFF
    assert board.region(0xA0000) is None and board.region(0xBF000) is None


def test_port_80_is_posted_and_shadowed(board: Board) -> None:
    """Guests write it to pass time."""
    desc = board.segment.regs[board.segment.ports[0x80]]
    assert (desc.read_class, desc.write_class) == (Access.SHADOW, Access.POSTED)
    board.out(0x80, 0x5A)
    assert board.inp(0x80) == 0x5A


def test_serial_output_and_debug_ports_go_out_in_batches(board: Board) -> None:
    for byte in b"hi":
        board.out(0x2F8, byte)
        board.out(0x402, byte)
    assert board.host.notices == []
    board.host.outlet.flush()
    assert [(type(n).__name__, n.data) for n in board.host.notices] == [  # type: ignore[attr-defined]
        ("SerialOutput", b"hi"), ("DebugOutput", b"hi"),
    ]  # fmt: skip


def test_traces_are_sent_line_by_line() -> None:
    board = Board(machine(trace=("pi*",)))
    board.inp(0x21)
    board.inp(0x60)
    board.host.outlet.flush()
    (notice,) = board.host.notices
    assert isinstance(notice, TraceLines) and len(notice.lines) == 1
    assert "pic_read" in notice.lines[0] and notice.lines[0].endswith("0x0")


# ---- PCI ---------------------------------------------------------------------------------------------
def test_the_functions_of_bus_0(board: Board) -> None:
    found = {}
    for devfn in range(256):
        identity = board.config_read(devfn >> 3, devfn & 7, 0, 4)
        if identity != 0xFFFF_FFFF:
            found[devfn] = f"{identity & 0xFFFF:04x}:{identity >> 16:04x}"
    assert found == {0: "8086:1237", 8: "8086:7000", 9: "8086:7010", 11: "8086:7113", 16: "1234:1111"}
    assert board.config_read(0, 0, 0x2C, 4) == 0x1100_1AF4


def test_ide_is_decoded_where_its_registers_say(board: Board) -> None:
    board.config_write(*IDE, 0x40, 4, 0x8000_8000)
    board.config_write(*IDE, 0x20, 4, 0xC000)
    assert board.device(0x1F0) == "nobody"
    board.config_write(*IDE, 0x04, 2, 0x0005)
    assert [board.device(port) for port in (0x1F0, 0x1F7, 0x3F6, 0x170, 0x376)] == ["ide0"] * 3 + ["ide1"] * 2
    assert [board.device(port) for port in (0xC000, 0xC007, 0xC008, 0xC00F)] == ["ide0"] * 2 + ["ide1"] * 2
    assert board.inp(0x1F7) == 0x50  # DRDY, DSC
    board.config_write(*IDE, 0x20, 4, 0xC100)
    assert board.device(0xC000) == "nobody" and board.device(0xC108) == "ide1"
    board.config_write(*IDE, 0x42, 2, 0)
    assert board.device(0x170) == "nobody" and board.device(0x1F0) == "ide0"


def test_pm_registers_move(board: Board) -> None:
    board.config_write(*PM, 0x40, 4, 0xB001)
    board.config_write(*PM, 0x80, 1, 1)
    assert board.device(0xB004) == "acpi-pm"
    assert board.inp(0xB004, 2) == 1  # SCI_EN
    board.config_write(*PM, 0x40, 4, 0x0601)
    assert board.device(0xB004) == "nobody" and board.device(0x604) == "acpi-pm"
    board.out(0x604, 0x2001, 2)  # SLP_EN with SLP_TYP 0
    assert board.host.notices == [GuestShutdown(reason="guest-shutdown")]


def test_frame_buffer_and_option_rom(tmp_path: Path) -> None:
    image = bytes(range(256)) * 150
    (tmp_path / "vga.bin").write_bytes(image)
    board = Board(machine(vga_rom=str(tmp_path / "vga.bin")))
    board.config_write(*VGA, 0x30, 4, 0xFFFF_FFFE)
    assert board.config_read(*VGA, 0x30, 4) == 0xFFFF_0000  # 64 KiB
    board.config_write(*VGA, 0x30, 4, 0xFEB0_0001)
    board.config_write(*VGA, 0x10, 4, 0xFD00_0000)
    board.config_write(*VGA, 0x04, 2, 0x0002)
    flags, read, _, _ = board.region(0xFEB0_0000) or (0,) * 4
    assert flags == READ and bytes(board.segment.view(read, len(image))) == image
    assert board.region(0xFD00_0000) == (
        READ | WRITE,
        board.segment.vram_offset,
        board.segment.vram_offset,
        0,
    )
    board.config_write(*VGA, 0x04, 2, 0)
    assert board.region(0xFEB0_0000) is None and board.region(0xFD00_0000) is None


@pytest.mark.parametrize("size", [None, 65537])
def test_option_rom_that_is_none(tmp_path: Path, size: int | None) -> None:
    if size:
        (tmp_path / "vga.bin").write_bytes(bytes(size))
    with pytest.raises(ConfigError, match="VGA BIOS"):
        Board(machine(vga_rom=str(tmp_path / "vga.bin")))


# ---- memory ------------------------------------------------------------------------------------------
def test_firmware_is_below_4_gib_and_below_1_mib(board: Board) -> None:
    rom = board.segment.rom_offset
    assert board.region(0xFFFF_F000) == (READ, rom + ROM - 0x1000, board.region(0xFFFF_F000)[2], 0)  # type: ignore[index]
    assert board.region(0xFF000)[:2] == (READ, rom + ROM - 0x1000)  # type: ignore[index]
    assert board.region(0xE0000)[:2] == (READ, rom + ROM - 0x20000)  # type: ignore[index]
    assert board.region(0xC0000)[0] == 0  # type: ignore[index]


def test_pam_turns_rom_into_ram(board: Board) -> None:
    guest = board.segment.guest_offset
    board.config_write(0, 0, 0x59, 1, 0x20)  # writes to RAM, reads from ROM
    flags, read, write, _ = board.region(0xF8000) or (0,) * 4
    assert (flags, read, write) == (READ | WRITE, board.segment.rom_offset + ROM - 0x8000, guest + 0xF8000)
    board.config_write(0, 0, 0x59, 1, 0x30)
    assert board.region(0xF8000)[:3] == (READ | WRITE, guest + 0xF8000, guest + 0xF8000)  # type: ignore[index]
    board.config_write(0, 0, 0x59, 1, 0x10)
    assert board.region(0xF8000)[:2] == (READ, guest + 0xF8000)  # type: ignore[index]


def test_a20_by_both_switches(board: Board) -> None:
    """Keyboard controller command D1h and port 92h: line 20 is forced low when both say so."""
    guest = board.segment.guest_offset
    board.out(0x64, 0xD1)
    board.out(0x60, 0xDD)
    assert board.region(0x100000)[:2] == (READ | WRITE, guest)  # type: ignore[index]
    assert board.region(0x1F8000)[:2] == (READ, board.segment.rom_offset + ROM - 0x8000)  # type: ignore[index]
    board.out(0x92, 0x02)
    assert board.region(0x100000)[1] == guest + MIB  # type: ignore[index]
    board.out(0x92, 0x00)
    assert board.region(0x100000)[1] == guest  # type: ignore[index]
    board.pc.power_on()
    assert board.region(0x100000)[1] == guest + MIB  # type: ignore[index]


def test_the_view_of_the_display_changes_with_the_write(board: Board) -> None:
    """Registers that move the window are not posted: a font goes to A0000h in the next instruction."""
    for port in (0x3C4, 0x3C5, 0x3CE, 0x3CF, 0x1CF):
        assert board.segment.regs[board.segment.ports[port]].write_class == Access.SYNC
    board.out(0x3CE, 0x0506, 2)
    assert board.region(0xA0000) is not None and board.region(0xB8000) is None
    board.out(0x3CE, 0x0E06, 2)
    assert board.region(0xA0000) is None and board.region(0xB8000) is not None


# ---- without firmware --------------------------------------------------------------------------------
def test_what_firmware_would_have_left() -> None:
    board = direct()
    assert [board.device(port) for port in (0x1F0, 0x170, 0xC000, 0xC008, 0x600)] == [
        "ide0",
        "ide1",
        "ide0",
        "ide1",
        "acpi-pm",
    ]
    assert board.config_read(*IDE, 0x04, 2) == 5 and board.config_read(*IDE, 0x40, 4) == 0x8000_8000
    assert board.config_read(1, 0, 0x60, 4) == 0x0B0B_0A0A
    assert (board.inp(0x4D0), board.inp(0x4D1)) == (0x00, 0x0E)  # level: 9, 10, 11
    assert (board.inp(0x21), board.inp(0xA1)) == (0xFF, 0xFF)
    assert [board.config_read(0, 0, 0x59 + i, 1) for i in range(7)] == [0x30] + [0x33] * 6
    assert board.region(0xC0000)[0] == board.region(0xFF000)[0] == READ | WRITE  # type: ignore[index]
    assert board.region(0xFD00_0000)[1] == board.segment.vram_offset  # type: ignore[index]
    assert board.region(0xFFFF_F000) is None


def test_text_mode_without_firmware(tmp_path: Path) -> None:
    """A kernel finds mode 3 with a font at B8000h."""
    font = bytearray(4096)
    font[16:32] = bytes.fromhex("0000 7e81 a581 81bd 9981 817e 0000 0000")
    font[0x41 * 16] = 0xFF
    (tmp_path / "vga.bin").write_bytes(b"\x55\xaa" + bytes(100) + bytes(font))
    board = direct(vga_rom=str(tmp_path / "vga.bin"))
    _, at, _, _ = board.region(0xB8000) or (0,) * 4
    assert bytes(board.segment.view(at, 4)) == b" \x07 \x07"
    board.segment.view(at, 2)[:] = (0x41, 0x1F)
    assert board.pc.display is not None
    picture = render(board.pc.display.vga)
    assert picture.shape == (400, 720, 3) and picture[0, 0].tolist() == [255, 255, 255]


# ---- reset -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", ["firmware", "direct"])
def test_reset_is_power_on(way: str) -> None:
    """After any use the machine is again as it was at first, but for what runs on (RTC, counters) and for the
    8237's addresses, which RESET leaves alone."""
    config = machine() if way == "firmware" else machine(boot=Boot(direct=True), rom_size=0)
    board, fresh = Board(config), Board(config)
    shake(board, random.Random(5), 400)
    board.host.drain(lambda: True)
    board.pc.power_on()
    after, first = board.pc.save(), fresh.pc.save()
    differ = {name for name in first if after[name] != first[name]}
    assert differ <= {"rtc", "pit", "dma"}
    assert board.regions() == fresh.regions()
    assert [board.device(port) for port in range(65536)] == [fresh.device(port) for port in range(65536)]


# ---- records -----------------------------------------------------------------------------------------
def shake(board: Board, rng: random.Random, count: int) -> None:
    """Accesses of every kind, mostly where somebody answers."""
    functions = list(board.pc.host.functions)
    for _ in range(count):
        kind = rng.random()
        width = rng.choice((1, 1, 1, 2, 4))
        value = rng.getrandbits(8 * width)
        if kind < 0.15:
            devfn, register = (
                rng.choice(functions),
                rng.choice((0x04, 0x10, 0x18, 0x20, 0x30, 0x40, rng.randrange(256))),
            )
            value = rng.choice((value, 0x7, 0xFEB0_0001, 0xE000_0000, 0x8000, 0xC001)) & (1 << 8 * width) - 1
            board.config_write(devfn >> 3, devfn & 7, register & -width, width, value)
        elif kind < 0.75:
            ports = list(board.bus._ports)
            port = rng.choice(ports)
            if rng.random() < 0.5:
                board.inp(port, width)
            else:
                board.out(port, value, width)
        elif kind < 0.9:
            base, size = rng.choice(((0xFED0_0000, 0x400), (0xA0000, 0x20000), (0xFEBF_0000, 0x1000)))
            address = base + (rng.randrange(size) & -width)
            if rng.random() < 0.4:
                board.load(address, width)
            else:
                board.store(address, value, width)
        elif kind < 0.97:
            board.advance(rng.choice((1_000, 100_000, 5_000_000, 60_000_000)))
        else:
            board.host.drain(lambda: True)


def settle(board: Board) -> None:
    """Pause all devices, as a stop of the machine does."""
    for slot in board.pc.slots.values():
        slot.device.pause()
    board.host.drain(lambda: all(slot.device.paused() for slot in board.pc.slots.values()))
    board.bus.publish_all()


def shadows(board: Board) -> dict[tuple[str, int, str], int | None]:
    return {
        (slot.name, offset, name): slot.device.peek(offset, name)
        for slot in board.bus.slots.values()
        for _, offset, name in slot.shadows
    }


def twin(board: Board) -> Board:
    """A fresh machine with the memory and the records of this one."""
    other = Board(board.config, at=board.clock.now())
    for part in ("ram", "vram", "rom"):
        getattr(other.segment, part)[:] = getattr(board.segment, part)
    for ident, backend in board.host.backends.items():
        other.host.backends[ident].image[:] = backend.image
    other.pc.load(board.pc.save())
    return other


@pytest.mark.parametrize("seed", range(12))
def test_records_of_the_whole_machine(seed: int) -> None:
    """Saved after any accesses and loaded into a fresh machine: the same maps, lines, shadows - and the same
    future, access by access."""
    rng = random.Random(seed)
    config = machine() if seed % 2 else machine(boot=Boot(direct=True), rom_size=0)
    board = Board(config)
    shake(board, rng, 500)
    settle(board)
    other = twin(board)
    assert other.pc.save() == board.pc.save()
    assert other.regions() == board.regions()
    assert [other.device(port) for port in range(65536)] == [board.device(port) for port in range(65536)]
    assert list(other.segment.fabric.pin_sources) == list(board.segment.fabric.pin_sources)
    common = shadows(other).keys() & shadows(board).keys()  # those of ranges that were mapped at some time
    assert len(common) > 20 and all(shadows(other)[key] == shadows(board)[key] for key in common)
    for machine_ in (board, other):
        for slot in machine_.pc.slots.values():
            slot.device.resume()
        machine_.bus.publish_all()
    ports = sorted(board.bus._ports)
    for step in range(600):
        port, width = rng.choice(ports), rng.choice((1, 1, 2))
        assert board.inp(port, width) == other.inp(port, width), (step, hex(port), board.device(port))
        if step % 50 == 0:
            board.advance(700_000)
            other.advance(700_000)
    for gpa in (*range(0xFED0_0000, 0xFED0_0200, 8), 0xA0000, 0xA1235, 0xB8001):
        assert board.load(gpa, 1) == other.load(gpa, 1)
    assert np.array_equal(other.segment.ram, board.segment.ram)


def test_records_with_devices_missing_or_unknown(board: Board) -> None:
    records = board.pc.save()
    assert (
        records.keys() == board.pc.slots.keys()
        and {"pci", "vga", "ide0", "acpi-pm", "i8042"} <= records.keys()
    )
    with pytest.raises(RecordError, match="vga"):
        Board(machine(vga=False)).pc.load(records)
    with pytest.raises(RecordError, match="serial1"):
        Board(machine(serials=1)).pc.load(records)
    swapped = {**records, "serial0": records["port92"]}
    with pytest.raises(RecordError):
        board.pc.load(swapped)


# ---- every port, every address (hardware-cases 12) --------------------------------------------------------
def test_every_port_and_width() -> None:
    """Random values everywhere; nothing raises, reads of nobody are ones."""
    board = Board()
    rng = random.Random(12)
    for port in range(0x10000):
        for width in (1, 2, 4):
            board.out(port, rng.getrandbits(8 * width), width)
            value = board.inp(port, width)
            assert 0 <= value < 1 << 8 * width
            assert board.device(port) != "nobody" or value == (1 << 8 * width) - 1
    assert RAM == board.config.ram


@pytest.mark.parametrize("seed", range(6))
def test_nonsense(seed: int) -> None:
    board = Board()
    shake(board, random.Random(1000 + seed), 3000)
