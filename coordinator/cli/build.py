"""From options to a machine: what each option of QEMU's spelling means here."""

from __future__ import annotations

import dataclasses
import datetime
import re
import uuid as uuid_module
from collections.abc import Callable

from coordinator import chardev_spec
from coordinator.chardev_spec import parse_device
from coordinator.cli import drives, options, properties
from coordinator.cli.options import HelpWanted, KeyValues
from coordinator.cli.settings import MonitorSpec, Settings
from coordinator.contract.config import Boot, Machine, Media, Rtc
from coordinator.contract.errors import UsageError
from coordinator.migrate import uri
from coordinator.policy import Options

MIN_RAM, MAX_RAM = 1 << 20, 64 << 30
MAX_VCPUS = 32
#: names that a command line may carry, as QEMU has them; all mean the one model (docs/quirks.md)
CPU_MODELS = tuple(
    "atoll max host base qemu64 qemu32 kvm64 kvm32 486 pentium pentium2 pentium3 coreduo core2duo "
    "n270 athlon phenom Conroe Penryn Nehalem Westmere SandyBridge IvyBridge Haswell Broadwell "
    "Skylake-Client Skylake-Server Cascadelake-Server Cooperlake Icelake-Server Snowridge "
    "SapphireRapids GraniteRapids Denverton KnightsMill Opteron_G1 Opteron_G2 Opteron_G3 Opteron_G4 "
    "Opteron_G5 EPYC EPYC-Rome EPYC-Milan EPYC-Genoa Dhyana".split()
)
#: what QEMU appends to a name for a variant of it
CPU_VARIANT = re.compile(r"(-v\d+|-noTSX|-IBRS|-IBPB)+$")
#: a day, in seconds
MOST_ISLAND_TIMEOUT = 86400
#: of -sandbox, as QEMU has them
SANDBOX_PROPERTIES = ("obsolete", "elevateprivileges", "spawn", "resourcecontrol")
ENGINES, ABSENT_ENGINES = ("interp", "tcg"), ("kvm", "xen", "hvf", "whpx", "nvmm")


def settings(arguments: list[str]) -> Settings:
    """Parse a command line; UsageError names what is wrong."""
    result = Settings()
    for name, value in sorted(options.parse(arguments), key=lambda option: _RANK.get(option[0], 1)):
        if name in _FLAGS:
            _FLAGS[name](result)
        else:
            _VALUES[name](result, value)
    _finish(result)
    return result


def _finish(s: Settings) -> None:
    if s.loose:
        raise UsageError(
            f"-drive id={next(iter(s.loose))}: if=none needs a -device ide-hd or ide-cd with drive="
        )
    if s.kernel is None and (s.initrd or s.append):
        raise UsageError("-initrd and -append need -kernel")
    if s.engines and not set(s.engines) & set(ENGINES):
        raise UsageError(f"-accel {s.engines[0]} is not available: Atoll emulates; say -accel tcg")
    if s.snapshot:
        drives.throw_writes_away(s)
    properties.apply(s)
    _default_devices(s)
    _share(s)
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


def _share(s: Settings) -> None:
    """A monitor on the -chardev ...,mux=on of a serial port is the one that the port is shared with."""
    shared = [spec for spec in s.serials if spec.mux]
    s.monitors = [m for m in s.monitors if m.mode != "readline" or m.device not in shared or not m.device.id]


def _used_once(s: Settings) -> None:
    """A terminal, a file or a socket has one user."""
    taken: set[str] = set()
    for spec in (*s.serials, *(m.device for m in s.monitors)):
        if spec.kind == "stdio" and spec.where in taken:
            raise UsageError(
                "the terminal is used twice; only one of -serial, -monitor and -qmp can have stdio"
                " (mon:stdio shares it)"
            )
        if spec.kind != "null" and spec.where in taken:
            raise UsageError(
                f"{spec.where} is used twice; give each -serial, -monitor and -qmp a place of its own"
            )
        taken.add(spec.where)


def _incoming(s: Settings, value: str) -> None:
    if value != "defer":
        uri.parse(value, "-incoming")
    s.options = dataclasses.replace(s.options, incoming=value)


def _loadvm(s: Settings, value: str) -> None:
    s.options = dataclasses.replace(s.options, loadvm=value)


def _sandbox(s: Settings, value: str) -> None:
    """QEMU's further properties allow what no process of ours needs: they are known, and all stay denied."""
    kv = KeyValues("sandbox", value, implied="enable")
    on = kv.flag("enable", True)
    for name in SANDBOX_PROPERTIES:
        kv.choice(name, ("allow", "deny", "children"), "deny")
    kv.done(("enable", *SANDBOX_PROPERTIES))
    s.options = dataclasses.replace(s.options, sandbox=on)


def _island_timeout(s: Settings, value: str) -> None:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MOST_ISLAND_TIMEOUT:
        raise UsageError(f"-island-timeout {value}: must be seconds from 0 (never) to {MOST_ISLAND_TIMEOUT}")
    s.options = dataclasses.replace(s.options, island_timeout=seconds)


def _fault(s: Settings, value: str) -> None:
    s.options = dataclasses.replace(s.options, fault=value)


def _commits(s: Settings, value: str) -> None:
    kv = KeyValues("x-commits", value, implied="enable")
    on = kv.flag("enable", True)
    kv.done(("enable",))
    s.options = dataclasses.replace(s.options, commits=on)


