"""-cdrom, -hda and its like, -drive and -device: the drives of a machine and where they are."""

from __future__ import annotations

import msgspec

from coordinator.cli import options, properties
from coordinator.cli.options import KeyValues
from coordinator.cli.settings import Settings
from coordinator.contract.config import IMAGE_FORMATS, DebugExit, DetectZeroes, Drive, LeasePolicy, Media
from coordinator.contract.drives import PROPERTIES
from coordinator.contract.errors import UsageError
from coordinator.contract.nbd import absolute_name

DRIVE_PROPERTIES = (
    "file",
    "if",
    "index",
    "media",
    "format",
    "allow-backing",
    "readonly",
    "id",
    "bus",
    "unit",
    "serial",
    "cache",
    "snapshot",
    "lease",
    "aio",
    "discard",
    "detect-zeroes",
)
#: every write reaches the kernel before it is answered, and a flush the disk; with the two of WRITETHROUGH
#: each write reaches the disk, with unsafe not even a flush does. The host's page cache is always used
CACHE_MODES = ("writeback", "writethrough", "none", "directsync", "unsafe")
WRITETHROUGH = ("writethrough", "directsync")
#: accepted, and all the same: there is one engine, system calls from the threads of the block daemon
AIO = ("threads", "native", "io_uring")
#: what a discard does; the names that mean that it gives space back
DISCARD = ("ignore", "off", "unmap", "on")
DISCARDING = ("unmap", "on")
#: how a writable disk is leased; the remaining policy is for incoming machines
LEASES = tuple(policy.value for policy in LeasePolicy if policy is not LeasePolicy.AWAIT)
NO_NETWORK = "there is no network yet; say -nic none"


def image(s: Settings, index: int, media: Media, file: str) -> None:
    if not file:
        raise UsageError("-cdrom, -hda, -hdb, -hdc and -hdd need the name of an image file")
    letter = "cd" if media is Media.CDROM else "hd"
    _add_drive(
        s,
        Drive(
            id=f"ide{index // 2}-{letter}{index % 2}",
            index=index,
            media=media,
            file=_absolute(file),
            format="auto",
            read_only=media is Media.CDROM,
        ),
    )


def _absolute(file: str | None) -> str | None:
    return absolute_name(file) if file else None


def _add_drive(s: Settings, drive: Drive) -> None:
    if any(d.index == drive.index for d in s.drives):
        raise UsageError(f"two drives at index {drive.index}: {drive.id}")
    if any(d.id == drive.id for d in s.drives):
        raise UsageError(f"two drives named {drive.id}")
    s.drives.append(drive)


def throw_writes_away(s: Settings) -> None:
    """-snapshot: for all disks."""
    s.drives = [msgspec.structs.replace(d, snapshot=d.media is Media.DISK) for d in s.drives]


def _free_index(s: Settings) -> int:
    used = {d.index for d in s.drives}
    for index in range(4):
        if index not in used:
            return index
    raise UsageError("there are only four IDE drives")


def drive(s: Settings, value: str) -> None:
    kv = KeyValues("drive", value)
    interface = kv.choice("if", ("ide", "none"), "ide")
    media = Media(kv.choice("media", ("disk", "cdrom"), "disk"))
    file = _absolute(kv.take("file"))
    image_format = kv.choice("format", ("auto", *IMAGE_FORMATS), "auto")
    allowed = kv.take("allow-backing")
    backing_allowed = (allowed if allowed == "*" else absolute_name(allowed),) if allowed else ()
    read_only = kv.flag("readonly", media is Media.CDROM) or media is Media.CDROM
    bus, unit = kv.take("bus"), kv.number("unit", 0, 0, 1)
    if bus not in (None, "0", "1"):
        raise UsageError(f"-drive bus={bus}: choose 0 or 1")
    given = kv.number("index", -1, 0, 3)
    ident = kv.take("id")
    serial = kv.take("serial") or ""
    cache = kv.choice("cache", CACHE_MODES, "writeback")
    throwaway = kv.flag("snapshot")
    lease = LeasePolicy(kv.choice("lease", LEASES, "take"))
    kv.choice("aio", AIO, "threads")
    discard = kv.choice("discard", DISCARD, "ignore") in DISCARDING
    zeroes = DetectZeroes(kv.choice("detect-zeroes", (mode.value for mode in DetectZeroes), "off"))
    if zeroes is DetectZeroes.UNMAP and not discard:
        raise UsageError("-drive detect-zeroes=unmap: needs discard=unmap")
    kv.ignore("werror", "rerror", "copy-on-read")
    kv.done(DRIVE_PROPERTIES)
    if media is Media.DISK and file is None:
        raise UsageError("-drive media=disk needs file=")
    if interface == "none":
        if not ident:
            raise UsageError("-drive if=none needs id=")
        index = 0
    elif given >= 0:
        index = given
    else:
        index = int(bus) * 2 + unit if bus is not None else _free_index(s)
    letter = "cd" if media is Media.CDROM else "hd"
    ident = ident or f"ide{index // 2}-{letter}{index % 2}"
    made = Drive(
        id=ident,
        index=index,
        media=media,
        file=file,
        format=image_format,
        read_only=read_only,
        serial=serial,
        backing_allowed=backing_allowed,
        snapshot=throwaway,
        unsafe=cache == "unsafe",
        writethrough=cache in WRITETHROUGH,
        discard=discard,
        detect_zeroes=zeroes,
        lease=lease,
    )
    if interface == "none":
        s.loose[ident] = made
    else:
        _add_drive(s, made)


def device(s: Settings, value: str) -> None:
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
        raise UsageError(
            f"-device {driver} is not known; the nearest known one is {options.nearest(driver, known)}"
        )


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
    driver = "ide-cd" if media is Media.CDROM else "ide-hd"
    properties.take(s, kv, driver, ident)
    kv.ignore("bootindex", "model", "ver", "wwn")
    kv.done(("drive", "bus", "unit", "id", "serial", *PROPERTIES[driver]))
    empty = Drive(id=ident, index=index, media=media, format="auto", read_only=media is Media.CDROM)
    changes = {"id": ident, "index": index, "media": media, "serial": serial}
    _add_drive(s, msgspec.structs.replace(loose or empty, **changes))
