"""From options to a machine: what each option of QEMU's spelling means here."""

from __future__ import annotations

import datetime
import os
import stat
import uuid as uuid_module
from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator import chardev_spec
from coordinator.chardev_spec import ChardevSpec, parse_device
from coordinator.cli import options
from coordinator.cli.options import HelpWanted, KeyValues
from coordinator.contract.config import Boot, DebugExit, Drive, Machine, Media, Rtc
from coordinator.contract.errors import ConfigError, UsageError
from coordinator.policy import Options

MIN_RAM, MAX_RAM = 1 << 20, 64 << 30
MAX_VCPUS = 32
#: names that a command line for such a machine may carry; all mean the one model (docs/quirks.md)
CPU_MODELS = ("atoll", "qemu64", "kvm64", "max", "host", "qemu32", "EPYC", "EPYC-Rome", "EPYC-Milan", "Opteron_G5")
DRIVE_PROPERTIES = ("file", "if", "index", "media", "format", "readonly", "id", "bus", "unit", "serial", "cache", "aio")
NO_NETWORK = "there is no network yet; say -nic none"


@dataclass
class MonitorSpec:
    """A monitor: ``mode`` is "control" (QMP) or "readline"."""

    device: ChardevSpec
    mode: str
    pretty: bool = False


@dataclass
class Settings:
    """The command line as understood so far."""

    name: str = "atoll"
    vcpus: int = 1
    ram: int = 128 << 20
    drives: list[Drive] = field(default_factory=list)
    serials: list[ChardevSpec] = field(default_factory=list)
    monitors: list[MonitorSpec] = field(default_factory=list)
    chardevs: dict[str, ChardevSpec] = field(default_factory=dict)
    boot: Boot = field(default_factory=Boot)
    rtc: Rtc = field(default_factory=Rtc)
    uuid: str = "00000000-0000-0000-0000-000000000000"
    vga: bool | None = None
    debug_exit: DebugExit | None = None
    bios: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str = ""
    nographic: bool = False
    defaults: bool = True
    serial_given: bool = False
    monitor_given: bool = False
    options: Options = field(default_factory=Options)
    pidfile: str | None = None
    log_file: str | None = None
    trace: list[str] = field(default_factory=list)
    stats: str | None = None
    #: drives of if=none, waiting for their -device
    loose: dict[str, Drive] = field(default_factory=dict)


def settings(arguments: list[str]) -> Settings:
    """Parse a command line; UsageError names what is wrong."""
    result = Settings()
    for name, value in options.parse(arguments):
        if name in _FLAGS:
            _FLAGS[name](result)
        else:
            _VALUES[name](result, value)
    _finish(result)
    return result


def _finish(s: Settings) -> None:
    if s.loose:
        raise UsageError(f"-drive id={next(iter(s.loose))}: if=none needs a -device ide-hd or ide-cd with drive=")
    if s.kernel is None and (s.initrd or s.append):
        raise UsageError("-initrd and -append need -kernel")
    _default_devices(s)
    if s.vga is None:
        s.vga = s.defaults
    _used_once(s)


def _default_devices(s: Settings) -> None:
    """What QEMU adds where nothing was said, as its -nographic documents it."""
    serial, monitor = s.defaults and not s.serial_given, s.defaults and not s.monitor_given
    if s.nographic and serial and monitor:
        s.serials.append(parse_device("serial", "mon:stdio"))
    elif s.nographic and serial:
        s.serials.append(parse_device("serial", "stdio"))
    elif s.nographic and monitor:
        s.monitors.append(MonitorSpec(parse_device("monitor", "stdio"), "readline"))
    elif serial:
        s.serials.append(parse_device("serial", "null"))


def _used_once(s: Settings) -> None:
    """A terminal, a file or a socket has one user."""
    taken: set[str] = set()
    for spec in (*s.serials, *(m.device for m in s.monitors)):
        if spec.kind == "stdio" and spec.where in taken:
            raise UsageError("the terminal is used twice; only one of -serial, -monitor and -qmp can have stdio (mon:stdio shares it)")
        if spec.kind != "null" and spec.where in taken:
            raise UsageError(f"{spec.where} is used twice; give each -serial, -monitor and -qmp a place of its own")
        taken.add(spec.where)


