"""Dumps of guest memory, read by binutils and gdb, of a guest whose vCPU has been killed."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from coordinator import pieces
from tests.support import products
from tests.support.tools import run_tool
from tests.system.machine import CONSOLE, until, with_qmp

#: Linux: Documentation/arch/x86/x86_64/mm.rst
KERNEL_IMAGE = 0xFFFF_FFFF_8000_0000
GPRS = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip".split()


def monitor(qmp: Any, line: str) -> str:
    return str(qmp.cmd("human-monitor-command", **{"command-line": line}))


def registers(qmp: Any, cpu: int) -> dict[str, int]:
    """As the monitor shows them."""
    text = str(qmp.cmd("human-monitor-command", **{"command-line": "info registers", "cpu-index": cpu}))
    found = {name.lower(): int(value, 16) for name, value in re.findall(r"\b(R\w\w?) *=([0-9a-f]{16})", text)}
    found["eflags"] = int(re.search(r"RFL=([0-9a-f]+)", text)[1], 16)  # type: ignore[index]
    found["cs"] = int(re.search(r"CS  =([0-9a-f]+)", text)[1], 16)  # type: ignore[index]
    return found


def gdb(core: Path, *commands: str) -> str:
    words = [word for command in commands for word in ("-ex", command)]
    return run_tool("gdb", "-batch", "-nx", "-ex", f"core-file {core}", *words)


def in_gdb(core: Path, cpu: int) -> dict[str, int]:
    names = [*GPRS, "eflags", "cs"]
    text = gdb(core, f"thread {cpu + 1}", *(f'printf "@{name} %lx\\n", ${name}' for name in names))
    return {name: int(value, 16) for name, value in re.findall(r"@(\w+) ([0-9a-f]+)", text)}


def died(qmp: Any) -> None:
    until(lambda: any(e["event"] == "ISLAND_DIED" for e in qmp.get_events()), "the event")


def loads(core: Path) -> list[tuple[int, int, int, int]]:
    """(offset, virtual, physical, size) by readelf."""
    text = run_tool("readelf", "-lW", str(core))
    rows = re.findall(r"LOAD\s+0x(\w+) 0x(\w+) 0x(\w+) 0x(\w+) 0x\w+", text)
    return [tuple(int(word, 16) for word in row) for row in rows]  # type: ignore[misc]


def test_a_dump_is_what_gdb_and_binutils_read(tmp_path: Path) -> None:
    core = tmp_path / "core file"
    with with_qmp(*CONSOLE, "-smp", "2", "-m", "64") as machine, machine.qmp() as qmp:
        machine.says("ready")
        os.kill(machine.roles()["vcpu0"], signal.SIGKILL)
        died(qmp)
        assert qmp.cmd("query-dump-guest-memory-capability") == {"formats": ["elf"]}
        assert qmp.cmd("query-dump")["status"] == "none"
        qmp.cmd("dump-guest-memory", paging=False, protocol=f"file:{core}")
        progress = qmp.cmd("query-dump")
        assert progress["status"] == "completed" and progress["completed"] == progress["total"]
        for cpu in range(2):
            shown, read = registers(qmp, cpu), in_gdb(core, cpu)
            assert read == {name: shown[name] for name in read} and len(read) == 19
        header = run_tool("readelf", "-hW", str(core))
        assert "CORE (Core file)" in header and "X86-64" in header
        notes = run_tool("readelf", "-nW", str(core))
        assert notes.count("NT_PRSTATUS") == 2 and notes.count("QEMU") == 2
        rip = registers(qmp, 0)["rip"]  # physical too: this guest has no paging
        physical = monitor(qmp, f"xp/16xb {rip:#x}")
        expected = bytes(int(word, 16) for word in re.findall(r"0x(\w\w)\b", physical))
        (place,) = [row for row in loads(core) if row[2] <= rip < row[2] + row[3]]
        data = core.read_bytes()
        assert data[place[0] + rip - place[2] :][:16] == expected
        # what no guest has written takes no room
        assert core.stat().st_size > 63 << 20 and core.stat().st_blocks * 512 < 32 << 20
        part = tmp_path / "part"
        qmp.cmd("dump-guest-memory", paging=False, protocol=f"file:{part}", begin=rip & ~0xFFF, length=4096)
        assert [row[2:] for row in loads(part)] == [(rip & ~0xFFF, 4096)]
        assert part.stat().st_mode & 0o777 == 0o600
        qmp.cmd("quit")
        assert machine.wait() == 0
        machine.gone()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"protocol": "tcp:1"}, "say file:PATH or fd:NUMBER"),
        ({"protocol": "file:/no/such/folder/x"}, "Could not open"),
        ({"protocol": "fd:5"}, "was not given"),
        ({"begin": 0}, "Parameter 'length' is missing"),
        ({"length": 1}, "Parameter 'begin' is missing"),
        ({"begin": 0, "length": 0}, "non-zero"),
        ({"begin": 1 << 40, "length": 1}, "no memory"),
        ({"format": "kdump-zlib"}, "kdump-zlib"),
    ],
)
def test_what_cannot_be_dumped_is_said(tmp_path: Path, arguments: dict[str, Any], error: str) -> None:
    target = tmp_path / "x"
    with with_qmp(*CONSOLE) as machine, machine.qmp() as qmp:
        machine.says("ready")
        command = {"paging": False, "protocol": f"file:{target}"} | arguments
        reply = qmp.cmd_obj({"execute": "dump-guest-memory", "arguments": command})
        assert error in reply["error"]["desc"]
        assert not target.exists() and qmp.cmd("query-status")["running"]


def test_a_pipe_and_the_background(tmp_path: Path) -> None:
    """A running guest goes on afterwards; what cannot have holes gets zeroes."""
    whole, piped = tmp_path / "whole", tmp_path / "piped"
    end, given = os.pipe()
    with with_qmp(*CONSOLE, "-m", "16", pass_fds=(given,)) as machine, machine.qmp() as qmp:
        os.close(given)
        machine.says("ready")
        qmp.cmd("stop")
        qmp.cmd("dump-guest-memory", paging=False, protocol=f"file:{whole}")
        qmp.cmd("dump-guest-memory", paging=False, protocol=f"fd:{given}", detach=True)
        with open(end, "rb") as reader:
            read = reader.read(whole.stat().st_size)
        piped.write_bytes(read)
        assert whole.read_bytes() == read
        event = until(lambda: [e for e in qmp.get_events() if e["event"] == "DUMP_COMPLETED"], "the event")[0]
        assert event["data"]["result"]["status"] == "completed"
        qmp.cmd("cont")
        assert monitor(qmp, f"dump-guest-memory {tmp_path / 'm'}") == ""
        assert len(loads(tmp_path / "m")) >= 1
        machine.type(b"a")
        machine.says("got 61")
        machine.type(b"O")
        assert machine.wait() == 0


@pytest.mark.boot
@pytest.mark.timeout(900)
def test_a_vcpu_of_linux_is_killed(tmp_path: Path) -> None:
    """While it is at work: registers are the monitor's, and the kernel's code is where its RIP says."""
    core = tmp_path / "core"
    linux = [
        "-smp", "2", "-m", "256", "-kernel", str(pieces.kernel()), "-initrd", str(products.initramfs()),
        "-append", "console=ttyS0 atoll.demo=fill atoll.fill=8",
    ]  # fmt: skip
    with with_qmp(*CONSOLE, *linux, guest=False) as machine, machine.qmp() as qmp:
        machine.says("atoll: filled")
        os.kill(machine.roles()["vcpu0"], signal.SIGKILL)
        died(qmp)
        assert qmp.cmd("query-status")["status"] == "internal-error"
        qmp.cmd("dump-guest-memory", paging=True, protocol=f"file:{core}")
        for cpu in range(2):
            shown = registers(qmp, cpu)
            assert in_gdb(core, cpu) == {name: shown[name] for name in [*GPRS, "eflags", "cs"]}
        rip = registers(qmp, 0)["rip"]
        code = re.findall(r"0x(\w\w)\b", monitor(qmp, f"x/16xb {rip:#x}"))
        text = gdb(core, f"x/16xb {rip:#x}")
        assert re.findall(r"\t0x(\w\w)\b", text) == code
        # in the kernel's image, which Linux maps at the top, and by the direct map
        banner = f"Linux version {pieces.modules_dir().name}".encode()
        places = [match.start() for match in re.finditer(re.escape(banner), core.read_bytes())]
        linear = [
            row[1] + at - row[0] for at in places for row in loads(core) if row[0] <= at < row[0] + row[3]
        ]
        assert min(linear) < KERNEL_IMAGE <= max(linear)
        for address in (min(linear), max(linear)):
            assert banner.decode() in gdb(core, f"x/s {address:#x}")
        qmp.cmd("quit")
        assert machine.wait() == 0
        machine.gone()
