"""Configuration space of the IDE function (PIIX3 data sheet, 2.3)."""

from __future__ import annotations

from devhost.ide.pci_function import Piix3Ide


def function() -> tuple[Piix3Ide, list[tuple[int, bool]], list[int | None]]:
    decoded: list[tuple[int, bool]] = []
    moved: list[int | None] = []
    ide = Piix3Ide(lambda channel, on: decoded.append((channel, on)), moved.append, lambda granted: None)
    return ide, decoded, moved


def test_bus_mastering_is_told() -> None:
    granted: list[bool] = []
    ide = Piix3Ide(lambda channel, on: None, lambda base: None, granted.append)
    ide.reset()
    ide.write(0x04, 2, 0xFFFF)
    assert ide.read(0x04, 2) == 0x0005  # 2.3.3: IOSE and BME, the others are hardwired to 0
    ide.write(0x04, 2, 0x0001)
    assert granted == [False, True, False]


def test_identity() -> None:
    ide, _, _ = function()
    assert ide.read(0x00, 4) == 0x7010_8086
    assert ide.read(0x09, 3) == 0x01_01_80  # IDE with bus master, legacy only
    assert ide.read(0x40, 4) == 0 and ide.read(0x3D, 1) == 0
    ide.write(0x20, 4, 0xFFFF_FFFF)
    assert ide.read(0x20, 4) & 0xFFFF == 0xFFF1  # 16 ports of I/O


def test_legacy_ports_need_both_enables() -> None:
    ide, decoded, _ = function()
    ide.write(0x40, 2, 0x8000)
    assert decoded == []
    ide.write(0x04, 2, 0x0001)
    ide.write(0x42, 2, 0xA307)
    assert decoded == [(0, True), (1, True)]
    ide.write(0x43, 1, 0x00)
    assert decoded[2:] == [(1, False)] and ide.read(0x42, 2) == 0x0007
    ide.reset()
    assert decoded[3:] == [(0, False)] and ide.read(0x40, 4) == 0


def test_bus_master_base() -> None:
    ide, _, moved = function()
    ide.write(0x20, 4, 0xC000)
    ide.write(0x04, 2, 0x0005)
    assert moved == [0xC000] and ide.bus_master
    state = bytes(ide.config)
    other, decoded, places = function()
    other.restore(state)
    assert places == [0xC000] and decoded == []
