"""Picture files. Sources: Netpbm ppm(5); PNG specification, third edition; Pillow as another decoder."""

from __future__ import annotations

import asyncio
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from coordinator import screen
from coordinator.contract import messages
from coordinator.contract.errors import ConfigError, IslandError
from tests.coordinator.fakes import FakeVm

WIDTH, HEIGHT = 5, 3
RGB = bytes(range(WIDTH * HEIGHT * 3))


def test_ppm() -> None:
    assert screen.ppm(WIDTH, HEIGHT, RGB) == b"P6\n5 3\n255\n" + RGB


def test_png_chunk_by_chunk() -> None:
    """Section 5: signature, then chunks of length, type, data and CRC over type and data."""
    data = screen.png(WIDTH, HEIGHT, RGB)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", data, at + 8 + length) == (zlib.crc32(kind + body),)
        chunks.append((kind, body))
        at += 12 + length
    assert [kind for kind, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    # section 11.2.1: width, height, 8 bits, truecolour, deflate, adaptive filtering, no interlace
    assert chunks[0][1] == struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)
    lines = zlib.decompress(chunks[1][1])
    assert lines == b"".join(b"\0" + RGB[15 * y : 15 * y + 15] for y in range(HEIGHT))


def test_png_by_another_decoder(tmp_path: Path) -> None:
    (tmp_path / "s.png").write_bytes(screen.png(WIDTH, HEIGHT, RGB))
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.size == (WIDTH, HEIGHT) and picture.mode == "RGB"
        assert picture.tobytes() == RGB


def test_the_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    async def go() -> None:
        vm: Any = FakeVm()
        vm.answers[messages.Screen] = (WIDTH, HEIGHT, RGB)
        await screen.dump(vm, str(tmp_path / "s.ppm"))
        await screen.dump(vm, str(tmp_path / "s.png"), "png")
        with pytest.raises(ConfigError, match="none"):
            await screen.dump(vm, str(tmp_path / "none" / "s.ppm"))
        (tmp_path / "folder").mkdir()
        with pytest.raises(ConfigError):
            await screen.dump(vm, str(tmp_path / "folder"))
        vm = FakeVm(vga=False)
        with pytest.raises(IslandError):
            await screen.dump(vm, str(tmp_path / "x"))

    asyncio.run(go())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "s.png", "s.ppm"]