def machine(s: Settings, vga_rom: str | None, rom_size: int) -> Machine:
    """The configuration that every process reads; ``rom_size`` is 0 where no firmware runs."""
    boot = Boot(order=s.boot.order, once=s.boot.once, menu=s.boot.menu, direct=s.kernel is not None)
    return Machine(
        name=s.name,
        vcpus=s.vcpus,
        ram=s.ram,
        drives=tuple(sorted(s.drives, key=lambda d: d.index)),
        serials=min(len(s.serials), 2),
        vga=bool(s.vga),
        nographic=s.nographic,
        rtc=s.rtc,
        boot=boot,
        uuid=s.uuid,
        rom_size=rom_size,
        debug_exit=s.debug_exit,
        vga_rom=vga_rom if s.vga else None,
        trace=tuple(s.trace),
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
        for engine in accel.split(":"):
            _accel(s, engine)
    kv.ignore("usb", "graphics", "dump-guest-core", "mem-merge", "vmport", "hpet", "acpi", "kernel-irqchip")
    kv.done(("type", "accel"))


def _accel(s: Settings, value: str) -> None:
    """One of a list in order of preference; one that there is must be among them."""
    engine = options.split(value)[0]
    if engine not in (*ENGINES, *ABSENT_ENGINES):
        raise UsageError(f"-accel {engine} is not known; choose interp or tcg")
    s.engines.append(engine)


def _cpu(s: Settings, value: str) -> None:
    name = options.split(value)[0]
    if name == "help":
        raise HelpWanted("CPU models: " + ", ".join(CPU_MODELS) + " (all name the same x86-64-v2 model)")
    if CPU_VARIANT.sub("", name) not in CPU_MODELS:
        raise UsageError(
            f"-cpu {name} is not known; the nearest known one is {options.nearest(name, CPU_MODELS)}"
        )


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
    shape = {
        key: kv.number(key, 0, 1, MAX_VCPUS)
        for key in ("cpus", "sockets", "cores", "threads", "maxcpus", "dies")
    }
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


def _boot(s: Settings, value: str) -> None:
    kv = KeyValues("boot", value, implied="order")
    order, once = kv.take("order") or s.boot.order, kv.take("once") or s.boot.once
    if set(order + once) - set("acdn"):
        raise UsageError(f"-boot {value}: order is made of a, c, d and n")
    menu = kv.flag("menu", s.boot.menu)
    kv.ignore("splash", "splash-time", "reboot-timeout", "strict")
    kv.done(("order", "once", "menu"))
    s.boot = Boot(order=order, once=once, menu=menu)


def _rtc(s: Settings, value: str) -> None:
    kv = KeyValues("rtc", value)
    base = kv.take("base", "utc") or "utc"
    if base not in ("utc", "localtime"):
        try:
            datetime.datetime.fromisoformat(base)
        except ValueError:
            raise UsageError(
                f"-rtc base={base}: say utc, localtime or a date like 2026-01-31T12:00:00"
            ) from None
    clock = kv.choice("clock", ("host", "vm", "rt"), "host")
    kv.ignore("driftfix")
    kv.done(("base", "clock"))
    s.rtc = Rtc(base=base, clock="host" if clock == "rt" else clock)


def _no_network(s: Settings, value: str) -> None:
    if options.split(value)[0] != "none":
        raise UsageError(f"'{value}': {drives.NO_NETWORK}")


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
    if value.startswith("mon:"):
        s.monitor_given = True
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
    "snapshot": _enable("snapshot"),
    "nodefaults": _enable("defaults", False),
    "S": _behave(start_paused=True),
    "no-reboot": _behave(no_reboot=True),
    "no-shutdown": _behave(no_shutdown=True),
}

#: what others refer to by its name comes before them, wherever it stands on the command line
_RANK = {"chardev": 0, "serial": 2, "device": 2, "mon": 2, "monitor": 2, "qmp": 2}

_VALUES: dict[str, Callable[[Settings, str], None]] = {
    "machine": _machine,
    "M": _machine,
    "accel": _accel,
    "cpu": _cpu,
    "m": _memory,
    "smp": _smp,
    "name": _name,
    "uuid": _uuid,
    "drive": drives.drive,
    "device": drives.device,
    "global": properties.global_property,
    "boot": _boot,
    "bios": _set("bios"),
    "kernel": _set("kernel"),
    "initrd": _set("initrd"),
    "append": _set("append"),
    "display": _display,
    "vga": _vga,
    "serial": _serial,
    "monitor": _monitor,
    "qmp": _qmp,
    "chardev": _chardev,
    "mon": _mon,
    "net": _no_network,
    "nic": _no_network,
    "netdev": _no_network,
    "rtc": _rtc,
    "incoming": _incoming,
    "sandbox": _sandbox,
    "island-timeout": _island_timeout,
    "x-fault": _fault,
    "x-commits": _commits,
    "loadvm": _loadvm,
    "pidfile": _set("pidfile"),
    "D": _set("log_file"),
    "trace": _trace,
    "stats": _set("stats"),
    "cdrom": lambda s, v: drives.image(s, 2, Media.CDROM, v),
    "hda": lambda s, v: drives.image(s, 0, Media.DISK, v),
    "hdb": lambda s, v: drives.image(s, 1, Media.DISK, v),
    "hdc": lambda s, v: drives.image(s, 2, Media.DISK, v),
    "hdd": lambda s, v: drives.image(s, 3, Media.DISK, v),
}