def machine(s: Settings, vga_rom: str | None, rom_size: int) -> Machine:
    """The configuration that every process reads; ``rom_size`` is 0 where no firmware runs."""
    boot = Boot(order=s.boot.order, menu=s.boot.menu, direct=s.kernel is not None)
    return Machine(
        name=s.name, vcpus=s.vcpus, ram=s.ram, drives=tuple(sorted(s.drives, key=lambda d: d.index)),
        serials=min(len(s.serials), 2), vga=bool(s.vga), rtc=s.rtc, boot=boot, uuid=s.uuid, rom_size=rom_size,
        debug_exit=s.debug_exit, vga_rom=vga_rom if s.vga else None, trace=tuple(s.trace),
    )


# ---- one function an option ---------------------------------------------------------------------------
def _machine(s: Settings, value: str) -> None:
    kv = KeyValues("machine", value, implied="type")
    kind = kv.take("type", "pc")
    assert kind is not None
    if kind == "help":
        raise HelpWanted("machine types: pc (i440FX + PIIX3)")
    if kind != "pc" and not kind.startswith("pc-i440fx"):
        raise UsageError(f"machine type '{kind}' is not known; the one there is is 'pc'")
    accel = kv.take("accel")
    if accel is not None:
        _accel(s, accel)
    kv.ignore("usb", "graphics", "dump-guest-core", "mem-merge", "vmport", "hpet", "acpi", "kernel-irqchip")
    kv.done(("type", "accel"))


def _accel(s: Settings, value: str) -> None:
    engine = options.split(value)[0].split(":")[0]
    if engine in ("kvm", "xen", "hvf", "whpx"):
        raise UsageError(f"-accel {engine} is not available: Atoll emulates; say -accel tcg")
    if engine not in ("interp", "tcg"):
        raise UsageError(f"-accel {engine} is not known; choose interp or tcg")


def _cpu(s: Settings, value: str) -> None:
    name = options.split(value)[0]
    if name == "help":
        raise HelpWanted("CPU models: " + ", ".join(CPU_MODELS) + " (all name the same x86-64-v2 model)")
    if name not in CPU_MODELS:
        raise UsageError(f"-cpu {name} is not known; the nearest known one is {options.nearest(name, CPU_MODELS)}")


def _memory(s: Settings, value: str) -> None:
    kv = KeyValues("m", value, implied="size")
    s.ram = options.size("m", kv.need("size"))
    kv.ignore("slots", "maxmem")
    kv.done(("size",))
    if not MIN_RAM <= s.ram <= MAX_RAM:
        raise UsageError(f"-m {value}: RAM must be from 1M to 64G")
    s.ram &= ~0xFFF


def _smp(s: Settings, value: str) -> None:
    kv = KeyValues("smp", value, implied="cpus")
    shape = {key: kv.number(key, 0, 1, MAX_VCPUS) for key in ("cpus", "sockets", "cores", "threads", "maxcpus", "dies")}
    kv.done(shape)
    product = (shape["sockets"] or 1) * (shape["cores"] or 1) * (shape["threads"] or 1) * (shape["dies"] or 1)
    s.vcpus = shape["cpus"] or product
    if s.vcpus > MAX_VCPUS:
        raise UsageError(f"-smp {value}: at most {MAX_VCPUS} vCPUs")


def _name(s: Settings, value: str) -> None:
    kv = KeyValues("name", value, implied="guest")
    s.name = kv.take("guest") or s.name
    kv.ignore("process", "debug-threads")
    kv.done(("guest",))


def _uuid(s: Settings, value: str) -> None:
    try:
        s.uuid = str(uuid_module.UUID(value))
    except ValueError:
        raise UsageError(f"-uuid {value}: not a UUID") from None


