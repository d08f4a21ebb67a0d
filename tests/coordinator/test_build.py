"""Command lines of QEMU and what they mean. Source: qemu-system-x86_64(1)."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from coordinator.chardev_spec import ChardevSpec
from coordinator.cli import build, files
from coordinator.cli.options import OPTIONS, HelpWanted
from coordinator.cli.settings import Settings
from coordinator.contract.config import DetectZeroes, Media, export_of
from coordinator.contract.drives import DrivePolicy, Incomplete, Stream
from coordinator.contract.errors import ConfigError, UsageError


def parse(line: str) -> Settings:
    return build.settings(shlex.split(line))


def drives(s: Settings) -> list[tuple[int, str, str | None, bool]]:
    found = build.machine(s, None, 0).drives
    return [(d.index, d.id, os.path.basename(d.file) if d.file else None, d.read_only) for d in found]


def test_a_whole_command_line() -> None:
    s = parse(
        "-name guest=vm,debug-threads=on -machine pc,accel=tcg -cpu qemu64,+x2apic -m size=1G "
        "-smp 4,sockets=1,cores=4 "
        "-drive file=disk.img,if=ide,index=0,media=disk,format=raw,cache=none "
        "-drive file=cd.iso,if=ide,index=2,media=cdrom,readonly=on -boot order=dc,menu=on "
        "-rtc base=utc,clock=host "
        "-uuid 5d8d2a7c-6b61-4ce6-8f0a-111213141516 -nodefaults -vga std -display none "
        "-chardev socket,id=q,path=/tmp/q,server=on,wait=off -mon chardev=q,mode=control "
        "-serial file:/tmp/serial -nic none -no-reboot -S -device isa-debug-exit,iobase=0xf4,iosize=0x04"
    )
    m = build.machine(s, "rom", 65536)
    assert (m.name, m.vcpus, m.ram, m.vga, m.serials, m.vga_rom, m.rom_size) == (
        "vm",
        4,
        1 << 30,
        True,
        1,
        "rom",
        65536,
    )
    assert (m.boot.order, m.boot.menu, m.boot.direct) == ("dc", True, False)
    assert m.uuid == "5d8d2a7c-6b61-4ce6-8f0a-111213141516"
    assert drives(s) == [(0, "ide0-hd0", "disk.img", False), (2, "ide1-cd0", "cd.iso", True)]
    assert m.debug_exit is not None and (m.debug_exit.iobase, m.debug_exit.iosize) == (0xF4, 4)
    assert s.options.no_reboot and s.options.start_paused and not s.options.no_shutdown
    (monitor,) = s.monitors
    assert monitor.mode == "control" and monitor.device.path == "/tmp/q"
    assert monitor.device.server and not monitor.device.wait
    assert s.serials == [ChardevSpec("file", path="/tmp/serial")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("-cdrom a", [(2, "ide1-cd0", "a", True)]),
        (
            "-hda a -hdb b -hdc c -hdd d",
            [
                (0, "ide0-hd0", "a", False),
                (1, "ide0-hd1", "b", False),
                (2, "ide1-hd0", "c", False),
                (3, "ide1-hd1", "d", False),
            ],
        ),
        ("-drive file=a,media=cdrom", [(0, "ide0-cd0", "a", True)]),  # as QEMU: the first place that is free
        ("-hda a -drive file=b", [(0, "ide0-hd0", "a", False), (1, "ide0-hd1", "b", False)]),
        ("-drive file=a,bus=1,unit=1", [(3, "ide1-hd1", "a", False)]),
        ("-drive file=a,index=3,media=cdrom", [(3, "ide1-cd1", "a", True)]),
        ("-drive file=a,readonly=on,id=x", [(0, "x", "a", True)]),
        ("-drive media=cdrom,index=2", [(2, "ide1-cd0", None, True)]),
        ("-drive if=none,id=d,file=a -device ide-hd,drive=d,bus=ide.1,unit=0", [(2, "d", "a", False)]),
        ("-drive if=none,id=d,file=a,media=cdrom -device ide-cd,drive=d", [(0, "d", "a", True)]),
        ("-device ide-cd,bus=ide.1", [(2, "ide1-cd0", None, True)]),
        ("-drive file=with,,comma", [(0, "ide0-hd0", "with,comma", False)]),
    ],
)
def test_drives(line: str, expected: list[tuple[int, str, str | None, bool]]) -> None:
    assert drives(parse(line)) == expected


def test_formats_and_what_becomes_of_writes() -> None:
    line = "-drive file=a -drive file=b,format=qcow2,snapshot=on,cache=unsafe,allow-backing=/images -cdrom c"
    a, b, c = build.machine(parse(line), None, 0).drives
    assert (a.format, a.snapshot, a.unsafe, a.backing_allowed) == ("auto", False, False, ())
    assert (b.format, b.snapshot, b.unsafe, b.backing_allowed) == ("qcow2", True, True, ("/images",))
    found = build.machine(parse(line + " -snapshot"), None, 0).drives
    assert [d.snapshot for d in found] == [True, True, False]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (False, DetectZeroes.OFF, False)),
        (",discard=unmap,aio=io_uring", (True, DetectZeroes.OFF, False)),
        (",discard=on,detect-zeroes=unmap,aio=native", (True, DetectZeroes.UNMAP, False)),
        (",discard=off,detect-zeroes=on", (False, DetectZeroes.ON, False)),
        (",discard=ignore,cache=writethrough,aio=threads", (False, DetectZeroes.OFF, True)),
        (",cache=directsync", (False, DetectZeroes.OFF, True)),
    ],
)
def test_discards_and_zeroes(words: str, expected: tuple[bool, DetectZeroes, bool]) -> None:
    """The same for a drive that a device takes; and the export has them."""
    for line in (f"-drive file=a{words}", f"-drive if=none,id=d,file=a{words} -device ide-hd,drive=d"):
        (drive,) = build.machine(parse(line), None, 0).drives
        for found in (drive, export_of(drive)):
            assert (found.discard, found.detect_zeroes, found.writethrough) == expected


def test_files_of_drives_are_absolute() -> None:
    (drive,) = build.machine(parse("-cdrom x"), None, 0).drives
    assert drive.file == os.path.abspath("x") and drive.media is Media.CDROM


TERMINAL, SHARED, NOTHING = "stdio", "mon:stdio", "null"


@pytest.mark.parametrize(
    ("line", "serials", "monitors"),
    [
        ("", [NOTHING], []),
        ("-nodefaults", [], []),
        ("-display none", [NOTHING], []),
        ("-nographic", [SHARED], []),
        ("-nographic -nodefaults", [], []),
        ("-nographic -monitor none", [TERMINAL], []),
        ("-nographic -serial file:x", ["file"], [TERMINAL]),
        ("-nographic -serial none", [], [TERMINAL]),
        ("-nographic -serial mon:stdio -monitor none", [SHARED], []),
        ("-nographic -serial mon:stdio", [SHARED], []),
        ("-chardev stdio,id=c,mux=on -mon chardev=c,mode=readline -serial chardev:c", [SHARED], []),
        ("-nographic -qmp unix:q,server=on,wait=off", [TERMINAL], ["socket"]),
        ("-serial stdio -serial null", [TERMINAL, NOTHING], []),
        ("-serial none -monitor stdio", [], [TERMINAL]),
        ("-monitor unix:m,server,nowait", [NOTHING], ["socket"]),
        ("-chardev stdio,id=c -serial chardev:c", [TERMINAL], []),
        ("-chardev stdio,id=c,mux=on -serial chardev:c", [SHARED], []),
    ],
)
def test_where_serial_ports_and_monitors_go(line: str, serials: list[str], monitors: list[str]) -> None:
    def kind(spec: ChardevSpec) -> str:
        return SHARED if spec.mux else spec.kind

    s = parse(line)
    assert [kind(spec) for spec in s.serials] == serials
    assert [kind(monitor.device) for monitor in s.monitors] == monitors


@pytest.mark.parametrize(
    ("line", "vga"),
    [
        ("", True),
        ("-nodefaults", False),
        ("-vga none", False),
        ("-nodefaults -vga std", True),
        ("-nodefaults -device VGA", True),
    ],
)
def test_vga(line: str, vga: bool) -> None:
    assert build.machine(parse(line), "rom", 0).vga is vga


@pytest.mark.parametrize(
    ("line", "vcpus"),
    [
        ("", 1),
        ("-smp 2", 2),
        ("-smp cpus=3", 3),
        ("-smp sockets=2,cores=2", 4),
        ("-smp 2,maxcpus=4", 2),
        ("-smp 32", 32),
    ],
)
def test_vcpus(line: str, vcpus: int) -> None:
    assert parse(line).vcpus == vcpus


@pytest.mark.parametrize(
    ("line", "base", "clock"),
    [
        ("", "utc", "host"),
        ("-rtc base=localtime", "localtime", "host"),
        ("-rtc clock=vm", "utc", "vm"),
        ("-rtc base=2026-01-31T12:00:00,clock=rt", "2026-01-31T12:00:00", "host"),
    ],
)
def test_clock(line: str, base: str, clock: str) -> None:
    rtc = build.machine(parse(line), None, 0).rtc
    assert (rtc.base, rtc.clock) == (base, clock)


def test_once_is_for_the_first_boot_alone() -> None:
    boot = build.machine(parse("-boot order=c,once=d"), None, 0).boot
    assert (boot.order, boot.once) == ("c", "d")


def test_names_may_be_used_before_they_are_given() -> None:
    line = "-device ide-cd,drive=x -drive if=none,id=x,media=cdrom,file=/x.iso"
    line += " -mon chardev=c -chardev null,id=c"
    settings = parse(line)
    assert [drive.file for drive in settings.drives] == ["/x.iso"]
    assert [monitor.device.id for monitor in settings.monitors] == ["c"]


@pytest.mark.parametrize(
    ("line", "order", "menu"),
    [
        ("", "cd", False),
        ("-boot d", "d", False),
        ("-boot order=cd,menu=on", "cd", True),
        ("-boot menu=on", "cd", True),
    ],
)
def test_boot(line: str, order: str, menu: bool) -> None:
    boot = build.machine(parse(line), None, 0).boot
    assert (boot.order, boot.menu) == (order, menu)


@pytest.mark.parametrize(
    "line",
    [
        "-net none",
        "-nic none",
        "-accel interp",
        "-accel tcg,thread=multi",
        "-M pc-i440fx-7.2",
        "-cpu max",
        "-cpu Skylake-Server-v4",
        "-cpu Haswell-noTSX-IBRS,-avx",
        "-machine pc,accel=kvm:tcg",
        "-accel kvm -accel tcg",
    ],
)
def test_accepted_without_effect(line: str) -> None:
    assert parse(line).vcpus == 1


@pytest.mark.parametrize("line", ["-cpu help", "-machine help"])
def test_help_is_no_error(line: str) -> None:
    with pytest.raises(HelpWanted):
        parse(line)


def test_trace_and_log() -> None:
    s = parse("-D log -trace 'ide*' -trace enable=pic,file=other")
    assert (s.trace, s.log_file) == (["ide*", "pic"], "other")


@pytest.mark.parametrize(
    "line",
    [
        "-drive if=none,id=a,file=x",
        "-drive if=none,file=x",
        "-drive if=virtio,file=x",
        "-device ide-hd",
        "-hda ''",
        "-device ide-hd,drive=nope",
        "-drive media=disk",
        "-drive file=x,cache=odd",
        "-drive file=x,discard=odd",
        "-drive file=x,aio=odd",
        "-drive file=x,detect-zeroes=odd",
        "-drive file=x,detect-zeroes=unmap",
        "-drive file=x,bus=2",
        "-hda a -hdb b -hdc c -hdd d -drive file=e",
        "-serial null -serial null -serial null",
        "-cdrom a -hdc b",
        "-chardev null,id=a -chardev null,id=a",
        "-chardev nonsense,id=a",
        "-serial tcp:host:99999",
        "-m 65G",
        "-machine pc,nonsense=1",
        "-accel kvm",
        "-accel nonsense",
        "-machine pc,accel=kvm:xen",
        "-mon nochardev",
        "-append x",
    ],
)
def test_refused(line: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(line)
    assert "\n" not in str(error.value)


def test_every_option_of_the_table_is_understood() -> None:
    assert {option.name for option in OPTIONS} == set(build._FLAGS) | set(build._VALUES)


def test_unreadable_and_unwritable_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Access is asked of the system; root may read everything, so it is answered here."""
    image = tmp_path / "image"
    image.write_bytes(bytes(512))
    for refused, text in ((os.R_OK, "is not readable"), (os.W_OK, "is not writable")):
        monkeypatch.setattr(os, "access", lambda path, mode, refused=refused: mode != refused)
        with pytest.raises(ConfigError, match=f"image: {text}"):
            files.check(parse(f"-hda {image}"))


