"""Committed state and output ring of a device host: all or nothing, by whoever looks after a death."""

from __future__ import annotations

import pytest

from coordinator.contract._segment import lib
from coordinator.contract.errors import SegmentError
from coordinator.contract.segment import Segment
from coordinator.contract.state_area import MOST_OUTPUT

HOST = 1


def test_records_are_valid_together_or_not_at_all(segment: Segment) -> None:
    area = segment.state(HOST)
    one, two, three = (area.slot(name, 100) for name in ("one", "two", "three"))
    assert area.get(one) is None
    area.put(one, b"1a")
    area.put(two, b"2a")
    assert [area.get(slot) for slot in (one, two)] == [None, None]
    area.commit()
    assert [area.get(slot) for slot in (one, two, three)] == [b"1a", b"2a", None]
    area.put(one, b"1b")
    area.put(one, b"1c")  # twice in one event: the last one counts
    area.put(three, b"3c")
    assert [area.get(slot) for slot in (one, two, three)] == [b"1a", b"2a", None]
    area.commit()
    assert [area.get(slot) for slot in (one, two, three)] == [b"1c", b"2a", b"3c"]
    assert area.commits == 2


def test_what_was_not_committed_does_not_become_valid_by_a_successors_commit(segment: Segment) -> None:
    first = segment.state(HOST)
    one, two = first.slot("one", 10), first.slot("two", 10)
    first.put(one, b"1a")
    first.put(two, b"2a")
    first.commit()
    first.put(one, b"1b")  # and dies
    successor = segment.state(HOST)
    assert successor.recover() == 1
    assert (successor.slot("one", 10), successor.slot("two", 10)) == (one, two)
    successor.put(two, b"2c")
    successor.commit()
    assert (successor.get(one), successor.get(two)) == (b"1a", b"2c")


def test_rooms_are_kept(segment: Segment) -> None:
    area = segment.state(HOST)
    slot = area.slot("one", 64)
    with pytest.raises(SegmentError):
        area.put(slot, bytes(65))
    area.put(slot, bytes(64))
    for name, room in (("one", 65), ("n" * 32, 1), ("huge", 1 << 40), ("large", lib.SEG_STATE_ROOM // 2)):
        with pytest.raises(SegmentError, match=name):
            area.slot(name, room)
    for number in range(1, lib.SEG_STATE_SLOTS):
        area.slot(f"n{number}", 1)
    with pytest.raises(SegmentError):
        area.slot("one more", 1)


def test_hosts_are_apart(segment: Segment) -> None:
    for host in range(lib.SEG_MAX_HOSTS):
        area = segment.state(host)
        area.put(area.slot("name", 16), b"%d" % host)
        area.commit()
    for host in range(lib.SEG_MAX_HOSTS):
        area = segment.state(host)
        assert area.get(area.slot("name", 16)) == b"%d" % host


def test_output_is_seen_when_it_is_shown(segment: Segment) -> None:
    output = segment.output(HOST)
    first = output.put(0, b"one")
    assert first is not None
    second = output.put(first, b"")
    assert second is not None and list(output.take()) == []
    assert output.show(second)  # all had been read: the coordinator sleeps
    third = output.put(second, b"three")
    assert third is not None and not output.show(third)  # it has not looked since
    assert list(output.take()) == [b"one", b"", b"three"]
    assert not output.show(third)
    assert list(output.take()) == []


def test_output_goes_round_and_waits_for_room(segment: Segment) -> None:
    output, head, put, got = segment.output(HOST), 0, [], []
    for number in range(40):
        frame = bytes([number]) * (MOST_OUTPUT - number)
        while (after := output.put(head, frame)) is None:
            output.show(head)
            got += list(output.take())
        head = after
        put.append(frame)
    output.show(head)
    assert got + list(output.take()) == put


def test_a_mad_host_hangs_nobody(segment: Segment) -> None:
    block = segment.host(HOST)
    for head, tail in ((3, 0), (1 << 63, 0), (0, 5), (lib.SEG_OUTPUT_ROOM, 0)):
        block.output_head, block.output_tail = head, tail
        assert len(list(segment.output(HOST).take())) <= lib.SEG_OUTPUT_ROOM // 4