def _image(s: Settings, index: int, media: Media, file: str) -> None:
    if not file:
        raise UsageError("-cdrom, -hda, -hdb, -hdc and -hdd need the name of an image file")
    letter = "cd" if media is Media.CDROM else "hd"
    _add_drive(s, Drive(id=f"ide{index // 2}-{letter}{index % 2}", index=index, media=media, file=_absolute(file),
                        read_only=media is Media.CDROM))


def _absolute(file: str | None) -> str | None:
    return os.path.abspath(file) if file else None


def _add_drive(s: Settings, drive: Drive) -> None:
    if any(d.index == drive.index for d in s.drives):
        raise UsageError(f"two drives at index {drive.index}: {drive.id}")
    if any(d.id == drive.id for d in s.drives):
        raise UsageError(f"two drives named {drive.id}")
    s.drives.append(drive)


def _free_index(s: Settings) -> int:
    used = {d.index for d in s.drives}
    for index in range(4):
        if index not in used:
            return index
    raise UsageError("there are only four IDE drives")


def _drive(s: Settings, value: str) -> None:
    kv = KeyValues("drive", value)
    interface = kv.choice("if", ("ide", "none"), "ide")
    media = Media(kv.choice("media", ("disk", "cdrom"), "disk"))
    file = _absolute(kv.take("file"))
    image_format = kv.take("format", "raw") or "raw"
    if image_format != "raw":
        raise UsageError(f"-drive format={image_format}: only raw images can be used yet")
    read_only = kv.flag("readonly", media is Media.CDROM) or media is Media.CDROM
    bus, unit = kv.take("bus"), kv.number("unit", 0, 0, 1)
    if bus not in (None, "0", "1"):
        raise UsageError(f"-drive bus={bus}: choose 0 or 1")
    given = kv.number("index", -1, 0, 3)
    ident = kv.take("id")
    serial = kv.take("serial") or ""
    kv.ignore("cache", "aio", "discard", "werror", "rerror", "detect-zeroes", "copy-on-read")
    if kv.flag("snapshot"):
        raise UsageError("-drive snapshot=on is not there yet")
    kv.done(DRIVE_PROPERTIES)
    if media is Media.DISK and file is None:
        raise UsageError("-drive media=disk needs file=")
    if interface == "none":
        if not ident:
            raise UsageError("-drive if=none needs id=")
        s.loose[ident] = Drive(id=ident, index=0, media=media, file=file, read_only=read_only, serial=serial)
        return
    index = given if given >= 0 else int(bus) * 2 + unit if bus is not None else _free_index(s)
    letter = "cd" if media is Media.CDROM else "hd"
    ident = ident or f"ide{index // 2}-{letter}{index % 2}"
    _add_drive(s, Drive(id=ident, index=index, media=media, file=file, read_only=read_only, serial=serial))


def _device(s: Settings, value: str) -> None:
    kv = KeyValues("device", value, implied="driver")
    driver = kv.need("driver")
    if driver == "isa-debug-exit":
        s.debug_exit = DebugExit(kv.number("iobase", 0x501, 0, 0xFFFF), kv.number("iosize", 2, 1, 4))
        kv.ignore("id")
        kv.done(("iobase", "iosize"))
    elif driver in ("ide-cd", "ide-hd"):
        _ide_device(s, kv, Media.CDROM if driver == "ide-cd" else Media.DISK)
    elif driver in ("VGA", "std"):
        s.vga = True
    elif any(word in driver for word in ("net", "e1000", "rtl8139")):
        raise UsageError(f"-device {driver}: {NO_NETWORK}")
    else:
        known = ("isa-debug-exit", "ide-cd", "ide-hd", "VGA")
        raise UsageError(f"-device {driver} is not known; the nearest known one is {options.nearest(driver, known)}")


