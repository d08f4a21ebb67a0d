"""The command line as understood so far, which the functions of the options fill in."""

from __future__ import annotations

from dataclasses import dataclass, field

from coordinator.chardev_spec import ChardevSpec
from coordinator.contract.config import Boot, DebugExit, Drive, Rtc
from coordinator.policy import Options


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
    snapshot: bool = False
    defaults: bool = True
    engines: list[str] = field(default_factory=list)
    serial_given: bool = False
    monitor_given: bool = False
    options: Options = field(default_factory=Options)
    pidfile: str | None = None
    log_file: str | None = None
    trace: list[str] = field(default_factory=list)
    stats: str | None = None
    #: drives of if=none, waiting for their -device
    loose: dict[str, Drive] = field(default_factory=dict)
    #: -global: (driver, property, value), and of -device by drive id: (property, value)
    globals: list[tuple[str, str, str]] = field(default_factory=list)
    own_properties: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
