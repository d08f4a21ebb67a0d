"""The closed set of messages between processes. One message a ZeroMQ frame, see codec.py.

Control: every island holds a DEALER to the coordinator's ROUTER; its routing id is its role
("vcpu0", "devhost0", "blockd"). The coordinator sends a Command, the island answers with one
Answer of the same serial; islands send Notices on their own.

Bus: every vCPU holds a DEALER to each device host's ROUTER, routing id b"vcpuN", and has at most
one request open.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from coordinator.contract.codec import Codec
from coordinator.contract.config import Drive, Export
from coordinator.contract.drives import DrivePhase

#: raised with every change of a message; islands of another protocol are refused at Hello
PROTOCOL = 2

SPACE_PORT = 0
SPACE_MEMORY = 1
SPACE_INTA = 2


# ---- bus ----------------------------------------------------------------------------------------
class BusRequest(msgspec.Struct, frozen=True, tag="req", array_like=True):
    """A sync access, see ``struct io_request``. ``data``: width * count bytes for writes, else empty."""

    serial: int
    vcpu: int
    ticket: int
    space: int
    device: int
    addr: int
    width: Literal[1, 2, 4, 8]
    count: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    write: bool
    data: bytes


class BusReply(msgspec.Struct, frozen=True, tag="rep", array_like=True):
    """``data`` is width * count bytes for reads, empty for writes. ``hold``: not begun, ask again
    after the coordinator has been heard (a drain is on)."""

    serial: int
    data: bytes
    hold: bool = False


# ---- coordinator -> island ------------------------------------------------------------------------
class Command(msgspec.Struct, frozen=True, kw_only=True):
    """Base: ``serial`` pairs a command with its Answer."""

    serial: int


class Run(Command, frozen=True, tag="run"):
    """vCPU: enter the guest. Device host: resume."""


class Stop(Command, frozen=True, tag="stop"):
    """vCPU: stop at an instruction boundary. Device host: pause; answered when drained."""


class Reset(Command, frozen=True, tag="reset"):
    """Power-on state. vCPU 0 starts at the reset vector (or as loaded), others wait for SIPI."""


class LoadCpu(Command, frozen=True, tag="loadcpu"):
    """vCPU: start state of a boot without firmware. ``mode`` is "long" (64-bit flat, paging by the CR3
    given), "flat32" (protected, no paging) or "wait" (an application processor: only MSRs are set).
    ``registers``: rax..r15, rip, rflags, cr3, gdt_base, gdt_limit, mtrr_def_type, mtrr_base0,
    mtrr_mask0, mtrr_fixed (all eleven alike), then mtrr_fixed2 (that one). Selectors: code 10h (long) or
    20h (flat32), data 18h."""

    mode: str
    registers: dict[str, int]


class SaveState(Command, frozen=True, tag="savestate"):
    """vCPU or device host, stopped: value is its packed records by name (see state.py)."""


class LoadState(Command, frozen=True, tag="loadstate"):
    """vCPU or device host, stopped: go on from what SaveState gave on a machine of the same configuration."""

    records: dict[str, bytes]


class DescribeCpu(Command, frozen=True, tag="describecpu"):
    """vCPU: what a guest can rely on, as words of CPUID by name ("1.ecx"), XSAVE size ("d.0.ecx") among
    them."""


class SetDriveProperty(Command, frozen=True, tag="setdrive"):
    """Device host: -global at run time, for one drive or all of a driver (words: contract/drives.py). Before
    Stop, as that goes by them. Value: the properties of the drives concerned, by drive id."""

    driver: str
    name: str
    value: str
    drive: str | None = None


class DrainDrives(Command, frozen=True, tag="drain"):
    """Device host, while the vCPUs run: let commands end and none begin. Concerns drives whose policy has a
    drain; ``bound_ms`` (guest time) stands in for the policies' bounds and then concerns all. Answered late:
    {"drained": bool, "cancelled": bool, "waited_ns": int, "drives": [{"id", "phase", "drained"}]}. New
    commands wait (BusReply.hold) until CancelDrain or Run, also after the answer."""

    bound_ms: int | None = None


class CancelDrain(Command, frozen=True, tag="canceldrain"):
    """Device host: no more drain; one that is under way is answered. Harmless when there is none."""


class ArmPhase(Command, frozen=True, tag="armphase"):
    """Device host: at the ``nth`` time from now on that the drive enters ``phase``, hold it there and notify
    PhaseReached. The vCPUs are to be stopped then; the drive moves on at DisarmPhase, at the next Run or
    Reset, or after ``hold_ms``. PhaseMissed when it has not come within ``timeout_ms``. Times are guest
    time."""

    drive: str
    phase: DrivePhase
    nth: Annotated[int, msgspec.Meta(ge=1)] = 1
    timeout_ms: Annotated[int, msgspec.Meta(ge=1)] = 60_000
    hold_ms: Annotated[int, msgspec.Meta(ge=1)] = 5_000


class DisarmPhase(Command, frozen=True, tag="disarmphase"):
    """Device host: forget what is armed, let a drive that is held go on."""


class QueryPhases(Command, frozen=True, tag="queryphases"):
    """Device host: value is a list of dicts, one a drive: id, driver, phase (a DrivePhase), properties (as
    -global has them), and since the last ``reset`` of the counters guest_ns, and by phase ``ns`` and
    ``entries``. ``command`` tells of one under way, else None: opcode, packet (hex, CD-ROM only), position
    and length in the buffer, remaining bytes of the medium, PRD descriptor and region_left, the bytes left
    of its region."""

    reset: bool = False


class Quit(Command, frozen=True, tag="quit"):
    """End in order: flush, close, exit 0."""


class Translate(Command, frozen=True, tag="translate"):
    """vCPU, stopped: linear to guest-physical for the monitor's ``x``; value is gpa or None."""

    linear: int


