"""The same port accesses against QEMU's drives, a second implementation, where QEMU is installed.

QEMU is driven through its test socket (`-qtest`) with the CPU stopped. Compared is what the
specifications fix: data, block sizes, interrupt reason, interrupt line, BSY, DRQ and ERR, sense
key and code. Where the two differ on purpose (QEMU leaves DSC clear in error status, aborts unlike
the error that a command asks for, clears "active" though descriptors are left) the step is left out.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devhost.ide.ata import AtaDrive
from devhost.ide.atapi import AtapiDrive
from tests.devhost.ide.rig import ACTIVE, BM_INTERRUPT, BSY, COUNT, DRQ, ERR, Backend, Rig, pattern

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")

CD = bytes(pattern(300 * 2048))
DISK = bytes(pattern(2048 * 512))
OUTPUT = {1: "outb", 2: "outw", 4: "outl"}


class QemuMemory:
    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask

    def write(self, gpa: int, data: bytes) -> None:
        self._ask(f"write {gpa:#x} {len(data):#x} 0x{bytes(data).hex()}")

    def read(self, gpa: int, length: int) -> bytes:
        return bytes.fromhex(self._ask(f"read {gpa:#x} {length:#x}")[2:])


class QemuRig(Rig):
    """The steps of ``Rig`` at a drive of QEMU."""

    def __init__(self, drive: str, command: int, control: int, master: int, irq: int) -> None:
        assert QEMU is not None
        options = (
            "-machine pc -accel tcg -S -nodefaults -display none -m 16 -qtest stdio -qtest-log /dev/null"
        )
        self.process = subprocess.Popen(
            [QEMU, *options.split(), "-snapshot", "-drive", drive],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ports = {"command": command, "control": control, "busmaster": master}
        self.irq = irq
        self.level = False
        self.memory = QemuMemory(self.ask)  # type: ignore[assignment]
        self.channel = self  # type: ignore[assignment]
        self.ask("irq_intercept_in ioapic")
        for register, value in ((0x20, 0xC001), (0x04, 0x0005)):  # BAR 4; I/O and bus master
            self.ask(f"outl 0xcf8 {0x8000_0900 | register:#x}")
            self.ask(f"outl 0xcfc {value:#x}")

    def ask(self, line: str) -> str:
        """One command; the value it gives. Interrupt lines that change are told before it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        while True:
            word, *rest = self.process.stdout.readline().split()
            if word == "IRQ" and int(rest[1]) == self.irq:
                self.level = rest[0] == "raise"
            elif word != "IRQ":
                assert word == "OK", line
                return rest[0] if rest else ""

    def input(self, name: str, offset: int) -> int:
        return int(self.ask(f"inb {self.ports[name] + offset:#x}"), 16)

    def read(self, offset: int) -> int:
        return self.input("command", offset)

    def write(self, offset: int, *value: Any) -> None:
        """As ``Rig.write``, and as ``IdeChannel.write``."""
        width, number, name = value if len(value) == 3 else (1, value[0], "command")
        self.ask(f"{OUTPUT[width]} {self.ports[name] + offset:#x} {number:#x}")

    @property
    def alternate(self) -> int:
        return self.input("control", 0)

    def control(self, value: int) -> None:
        self.write(0, 1, value, "control")

    def words(self, count: int) -> bytes:
        items = [int(self.ask(f"inw {self.ports['command']:#x}"), 16) for _ in range(count)]
        return struct.pack(f"<{count}H", *items)

    def send_words(self, data: bytes) -> None:
        for (item,) in struct.iter_unpack("<H", data):
            self.ask(f"outw {self.ports['command']:#x} {item:#x}")

    @property
    def bm_status(self) -> int:
        return self.input("busmaster", 2)

    def bm_command(self, value: int) -> None:
        self.write(0, 1, value, "busmaster")

    def settle(self, errno: int = 0) -> int:
        """Another implementation is waited for, as guests do: until BSY is clear and DMA is over."""
        deadline = time.monotonic() + 20
        while self.alternate & BSY or self.bm_status & (ACTIVE | BM_INTERRUPT) == ACTIVE:
            assert time.monotonic() < deadline
        return 0


