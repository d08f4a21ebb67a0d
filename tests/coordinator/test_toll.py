"""What a device host dies of, as the coordinator counts it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.contract._segment import lib
from coordinator.contract.messages import SPACE_INTA, SPACE_MEMORY, SPACE_PORT
from coordinator.contract.segment import Segment
from coordinator.toll import MOST_STARTS, Toll, Work, in_hand

READ = Work(lib.HAND_ACCESS, 7, SPACE_PORT, 0x1F7, False, 40)


def test_the_third_death_of_the_same_is_fatal() -> None:
    toll = Toll()
    assert [toll.fatal(READ, 10) for _ in range(3)] == [False, False, True]


def test_events_in_between_do_not_hide_it() -> None:
    """A timer fires and a posted write is applied before the vCPU asks again."""
    toll = Toll()
    assert [toll.fatal(READ, events) for events in (10, 12, 15)] == [False, False, True]


@pytest.mark.parametrize(
    "other",
    [
        replace(READ, number=41),  # it was answered, and the guest reads again
        replace(READ, device=8),
        replace(READ, address=0x1F6),
        replace(READ, write=True),
        replace(READ, kind=lib.HAND_POSTED),
    ],
)
def test_another_thing_begins_the_count_anew(other: Work) -> None:
    toll = Toll()
    assert not any(toll.fatal(work, 10) for work in (READ, READ, other, READ, READ))
    assert toll.fatal(READ, 10)


def test_killed_with_nothing_in_hand_is_no_fault_of_its_own() -> None:
    """A hundred times in a row without an event, and it is taken not to be able to start."""
    toll = Toll()
    assert not any(toll.fatal(None, 10) for _ in range(MOST_STARTS - 1))
    assert not toll.fatal(None, 11)
    assert not any(toll.fatal(None, 11) for _ in range(MOST_STARTS - 2))
    assert toll.fatal(None, 11)


def test_killings_in_between_do_not_hide_it() -> None:
    toll = Toll()
    assert [toll.fatal(work, 10) for work in (READ, None, READ, None, READ)] == [False] * 4 + [True]


def test_what_is_in_hand_is_read_from_the_segment() -> None:
    segment = Segment.create(vcpus=1, ram=4096)
    block = segment.host(0)
    assert in_hand(block) is None
    block.events, block.begun = 5, 6
    assert in_hand(block) is None  # it has begun, and nothing is known yet
    block.hand_kind, block.hand_device, block.hand_number = lib.HAND_ACCESS, 7, 40
    block.hand_space, block.hand_address, block.hand_write = SPACE_PORT, 0x1F7, 0
    assert in_hand(block) == READ
    block.begun = 5
    assert in_hand(block) is None
    segment.close()


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (READ, "a read of port 0x1f7"),
        (replace(READ, space=SPACE_MEMORY, address=0xFED00000, write=True), "a write to address 0xfed00000"),
        (replace(READ, space=SPACE_INTA), "an interrupt acknowledge"),
        (replace(READ, kind=lib.HAND_TIMER), "a timer"),
    ],
)
def test_it_is_told_in_words(work: Work, text: str) -> None:
    assert str(work) == text