class InjectNmi(Command, frozen=True, tag="nmi"):
    """vCPU."""


class DescribeChip(Command, frozen=True, tag="describe"):
    """Device host: text about ``what``; it knows "pic"."""

    what: str


class PowerButton(Command, frozen=True, tag="button"):
    """Device host: ACPI power button."""


class SendKeys(Command, frozen=True, tag="keys"):
    """Device host: press the qcodes in order, release them in reverse order."""

    keys: tuple[str, ...]
    hold_ms: int = 100


class SerialInput(Command, frozen=True, tag="serialin"):
    """Device host: bytes for UART ``index``; answered with the number taken."""

    index: int
    data: bytes


class Screen(Command, frozen=True, tag="screen"):
    """Device host: the picture; value is (width, height, RGB bytes)."""


class OpenTray(Command, frozen=True, tag="opentray"):
    """Device host. ``force`` overrides the guest's lock; else a locked tray asks the guest to eject."""

    drive: str
    force: bool = False


class CloseTray(Command, frozen=True, tag="closetray"):
    drive: str


class InsertMedium(Command, frozen=True, tag="insert"):
    """Device host: blockd now exports a medium under this drive's id (``drive.file`` None: removed)."""

    drive: Drive


class OpenExport(Command, frozen=True, tag="openexport"):
    """blockd."""

    export: Export


class CloseExport(Command, frozen=True, tag="closeexport"):
    """blockd."""

    id: str


class ResizeExport(Command, frozen=True, tag="resizeexport"):
    """blockd: make an export larger; sessions that began before see its old size."""

    id: str
    #: bytes
    size: int


class AcquireLeases(Command, frozen=True, tag="acquireleases"):
    """blockd: open these exports, all or none, those that are written under leases (``Export.lease``). Value:
    a list of dicts as of QueryExports."""

    exports: tuple[Export, ...]


class QueryLeases(Command, frozen=True, tag="queryleases"):
    """blockd: value is a list of dicts: id, file, state ("held", "transferring", "lost", "awaited", or "none"
    where the folder cannot keep one), and where there is one epoch, token and transfer."""


class PrepareTransfer(Command, frozen=True, tag="preparetransfer"):
    """blockd of the source: drain and close the exports of all leased images and mark the leases. ``images``
    may name them, which must be all. Value: dict with transfer, epoch, decision (path of the record to be)
    and images (as of QueryLeases). After an error everything is as before."""

    transfer: str
    images: tuple[str, ...] = ()


