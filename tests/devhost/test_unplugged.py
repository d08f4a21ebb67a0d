"""A device that has been unplugged by its faults, at the registers; and what is in hand at a death.

Port numbers are the PC AT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.contract import messages
from coordinator.contract._segment import lib
from coordinator.contract.errors import UsageError
from coordinator.toll import Work, in_hand
from devhost.faults import Faults
from tests.devhost.lives import Deadly, Guest, Killed

COM1, ALTERNATE, IDE_STATUS, IDE_COMMAND, IDE_DEVICE = 0x3F8, 0x3F6, 0x1F7, 0x1F7, 0x1F6
READ_SECTORS, IDENTIFY = 0x20, 0xEC
#: of the IDE channel, at the fabric
IRQ14 = 14


class At(Faults):
    """Dies three times when a port is accessed, and notes what is in hand."""

    def __init__(self) -> None:
        self.port: int | None = None
        self.works: list[Work] = []
        self.guest: Guest | None = None

    def access(self, space: int, address: int) -> None:
        if address == self.port and self.guest is not None:
            work = in_hand(self.guest.segment.host(0))
            assert work is not None
            self.works.append(work)
            if len(self.works) == 3:
                self.port = None
            raise Killed


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    faults = At()
    faults.guest = guest = Guest(tmp_path, faults)
    yield guest
    guest.close()


def unplug(guest: Guest, *names: str) -> None:
    guest.unplugged = names
    guest._dies()


def test_it_reads_as_all_ones_and_takes_no_writes(guest: Guest) -> None:
    assert guest.access(IDE_STATUS) != b"\xff"
    unplug(guest, "ide0")
    for port in (IDE_STATUS, ALTERNATE, IDE_DEVICE):
        assert guest.access(port) == b"\xff"
    assert guest.access(0x1F0, width=2, count=3) == b"\xff" * 6
    guest.out(IDE_DEVICE, 0xA0)
    guest.out(IDE_COMMAND, READ_SECTORS)
    guest.post((0x1F2, 1), (0x1F3, 0))
    assert not any(disk.pending for disk in guest.life.disks)


def test_the_rest_goes_on(guest: Guest) -> None:
    guest.out(COM1 + 7, 0x5A)
    unplug(guest, "ide0")
    assert guest.access(COM1 + 7) == b"\x5a"
    assert guest.access(0x177) != b"\xff"  # the other channel
    guest._dies()  # and so it does with the next successor
    assert guest.access(COM1 + 7) == b"\x5a" and guest.access(IDE_STATUS) == b"\xff"


def test_its_interrupt_line_is_low(guest: Guest) -> None:
    guest.out(IDE_DEVICE, 0xA0)
    guest.out(IDE_COMMAND, IDENTIFY)
    guest.advance(1_000_000)
    assert guest.segment.fabric.pin_sources[IRQ14]
    unplug(guest, "ide0")
    assert not guest.segment.fabric.pin_sources[IRQ14]
    guest.advance(1_000_000)
    assert not guest.segment.fabric.pin_sources[IRQ14]


def test_shadows_are_asked_for(guest: Guest) -> None:
    """A vCPU would read them without asking, and find what the device has left there."""
    unplug(guest, "serial0")
    index = guest.segment.ports[COM1 + 5]
    shadow = guest.segment.regs[index].shadow
    shadows = guest.segment.view(int(guest.segment.header.shadow_offset), 8 * (shadow + 1)).view("<u8")
    assert shadow and shadows[shadow] == lib.SEG_SHADOW_ASK
    assert guest.access(COM1 + 5) == b"\xff"


def test_commands_for_it_are_refused_and_the_machine_has_no_state(guest: Guest) -> None:
    unplug(guest, "serial0")
    handle = guest.life.handle
    with pytest.raises(UsageError, match="serial0 has been unplugged by a fault"):
        handle(messages.SerialInput(serial=1, index=0, data=b"x"))
    with pytest.raises(UsageError, match="serial0: unplugged by a fault; its state cannot be saved"):
        handle(messages.SaveState(serial=2))
    guest.command(messages.Stop)
    guest.command(messages.Reset)
    assert guest.access(COM1 + 5) == b"\xff"


# ---- what is in hand --------------------------------------------------------------------------------------
def deadly(guest: Guest, port: int) -> list[Work]:
    """What is in hand at each of three deaths at this port, as it will be."""
    assert isinstance(guest.faults, At)
    guest.faults.port, guest.faults.works = port, []
    return guest.faults.works


@pytest.mark.parametrize(("port", "write"), [(IDE_STATUS, False), (IDE_COMMAND, True)])
def test_the_same_access_is_known_by_its_number(guest: Guest, port: int, write: bool) -> None:
    works = deadly(guest, port)
    guest.access(port, data=b"\x00" if write else None)
    assert len(works) == 3 and len(set(works)) == 1
    assert (works[0].kind, works[0].address, works[0].write) == (lib.HAND_ACCESS, port, write)
    assert guest.segment.device_name(works[0].device) == "ide0"
    again = deadly(guest, port)
    guest.access(port, data=b"\x00" if write else None)
    assert len(set(again)) == 1 and again[0] != works[0]


def test_a_posted_write_is_known_by_its_ticket(guest: Guest) -> None:
    works = deadly(guest, COM1 + 7)
    guest.post((COM1 + 1, 0), (COM1 + 7, 3))
    assert len(works) == 3 and len(set(works)) == 1
    assert works[0].kind == lib.HAND_POSTED and works[0].write
    assert guest.segment.device_name(works[0].device) == "serial0"
    assert guest.access(COM1 + 7) == b"\x03"


def test_between_events_nothing_is_in_hand(guest: Guest) -> None:
    block = guest.segment.host(0)
    assert in_hand(block) is None
    guest.access(IDE_STATUS)
    assert in_hand(block) is None
    guest._dies()
    assert in_hand(block) is None


@pytest.mark.parametrize("point", ["applied", "committed", "shown"])
def test_it_is_in_hand_until_it_is_done(tmp_path: Path, point: str) -> None:
    """Died behind the access itself: it is in hand as long as the event has not ended."""
    faults = Deadly()
    guest = Guest(tmp_path, faults)
    found: list[Work | None] = []
    dies = guest._dies

    def noted() -> None:
        found.append(in_hand(guest.segment.host(0)))
        dies()

    guest._dies = noted  # type: ignore[method-assign]
    faults.point, faults.nth = point, faults.passed[point] + 1
    guest.out(IDE_DEVICE, 0xB0)
    (work,) = found
    assert (work is None) == (point == "shown")
    assert work is None or work.address == IDE_DEVICE
    guest.close()