def test_initrd_names(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "a disk, old"
    kernel.write_bytes(b"x")
    initrd.write_bytes(b"x")
    files.check(build.settings(["-kernel", str(kernel), "-initrd", str(initrd)]))
    files.check(build.settings(["-kernel", str(kernel), "-initrd", f"{kernel} some words,{kernel}"]))
    with pytest.raises(ConfigError, match="none: no such file"):
        files.check(build.settings(["-kernel", str(kernel), "-initrd", f"{kernel} words,{tmp_path}/none"]))


def policies(*arguments: str) -> dict[str, DrivePolicy]:
    return {drive.driver: drive.policy for drive in build.settings(list(arguments)).drives}


def test_global_properties_of_drives_wherever_they_stand() -> None:
    found = policies(
        "-global", "ide-cd.migrate-stream=v0", "-cdrom", "a.iso", "-hda", "b.img",
        "-global", "driver=ide-cd,property=migrate-drain,value=250",
        "-global", "ide-cd.migrate-incomplete=drop", "-global", "ide-hd.migrate-drain=90",
    )  # fmt: skip
    assert found["ide-cd"] == DrivePolicy(Stream.V0, 250, Incomplete.DROP)
    assert found["ide-hd"] == DrivePolicy(Stream.FULL, 90, Incomplete.ERROR)
    assert policies("-cdrom", "a.iso") == {"ide-cd": DrivePolicy(Stream.FULL, None, Incomplete.ERROR)}


def test_a_device_has_properties_of_its_own() -> None:
    found = policies(
        "-drive", "if=none,id=cd,media=cdrom,file=a.iso",
        "-device", "ide-cd,drive=cd,migrate-incomplete=restart,migrate-drain=off",
        "-global", "ide-cd.migrate-incomplete=drop", "-global", "ide-cd.migrate-drain=7",
    )  # fmt: skip
    assert found == {"ide-cd": DrivePolicy(Stream.FULL, None, Incomplete.RESTART)}


@pytest.mark.parametrize(
    ("value", "choices"),
    [
        ("ide-cd.migrate-stream=v1", "full, v0"),
        ("ide-cd.migrate-incomplete=", "restart, error, drop"),
        ("ide-cd.migrate-drain=-1", "off, or milliseconds"),
        ("ide-cd.migrate-drain=600001", "off, or milliseconds"),
        ("ide-cd.migrate-drain=9999999999999999999", "off, or milliseconds"),
        ("ide-hd.migrate-stream=v0", "choose one of full"),
        ("ide-hd.migrate-incomplete=drop", "migrate-stream, migrate-drain"),
        ("ide-cd.migrate", "ide-cd.migrate-stream=full"),
        ("ide-dvd.migrate-stream=full", "ide-cd, ide-hd"),
        ("driver=ide-cd,property=migrate-stream", "value"),
    ],
)
def test_wrong_global_properties_name_the_choices(value: str, choices: str) -> None:
    with pytest.raises(UsageError) as raised:
        build.settings(["-global", value])
    assert choices in str(raised.value) and "\n" not in str(raised.value)
