"""Pictures of the guest's screen as files: PPM and PNG.

Sources: Netpbm ppm(5); PNG Specification (third edition), sections 5 and 11.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from coordinator.contract import messages
from coordinator.contract.errors import ConfigError, IslandError
from coordinator.machine import Vm

FORMATS = ("ppm", "png")


def ppm(width: int, height: int, rgb: bytes) -> bytes:
    return b"P6\n%d %d\n255\n" % (width, height) + rgb


def png(width: int, height: int, rgb: bytes) -> bytes:
    """8-bit RGB, filter 0 on every line."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    line = 3 * width
    raw = b"".join(b"\0" + rgb[y * line : (y + 1) * line] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw, 6))
        + chunk(b"IEND", b"")
    )


async def dump(vm: Vm, filename: str, image_format: str = "ppm") -> None:
    """Write the screen to a file; the file appears whole or not at all."""
    if not vm.machine.vga:
        raise IslandError("There is no console to take a screendump from")
    width, height, rgb = await vm.command("devhost0", messages.Screen(serial=vm.next_serial()))
    data = png(width, height, rgb) if image_format == "png" else ppm(width, height, rgb)
    path = Path(filename)
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"failed to open file '{filename}': {error.strerror}") from None
