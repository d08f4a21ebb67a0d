"""The control socket of a running machine, driven by QEMU's own client library.

Expected replies are from QEMU's QAPI schema (qapi/*.json) and docs/interop/qmp-spec.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient
from qemu.qmp.legacy import QMPMessage

from tests.support import products
from tests.support.tools import run_tool
from tests.system.machine import ATOLL, CONSOLE, Machine, until, with_qmp

UUID = "5d8d2a7c-6b61-4ce6-8f0a-111213141516"


def events(monitor: Any, last: str) -> list[QMPMessage]:
    """All events up to the first one called ``last``."""
    found: list[QMPMessage] = []
    while not found or found[-1]["event"] != last:
        event = monitor.pull_event(wait=60.0)
        assert event is not None
        found.append(event)
    return found


@pytest.fixture
def machine() -> Any:
    with with_qmp(*CONSOLE, "-smp", "2", "-m", "32", "-uuid", UUID) as machine:
        machine.says("ready")
        yield machine


def test_queries(machine: Machine) -> None:
    with machine.qmp() as monitor:
        assert monitor.cmd("query-status") == {"status": "running", "running": True, "singlestep": False}
        assert monitor.cmd("query-name") == {"name": machine.name}
        assert monitor.cmd("query-uuid") == {"UUID": UUID}
        version = monitor.cmd("query-version")
        assert set(version["qemu"]) == {"major", "minor", "micro"}
        names = {command["name"] for command in monitor.cmd("query-commands")}
        assert names >= {
            "qmp_capabilities", "query-commands", "query-status", "query-version", "query-name", "query-uuid",
            "query-cpus-fast", "query-block", "stop", "cont", "quit", "system_reset", "system_powerdown",
            "eject", "blockdev-open-tray", "blockdev-close-tray", "blockdev-change-medium", "screendump",
            "send-key", "inject-nmi", "human-monitor-command",
        }  # fmt: skip
        cpus: Any = monitor.cmd("query-cpus-fast")
        roles = machine.roles()
        assert [cpu["cpu-index"] for cpu in cpus] == [0, 1]
        assert [cpu["thread-id"] for cpu in cpus] == [roles["vcpu0"], roles["vcpu1"]]
        assert monitor.cmd("query-block") == []


def test_async_client_negotiates_and_quits(machine: Machine) -> None:
    async def talk() -> None:
        client = QMPClient("test")
        await client.connect(str(machine.qmp_path))
        assert (await client.execute("query-status")) == {
            "status": "running",
            "running": True,
            "singlestep": False,
        }
        await client.execute("quit")
        await client.disconnect()

    asyncio.run(talk())
    assert machine.wait() == 0
    machine.gone()


def test_stop_holds_the_guest_and_cont_lets_it_go(machine: Machine) -> None:
    with machine.qmp() as monitor:
        monitor.cmd("stop")
        assert monitor.cmd("query-status") == {"status": "paused", "running": False, "singlestep": False}
        machine.type(b"a")
        monitor.cmd("cont")
        assert [event["event"] for event in events(monitor, "RESUME")] == ["STOP", "RESUME"]
        machine.says("got 61")
        monitor.cmd("cont")  # runs already: nothing happens
        monitor.cmd("stop")
        monitor.cmd("stop")
        assert [event["event"] for event in events(monitor, "STOP")] == ["STOP"]
        stamp = monitor.cmd_raw("query-status")
        assert "return" in stamp


def test_start_stopped() -> None:
    with with_qmp(*CONSOLE, "-S") as machine, machine.qmp() as monitor:
        assert monitor.cmd("query-status") == {"status": "prelaunch", "running": False, "singlestep": False}
        monitor.cmd("cont")
        machine.says("ready")
        assert monitor.cmd("query-status")["status"] == "running"


def test_reset_boots_again(machine: Machine) -> None:
    with machine.qmp() as monitor:
        monitor.cmd("system_reset")
        event = events(monitor, "RESET")[-1]
        assert event["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
        machine.says("ready")
        for order in (b"R", b"T"):  # by the guest: port CF9h, triple fault
            machine.type(order)
            event = events(monitor, "RESET")[-1]
            assert event["data"] == {"guest": True, "reason": "guest-reset"}
            machine.says("ready")


@pytest.mark.parametrize("order", [b"R", b"T"])
def test_no_reboot_ends_instead(order: bytes) -> None:
    with with_qmp(*CONSOLE, "-no-reboot") as machine, machine.qmp() as monitor:
        machine.says("ready")
        machine.type(order)
        event = events(monitor, "SHUTDOWN")[-1]
        assert event["data"] == {"guest": True, "reason": "guest-reset"}
        assert machine.wait() == 0
        machine.gone()


def test_no_shutdown_stays_until_reset() -> None:
    with with_qmp(*CONSOLE, "-no-shutdown") as machine, machine.qmp() as monitor:
        machine.says("ready")
        machine.type(b"O")
        found = events(monitor, "STOP")
        assert [event["event"] for event in found[-2:]] == ["SHUTDOWN", "STOP"]
        assert found[-2]["data"] == {"guest": True, "reason": "guest-shutdown"}
        assert monitor.cmd("query-status")["status"] == "shutdown"
        assert monitor.cmd_raw("cont")["error"]["class"] == "GenericError"
        monitor.cmd("system_reset")
        monitor.cmd("cont")
        machine.says("ready")


def test_guest_powers_off_and_quit_says_so(machine: Machine) -> None:
    with machine.qmp() as monitor:
        machine.type(b"O")
        event = events(monitor, "SHUTDOWN")[-1]
        assert event["data"] == {"guest": True, "reason": "guest-shutdown"}
        assert machine.wait() == 0
        machine.gone()


def test_quit(machine: Machine) -> None:
    with machine.qmp() as monitor:
        assert monitor.cmd("quit") == {}
        event = events(monitor, "SHUTDOWN")[-1]
        assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert machine.wait() == 0
        machine.gone()


def test_power_button_reaches_the_guest(machine: Machine) -> None:
    with machine.qmp() as monitor:
        monitor.cmd("system_powerdown")
        events(monitor, "POWERDOWN")
        machine.says("button")


def test_nmi_reaches_the_guest(machine: Machine) -> None:
    with machine.qmp() as monitor:
        monitor.cmd("inject-nmi")
        machine.says("nmi")


def test_keys_reach_the_guest(machine: Machine) -> None:
    with machine.qmp() as monitor:
        keys = [{"type": "qcode", "data": name} for name in ("ctrl", "a")]
        monitor.cmd("send-key", keys=keys, **{"hold-time": 10})
        # IBM scan code set 1: left Ctrl 1Dh, A 1Eh; released in reverse order, bit 7 set
        assert [machine.says("key (..)")[1] for _ in range(4)] == ["1d", "1e", "9e", "9d"]
        monitor.cmd("human-monitor-command", **{"command-line": "sendkey ret 10"})
        assert [machine.says("key (..)")[1] for _ in range(2)] == ["1c", "9c"]
        assert "Unknown key" in monitor.cmd("human-monitor-command", **{"command-line": "sendkey nokey"})


def test_debug_exit_gives_the_status() -> None:
    with with_qmp(*CONSOLE, "-device", "isa-debug-exit,iobase=0x501,iosize=2") as machine:
        machine.says("ready")
        machine.type(b"D")
        assert machine.wait() == 0x10 << 1 | 1
        machine.gone()


def test_a_halted_or_polling_guest_still_obeys(machine: Machine) -> None:
    """I polls the IDE status for ever: each look is a message to the device host."""
    with machine.qmp() as monitor:
        for order in (b"I", b"S", b"H"):
            machine.type(order)
            machine.says(f"got {order.hex()}")
            monitor.cmd("stop")
            monitor.cmd("cont")
            assert "RIP=" in monitor.cmd("human-monitor-command", **{"command-line": "info registers"})
            monitor.cmd("system_reset")
            machine.says("ready")


# ---- media ----------------------------------------------------------------------------------------------
def tray_events(monitor: Any, count: int) -> list[bool]:
    found: list[bool] = []
    while len(found) < count:
        event = events(monitor, "DEVICE_TRAY_MOVED")[-1]
        assert event["data"]["device"] == "ide1-cd0"
        found.append(event["data"]["tray-open"])
    return found


def test_media(tmp_path: Path) -> None:
    first, second = tmp_path / "a disc.iso", tmp_path / "second.iso"
    first.write_bytes(bytes(2048 * 8))
    second.write_bytes(bytes(2048 * 16))
    with with_qmp(*CONSOLE, "-cdrom", str(first)) as machine, machine.qmp() as monitor:
        machine.says("ready")

        def drive() -> Any:
            (block,) = monitor.cmd("query-block")
            return block

        assert drive()["device"] == "ide1-cd0" and drive()["removable"] and not drive()["locked"]
        assert drive()["inserted"]["file"] == str(first)
        assert drive()["inserted"]["image"]["virtual-size"] == 2048 * 8
        monitor.cmd("blockdev-open-tray", device="ide1-cd0")
        assert drive()["tray_open"]
        monitor.cmd("blockdev-close-tray", id="ide1-cd0")
        assert tray_events(monitor, 2) == [True, False]
        monitor.cmd("eject", device="ide1-cd0")
        assert drive()["tray_open"] and "inserted" not in drive()
        monitor.cmd("blockdev-change-medium", device="ide1-cd0", filename=str(second))
        assert drive()["inserted"]["image"]["virtual-size"] == 2048 * 16 and not drive()["tray_open"]
        assert tray_events(monitor, 2) == [True, False]
        line = f'change ide1-cd0 "{first}" raw'
        assert monitor.cmd("human-monitor-command", **{"command-line": line}) == ""
        assert drive()["inserted"]["file"] == str(first)
        assert monitor.cmd("human-monitor-command", **{"command-line": "eject ide1-cd0"}) == ""
        assert tray_events(monitor, 3) == [True, False, True]


def test_a_medium_may_be_qcow2(tmp_path: Path) -> None:
    image = tmp_path / "disc.qcow2"
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", str(image), str(2048 * 40))
    with with_qmp(*CONSOLE, "-drive", "media=cdrom,index=2") as machine, machine.qmp() as monitor:
        machine.says("ready")
        monitor.cmd("blockdev-change-medium", id="ide1-cd0", filename=str(image), format="qcow2")
        (block,) = monitor.cmd("query-block")
        assert block["inserted"]["drv"] == "qcow2" and block["inserted"]["ro"]
        assert block["inserted"]["image"]["virtual-size"] == 2048 * 40
        wrong = {"id": "ide1-cd0", "filename": str(image), "format": "vdi"}
        reply = monitor.cmd_raw("blockdev-change-medium", wrong)
        assert "choose one of raw, qcow2" in reply["error"]["desc"]


def test_a_medium_that_cannot_be_leaves_the_old_one(tmp_path: Path) -> None:
    disc, empty, locked = tmp_path / "disc.iso", tmp_path / "empty", tmp_path / "locked"
    disc.write_bytes(bytes(2048))
    empty.write_bytes(b"")
    with with_qmp(*CONSOLE, "-cdrom", str(disc)) as machine, machine.qmp() as monitor:
        machine.says("ready")
        for bad, text in ((empty, "empty"), (tmp_path / "none", "No such file"), (tmp_path, "")):
            reply = monitor.cmd_raw("blockdev-change-medium", {"device": "ide1-cd0", "filename": str(bad)})
            assert reply["error"]["class"] == "GenericError" and text in reply["error"]["desc"]
            (block,) = monitor.cmd("query-block")
            assert block["inserted"]["file"] == str(disc) and not block["tray_open"]
        assert locked.parent == tmp_path


def test_errors_of_media_commands(machine: Machine) -> None:
    with machine.qmp() as monitor:
        reply = monitor.cmd_raw("eject", {"device": "nope"})
        assert reply["error"]["class"] == "DeviceNotFound"
        reply = monitor.cmd_raw("eject", {"device": "a", "id": "b"})
        assert reply["error"]["class"] == "GenericError"


# ---- screen ---------------------------------------------------------------------------------------------
WIDTH, HEIGHT = 64, 48
PIXELS = bytes(v for y in range(HEIGHT) for x in range(WIDTH) for v in (4 * x, 5 * y, 0x80))


def test_screendump(tmp_path: Path) -> None:
    """The guest draws (4x, 5y, 80h) at pixel (x, y) of a 64 by 48 VBE mode."""
    with with_qmp(*CONSOLE, "-vga", "std") as machine, machine.qmp() as monitor:
        machine.says("ready")
        monitor.cmd("screendump", filename=str(tmp_path / "s.ppm"))
        assert (tmp_path / "s.ppm").read_bytes() == b"P6\n64 48\n255\n" + PIXELS
        monitor.cmd("screendump", filename=str(tmp_path / "s.png"), format="png")
        assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
        line = f"screendump {tmp_path / 'h.ppm'}"
        assert monitor.cmd("human-monitor-command", **{"command-line": line}) == ""
        assert (tmp_path / "h.ppm").read_bytes() == (tmp_path / "s.ppm").read_bytes()
        for arguments in ({"filename": str(tmp_path / "x"), "format": "gif"}, {"filename": "/nope/x.ppm"}):
            assert monitor.cmd_raw("screendump", arguments)["error"]["class"] == "GenericError"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["h.ppm", "s.png", "s.ppm"]


def test_screendump_without_a_card(machine: Machine) -> None:
    with machine.qmp() as monitor:
        assert "error" in monitor.cmd_raw("screendump", {"filename": "/nope"})


# ---- human monitor --------------------------------------------------------------------------------------
def test_monitor_topics(tmp_path: Path) -> None:
    disc = tmp_path / "disc.iso"
    disc.write_bytes(bytes(2048))
    with with_qmp(*CONSOLE, "-smp", "2", "-cdrom", str(disc)) as machine, machine.qmp() as monitor:
        machine.says("ready")

        def ask(line: str, **more: Any) -> str:
            text = monitor.cmd("human-monitor-command", **{"command-line": line}, **more)
            assert isinstance(text, str)
            return text

        assert ask("info status") == "VM status: running\n"
        assert re.search(r"\* CPU #0: halted, pid=\d+", ask("info cpus"))
        assert "* CPU #1: waiting for SIPI" in ask("info cpus", **{"cpu-index": 1})
        registers = ask("info registers")
        assert re.search(r"RIP=00000000001\w{5} ", registers) and "CR0=00000011" in registers
        assert str(disc) in ask("info block") and "not locked" in ask("info block")
        assert "irr=" in ask("info pic") and "ioapic0" in ask("info pic")
        assert re.search(r"LVT lint0 +00000700", ask("info lapic"))
        assert "ram" in ask("info mtree") and "00000000fec00000" in ask("info mtree")
        assert re.match(r"\d+\.\d+\.\d+ ", ask("info version"))
        islands = ask("info islands")
        # standbys come later
        assert {line.split()[0] for line in islands.splitlines()[1:]} >= {
            "coordinator", "nursery", "blockd", "devhost0", "vcpu0", "vcpu1",
        }  # fmt: skip
        image = products.bare("control").read_bytes()
        (at,) = struct.unpack_from("<I", image, 52 + 4)  # file offset of what is loaded at 1 MiB: gABI 5.1
        words = " ".join(f"0x{word:08x}" for word in struct.unpack_from("<3I", image, at))
        for form in ("xp /3xw 0x100000", "xp/3xw 0x100000", "x /3xw 0x100000", "x/3xw $rip - $rip + 1048576"):
            assert ask(form) == f"0000000000100000: {words}\n"
        assert ask("x /2xb 0x100000") == f"0000000000100000: 0x{image[at]:02x} 0x{image[at + 1]:02x}\n"
        assert len(ask("x /5i $pc").splitlines()) == 5
        assert "hlt" in ask("x /1i $rip-1")
        assert "xp" in ask("help") and "info lapic" in ask("help info")
        assert ask("stop") == "" and ask("info status") == "VM status: paused\n"
        assert ask("cont") == "" and ask("info status") == "VM status: running\n"
        assert ask("system_reset") == ""
        machine.says("ready")
        assert ask("system_powerdown") == ""
        machine.says("button")
        for bad in ("nonsense", "info nonsense", "x", "xp /9q 0", "x /x nonsense", "change a", 'eject "'):
            assert len(ask(bad).strip().splitlines()) in (1, 2)
        assert monitor.cmd("quit") == {}
    assert machine.wait() == 0


# ---- errors ---------------------------------------------------------------------------------------------
ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("nonsense", {}, "CommandNotFound"),
    ("qmp_capabilities", {}, "CommandNotFound"),  # complete already
    ("stop", {"unexpected": 1}, "GenericError"),
    ("screendump", {}, "GenericError"),
    ("screendump", {"filename": 5}, "GenericError"),
    ("screendump", {"filename": "\0"}, "GenericError"),
    ("screendump", {"filename": "\ud800"}, "GenericError"),
    ("send-key", {"keys": [1]}, "GenericError"),
    ("send-key", {"keys": [{"type": "qcode", "data": "nokey"}]}, "GenericError"),
    ("send-key", {"keys": []}, "GenericError"),
    ("human-monitor-command", {"command-line": "info status", "cpu-index": True}, "GenericError"),
]


def test_errors_have_qmps_form() -> None:
    with with_qmp("-S") as machine, machine.qmp() as monitor:
        for command, arguments, kind in ERRORS:
            reply = monitor.cmd_raw(command, arguments)
            assert reply["error"]["class"] == kind and reply["error"]["desc"]
            assert "\n" not in reply["error"]["desc"]
        assert monitor.cmd("query-status")["status"] == "prelaunch"


def test_hostile_bytes(machine: Machine) -> None:
    """hardware-cases item 19, at the real socket: FFh, deep nesting, 11 MB in a line, duplicate keys."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(machine.qmp_path))
        stream = client.makefile("rb")
        assert b"QMP" in stream.readline()
        client.sendall(b'{"execute": "qmp_capabilities"}\n')
        assert stream.readline() == b'{"return": {}}\r\n'
        for line in (
            b"\xff",
            b"[" * 100_000,
            b'{"a": "' + b"x" * (11 << 20) + b'"}',
            b'{"a": 1, "a": 1}',
            b"1" * 5000,
        ):
            client.sendall(line + b"\n")
            assert b'"GenericError"' in stream.readline()
        client.sendall(b'{"execute": "query-name"}\n')
        assert machine.name.encode() in stream.readline()


