"""What a machine is made of: the parsed command line, as every process may read it.

All structs are frozen and travel by the codec. Paths are absolute; sizes are bytes.
"""

from __future__ import annotations

import enum

import msgspec

from coordinator.contract.drives import DrivePolicy
from coordinator.contract.nbd import is_network_name


class Media(enum.Enum):
    DISK = "disk"
    CDROM = "cdrom"


class LeasePolicy(enum.Enum):
    """How the write lease of a disk comes to its VM (blockd/lease)."""

    #: none is taken; those of others are respected all the same
    OFF = "off"
    #: at the start, unless somebody else holds it
    TAKE = "take"
    #: at the start, from whoever has it
    BREAK = "break"
    #: later, by a transfer; until then the image is opened read-only and without locks
    AWAIT = "await"


class DetectZeroes(enum.Enum):
    """What becomes of a write of zeroes."""

    #: it is written
    OFF = "off"
    #: the range is made zero, and stays allocated
    ON = "on"
    #: the range is made zero, and its space is given back
    UNMAP = "unmap"


class Drive(msgspec.Struct, frozen=True):
    """An IDE drive. ``index`` 0-3: primary master, primary slave, secondary master, secondary slave."""

    id: str
    index: int
    media: Media
    file: str | None = None
    #: raw, qcow2, or auto for what the file itself claims to be
    format: str = "raw"
    read_only: bool = False
    serial: str = ""
    #: files and folders outside the image's own from which its backing files may come; "*" for all
    backing_allowed: tuple[str, ...] = ()
    #: writes go to a file that is thrown away at the end
    snapshot: bool = False
    #: a flush does nothing: for disks that nobody will miss
    unsafe: bool = False
    #: every write is durable when it is answered
    writethrough: bool = False
    #: False when a discarded range keeps its content
    discard: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    #: how a writable disk is leased
    lease: LeasePolicy = LeasePolicy.TAKE
    #: what migration does with a command under way
    policy: DrivePolicy = DrivePolicy()

    @property
    def driver(self) -> str:
        """As in -global: ide-cd or ide-hd."""
        return "ide-cd" if self.media is Media.CDROM else "ide-hd"


class Rtc(msgspec.Struct, frozen=True):
    """``base`` is utc, localtime or an ISO date; ``clock`` host or vm."""

    base: str = "utc"
    clock: str = "host"


class DebugExit(msgspec.Struct, frozen=True):
    """isa-debug-exit: a write ends the run with status (value << 1) | 1."""

    iobase: int = 0x501
    iosize: int = 2


class Boot(msgspec.Struct, frozen=True):
    """``order`` is letters of a, c, d, n, and ``once`` the same for the first boot alone; ``direct`` is True
    when no firmware runs."""

    order: str = "cd"
    once: str = ""
    menu: bool = False
    direct: bool = False


#: the guest's time-stamp counter
TSC_KHZ = 1_000_000


class Machine(msgspec.Struct, frozen=True):
    """One virtual machine."""

    name: str
    vcpus: int
    ram: int
    drives: tuple[Drive, ...] = ()
    serials: int = 1
    vga: bool = True
    #: firmware puts its console on the serial port
    nographic: bool = False
    rtc: Rtc = Rtc()
    boot: Boot = Boot()
    uuid: str = "00000000-0000-0000-0000-000000000000"
    tsc_khz: int = TSC_KHZ
    debug_exit: DebugExit | None = None
    #: file of the VGA option ROM, handed out through the PCI ROM BAR; None with -vga none
    vga_rom: str | None = None
    #: bytes of the firmware image at the start of the segment's ROM; 0 where no firmware runs
    rom_size: int = 0
    #: guest events to trace, as given to -trace
    trace: tuple[str, ...] = ()


class VcpuConfig(msgspec.Struct, frozen=True):
    """Start-up of a vCPU process. Descriptors are inherited: see coordinator/process.py."""

    vm: str
    index: int
    runtime: str
    parent: int
    segment_fd: int
    doorbell_fds: tuple[int, ...]
    log: str | None = None
    #: it gives up what it does not need, see contract/sandbox
    sandbox: bool = True
    trace: tuple[str, ...] = ()


