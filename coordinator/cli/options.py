"""QEMU's option syntax: ``-name value`` with values like ``file=a,,b.iso,media=cdrom``.

One table (OPTIONS) says what there is; ``parse`` turns an argument vector into the options in
order. What they mean for a machine is build.py's concern.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.contract.errors import UsageError


@dataclass(frozen=True)
class Option:
    """``argument`` names the value in the help; None for a flag."""

    name: str
    argument: str | None
    about: str


OPTIONS = (
    Option("machine", "TYPE[,accel=A]", "machine type: pc"),
    Option("M", "TYPE", "short for -machine"),
    Option("accel", "interp|tcg", "execution engine (both are Atoll's own)"),
    Option("cpu", "NAME", "accepted for compatibility; there is one CPU model (-cpu help)"),
    Option("m", "[size=]MEGS", "guest RAM, with suffix M or G; default 128M"),
    Option("smp", "[cpus=]N", "number of vCPUs, each a process; default 1"),
    Option("name", "NAME", "name of the machine, shown by ps"),
    Option("uuid", "UUID", "UUID of the machine"),
    Option("cdrom", "FILE", "ISO image as secondary master"),
    Option("hda", "FILE", "disk image as primary master; -hdb -hdc -hdd for the other places"),
    Option("hdb", "FILE", "disk image as primary slave"),
    Option("hdc", "FILE", "disk image as secondary master"),
    Option("hdd", "FILE", "disk image as secondary slave"),
    Option("drive", "file=F,if=ide,index=N,media=M,format=raw|qcow2,readonly=on|off,id=ID", "a drive"),
    Option("device", "DRIVER[,PROP=V]", "isa-debug-exit, ide-cd, ide-hd, VGA"),
    Option(
        "global",
        "DRIVER.PROP=V",
        "ide-cd, ide-hd: migrate-stream=full|v0, migrate-drain=off|MS, migrate-incomplete=restart|error|drop",
    ),
    Option("boot", "[order=]cd[,menu=on]", "boot order: c disk, d CD-ROM"),
    Option("bios", "FILE", "firmware image; default SeaBIOS"),
    Option("kernel", "FILE", "boot a bzImage, multiboot or ELF kernel without firmware"),
    Option("initrd", "FILE", "initial RAM disk (for multiboot: modules, comma separated)"),
    Option("append", "TEXT", "kernel command line"),
    Option("nographic", None, "no display; serial port and monitor on the terminal"),
    Option("display", "none", "there is no window; use screendump to see the screen"),
    Option("vga", "std|none", "VGA card"),
    Option(
        "serial",
        "DEV",
        "stdio, mon:stdio, file:F, unix:PATH[,server=on,wait=off], tcp:HOST:PORT, chardev:ID, null, none",
    ),
    Option("monitor", "DEV", "human monitor on stdio, unix:PATH, none"),
    Option("qmp", "DEV", "QMP on unix:PATH,server=on,wait=off or tcp:HOST:PORT"),
    Option("chardev", "socket|stdio|file|null,id=ID,...", "a character device for -mon and -serial"),
    Option("mon", "chardev=ID,mode=control|readline", "monitor on a chardev"),
    Option("nodefaults", None, "no default serial port, monitor and VGA"),
    Option("snapshot", None, "writes to disks are thrown away at the end"),
    Option("net", "none", "there is no network yet"),
    Option("nic", "none", "there is no network yet"),
    Option("netdev", "...", "there is no network yet"),
    Option("rtc", "base=utc|localtime|DATE,clock=host|vm", "real-time clock"),
    Option("S", None, "do not start the guest; wait for cont"),
    Option("incoming", "tcp:HOST:PORT|unix:PATH|file:PATH|defer", "wait for the guest of another machine"),
    Option("loadvm", "TAG", "go on from a snapshot of the whole machine (savevm, snapshot-save)"),
    Option("sandbox", "on|off", "confine the processes of the machine, which is the default"),
    Option("island-timeout", "SECONDS", "replace an island that is silent so long; default 30, 0: never"),
    Option("x-fault", "POINT[:NTH]|port:NUMBER", "device hosts die there (for experiments)"),
    Option("x-commits", "on|off", "off: a device host that dies takes the machine along (for measurements)"),
    Option("no-reboot", None, "end instead of resetting"),
    Option("no-shutdown", None, "stop instead of ending when the guest shuts down"),
    Option("pidfile", "FILE", "write the coordinator's PID"),
    Option("D", "FILE", "write log and trace lines here instead of standard error"),
    Option("trace", "[enable=]PATTERN", "trace accesses to devices whose name matches (shell pattern)"),
    Option("stats", "FILE", "write counters as JSON at the end (Atoll's own option)"),
)


class HelpWanted(Exception):
    """An option's value was ``help``; the text is for standard output."""


