"""Guest time, the TSC and counters that are functions of it."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.contract._segment import lib
from coordinator.contract.segment import NO_OFFSET, Segment

SHARED = Segment.create(vcpus=1, ram=4096)
#: ACPI specification 4.8.3.3
PM_TIMER_HZ = 3_579_545


def test_time_stands_still_until_started_and_while_stopped(segment: Segment) -> None:
    assert segment.guest_now() == 0
    segment.start_time()
    assert segment.time_runs()
    moments = [segment.guest_now() for _ in range(1000)]
    assert moments == sorted(moments)
    segment.stop_time()
    stopped = segment.guest_now()
    assert stopped >= moments[-1]
    assert segment.guest_now() == stopped
    segment.start_time()
    assert stopped <= segment.guest_now() < stopped + 10**10


def test_time_can_be_set_while_it_stands(segment: Segment) -> None:
    segment.set_time(5_000_000_000, 1_700_000_000 * 10**9, 2_000_000)
    assert segment.guest_now() == 5_000_000_000
    assert segment.guest_tsc() == 10_000_000_000
    assert segment.header.time.wall_ns == 1_700_000_000 * 10**9


@settings(max_examples=200)
@given(st.integers(0, 2**62), st.sampled_from([1_000_000, 2_000_000, 2_345_678, 999_999, 3_700_001]))
def test_tsc_is_exact(ns: int, khz: int) -> None:
    SHARED.set_time(0, 0, khz)
    assert lib.tsc_from_ns(SHARED.header, ns) == floor(Fraction(ns * khz, 10**6)) % 2**64


@settings(max_examples=200)
@given(st.integers(0, 2**60), st.sampled_from([1_000_000, 2_345_678, 999_999, 3_700_001]))
def test_deadline_is_the_first_moment_at_which_the_tsc_has_reached_it(tsc: int, khz: int) -> None:
    SHARED.set_time(0, 0, khz)
    ns = lib.ns_from_tsc(SHARED.header, tsc)
    assert ns == ceil(Fraction(tsc * 10**6, khz))
    assert lib.tsc_from_ns(SHARED.header, ns) >= tsc
    if ns:
        assert lib.tsc_from_ns(SHARED.header, ns - 1) < tsc


def test_a_deadline_beyond_all_time_does_not_wrap() -> None:
    SHARED.set_time(0, 0, 1)
    assert lib.ns_from_tsc(SHARED.header, NO_OFFSET) == NO_OFFSET - 1


def test_host_deadline(segment: Segment) -> None:
    assert lib.guest_host_deadline(segment.header, 100) == NO_OFFSET  # stopped: never
    segment.set_time(1000, 0)
    segment.start_time()
    reference = segment.header.time.host_ns
    assert lib.guest_host_deadline(segment.header, 5000) == reference + 4000
    assert lib.guest_host_deadline(segment.header, 1) == reference  # past
    assert lib.guest_host_deadline(segment.header, NO_OFFSET) == NO_OFFSET


def test_pm_timer_counts_24_bits_at_its_frequency(segment: Segment) -> None:
    source = segment.allocate_time_source(PM_TIMER_HZ, 10**9, 0xFF_FFFF)
    segment.set_time_source(source, True, 0, 0)
    for seconds in (0, 1, 5, 3600):
        value = lib.time_source_at(segment.header, source, seconds * 10**9)
        assert value == PM_TIMER_HZ * seconds % 2**24


def test_stopped_counter_is_frozen_and_a_started_one_may_begin_anywhere(segment: Segment) -> None:
    source = segment.allocate_time_source(1, 10, NO_OFFSET)  # 100 MHz, as an HPET's
    segment.set_time_source(source, False, 0, 0x1234)
    assert segment.time_source(source) == 0x1234
    # at 1000 ns the counter, started with 500, must go on from there: its zero lies before guest time 0
    segment.set_time_source(source, True, 1000 - 500 * 10, 0)
    assert lib.time_source_at(segment.header, source, 1000) == 500
    assert lib.time_source_at(segment.header, source, 1100) == 510


@pytest.mark.parametrize("source", [lib.SEG_MAX_TIME_SOURCES, 255])
def test_a_source_that_does_not_exist_reads_as_ones(segment: Segment, source: int) -> None:
    assert lib.time_source_at(segment.header, source, 5) == NO_OFFSET
