"""Phases by name, as a guest goes through commands; the time in each; being caught in one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator.contract.clock import ManualClock
from coordinator.contract.drives import DrivePhase
from devhost.ide.watch import PhaseWatch, name_of
from tests.devhost.ide.rig import SRST, START, TO_MEMORY, Rig, cdrom, disk

READ_10 = (0x28, 0, 0, 0, 0, 9, 0, 0, 4)


class Walk:
    """Steps of a driver, each 10 ns of guest time long; ``names`` is where the drive stood after each."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.clock = rig, ManualClock(0)
        self.watch = PhaseWatch(rig.drive(), self.clock.now)
        self.caught: list[DrivePhase] = []
        self.watch.caught = self.caught.append
        self.names: list[str] = []

    def __call__(self, step: Callable[[], object]) -> None:
        step()
        self.watch.observe()
        self.names.append(name_of(self.rig.drive()).value)
        self.clock.advance(10)

    def complete(self) -> None:
        """One request."""
        drive, backend = self.rig.drive(), self.rig.backend()
        cookie = next(iter(backend.pending))
        backend.finish(cookie)
        drive.complete(cookie, 0)


def begin(rig: Rig) -> None:
    """Up to the window."""
    rig.prds((0x8000, 0x2000))
    rig.bm_command(TO_MEMORY)
    rig.packet(*READ_10, dma=True)


def test_names_of_a_dma_packet() -> None:
    walk = Walk(cdrom(request_limit=4096))
    rig = walk.rig
    rig.prds((0x8000, 0x1000), last=True)
    walk(lambda: rig.begin_packet(dma=True))
    walk(lambda: rig.send_words(bytes(READ_10[:2])))
    walk(lambda: rig.send_words(bytes(READ_10[2:]).ljust(10, b"\0")))
    walk(lambda: rig.start())
    walk(walk.complete)  # the table is used up, half of the data is to come
    walk(lambda: rig.bm_command(0))
    walk(lambda: rig.start())
    walk(walk.complete)
    walk(lambda: rig.status)
    assert walk.names == [
        "packet-awaited", "packet-partial", "packet-complete", "dma-transfer", "dma-stalled", "dma-stalled",
        "dma-transfer", "interrupt-pending", "idle",
    ]  # fmt: skip
    assert walk.watch.counters() == {
        "guest_ns": 90,
        "ns": {
            "packet-awaited": 10, "packet-partial": 10, "packet-complete": 10, "dma-transfer": 20,
            "dma-stalled": 20, "interrupt-pending": 10, "idle": 10,
        },
        "entries": {
            "packet-awaited": 1, "packet-partial": 1, "packet-complete": 1, "dma-transfer": 2,
            "dma-stalled": 1, "interrupt-pending": 1, "idle": 1,
        },
    }  # fmt: skip
    walk.watch.restart()
    assert walk.watch.counters() == {"guest_ns": 0, "ns": {}, "entries": {}}


def test_names_of_a_pio_packet() -> None:
    walk = Walk(cdrom())
    rig = walk.rig
    walk(lambda: rig.packet(0x28, 0, 0, 0, 0, 9, 0, 0, 1, limit=1024))
    walk(walk.complete)
    walk(lambda: rig.words(512))
    walk(lambda: rig.words(512))
    walk(lambda: rig.status)
    assert walk.names == ["medium", "pio-in", "pio-in", "interrupt-pending", "idle"]
    assert walk.watch.counters()["entries"]["pio-in"] == 2  # each burst is one
    walk(lambda: rig.packet(0x55, 0x10, 0, 0, 0, 0, 0, 0, 20))
    walk(lambda: rig.control(SRST))
    walk(lambda: rig.control(0))
    assert walk.names[5:] == ["pio-out", "reset", "idle"]