def _ide_device(s: Settings, kv: KeyValues, media: Media) -> None:
    source = kv.take("drive")
    loose = s.loose.pop(source, None) if source else None
    if source and loose is None:
        raise UsageError(f"-device drive={source}: there is no -drive if=none,id={source} before it")
    if loose is None and media is Media.DISK:
        raise UsageError("-device ide-hd needs drive=")
    bus = kv.take("bus")
    unit = kv.number("unit", 0, 0, 1)
    if bus is not None and bus not in ("ide.0", "ide.1"):
        raise UsageError(f"-device bus={bus}: choose ide.0 or ide.1")
    index = int(bus[-1]) * 2 + unit if bus else _free_index(s)
    ident = kv.take("id") or (loose.id if loose else f"ide{index // 2}-cd{index % 2}")
    serial = kv.take("serial") or (loose.serial if loose else "")
    kv.ignore("bootindex", "model", "ver", "wwn")
    kv.done(("drive", "bus", "unit", "id", "serial"))
    _add_drive(s, Drive(id=ident, index=index, media=media, file=loose.file if loose else None,
                        read_only=loose.read_only if loose else media is Media.CDROM, serial=serial))


def _boot(s: Settings, value: str) -> None:
    kv = KeyValues("boot", value, implied="order")
    order = kv.take("order") or kv.take("once") or s.boot.order
    if set(order) - set("acdn"):
        raise UsageError(f"-boot {order}: order is made of a, c, d and n")
    menu = kv.flag("menu", s.boot.menu)
    kv.ignore("once", "splash", "splash-time", "reboot-timeout", "strict")
    kv.done(("order", "menu"))
    s.boot = Boot(order=order, menu=menu, direct=s.boot.direct)


def _rtc(s: Settings, value: str) -> None:
    kv = KeyValues("rtc", value)
    base = kv.take("base", "utc") or "utc"
    if base not in ("utc", "localtime"):
        try:
            datetime.datetime.fromisoformat(base)
        except ValueError:
            raise UsageError(f"-rtc base={base}: say utc, localtime or a date like 2026-01-31T12:00:00") from None
    clock = kv.choice("clock", ("host", "vm", "rt"), "host")
    kv.ignore("driftfix")
    kv.done(("base", "clock"))
    s.rtc = Rtc(base=base, clock="host" if clock == "rt" else clock)


def _no_network(s: Settings, value: str) -> None:
    if options.split(value)[0] != "none":
        raise UsageError(f"'{value}': {NO_NETWORK}")


def _display(s: Settings, value: str) -> None:
    kind = options.split(value)[0]
    if kind != "none":
        raise UsageError(f"-display {kind}: there is no window; say -display none and use screendump")


def _vga(s: Settings, value: str) -> None:
    if value not in ("std", "none"):
        raise UsageError(f"-vga {value}: choose std or none")
    s.vga = value == "std"


def _serial(s: Settings, value: str) -> None:
    s.serial_given = True
    if value != "none":
        s.serials.append(parse_device("serial", value, s.chardevs))
    if len(s.serials) > 2:
        raise UsageError("there are two serial ports")


def _monitor(s: Settings, value: str) -> None:
    s.monitor_given = True
    if value != "none":
        s.monitors.append(MonitorSpec(parse_device("monitor", value, s.chardevs), "readline"))


def _qmp(s: Settings, value: str) -> None:
    s.monitor_given = True
    s.monitors.append(MonitorSpec(parse_device("qmp", value, s.chardevs), "control"))


def _chardev(s: Settings, value: str) -> None:
    kv = KeyValues("chardev", value, implied="backend")
    spec = chardev_spec.from_properties(kv)
    if spec.id in s.chardevs:
        raise UsageError(f"-chardev: two named {spec.id}")
    s.chardevs[spec.id] = spec


def _mon(s: Settings, value: str) -> None:
    kv = KeyValues("mon", value, implied="chardev")
    ident = kv.need("chardev")
    mode = kv.choice("mode", ("control", "readline"), "readline")
    pretty = kv.flag("pretty")
    kv.ignore("id", "default")
    kv.done(("chardev", "mode"))
    if ident not in s.chardevs:
        raise UsageError(f"-mon chardev={ident}: there is no -chardev id={ident} before it")
    s.monitor_given = True
    s.monitors.append(MonitorSpec(s.chardevs[ident], mode, pretty))


def _trace(s: Settings, value: str) -> None:
    kv = KeyValues("trace", value, implied="enable")
    s.trace.append(kv.need("enable"))
    s.log_file = kv.take("file") or s.log_file
    kv.done(("enable", "file"))