Log = list[Any]
Seen = BSY | DRQ | ERR


def line(rig: Rig) -> bool:
    if isinstance(rig, QemuRig):
        rig.alternate  # noqa: B018  # the answer brings news of the line
        return rig.level
    return rig.pin.level


def state(rig: Rig) -> tuple[bool, int]:
    return line(rig), rig.alternate & Seen


def packet_command(rig: Rig, *command: int, limit: int = 0xFFFE) -> Log:
    rig.packet(*command, limit=limit)
    rig.settle()
    log: Log = []
    data = bytearray()
    while rig.alternate & DRQ:
        log.append((*state(rig), rig.read(COUNT), rig.byte_count))
        assert not rig.status & ERR
        data += rig.words(rig.byte_count // 2)
        rig.settle()
    log.append((*state(rig), rig.read(COUNT), bytes(data)))
    if rig.status & ERR:
        rig.packet(0x03, 0, 0, 0, 18)
        rig.settle()
        sense = rig.words(9)
        log.append((sense[2] & 0x0F, sense[12]))
        rig.settle()
        rig.status  # noqa: B018  # acknowledges
    return log


def dma(rig: Rig, begin: Callable[[], None], *regions: tuple[int, int], to_memory: bool = True) -> Log:
    rig.memory.write(0x8000, bytes(0x3000) if to_memory else pattern(0x3000, b"new"))
    rig.prds(*regions)
    begin()
    before = line(rig)
    rig.start(to_memory)
    rig.settle()
    log: Log = [before, *state(rig), rig.bm_status & (ACTIVE | BM_INTERRUPT)]
    log += [rig.status & Seen, line(rig), rig.memory.read(0x8000, 0x3000)]
    rig.bm_command(0)
    return log


def cd_steps(rig: Rig) -> Log:
    log: Log = [[rig.read(at) for at in (2, 3, 4, 5)]]
    for opcode in (0xEC, 0x20, 0xF8, 0xCA):
        rig.command(opcode)
        rig.settle()
        log.append((hex(opcode), state(rig), rig.read(1), [rig.read(at) for at in (2, 3, 4, 5)]))
        log.append((rig.status & Seen, line(rig)))
    for _ in range(2):  # attentions after power-on are taken
        packet_command(rig, 0x00)
    commands = [
        (0x00,),
        (0x25,),
        (0x43, 0, 0, 0, 0, 0, 0, 0, 12),
        (0x43, 2, 0, 0, 0, 0, 0, 0, 12),
        (0x43, 0, 0, 0, 0, 0, 5, 0, 100),
        (0x4A, 0, 0, 0, 0x10, 0, 0, 0, 8),
        (0x5A, 0, 0xC1, 0, 0, 0, 0, 0, 128),
        (0x5A, 0, 5, 0, 0, 0, 0, 0, 128),
        (0x28, 0, 0, 0, 1, 0x2B, 0, 0, 2),
        (0x28, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 1),
        (0xA8, 0, 0, 0, 0, 7, 0, 0, 0, 3),
        (0x28, 0, 0, 0, 0, 7, 0, 0, 0),
        (0xBE, 0, 0, 0, 0, 7, 0, 0, 2, 0x10),
        (0xBE, 0, 0, 0, 0, 7, 0, 0, 2, 0),
        (0xFF,),
        (0x2B, 0, 0, 0, 0, 5),
        (0x2B, 0, 0, 0, 2, 0),
        (0xBB, 0, 0xFF, 0xFF),
        (0x1E, 0, 0, 0, 1),
        (0x1E,),
        (0x1B, 0, 0, 0, 2),
        (0x00,),
        (0x1B, 0, 0, 0, 3),
    ]
    log += [(command, packet_command(rig, *command)) for command in commands]
    packet_command(rig, 0x00)
    for limit in (0xFFFF, 0xFFFE, 2047, 2048, 2049, 5000):
        log.append((limit, packet_command(rig, 0x28, 0, 0, 0, 0, 7, 0, 0, 5, limit=limit)))
    read = (0x28, 0, 0, 0, 0, 7, 0, 0, 4)
    log.append(dma(rig, lambda: rig.packet(*read, dma=True), (0x8000, 0x2000)))
    log.append(dma(rig, lambda: rig.packet(*read, dma=True), (0x8000, 1000), (0x9000, 7192)))
    log.append(dma(rig, lambda: rig.packet(0x25, dma=True), (0x8000, 8)))
    rig.command(0x08)
    log.append(([rig.read(at) for at in (2, 3, 4, 5, 7)], line(rig)))
    return log


def disk_steps(rig: Rig) -> Log:
    log: Log = [[rig.read(at) for at in (2, 3, 4, 5)]]
    rig.command(0xEC)
    log.append((state(rig), rig.status & Seen))
    words = struct.unpack("<256H", rig.words(256))
    log.append(
        (state(rig), words[1], words[3], words[6], words[54:59], words[60:62], words[83], words[100:104])
    )
    rig.taskfile(count=8)
    rig.command(0xC6)
    log.append((state(rig), rig.status & Seen))
    for opcode, blocks in ((0x20, [1] * 10), (0xC4, [8, 2])):
        rig.taskfile(count=10, lba=99)
        rig.command(opcode)
        rig.settle()
        for block in blocks:
            log.append((state(rig), rig.status & Seen, line(rig), rig.words(256 * block)))
            rig.settle()
        log.append(state(rig))
    for opcode, blocks in ((0x30, [1, 1, 1]), (0xC5, [3])):
        rig.taskfile(count=3, lba=200)
        rig.command(opcode)
        for block in blocks:
            log.append((state(rig), rig.status & Seen))
            rig.send_words(bytes(pattern(512 * block, b"%d" % opcode)))
            rig.settle()
        log.append((state(rig), rig.status & Seen))
    for opcode, to_memory in ((0xC8, True), (0xCA, False), (0xC8, True)):
        for regions in (
            [(0x8000, 0x2000)],
            [(0x8000, 0x200), (0x9000, 0x1E00)],
            [(0x8000, 100), (0x9000, 8092)],
        ):

            def begin(opcode: int = opcode) -> None:
                rig.taskfile(count=16, lba=50)
                rig.command(opcode)

            log.append((opcode, regions, dma(rig, begin, *regions, to_memory=to_memory)))
    for opcode in (0xE7, 0xEA, 0xE5, 0xE0, 0xE1, 0x10, 0x00, 0xB0, 0xF8, 0x27, 0xA1, 0xA0, 0x08, 0xFF):
        rig.taskfile(count=1)
        rig.command(opcode)
        rig.settle()
        registers = [rig.read(at) for at in range(1, 7)]
        log.append((hex(opcode), state(rig), registers, rig.status & Seen, line(rig)))
    rig.control(4)
    rig.control(0)
    log.append([rig.read(at) for at in range(1, 6)])
    return log


@pytest.mark.parametrize("kind", ["cd", "disk"])
def test_same_answers(kind: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    if kind == "cd":
        image.write_bytes(CD)
        ours = Rig(lambda: (AtapiDrive(Backend(CD)), None))
        media, ports, steps = "cdrom,index=2,readonly=on", (0x170, 0x376, 0xC008, 15), cd_steps
    else:
        image.write_bytes(DISK)
        ours = Rig(lambda: (AtaDrive(Backend(DISK)), None))
        media, ports, steps = "disk,index=0", (0x1F0, 0x3F6, 0xC000, 14), disk_steps
    theirs = QemuRig(f"if=ide,media={media},format=raw,file={image}", *ports)
    try:
        expected = steps(theirs)
    finally:
        theirs.process.kill()
        theirs.process.wait()
    for wanted, got in zip(expected, steps(ours), strict=True):
        assert got == wanted