def test_names_of_a_disk() -> None:
    walk = Walk(disk())
    rig = walk.rig
    rig.prds((0x8000, 0x200))
    rig.taskfile(count=1)
    walk(lambda: rig.command(0xC8))
    walk(lambda: rig.start())
    walk(walk.complete)
    walk(lambda: rig.status)
    walk(lambda: rig.command(0x30))
    walk(lambda: rig.send_words(bytes(512)))
    walk(walk.complete)
    walk(lambda: rig.command(0xE7))
    walk(walk.complete)
    assert walk.names == [
        "dma-awaited", "dma-transfer", "interrupt-pending", "idle", "pio-out", "medium", "interrupt-pending",
        "flush", "interrupt-pending",
    ]  # fmt: skip


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_caught_before_a_request_of_a_transfer(nth: int) -> None:
    """The bus master has moved what came before, and nothing is in flight."""
    walk = Walk(cdrom(request_limit=2048))
    rig = walk.rig
    begin(rig)
    walk.watch.arm(DrivePhase.DMA_TRANSFER, nth)
    rig.bm_command(TO_MEMORY | START)
    rig.settle()
    assert walk.caught == [DrivePhase.DMA_TRANSFER] and not rig.backend().pending
    image = rig.backend().image[9 * 2048 : 13 * 2048]
    moved = (nth - 1) * 2048
    assert rig.memory.read(0x8000, 0x2000) == image[:moved] + bytes(0x2000 - moved)
    assert rig.drive().remaining == 0x2000 - moved and rig.channel.master.cursor.left in (0, 0x2000 - moved)
    rig.stop()
    rig.channel.resume()
    rig.settle()
    assert rig.drive().remaining == 0x2000 - moved  # caught is more than paused
    rig.drive().release()
    rig.settle()
    assert rig.memory.read(0x8000, 0x2000) == image and rig.pin.level


def test_requests_are_small_while_a_transfer_is_aimed_at() -> None:
    walk = Walk(cdrom())
    rig = walk.rig
    walk.watch.arm(DrivePhase.DMA_TRANSFER, 2)
    rig.prds((0x8000, 0x8000))
    rig.packet(0x28, 0, 0, 0, 0, 0, 0, 0, 16, dma=True)
    rig.start()
    rig.settle()
    assert rig.drive().remaining == 0x4000
    rig.drive().release()
    rig.settle()
    assert rig.memory.read(0x8000, 0x8000) == rig.backend().image[:0x8000]
    assert [length for _, _, length in rig.backend().log] == [0x4000, 0x4000]
    rig.status  # noqa: B018 - the interrupt
    rig.bm_command(0)
    rig.packet(0x28, 0, 0, 0, 0, 0, 0, 0, 16, dma=True)
    rig.start()
    assert rig.backend().log[-1][2] == 0x8000


def test_caught_in_the_window_at_the_second_time() -> None:
    walk = Walk(cdrom())
    rig = walk.rig
    walk.watch.arm(DrivePhase.PACKET_COMPLETE, 2)
    for expected in ([], [DrivePhase.PACKET_COMPLETE]):
        walk(lambda: begin(rig))
        assert walk.caught == expected
        if not expected:
            walk(lambda: rig.bm_command(TO_MEMORY | START))
            walk(walk.complete)
            walk(lambda: rig.status)
    walk(lambda: rig.bm_command(TO_MEMORY | START))  # somebody else's hand: no request is made
    assert not rig.backend().pending
    rig.drive().release()
    rig.settle()
    assert rig.pin.level


def test_disarmed_is_not_caught() -> None:
    walk = Walk(cdrom())
    rig = walk.rig
    walk.watch.arm(DrivePhase.PACKET_COMPLETE, 1)
    walk.watch.disarm()
    walk(lambda: begin(rig))
    assert not walk.caught and not rig.drive().caught


def test_command_under_way_in_words() -> None:
    walk = Walk(cdrom())
    assert walk.watch.command() is None
    begin(walk.rig)
    about = walk.watch.command()
    assert about is not None and about["packet"] == "280000000009000004000000"
    assert (about["opcode"], about["remaining"], about["descriptor"]) == (0xA0, 0x2000, 0)
