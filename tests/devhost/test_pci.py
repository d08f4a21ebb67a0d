"""PCI configuration: mechanism 1, masks, BARs, and the registers of i440FX, PIIX3 and PIIX4.

Expected values are those of PCI 3.0 (chapter 6, 3.2.2.3.2) and of the data sheets 290549 (82441FX),
290550 (82371SB) and 290562 (82371AB).
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.contract.errors import RecordError
from coordinator.contract.state import pack, unpack
from devhost.pci.function import Bar, Identity, PciFunction, bar_offset
from devhost.pci.i440fx import PAM_SEGMENTS, I440fx, I440fxRecord
from devhost.pci.piix3 import Piix3Isa, Piix4Pm

ADDRESS, DATA = 0, 4
ENABLE = 0x8000_0000


class Board:
    """i440FX with PIIX3, PIIX4 and a card with BARs."""

    def __init__(self) -> None:
        self.pam: list[list[tuple[bool, bool]]] = []
        self.moved: dict[int, list[int | None]] = {0: [], 1: [], 6: []}
        self.pm: list[int | None] = []
        self.host = I440fx(self.pam.append)
        self.host.plug(1, 0, Piix3Isa())
        self.host.plug(1, 3, Piix4Pm(self.pm.append))
        self.card = PciFunction(Identity(0x1234, 0x1111, 0x030000))
        self.card.add_bar(0, Bar(0x100_0000, False, self.moved[0].append, prefetchable=True))
        self.card.add_bar(1, Bar(0x20, True, self.moved[1].append))
        self.card.add_bar(6, Bar(0x1_0000, False, self.moved[6].append))
        self.host.plug(2, 0, self.card)

    def address(self, slot: int, function: int, register: int, bus: int = 0) -> None:
        self.host.write(ADDRESS, 4, ENABLE | bus << 16 | slot << 11 | function << 8 | register & 0xFC)

    def read(self, slot: int, function: int, register: int, width: int) -> int:
        self.address(slot, function, register)
        return self.host.read(DATA + (register & 3), width)

    def write(self, slot: int, function: int, register: int, width: int, value: int) -> None:
        self.address(slot, function, register)
        self.host.write(DATA + (register & 3), width, value)


@pytest.fixture
def board() -> Board:
    return Board()


# ---- mechanism 1 -------------------------------------------------------------------------------------
def test_address_register_is_a_dword_alone(board: Board) -> None:
    """3.2.2.3.2: reserved bits read 0; narrower accesses pass by. 290549, 3.1.1."""
    board.host.write(ADDRESS, 4, 0xFFFF_FFFF)
    assert board.host.read(ADDRESS, 4) == 0x80FF_FFFC
    for width in (1, 2):
        board.host.write(ADDRESS, width, 0)
        assert board.host.read(ADDRESS, width) == (1 << 8 * width) - 1
    board.host.write(1, 1, 0x0E)
    assert board.host.read(ADDRESS, 4) == 0x80FF_FFFC


def test_the_probe_of_operating_systems(board: Board) -> None:
    board.host.write(ADDRESS, 4, 0x8000_0000)
    assert board.host.read(ADDRESS, 4) == 0x8000_0000
    assert board.host.read(DATA, 4) == 0x1237_8086


@pytest.mark.parametrize(
    "address", [0x0000_0000, 0x8001_0000, 0x80FF_0000, 0x8000_0100, 0x8000_F800, 0x8000_0A00]
)
def test_nobody_is_all_ones(board: Board, address: int) -> None:
    """Not enabled, other buses, no such function, no such device."""
    board.host.write(ADDRESS, 4, address)
    board.host.write(DATA, 4, 0)
    assert [board.host.read(DATA, width) for width in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]


def test_bytes_and_words_of_the_data_register(board: Board) -> None:
    board.address(1, 0, 0)
    assert [board.host.read(DATA + lane, 1) for lane in range(4)] == [0x86, 0x80, 0x00, 0x70]
    assert board.host.read(DATA + 2, 2) == 0x7000
    board.address(1, 0, 0xFC)
    assert board.host.read(DATA + 3, 4) == 0xFFFF_FFFF  # beyond the end


# ---- headers -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("slot", "function", "identity", "class_", "header", "command", "status"),
    [
        (0, 0, 0x1237_8086, 0x060000, 0x00, 0x0006, 0x0280),  # 290549: PCICMD, PCISTS
        (1, 0, 0x7000_8086, 0x060100, 0x80, 0x0007, 0x0200),  # 290550: multifunction
        (1, 3, 0x7113_8086, 0x068000, 0x00, 0x0000, 0x0280),  # 290562
    ],
)
def test_headers(
    board: Board, slot: int, function: int, identity: int, class_: int, header: int, command: int, status: int
) -> None:
    board.host.reset()
    assert board.read(slot, function, 0x00, 4) == identity
    assert board.read(slot, function, 0x08, 4) >> 8 == class_
    assert board.read(slot, function, 0x0E, 1) == header
    assert board.read(slot, function, 0x04, 2) == command
    assert board.read(slot, function, 0x06, 2) == status
    assert board.read(slot, function, 0x2C, 4) == 0x1100_1AF4


def test_read_only_bytes_stay(board: Board) -> None:
    for register in (*range(0x00, 0x04), *range(0x08, 0x0C), 0x0E, *range(0x2C, 0x30), 0x3D):
        before = board.read(1, 3, register, 1)
        board.write(1, 3, register, 1, ~before & 0xFF)
        assert board.read(1, 3, register, 1) == before


def test_status_is_cleared_by_ones(board: Board) -> None:
    """6.2.3: bits 15-11 and 8."""
    board.card.set(0x06, 2, 0xFFFF)
    board.write(2, 0, 0x06, 2, 0x8100)
    assert board.read(2, 0, 0x06, 2) == 0x7EFF
    board.write(2, 0, 0x06, 2, 0xFFFF)
    assert board.read(2, 0, 0x06, 2) == 0x06FF
    board.write(2, 0, 0x04, 4, 0)
    assert board.read(2, 0, 0x06, 2) == 0x06FF


def test_interrupt_line_is_software_s_own(board: Board) -> None:
    board.write(2, 0, 0x3C, 2, 0xFF0B)
    assert board.read(2, 0, 0x3C, 2) == 0x000B


# ---- base addresses ----------------------------------------------------------------------------------
def test_sizes_as_software_asks_for_them(board: Board) -> None:
    """6.2.5.1: write ones, read back; bit 0 of I/O is 1, bit 3 of memory is prefetchable."""
    for register, expected in ((0x10, 0xFF00_0008), (0x14, 0xFFFF_FFE1), (0x18, 0), (0x30, 0xFFFF_0001)):
        board.write(2, 0, register, 4, 0xFFFF_FFFF)
        assert board.read(2, 0, register, 4) == expected
    assert board.moved == {0: [], 1: [], 6: []}


def test_decoding_needs_the_command_bits(board: Board) -> None:
    board.write(2, 0, 0x10, 4, 0xFD12_3456)
    board.write(2, 0, 0x14, 4, 0xC123)
    board.write(2, 0, 0x30, 4, 0xFEB0_0001)
    assert board.moved == {0: [], 1: [], 6: []}
    board.write(2, 0, 0x04, 2, 0x0002)
    assert board.moved == {0: [0xFD00_0000], 1: [], 6: [0xFEB0_0000]}
    board.write(2, 0, 0x04, 2, 0x0001)
    assert board.moved == {0: [0xFD00_0000, None], 1: [0xC120], 6: [0xFEB0_0000, None]}


def test_sizing_while_decoding_unmaps(board: Board) -> None:
    board.write(2, 0, 0x04, 2, 0x0003)
    board.write(2, 0, 0x10, 4, 0xE000_0000)
    board.write(2, 0, 0x10, 4, 0xFFFF_FFFF)
    board.write(2, 0, 0x10, 4, 0xE000_0000)
    assert board.moved[0] == [0xE000_0000, None, 0xE000_0000]
    board.write(2, 0, 0x12, 2, 0)
    assert board.moved[0][-1] is None  # address 0: not placed


def test_rom_has_an_enable_of_its_own(board: Board) -> None:
    """6.2.5.2: bit 0, and the memory bit of COMMAND."""
    board.write(2, 0, 0x04, 2, 0x0002)
    board.write(2, 0, 0x30, 4, 0xFEB0_0000)
    board.write(2, 0, 0x30, 1, 0x01)
    board.write(2, 0, 0x30, 1, 0x00)
    assert board.moved[6] == [0xFEB0_0000, None]


def test_reset_unmaps(board: Board) -> None:
    board.write(2, 0, 0x04, 2, 0x0002)
    board.write(2, 0, 0x10, 4, 0xE000_0000)
    board.host.reset()
    assert board.moved[0] == [0xE000_0000, None] and board.read(2, 0, 0x10, 4) == 0x8
    assert board.read(2, 0, 0x04, 2) == 0


# ---- i440FX ------------------------------------------------------------------------------------------
def test_pam(board: Board) -> None:
    """290549, PAM: PAM0 bits 5-4 are F0000h; PAM1 low half C0000h, high C4000h; PAM6 high half EC000h."""
    assert [(gpa, size) for gpa, size, _, _ in PAM_SEGMENTS] == [
        (0xF0000, 0x10000),
        *((0xC0000 + 0x4000 * i, 0x4000) for i in range(12)),
    ]
    board.write(0, 0, 0x59, 1, 0xFF)
    assert board.read(0, 0, 0x59, 1) == 0x30
    assert board.pam[-1] == [(True, True)] + [(False, False)] * 12
    board.write(0, 0, 0x5A, 4, 0x0000_0021)
    assert board.pam[-1][1:4] == [(True, False), (False, True), (False, False)]
    board.write(0, 0, 0x5F, 1, 0x30)
    assert board.pam[-1][-1] == (True, True)
    count = len(board.pam)
    board.write(0, 0, 0x60, 4, 0xFFFF_FFFF)
    board.write(0, 0, 0x50, 4, 0xFFFF_FFFF)
    assert len(board.pam) == count
    board.host.reset()
    assert board.pam[-1] == [(False, False)] * 13


# ---- PIIX3, PIIX4 ------------------------------------------------------------------------------------
def test_piix3_registers(board: Board) -> None:
    """290550, 2.2: defaults and reserved bits."""
    expected = {
        0x4C: (0x4D, 0x7F),
        0x60: (0x80, 0x8F),
        0x63: (0x80, 0x8F),
        0x69: (0x02, 0xFE),
        0x70: (0x80, 0xEF),
    }
    for register, (default, mask) in expected.items():
        assert board.read(1, 0, register, 1) == default
        board.write(1, 0, register, 1, 0xFF)
        assert board.read(1, 0, register, 1) == mask
    board.host.reset()
    assert board.read(1, 0, 0x60, 4) == 0x8080_8080
    assert board.read(1, 0, 0x4E, 2) == 0x0003


def test_pm_base_needs_its_enable(board: Board) -> None:
    """290562, 7.1: PMBASE bits 15-6 with bit 0 fixed to 1; PMREGMISC bit 0 turns decoding on."""
    board.write(1, 3, 0x40, 4, 0xFFFF_FFFF)
    assert board.read(1, 3, 0x40, 4) == 0xFFC1
    board.write(1, 3, 0x40, 4, 0x0600)
    assert board.pm == []
    board.write(1, 3, 0x80, 1, 0xFF)
    assert board.read(1, 3, 0x80, 1) == 1 and board.pm == [0x600]
    board.write(1, 3, 0x40, 4, 0xB000)
    board.write(1, 3, 0x80, 1, 0)
    assert board.pm == [0x600, 0xB000, None]


def test_firmware_need_not_wait_for_smm(board: Board) -> None:
    """The byte that SeaBIOS looks at before it waits for port B3h, also after a reset."""
    assert board.read(1, 3, 0x5B, 1) & 2
    board.write(1, 3, 0x58, 4, 0)
    board.host.reset()
    assert board.read(1, 3, 0x5B, 1) & 2


# ---- records -----------------------------------------------------------------------------------------
def test_a_record_maps_everything_again(board: Board) -> None:
    board.write(2, 0, 0x04, 2, 0x0003)
    board.write(2, 0, 0x10, 4, 0xE000_0000)
    board.write(2, 0, 0x14, 4, 0xC000)
    board.write(1, 3, 0x40, 4, 0x0600)
    board.write(1, 3, 0x80, 1, 1)
    board.write(0, 0, 0x59, 1, 0x10)
    board.write(1, 0, 0x61, 1, 0x0A)
    other = Board()
    other.host.load(unpack(pack(board.host.save()), I440fxRecord))
    assert other.moved == {0: [0xE000_0000], 1: [0xC000], 6: []} and other.pm == [0x600]
    assert other.pam[-1][0] == (True, False)
    assert other.read(1, 0, 0x61, 1) == 0x0A
    assert other.host.save().functions == board.host.save().functions


@pytest.mark.parametrize("spoil", ["missing", "unknown", "short", "identity"])
def test_records_of_another_board_are_refused(board: Board, spoil: str) -> None:
    functions = dict(board.host.save().functions)
    if spoil == "missing":
        del functions[0x10]
    elif spoil == "unknown":
        functions[0x18] = bytes(256)
    elif spoil == "short":
        functions[0x10] = functions[0x10][:255]
    else:
        functions[0x10] = b"\x86\x80" + functions[0x10][2:]
    with pytest.raises(RecordError):
        board.host.load(I440fxRecord(confadd=0, functions=functions))


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFF_FFFF))
    )
)
def test_any_access_in_any_order(steps: list[tuple[bool, int, int, int]]) -> None:
    board = Board()
    for write, offset, width, value in steps:
        if write:
            board.host.write(offset, width, value & (1 << 8 * width) - 1)
        else:
            assert 0 <= board.host.read(offset, width) < 1 << 8 * width
    for function in board.host.functions.values():
        for number in function.bars:
            assert function.get(bar_offset(number), 4) < 1 << 32
