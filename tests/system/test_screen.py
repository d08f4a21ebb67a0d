"""The screen, end to end: the firmware's text read back from its pixels, and a VBE mode set by a guest."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from coordinator import pieces
from devhost.vga.mode3 import find_font
from tests.coordinator.boot import images
from tests.support.launch import Guest, Launcher
from tests.vcpu.guest import assemble

pytestmark = [pytest.mark.boot, pytest.mark.timeout(300)]

PATIENCE = 120.0
PROMPT = b"(atoll) "
Picture = np.ndarray

KERNEL = 0x10_0000
#: 320 x 200 in 32 bits, blue and green as a ramp, bit 5 of the column in red
DRAW = """
    mov edi, 0xfd000000
    xor ebx, ebx
row:
    xor ecx, ecx
column:
    mov eax, ebx
    shl eax, 8
    or eax, ecx
    and eax, 0xffff
    test cl, 0x20
    jz store
    or eax, 0xff0000
store:
    mov [edi], eax
    add edi, 4
    inc ecx
    cmp ecx, 320
    jne column
    inc ebx
    cmp ebx, 200
    jne row
stop:
    hlt
    jmp stop
"""


class Monitor:
    """The human monitor on a socket."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self.read()

    def read(self) -> bytes:
        """Up to the next prompt."""
        got = b""
        while not got.endswith(PROMPT):
            piece = self.socket.recv(4096)
            assert piece, "the monitor hung up"
            got += piece
        return got

    def screen(self, file: Path) -> Picture:
        self.socket.sendall(f"screendump {file}\n".encode())
        self.read()
        kind, size, depth, pixels = file.read_bytes().split(b"\n", 3)
        assert (kind, depth) == (b"P6", b"255")
        width, height = map(int, size.split())
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


@pytest.fixture
def start(launcher: Launcher, tmp_path: Path) -> Iterator[Callable[..., Monitor]]:
    """A machine with a display and a monitor."""
    guests: list[Guest] = []

    def start(*options: str) -> Monitor:
        path = tmp_path / "monitor"
        machine = ["-m", "64", "-vga", "std", "-display", "none", "-serial", "stdio", "-nic", "none"]
        monitor = ["-monitor", f"unix:{path},server=on,wait=off"]
        guests.append(Guest(launcher, [*machine, *monitor, *options], tmp_path / "console.log"))
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return Monitor(path)
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline and guests[0].exit_status() is None, guests[0].errors()
                time.sleep(0.05)

    yield start
    for guest in guests:
        guest.kill()


def until(look: Callable[[], Picture], good: Callable[[Picture], bool]) -> Picture:
    """The first picture that will do."""
    deadline = time.monotonic() + PATIENCE
    while not good(picture := look()):
        assert time.monotonic() < deadline, "that never came on the screen"
        time.sleep(0.2)
    return picture


def text(picture: Picture) -> str:
    """Characters by the shapes of the video BIOS's font."""
    if picture.shape != (400, 720, 3):
        return ""
    font = find_font(pieces.firmware("vgabios-stdvga.bin").read_bytes())
    assert font is not None
    shapes = {font[16 * code : 16 * code + 16]: chr(code) for code in range(0x7E, 0x1F, -1)}
    lit = picture.any(axis=2).reshape(25, 16, 80, 9)[..., :8]
    rows = np.packbits(lit.transpose(0, 2, 1, 3), axis=-1)
    return "\n".join("".join(shapes.get(cell.tobytes(), "?") for cell in row) for row in rows[..., 0])


def test_firmware_writes_to_the_screen(start: Callable[..., Monitor], tmp_path: Path) -> None:
    monitor = start()
    picture = until(
        lambda: monitor.screen(tmp_path / "x.ppm"), lambda picture: "No bootable" in text(picture)
    )
    lines = text(picture).splitlines()
    assert lines[0].startswith("SeaBIOS (version ") and lines[0].strip().endswith(")")


def test_a_guest_sets_a_vbe_mode(start: Callable[..., Monitor], tmp_path: Path) -> None:
    registers = ((4, 0), (1, 320), (2, 200), (3, 32), (4, 0x41))
    setup = "".join(
        f"mov dx, 0x1ce\n mov ax, {index}\n out dx, ax\n mov dx, 0x1cf\n mov ax, {value}\n out dx, ax\n"
        for index, value in registers
    )
    code, _ = assemble("nop\n" + setup + DRAW, KERNEL, 32)
    (tmp_path / "kernel").write_bytes(images.elf(32, KERNEL, code))
    monitor = start("-kernel", str(tmp_path / "kernel"))
    row, column = np.mgrid[:200, :320]
    value = (row << 8 | column) & 0xFFFF
    red = np.where(column & 0x20, 0xFF, 0)
    expected = np.stack([red, value >> 8, value & 0xFF], axis=-1).astype(np.uint8)
    until(lambda: monitor.screen(tmp_path / "x.ppm"), lambda picture: np.array_equal(picture, expected))