class DevhostConfig(msgspec.Struct, frozen=True):
    """Start-up of a device host."""

    vm: str
    index: int
    runtime: str
    parent: int
    segment_fd: int
    doorbell_fd: int
    machine: Machine
    log: str | None = None
    #: another process has been this host, and has died
    replaces: bool = False
    #: where a standby waits for its order, see standby.py
    order_fds: tuple[int, ...] = ()
    #: devices that have been unplugged, by name
    unplugged: tuple[str, ...] = ()
    #: False: nothing is committed, for measurements; nobody can take over then
    commits: bool = True
    #: for experiments: where to die, see devhost/faults.py
    fault: str = ""
    #: it gives up what it does not need, see contract/sandbox
    sandbox: bool = True


#: formats of images that are known, by qemu-img's names
IMAGE_FORMATS = ("raw", "qcow2")


class Export(msgspec.Struct, frozen=True):
    """One image that blockd serves, under the drive's id."""

    id: str
    file: str
    format: str = "raw"
    read_only: bool = False
    media: Media = Media.DISK
    #: these as in Drive
    backing_allowed: tuple[str, ...] = ()
    snapshot: bool = False
    unsafe: bool = False
    writethrough: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    #: what a client is told about it; empty for its media and format
    description: str = ""
    #: an internal snapshot that is served read-only instead of the disk: its id or name, or
    #: snapshot.id=...,snapshot.name=...
    load_snapshot: str = ""
    #: persistent dirty bitmaps that clients may read
    bitmaps: tuple[str, ...] = ()
    #: False when a discarded range keeps its content
    discard: bool = True
    #: False when a raw image need not be in whole sectors
    sectors: bool = True
    #: what the user would write to open it read-only, and as a raw image: for errors
    read_only_option: str = "readonly=on"
    raw_option: str = "format=raw"
    #: how it is leased if it is written
    lease: LeasePolicy = LeasePolicy.OFF

    @property
    def leased(self) -> bool:
        """Does it take part in leases? What is not written, or written elsewhere, needs none, and an NBD
        server has none."""
        written = not (self.read_only or self.snapshot or self.load_snapshot) and self.media is Media.DISK
        return written and self.lease is not LeasePolicy.OFF and not is_network_name(self.file)

    @property
    def inactive(self) -> bool:
        """Is it waiting for its lease?"""
        return self.leased and self.lease is LeasePolicy.AWAIT


def export_of(drive: Drive, incoming: bool = False) -> Export:
    """The export that serves a drive, which has a medium. ``incoming``: the VM comes from elsewhere, and the
    leases of its disks with it."""
    assert drive.file is not None
    awaited = incoming and drive.lease is not LeasePolicy.OFF
    return Export(
        id=drive.id,
        file=drive.file,
        format=drive.format,
        read_only=drive.read_only,
        media=drive.media,
        backing_allowed=drive.backing_allowed,
        snapshot=drive.snapshot,
        unsafe=drive.unsafe,
        writethrough=drive.writethrough,
        discard=drive.discard,
        detect_zeroes=drive.detect_zeroes,
        lease=LeasePolicy.AWAIT if awaited else drive.lease,
    )


class BlockdConfig(msgspec.Struct, frozen=True):
    """Start-up of the block daemon."""

    vm: str
    runtime: str
    parent: int
    exports: tuple[Export, ...] = ()
    log: str | None = None
    #: it gives up what it does not need, see contract/sandbox
    sandbox: bool = True
    #: of the VM, for its leases
    uuid: str = ""
    #: another process has been this daemon, and has died
    replaces: bool = False
    #: files for what is thrown away at the end, one for each export with ``snapshot``, in their order
    scratch_fds: tuple[int, ...] = ()
    #: where a standby waits for its order, see standby.py
    order_fds: tuple[int, ...] = ()


def rehearsal_folder(runtime: str) -> str:
    """Where a standby's sockets are while it rehearses."""
    return f"{runtime}/warm"


def control_endpoint(runtime: str) -> str:
    """Where the coordinator's ROUTER listens."""
    return f"ipc://{runtime}/control"


def bus_endpoint(runtime: str, host: int) -> str:
    """Where device host ``host`` answers sync accesses."""
    return f"ipc://{runtime}/bus{host}"


def nbd_socket(runtime: str) -> str:
    """The UNIX socket on which blockd serves its exports."""
    return f"{runtime}/nbd"
