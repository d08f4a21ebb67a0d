"""Posted rings: order, bound, doorbell, hazards; also with several processes at once."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading

from coordinator.contract._segment import ffi, lib
from coordinator.contract.segment import Segment

HOST = 0
TIMEOUT = 30.0


def post(segment: Segment, value: int, hazard: int = 0, doorbell: int = -1) -> None:
    entry = ffi.new("struct posted_entry *")
    entry.addr, entry.width, entry.value = 0x1F2, 1, value
    lib.ring_post(segment.header, HOST, entry, hazard, doorbell)


def test_entries_come_out_in_order_and_whole(segment: Segment) -> None:
    ring = segment.ring(HOST)
    assert ring.take() is None
    for value in (1, 2, 2**64 - 1):
        post(segment, value)
    assert ring.pending()
    assert [ring.take() for _ in range(3)] == [(0, 0x1F2, 1, 1), (0, 0x1F2, 1, 2), (0, 0x1F2, 1, 2**64 - 1)]
    assert ring.take() is None


def test_take_stops_at_the_ticket_asked_for(segment: Segment) -> None:
    ring = segment.ring(HOST)
    post(segment, 1)
    ticket = lib.ring_next_ticket(segment.header, HOST)
    post(segment, 2)
    assert ring.take(ticket) is not None
    assert ring.take(ticket) is None  # entry 2 was posted behind the request
    assert ring.take() is not None


def test_an_entry_that_is_drawn_but_not_filled_is_a_hole(segment: Segment) -> None:
    ring = segment.ring(HOST)
    first = lib.ring_ticket(segment.header, HOST)
    post(segment, 2)
    assert ring.take() is None  # order is by ticket: 2 must wait
    entry = ffi.new("struct posted_entry *")
    entry.value = 1
    lib.ring_put(segment.header, HOST, first, entry, 0, -1)
    assert [ring.take(), ring.take()] == [(0, 0, 0, 1), (0, 0x1F2, 1, 2)]


def test_what_a_dead_vcpu_has_drawn_is_filled(segment: Segment) -> None:
    """Its writes go nowhere; those of the living are waited for."""
    ring = segment.ring(HOST)
    post(segment, 1)
    assert lib.ring_claim(segment.header, 1, HOST) == 1  # vCPU 1 dies here
    second = lib.ring_claim(segment.header, 2, HOST)
    post(segment, 4)
    assert ring.take() == (0, 0x1F2, 1, 1) and ring.take() is None
    assert not segment.mend_ring(HOST, [1], -1)
    space, addr, width, _ = ring.take() or (0, 0, 0, 0)
    assert (space, width) == (0, 1) and addr >= lib.SEG_PORTS
    assert ring.take() is None  # vCPU 2 is slow, not dead
    entry = ffi.new("struct posted_entry *")
    entry.value = 3
    lib.ring_put(segment.header, HOST, second, entry, 0, -1)
    lib.ring_claimed(segment.header, 2)
    assert segment.mend_ring(HOST, [1], -1)
    assert [ring.take(), ring.take(), ring.take()] == [(0, 0, 0, 3), (0, 0x1F2, 1, 4), None]


def test_a_vcpu_that_may_have_drawn_is_waited_for(segment: Segment) -> None:
    segment.vcpu(3).posting = HOST + 1  # and has not said yet which ticket it got
    lib.ring_ticket(segment.header, HOST)
    assert not segment.mend_ring(HOST, [0], -1)
    assert segment.mend_ring(HOST, [0, 3], -1)
    assert segment.ring(HOST).take() is not None


def test_a_ticket_of_a_full_ring_is_filled_when_there_is_room(segment: Segment) -> None:
    ring = segment.ring(HOST)
    for value in range(lib.SEG_RING_SLOTS):
        post(segment, value)
    lib.ring_claim(segment.header, 1, HOST)
    assert not segment.mend_ring(HOST, [1], -1)
    assert ring.take() == (0, 0x1F2, 1, 0)
    ring.applied()
    assert segment.mend_ring(HOST, [1], -1)
    assert len([entry for _ in range(lib.SEG_RING_SLOTS) if (entry := ring.take())]) == lib.SEG_RING_SLOTS


def test_a_full_ring_makes_the_writer_wait(segment: Segment) -> None:
    ring = segment.ring(HOST)
    for value in range(lib.SEG_RING_SLOTS):
        post(segment, value)
    assert lib.ring_full(segment.header, HOST, lib.ring_next_ticket(segment.header, HOST))
    writer = threading.Thread(target=post, args=(segment, 9999))
    writer.start()
    assert ring.take() == (0, 0x1F2, 1, 0)
    ring.applied()
    writer.join(TIMEOUT)
    assert not writer.is_alive()
    rest = [entry[3] for _ in range(lib.SEG_RING_SLOTS) if (entry := ring.take()) is not None]
    assert rest == [*range(1, lib.SEG_RING_SLOTS), 9999]


def test_hazard_lasts_until_the_write_is_applied(segment: Segment) -> None:
    ring = segment.ring(HOST)
    first, second = segment.allocate_hazard(), segment.allocate_hazard()

    def unapplied() -> list[int]:
        return [lib.ring_hazard(segment.header, HOST, hazard) for hazard in (0, first, second)]

    assert unapplied() == [0, 0, 0]
    post(segment, 1, first)
    post(segment, 2)
    post(segment, 3, second)
    assert unapplied() == [0, 1, 1]
    ring.take()
    assert unapplied() == [0, 1, 1]  # taken is not applied
    ring.applied()
    assert unapplied() == [0, 0, 1]
    ring.take()
    ring.take()
    ring.applied()
    assert unapplied() == [0, 0, 0]


def test_doorbell_rings_once_for_a_sleeping_host_and_never_for_one_awake(segment: Segment) -> None:
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    ring = segment.ring(HOST)
    post(segment, 1, doorbell=bell)
    assert not select.select([bell], [], [], 0)[0]
    ring.take()
    ring.sleeping(True)
    assert not ring.pending()
    post(segment, 2, doorbell=bell)
    post(segment, 3, doorbell=bell)
    assert os.eventfd_read(bell) == 1
    ring.sleeping(False)
    os.close(bell)


def test_a_host_that_restarts_goes_on_where_the_last_one_stopped(segment: Segment) -> None:
    ring = segment.ring(HOST)
    for value in (1, 2, 3):
        post(segment, value)
    ring.take()
    ring.applied()
    ring.take()  # taken, not applied: the next host does it again
    assert segment.ring(HOST).take() == (0, 0x1F2, 1, 2)


def test_two_processes_fill_one_ring(segment: Segment) -> None:
    """More entries than slots, and a host that sleeps whenever the ring is empty: nothing is lost,
    doubled, or out of a writer's order."""
    count = 6000
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    peers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.contract.peer", *map(str, (segment.fd, bell, vcpu, count))],
            pass_fds=(segment.fd, bell),
        )
        for vcpu in (0, 1)
    ]
    ring = segment.ring(HOST)
    got: dict[int, list[int]] = {0: [], 1: []}
    while sum(map(len, got.values())) < 2 * count:
        entry = ring.take()
        if entry is not None:
            _, addr, width, value = entry
            assert (addr - 0x3F8, width) == (value >> 32, 4)
            got[value >> 32].append(value & 0xFFFF_FFFF)
            ring.applied()
            continue
        ring.sleeping(True)
        if not ring.pending():
            assert select.select([bell], [], [], TIMEOUT)[0], "the doorbell did not ring"
            os.eventfd_read(bell)
        ring.sleeping(False)
    assert got == {0: list(range(count)), 1: list(range(count))}
    assert [peer.wait(TIMEOUT) for peer in peers] == [0, 0]
    os.close(bell)