class ReleaseTransfer(Command, frozen=True, tag="releasetransfer"):
    """blockd of the source: the commit point; ``epoch`` as PrepareTransfer told it. Value: dict with
    transfer, epoch and decision. After an error ask again, or AbortTransfer, which finds out for certain."""

    transfer: str
    epoch: int


class AbortTransfer(Command, frozen=True, tag="aborttransfer"):
    """blockd of the source: everything is as before PrepareTransfer when this is answered, and a
    PrepareTransfer of this transfer that comes later is refused. An error after the commit point."""

    transfer: str


class CheckTransfer(Command, frozen=True, tag="checktransfer"):
    """blockd of the destination, between PrepareTransfer and ReleaseTransfer: are the images that are awaited
    here those of the transfer, and is the folder of its decision here? Value: a list of dicts with id, file,
    epoch and token, to be compared with the source's."""

    transfer: str


class GrantTransfer(Command, frozen=True, tag="granttransfer"):
    """blockd of the destination, after the commit point: take the leases, all or none, open the images again
    and serve writes. ``epoch`` as released. Value: a list of dicts as of QueryLeases. May be asked again
    after an error."""

    transfer: str
    epoch: int


class QuerySnapshots(Command, frozen=True, tag="querysnapshots"):
    """blockd: value is a list of dicts: id, file, refusal (why its image can have no snapshots with others,
    or None) and snapshots, each a dict of id, name, size (of the machine's state, bytes; 0 without), date_ns
    (UNIX time) and clock_ns (guest time). ``images`` () means all exports."""

    images: tuple[str, ...] = ()


class StoreVmState(Command, frozen=True, tag="storestate"):
    """blockd: connect to the UNIX socket ``path`` and keep what comes until its end in this export's image,
    for the next CreateSnapshots. Value: its bytes. Answered when all is there."""

    id: str
    path: str


class DropVmState(Command, frozen=True, tag="dropstate"):
    """blockd: forget what StoreVmState has kept, if anything."""


class FetchVmState(Command, frozen=True, tag="fetchstate"):
    """blockd: connect to ``path`` and send the machine's state of a snapshot; answered with its bytes before
    they are sent, which goes on beside other commands. An error later ends the stream early."""

    id: str
    tag: str
    path: str


class CreateSnapshots(Command, frozen=True, tag="createsnapshots"):
    """blockd: a snapshot named ``tag`` of all these exports or of none, with the guest at rest. ``vmstate``
    names the one that has the machine's state (StoreVmState), which appears last. ``replace``: snapshots of
    this name make room in the same moment."""

    tag: str
    images: tuple[str, ...]
    vmstate: str
    date_ns: int
    clock_ns: int
    replace: bool = False


class ApplySnapshots(Command, frozen=True, tag="applysnapshots"):
    """blockd: make all these disks, or none, what they were at ``tag``, with the guest at rest. Sessions are
    ended; clients come back."""

    tag: str
    images: tuple[str, ...]


class DeleteSnapshots(Command, frozen=True, tag="deletesnapshots"):
    """blockd: forget the snapshots named ``tag`` of all these exports that have some, or of none."""

    tag: str
    images: tuple[str, ...]


class Ping(Command, frozen=True, tag="ping"):
    """Device host and blockd: answered between two pieces of work, at once where there is none."""


class QueryExports(Command, frozen=True, tag="queryexports"):
    """blockd: value is a list of dicts (id, file, format, size, read_only, reads, writes, ...)."""


class IdentifyExport(Command, frozen=True, tag="identifyexport"):
    """blockd: value is a dict (size, content, writable), see blockd/identity.py."""

    id: str


class QueryDrives(Command, frozen=True, tag="querydrives"):
    """Device host: value is a list of dicts: id, phase (a DrivePhase) and stream ("full" or "v0", what
    SaveState writes), for CD-ROM drives tray_open, locked and inserted."""