def _set(attribute: str) -> Callable[[Settings, str], None]:
    def store(s: Settings, value: str) -> None:
        setattr(s, attribute, value)

    return store


def _behave(**changes: bool) -> Callable[[Settings], None]:
    def store(s: Settings) -> None:
        s.options = Options(**{**s.options.__dict__, **changes})

    return store


def _enable(attribute: str, value: bool = True) -> Callable[[Settings], None]:
    def store(s: Settings) -> None:
        setattr(s, attribute, value)

    return store


_FLAGS: dict[str, Callable[[Settings], None]] = {
    "nographic": _enable("nographic"),
    "nodefaults": _enable("defaults", False),
    "S": _behave(start_paused=True),
    "no-reboot": _behave(no_reboot=True),
    "no-shutdown": _behave(no_shutdown=True),
}

_VALUES: dict[str, Callable[[Settings, str], None]] = {
    "machine": _machine, "M": _machine, "accel": _accel, "cpu": _cpu, "m": _memory, "smp": _smp, "name": _name,
    "uuid": _uuid, "drive": _drive, "device": _device, "boot": _boot, "bios": _set("bios"), "kernel": _set("kernel"),
    "initrd": _set("initrd"), "append": _set("append"), "display": _display, "vga": _vga, "serial": _serial,
    "monitor": _monitor, "qmp": _qmp, "chardev": _chardev, "mon": _mon, "net": _no_network, "nic": _no_network,
    "netdev": _no_network, "rtc": _rtc, "pidfile": _set("pidfile"), "D": _set("log_file"), "trace": _trace,
    "stats": _set("stats"),
    "cdrom": lambda s, v: _image(s, 2, Media.CDROM, v),
    "hda": lambda s, v: _image(s, 0, Media.DISK, v),
    "hdb": lambda s, v: _image(s, 1, Media.DISK, v),
    "hdc": lambda s, v: _image(s, 2, Media.DISK, v),
    "hdd": lambda s, v: _image(s, 3, Media.DISK, v),
}  # fmt: skip


def check_files(s: Settings) -> None:
    """Files that the user named must be usable before anything starts."""
    for option, file in (("bios", s.bios), ("kernel", s.kernel)):
        if file is not None:
            _readable(f"-{option}", file)
    for file in (s.initrd or "").split(",") if s.initrd else ():
        _readable("-initrd", file.split(" ")[0])
    for drive in s.drives:
        if drive.file is not None:
            mode = _readable(f"drive {drive.id}:", drive.file, (stat.S_ISREG, stat.S_ISBLK))
            if not drive.read_only and not os.access(drive.file, os.W_OK):
                raise ConfigError(f"drive {drive.id}: {drive.file}: is not writable; add readonly=on or change its mode")
            if stat.S_ISREG(mode) and os.path.getsize(drive.file) == 0:
                raise ConfigError(f"drive {drive.id}: {drive.file}: is empty; give an image with at least one sector")
    for option, file in (("-stats", s.stats), ("-pidfile", s.pidfile), ("-D", s.log_file)):
        if file is not None:
            _writable(option, file)


def _readable(what: str, file: str, kinds: tuple[Callable[[int], bool], ...] = (stat.S_ISREG,)) -> int:
    """The mode of a file that can be read."""
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise ConfigError(f"{what} {file}: {reason}") from None
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{what} {file}: is a directory, not an image")
    if not any(kind(mode) for kind in kinds):
        raise ConfigError(f"{what} {file}: is not a regular file")
    if not os.access(file, os.R_OK):
        raise ConfigError(f"{what} {file}: is not readable")
    return mode


def _writable(what: str, file: str) -> None:
    folder = os.path.dirname(os.path.abspath(file))
    if os.path.isdir(file):
        raise ConfigError(f"{what} {file}: is a directory")
    if not os.path.isdir(folder):
        raise ConfigError(f"{what} {file}: there is no folder {folder}")
    if not os.access(file if os.path.exists(file) else folder, os.W_OK):
        raise ConfigError(f"{what} {file}: cannot be written")
