"""The human monitor with a machine that has memory but no processes. Spelling: QEMU's own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from coordinator.contract import messages
from coordinator.contract.errors import IslandError, UsageError
from coordinator.contract.segment import Segment
from coordinator.monitor import MonitorFrontend, execute
from coordinator.monitor.memory import parse_format
from tests.contract.conftest import ram_at
from tests.coordinator.fakes import FakeDevice, FakeVm, settle


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(vcpus=2, ram=2 << 20)
    segment.publish_map([ram_at(segment, 0, 2 << 20)])
    yield segment
    segment.close()


def ask(segment: Segment | None, *lines: str, cpu: int = 0, **answers: Any) -> tuple[list[str], Any]:
    """Run lines one after another; ``answers`` by the name of the command to an island."""

    async def go() -> tuple[list[str], Any]:
        vm: Any = FakeVm(segment)
        vm.answers = {getattr(messages, name): value for name, value in answers.items()}
        return [await execute(vm, line, cpu) for line in lines], vm

    return asyncio.run(go())


def identity(command: messages.Translate) -> int:
    return command.linear


# ---- memory -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "count", "letter", "size"),
    [
        ("", 1, "x", 4),
        ("4", 4, "x", 4),
        ("4xw", 4, "x", 4),
        ("10i", 10, "i", 4),
        ("2gx", 2, "x", 8),
        ("3c", 3, "c", 1),
    ],
)
def test_formats(text: str, count: int, letter: str, size: int) -> None:
    shape = parse_format(text)
    assert (shape.count, shape.letter, shape.size) == (count, letter, size)


@pytest.mark.parametrize("text", ["q", "xx", "x4", "-1x", "9999999999xg", "xwx"])
def test_no_formats(text: str) -> None:
    with pytest.raises(UsageError):
        parse_format(text)


def test_xp_in_every_format(segment: Segment) -> None:
    segment.ram[0x1000:0x1010] = memoryview(bytes.fromhex("fe ff 41 00 78 56 34 12 ef be ad de 00 00 00 80"))
    (words, halves, octal, signed, plain, characters, wide), _ = ask(
        segment,
        "xp/4xw 0x1000",
        "xp /2xh 4096",
        "xp/1ob 0x1000",
        "xp/1dh 0x1000",
        "xp/1uh 0x1000",
        "xp/3c 0x1000",
        "xp/2xg 0x1000",
    )
    assert words == "0000000000001000: 0x0041fffe 0x12345678 0xdeadbeef 0x80000000\n"
    assert halves == "0000000000001000: 0xfffe 0x0041\n"
    assert (octal, signed, plain) == (
        "0000000000001000: 0376\n",
        "0000000000001000: -2\n",
        "0000000000001000: 65534\n",
    )
    assert characters == "0000000000001000: '\\xfe' '\\xff' 'A'\n"
    assert wide == "0000000000001000: 0x123456780041fffe 0x80000000deadbeef\n"


def test_rows_of_sixteen_bytes(segment: Segment) -> None:
    (text,), _ = ask(segment, "xp/5xw 0")
    assert [line.split(":")[0] for line in text.splitlines()] == ["0000000000000000", "0000000000000010"]


def test_x_goes_through_the_page_tables_to_the_first_hole(segment: Segment) -> None:
    segment.ram[0x3FFC:0x4000] = memoryview(b"\x01\x02\x03\x04")

    def translate(command: messages.Translate) -> int | None:
        return command.linear - 0xFFFF_8000_0000_0000 if command.linear < 0xFFFF_8000_0000_4000 else None

    (text, nothing), vm = ask(
        segment, "x/8xb 0xffff800000003ffc", "x 0xffff800000004000", Translate=translate
    )
    assert text == "ffff800000003ffc: 0x01 0x02 0x03 0x04\n"
    assert nothing == "Cannot access memory at 0xffff800000004000\n"
    assert vm.sent[0][0] == "vcpu0"


def test_instructions_at_a_register(segment: Segment) -> None:
    segment.ram[0x1000:0x1006] = memoryview(b"\x90\xb8\x05\x00\x00\x00")
    arch = segment.vcpu(1).arch
    arch.rip = 0x1000
    arch.seg[1].attr |= 0x4000  # a 32-bit code segment
    (text,), vm = ask(segment, "x/2i $pc", cpu=1, Translate=identity)
    first, second = text.splitlines()
    assert first.startswith("0x00001000:") and "nop" in first
    assert second.startswith("0x00001001:") and "mov" in second and "eax" in second
    assert vm.sent[0][0] == "vcpu1"


@pytest.mark.parametrize("line", ["xp", "x/xx 0", "xp $nothing", "xp 12z", "xp/9999999xg 0", "x"])
def test_memory_commands_that_are_wrong(segment: Segment, line: str) -> None:
    (text,), vm = ask(segment, line)
    assert "usage: " in text and len(text.splitlines()) == 2
    assert vm.sent == []


@pytest.mark.parametrize(
    "line", ["xp/16xb 0x1ffff8", "xp 0xfffffffffffffffc", "xp/4xw 0xfee00000", "xp/2xw -4"]
)
def test_where_no_memory_is(segment: Segment, line: str) -> None:
    (text,), _ = ask(segment, line)
    assert text.endswith("\n") and "failed" not in text


# ---- other commands -----------------------------------------------------------------------------------
def test_what_each_command_does(segment: Segment) -> None:
    lines = ["stop", "cont", "c", "system_reset", "quit", "q"]
    texts, vm = ask(segment, *lines)
    assert texts == [""] * len(lines)
    assert vm.done == ["stop", "cont", "cont", "reset", "quit", "quit"]


def test_commands_for_islands(segment: Segment) -> None:
    _, vm = ask(
        segment, "system_powerdown", "nmi", "sendkey ctrl-alt-delete 50", "eject -f ide1-cd0", OpenTray=True
    )
    kinds = [(role, type(command).__name__) for role, command in vm.sent]
    assert kinds == [
        ("devhost0", "PowerButton"),
        ("vcpu0", "InjectNmi"),
        ("vcpu1", "InjectNmi"),
        ("devhost0", "SendKeys"),
        ("devhost0", "OpenTray"),
        ("devhost0", "InsertMedium"),
        ("blockd", "CloseExport"),
    ]
    assert vm.sent[3][1].keys == ("ctrl", "alt", "delete") and vm.sent[3][1].hold_ms == 50
    assert vm.sent[4][1].force and vm.done == ["drive None"]


def test_a_locked_tray_is_said(segment: Segment) -> None:
    (text,), _ = ask(segment, "eject ide1-cd0", OpenTray=False)
    assert text.startswith("Error: ") and "locked" in text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("", ""),
        ("   ", ""),
        ("nonsense", "the nearest known one is"),
        ("info nonsense", "the nearest known one is"),
        ('eject "', "No closing quotation"),
        ("eject", "usage: eject"),
        ("eject other", "Device 'other' not found"),
        ("change ide1-cd0", "usage: change"),
        ("change ide1-cd0 /nowhere", "Could not open '/nowhere'"),
        ("sendkey a b", "not a time"),
        ("screendump", "usage: screendump"),
        ("screendump a -f gif", "usage: "),
    ],
)
def test_errors_are_text(segment: Segment, line: str, text: str) -> None:
    (found,), vm = ask(segment, line)
    assert text in found and len(found.splitlines()) <= 2
    assert vm.sent == []


@pytest.mark.parametrize(
    "failure", [IslandError("it broke"), ZeroDivisionError("it broke"), OSError(5, "it broke")]
)
def test_whatever_happens_is_one_line(segment: Segment, failure: Exception) -> None:
    (text,), _ = ask(segment, "system_powerdown", PowerButton=failure)
    assert text.startswith("Error: ") and "it broke" in text and len(text.splitlines()) == 1


def test_topics(segment: Segment) -> None:
    texts, _ = ask(
        segment,
        "info status",
        "info cpus",
        "info registers",
        "info pic",
        "info lapic",
        "info mtree",
        "info version",
        "info islands",
        "info block",
        "info",
        "help",
        DescribeChip="pic0: irr=00\n",
        QueryDrives=[{"id": "ide1-cd0", "locked": True, "tray_open": False}],
        QueryExports=[{"id": "ide1-cd0", "size": 2048, "format": "raw"}],
    )
    status, cpus, registers, pic, lapic, _, version, islands, block, topics, help_ = texts
    assert status == "VM status: running\n"
    assert "* CPU #0" in cpus and "pid=1001" in cpus
    assert registers.startswith("RAX=") and "XMM15=" in registers and "EFER=" in registers
    assert "irr=00" in pic and len([line for line in pic.splitlines() if "pin" in line]) == 24
    assert "LVT timer" in lapic and "(none)" in lapic
    assert version.endswith(" (atoll)\n")
    assert "coordinator" in islands and "vcpu1" in islands
    assert block == "ide1-cd0: /a.iso (raw)\n    Removable device: locked, tray closed\n"
    for topic in ("status", "cpus", "registers", "block", "pic", "lapic", "mtree", "version", "islands"):
        assert f"info {topic} " in topics
    assert all(name in help_ for name in ("eject", "change", "screendump", "sendkey", "xp"))


# ---- the prompt -----------------------------------------------------------------------------------------
def type_at(*pieces: bytes) -> tuple[list[bytes], list[str]]:
    """What shows after each piece, and what the machine was told."""

    async def go() -> tuple[list[bytes], list[str]]:
        vm: Any = FakeVm()
        device = FakeDevice()
        frontend = MonitorFrontend(vm)
        frontend.connected(device)
        device.take()
        shown = []
        for piece in pieces:
            frontend.received(device, piece)
            await settle()
            shown.append(device.take())
        assert frontend._worker is not None
        frontend._worker.cancel()
        await settle()
        return shown, vm.done

    return asyncio.run(go())


def test_line_editing() -> None:
    _, done = type_at(
        b"stopp\x7f\r", b"xxx\x15cont\r", b"cont nonsense\x17\r", b"\x1b[A\r", b"system_r\t\r", b"\r"
    )
    assert done == ["stop", "cont", "cont", "cont", "reset"]


def test_echo_and_prompt() -> None:
    shown, _ = type_at(b"info status\r")
    assert shown == [b"info status\r\nVM status: running\r\n(atoll) "]


def test_completion_shows_what_there_is() -> None:
    shown, _ = type_at(b"system_\t")
    assert b"system_powerdown" in shown[0] and b"system_reset" in shown[0]


@pytest.mark.parametrize(
    "noise",
    [bytes(range(256)), b"\x1b[\x1b[\x1b", b"\xff" * 50 + b"\r", b"a" * 10_000 + b"\r", b"\x7f\x15\x17\t"],
)
def test_noise(noise: bytes) -> None:
    shown, _ = type_at(noise, b"\r\x15stop\r")
    assert shown