AnyCommand = (
    Run
    | Stop
    | Reset
    | LoadCpu
    | SaveState
    | LoadState
    | DescribeCpu
    | SetDriveProperty
    | DrainDrives
    | CancelDrain
    | ArmPhase
    | DisarmPhase
    | QueryPhases
    | Quit
    | Translate
    | InjectNmi
    | DescribeChip
    | PowerButton
    | SendKeys
    | SerialInput
    | Screen
    | OpenTray
    | CloseTray
    | InsertMedium
    | OpenExport
    | CloseExport
    | AcquireLeases
    | QueryLeases
    | PrepareTransfer
    | ReleaseTransfer
    | AbortTransfer
    | CheckTransfer
    | GrantTransfer
    | ResizeExport
    | QuerySnapshots
    | StoreVmState
    | DropVmState
    | FetchVmState
    | CreateSnapshots
    | ApplySnapshots
    | DeleteSnapshots
    | Ping
    | QueryExports
    | IdentifyExport
    | QueryDrives
)


# ---- island -> coordinator ------------------------------------------------------------------------
class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of an island, when it is ready to serve."""

    role: str
    pid: int
    protocol: int = PROTOCOL


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """``error`` is a one-line text for the user, None when it went well."""

    serial: int
    value: Any = None
    error: str | None = None


class OutputReady(msgspec.Struct, frozen=True, tag="output"):
    """Device host: frames are waiting in its output ring (state.c). All its notices but this one, Hello and
    Failed, and its answers unless they are very large, travel there, so that they outlive it."""


class GuestReset(msgspec.Struct, frozen=True, tag="guestreset"):
    """The guest asked for a reset; ``reason`` is QEMU's word ("guest-reset") or a port's name."""

    reason: str


class GuestShutdown(msgspec.Struct, frozen=True, tag="guestshutdown"):
    """``reason``: "guest-shutdown" (ACPI S5), "triple-fault" or "debug-exit" with ``status``."""

    reason: str
    status: int = 0


class SerialOutput(msgspec.Struct, frozen=True, tag="serialout"):
    index: int
    data: bytes


class DebugOutput(msgspec.Struct, frozen=True, tag="debugout"):
    """Bytes of the firmware's debug port 402h or of E9h."""

    port: int
    data: bytes


class TraceLines(msgspec.Struct, frozen=True, tag="trace"):
    """Accesses that -trace asked for, oldest first."""

    lines: tuple[str, ...]


class TrayMoved(msgspec.Struct, frozen=True, tag="tray"):
    drive: str
    open: bool


class TookOver(msgspec.Struct, frozen=True, tag="tookover"):
    """A successor has loaded what its predecessor committed last: where each drive stands, by id."""

    role: str
    drives: dict[str, str]
    guest_ns: int


class PhaseReached(msgspec.Struct, frozen=True, tag="phasereached"):
    """ArmPhase: the drive is held in this phase since guest time ``guest_ns``."""

    drive: str
    phase: DrivePhase
    guest_ns: int


class PhaseMissed(msgspec.Struct, frozen=True, tag="phasemissed"):
    """ArmPhase: it did not come in time (``held`` False), or nobody stopped the vCPUs (True). Nothing is
    armed now."""

    drive: str
    phase: DrivePhase
    held: bool


class LeaseLost(msgspec.Struct, frozen=True, tag="leaselost"):
    """blockd: another has taken the lease of an image; every write to it fails from now on. ``error`` is one
    line for the user."""

    id: str
    error: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The island cannot go on; it exits after this."""

    error: str


AnyNotice = (
    Hello
    | Answer
    | OutputReady
    | GuestReset
    | GuestShutdown
    | SerialOutput
    | DebugOutput
    | TraceLines
    | TrayMoved
    | TookOver
    | PhaseReached
    | PhaseMissed
    | LeaseLost
    | Failed
)

commands: Codec[AnyCommand] = Codec(AnyCommand)
notices: Codec[AnyNotice] = Codec(AnyNotice)
requests: Codec[BusRequest] = Codec(BusRequest)
replies: Codec[BusReply] = Codec(BusReply)
