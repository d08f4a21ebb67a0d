"""Whatever cannot be: one line that says what and which, exit 1 (2 for usage), and nothing left behind."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from pathlib import Path

import pytest

from tests.system.machine import CONSOLE, Machine, until

#: options, exit status, what the line says; {} is a folder with the files of ``prepare``
CASES = [
    # images
    ("-cdrom {}/none.iso", 1, r"none\.iso: no such file"),
    ("-cdrom {}", 1, "is a directory"),
    ("-cdrom {}/empty", 1, "empty: is empty"),
    ("-hda {}/empty", 1, "empty: is empty"),
    ("-hda {}/odd", 1, r"odd: size 1000 is not a multiple of 512"),
    ("-drive file={}/none.img,if=ide,index=0,media=disk,format=raw", 1, r"none\.img: no such file"),
    ("-hda /dev/null", 1, "/dev/null: is not a regular file"),
    ("-cdrom {}/" + "n" * 300, 1, "File name too long"),
    # memory
    ("-m 0", 2, "-m 0"),
    ("-m 100k", 2, "-m 100k"),
    ("-m 1000G", 2, "-m 1000G"),
    ("-m much", 2, "-m much: not a size"),
    ("-m 1 -kernel {control}", 1, "too little to boot a kernel; give at least"),
    # firmware and kernels
    ("-bios {}/none", 1, "-bios .*none: no such file"),
    ("-bios {}/odd", 1, "firmware .*odd: 1000 bytes"),
    ("-bios {}/zeroes", 1, "no firmware image"),
    ("-bios {}/empty", 1, "firmware"),
    ("-kernel {}/none", 1, "-kernel .*none: no such file"),
    ("-kernel {}/odd", 1, "neither a Linux bzImage"),
    ("-kernel {}/cut.elf", 1, "ELF file"),
    ("-kernel {}/empty", 1, "neither"),
    ("-kernel {control} -initrd {}/none", 1, "-initrd .*none: no such file"),
    ("-initrd {}/odd", 2, "need -kernel"),
    # sockets and files
    ("-qmp unix:{}/taken,server=on,wait=off", 1, "taken is in use by another process"),
    ("-qmp unix:{}/odd,server=on,wait=off", 1, "odd is in the way and is not a socket"),
    ("-qmp unix:{}/no/qmp,server=on,wait=off", 1, "cannot listen on .*/no/qmp: No such file or directory"),
    ("-qmp unix:{}/" + "n" * 120 + ",server=on,wait=off", 1, "AF_UNIX path too long"),
    ("-serial unix:{}/none", 1, "cannot connect to .*none: No such file or directory"),
    ("-serial file:{}/no/log", 1, "cannot write .*/no/log: No such file or directory"),
    ("-serial tcp:127.0.0.1:1", 1, "cannot connect to 127.0.0.1:1"),
    ("-pidfile {}/no/pid", 1, "-pidfile .*there is no folder"),
    ("-pidfile /dev/full", 1, "-pidfile /dev/full: No space left on device"),
    ("-D {}/no/log", 1, "-D .*there is no folder"),
    ("-D {}", 1, "-D .*is a directory"),
    ("-stats {}/no/stats", 1, "-stats .*there is no folder"),
    # usage
    ("-nonsense", 2, "unknown option '-nonsense'; the nearest known one is '-"),
    ("-cdrm x", 2, "unknown option '-cdrm'; the nearest known one is '-cdrom'"),
    ("-smp", 2, "option '-smp' needs a value"),
    ("-smp 0", 2, "-smp cpus=0: must be from 1 to"),
    ("-smp 33", 2, "-smp cpus=33: must be from 1 to 32"),
    ("-smp two", 2, "not a number"),
    ("image.iso", 2, "'image.iso' is not an option"),
    ("-netdev user,id=n", 2, "no network yet"),
    ("-nic user", 2, "no network yet"),
    ("-net nic", 2, "no network yet"),
    ("-device e1000", 2, "no network yet"),
    ("-device isa-debug-exit,iobase=0x10000", 2, "iobase"),
    ("-device isa-debug-exti", 2, "the nearest known one is isa-debug-exit"),
    ("-machine q35", 2, "machine type 'q35' is not known"),
    ("-accel kvm", 2, "-accel kvm is not available"),
    ("-cpu nonsense", 2, "-cpu nonsense is not known; the nearest known one is"),
    ("-vga cirrus", 2, "choose std or none"),
    ("-display gtk", 2, "there is no window"),
    ("-rtc base=never", 2, "-rtc base=never"),
    ("-uuid nonsense", 2, "not a UUID"),
    ("-boot order=xyz", 2, "order is made of"),
    ("-drive file={}/odd,indx=2", 2, "unknown property 'indx'; the nearest known one is 'index'"),
    ("-drive file={}/odd,index=4", 2, "index=4: must be from 0 to 3"),
    ("-hda {}/odd -drive file={}/odd,index=0", 2, "two drives at index 0"),
    ("-serial mon:stdio -serial mon:stdio", 2, "the terminal is used twice"),
    ("-serial stdio -monitor stdio", 2, "the terminal is used twice"),
    ("-serial nonsense", 2, "unknown device"),
    ("-mon chardev=none", 2, "there is no -chardev id=none"),
    ("-chardev socket,id=q", 2, "needs path="),
    ("-qmp unix:/tmp/a,server=on -qmp unix:/tmp/a,server=on", 2, "/tmp/a is used twice"),
]


def prepare(folder: Path) -> socket.socket:
    (folder / "empty").write_bytes(b"")
    (folder / "odd").write_bytes(bytes(range(250)) * 4)
    (folder / "zeroes").write_bytes(bytes(65536))
    (folder / "cut.elf").write_bytes(b"\x7fELF\x01\x01\x01" + bytes(9) + b"\x02\0\x03\0")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "taken"))
    listener.listen()
    return listener


@pytest.fixture
def folder() -> object:
    with tempfile.TemporaryDirectory(prefix="bad ") as name:  # a space, and short enough for sockets
        yield Path(name)


@pytest.mark.parametrize(("options", "status", "text"), CASES, ids=[case[0][:60] for case in CASES])
def test_one_line(folder: Path, options: str, status: int, text: str) -> None:
    from tests.support import products

    listener = prepare(folder)
    before = sorted(os.listdir(folder))
    kernel = str(products.bare("control"))
    words = [word.replace("{control}", kernel).replace("{}", str(folder)) for word in options.split(" ")]
    with listener, Machine(*words, guest=False) as machine:
        assert machine.wait() == status, machine.errors()
        (line,) = machine.errors().splitlines()
        assert re.search(rf"^atoll run: .*{text}", line), line
        assert sorted(os.listdir(folder)) == before
        machine.gone()


def test_a_locked_image(folder: Path) -> None:
    image = folder / "disk"
    image.write_bytes(bytes(1 << 20))
    with Machine(*CONSOLE, "-hda", str(image)) as first:
        first.says("ready")
        with Machine(*CONSOLE, "-hda", str(image)) as second:
            assert second.wait() == 1
            (line,) = second.errors().splitlines()
            assert re.search(r"atoll run: .*disk: is locked", line)
            second.gone()
        first.type(b"O")
        assert first.wait() == 0


def test_a_runtime_folder_that_cannot_be(folder: Path) -> None:
    (folder / "file").write_text("")
    for runtime in (folder / "file", Path("/proc/none"), folder / ("n" * 120)):
        with Machine(runtime=runtime) as machine:
            assert machine.wait() == 1
            (line,) = machine.errors().splitlines()
            assert line.startswith("atoll run: ") and "XDG_RUNTIME_DIR" in line
            assert not machine.roles()


def test_a_full_disk_for_the_serial_port_is_said_once() -> None:
    with Machine("-serial", "file:/dev/full", "-device", "isa-debug-exit", "-monitor", "stdio") as machine:
        until(lambda: machine.errors(), "the complaint")
        machine.type(b"quit\n")
        assert machine.wait() == 0
        assert machine.errors() == "atoll run: /dev/full: No space left on device; output is lost"
        machine.gone()


def test_a_full_disk_for_the_log(folder: Path) -> None:
    with Machine(*CONSOLE, "-D", "/dev/full", "-trace", "*") as machine:
        machine.says("ready")
        machine.type(b"O")
        assert machine.wait() == 0
        assert machine.errors() == ""
        machine.gone()


def test_a_full_disk_for_the_statistics() -> None:
    with Machine(*CONSOLE, "-stats", "/dev/full") as machine:
        machine.says("ready")
        machine.type(b"O")
        assert machine.wait() == 1
        assert machine.errors() == "atoll run: -stats /dev/full: No space left on device"
        machine.gone()
    assert Path("/dev/full").is_char_device()


def test_paths_with_spaces_and_commas(folder: Path) -> None:
    """A comma in a value is doubled, as QEMU wants it."""
    image, log, pid = folder / "a disc, old.iso", folder / "serial log", folder / "the pid"
    image.write_bytes(bytes(4096))
    doubled = str(image).replace(",", ",,")
    trace, stats = folder / "a trace", folder / "the stats"
    with Machine(
        "-drive",
        f"file={doubled},if=ide,index=2,media=cdrom,format=raw,readonly=on",
        "-serial",
        f"file:{log}",
        "-pidfile",
        str(pid),
        "-D",
        str(trace),
        "-trace",
        "pic*",
        "-stats",
        str(stats),
        "-monitor",
        "stdio",
    ) as machine:
        until(lambda: log.exists() and log.read_bytes() == b"ready\n", "the guest")
        assert pid.read_text() == f"{machine.process.pid}\n"
        machine.type(b"info block\nquit\n")
        machine.says(re.escape(str(image)))
        assert machine.wait() == 0
        assert machine.errors() == ""
        assert not pid.exists() and stats.stat().st_size > 100
        assert re.search(r"pic\w*_write", trace.read_text())
        machine.gone()