def test_a_client_that_goes_in_the_middle_of_a_command_does_no_harm(machine: Machine) -> None:
    orders = [
        b'{"execute": "qmp_capabilities"}',
        b'{"execute": "stop"}',
        b'{"execute": "cont"}',
        b'{"execute": "stop"}',
    ]
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(machine.qmp_path))
            client.sendall(b" ".join(orders))
    with machine.qmp() as monitor:
        monitor.cmd("cont")
        machine.type(b"b")
        machine.says("got 62")


def test_qmp_shell(machine: Machine) -> None:
    done = subprocess.run(
        [str(Path(ATOLL).parent / "qmp-shell"), str(machine.qmp_path)],
        input=b"query-name\nhuman-monitor-command command-line=info\\ status\n", capture_output=True,
        timeout=60, check=False, env={**os.environ, "HOME": str(machine.runtime)},
    )  # fmt: skip
    assert machine.name.encode() in done.stdout, done


def test_quit_while_starting() -> None:
    """The control socket listens before the islands are there."""
    with with_qmp("-smp", "4") as machine, machine.qmp() as monitor:
        monitor.cmd("quit")
        assert machine.wait() == 0
        assert machine.errors() == ""
        machine.gone()


@pytest.mark.parametrize("connect", [True, False])
def test_a_socket_that_waits_for_its_client(connect: bool) -> None:
    """The guest runs only when somebody has connected; SIGTERM ends the wait."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "serial"
        with with_qmp("-serial", f"unix:{path},server=on") as machine, machine.qmp() as monitor:
            until(lambda: "waiting for a connection" in machine.errors(), "the wait")
            assert monitor.cmd("query-status")["status"] == "prelaunch"
            if connect:
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(path))
                    assert client.recv(6, socket.MSG_WAITALL) == b"ready\n"
                    client.sendall(b"O")
                    assert machine.wait() == 0
            else:
                machine.kill(signal.SIGTERM)
                assert machine.wait() == 0
            assert not path.exists()
            machine.gone()


def test_two_machines_of_one_name(tmp_path: Path) -> None:
    with Machine(*CONSOLE) as first:
        first.says("ready")
        with Machine(*CONSOLE, name=first.name, runtime=first.runtime) as second:
            second.says("ready")
            second.type(b"O")
            assert second.wait() == 0
        first.type(b"x")
        first.says("got 78")
        first.type(b"O")
        assert first.wait() == 0
        first.gone()
    until(lambda: not first.roles(), "the end")