#: options that people know from QEMU, and why they are not here
ABSENT = {
    "enable-kvm": "Atoll emulates every instruction; leave it out",
    "daemonize": "start it in the background with your shell or service manager",
    "vnc": "there is no window; screendump shows the screen",
    "usb": "there is no USB; the keyboard and mouse are PS/2",
    "usbdevice": "there is no USB; the keyboard and mouse are PS/2",
    "fda": "there is no floppy drive",
    "fdb": "there is no floppy drive",
    "parallel": "there is no parallel port; say -serial",
    "gdb": "there is no gdb server; the monitor has info registers and x",
    "s": "there is no gdb server; the monitor has info registers and x",
}

_BY_NAME = {option.name: option for option in OPTIONS}


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like ``word``."""
    words = list(known)
    matches = difflib.get_close_matches(word, words, n=1, cutoff=0.0)
    return matches[0] if matches else words[0]


def help_text() -> str:
    lines = ["usage: atoll run [OPTIONS]   (options as in qemu-system-x86_64)", ""]
    for option in OPTIONS:
        head = f"-{option.name}" + (f" {option.argument}" if option.argument else "")
        lines.append(
            f"  {head:<30} {option.about}" if len(head) <= 30 else f"  {head}\n{'':33}{option.about}"
        )
    lines += [
        "",
        "Keys on a console at the terminal: Ctrl-a x ends, Ctrl-a c switches to the monitor, Ctrl-a h helps",
    ]
    return "\n".join(lines)


def parse(arguments: list[str]) -> list[tuple[str, str]]:
    """(name, value) in order; flags have an empty value. Raises UsageError for what is not in the table."""
    found = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            raise UsageError(
                f"'{word}' is not an option; give a disk image with -hda {word}, a CD with -cdrom {word}"
            )
        name = word[2:] if word.startswith("--") else word[1:]
        option = _BY_NAME.get(name)
        if option is None and name in ABSENT:
            raise UsageError(f"option '{word}' cannot be used: {ABSENT[name]}")
        if option is None:
            raise UsageError(
                f"unknown option '{word}'; the nearest known one is '-{nearest(name, _BY_NAME)}'"
            )
        if option.argument is None:
            found.append((name, ""))
        elif not rest:
            raise UsageError(f"option '-{name}' needs a value: {option.argument}")
        else:
            found.append((name, rest.pop(0)))
    return found


def split(value: str) -> list[str]:
    """Cut at commas; a doubled comma is a comma."""
    return [part.replace("\0", ",") for part in value.replace(",,", "\0").split(",")]


class KeyValues:
    """The ``key=value`` list of one option. ``take`` removes what it reads; ``done`` refuses left-overs."""

    def __init__(self, option: str, value: str, implied: str | None = None) -> None:
        self.option = option
        self._values: dict[str, str] = {}
        for i, part in enumerate(split(value)):
            key, equals, text = part.partition("=")
            if not equals:
                if i == 0 and implied is not None:
                    key, text = implied, part
                else:
                    text = "on"
            self._values[key] = text

    def take(self, key: str, default: str | None = None) -> str | None:
        return self._values.pop(key, default)

    def need(self, key: str) -> str:
        value = self.take(key)
        if not value:
            raise UsageError(f"-{self.option} needs {key}=")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        if self._values.get(f"no{key}") == "on":  # the old form: server,nowait
            del self._values[f"no{key}"]
            return False
        value = self.take(key)
        if value is None:
            return default
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
        raise UsageError(f"-{self.option} {key}={value}: say on or off")

    def choice(self, key: str, known: Iterable[str], default: str) -> str:
        value = self.take(key, default)
        assert value is not None
        words = list(known)
        if value not in words:
            raise UsageError(f"-{self.option} {key}={value}: choose one of {', '.join(words)}")
        return value

    def number(self, key: str, default: int, low: int, high: int) -> int:
        value = self.take(key)
        if value is None:
            return default
        try:
            number = int(value, 0)
        except ValueError:
            raise UsageError(f"-{self.option} {key}={value}: not a number") from None
        if not low <= number <= high:
            raise UsageError(f"-{self.option} {key}={value}: must be from {low} to {high}")
        return number

    def ignore(self, *keys: str) -> None:
        """Properties that change nothing here."""
        for key in keys:
            self._values.pop(key, None)

    def done(self, known: Iterable[str]) -> None:
        if self._values:
            key = next(iter(self._values))
            raise UsageError(
                f"-{self.option}: unknown property '{key}'; the nearest known one is '{nearest(key, known)}'"
            )


_SUFFIXES = {"": 1 << 20, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def size(option: str, text: str) -> int:
    """Bytes from ``512``, ``512M`` or ``1.5G``; without a suffix the unit is MiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|0[xX][0-9a-fA-F]+)([bkmgt]?)", text, re.IGNORECASE | re.ASCII)
    try:
        if match is None:
            raise ValueError
        number = int(match[1], 16) if match[1][:2] in ("0x", "0X") else float(match[1])
        return int(number * _SUFFIXES[match[2].lower()])
    except (ValueError, OverflowError):
        raise UsageError(f"-{option} {text}: not a size; say for example 512M or 2G") from None
