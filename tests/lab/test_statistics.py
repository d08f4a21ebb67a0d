"""Figures against published ones and against NumPy."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.lab import statistics
from tests.lab.results import LIBATA, migration, results


#: R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17
#: (1998), table I, method 3 (the score interval of Wilson)
@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_bounds_are_those_of_the_literature(count: int, of: int, low: float, high: float) -> None:
    rate = statistics.wilson(count, of)
    assert (round(rate.low, 4), round(rate.high, 4)) == (low, high)


@given(st.integers(0, 3000), st.integers(1, 3000))
def test_bounds_hold_the_share_and_are_symmetric(count: int, more: int) -> None:
    of = count + more
    rate, other = statistics.wilson(count, of), statistics.wilson(more, of)
    assert 0 <= rate.low <= count / of <= rate.high <= 1
    assert rate.low == pytest.approx(1 - other.high) and rate.high == pytest.approx(1 - other.low)


def test_nothing_is_known_without_a_trial() -> None:
    rate = statistics.wilson(0, 0)
    assert (rate.low, rate.high) == (0.0, 1.0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_distributions_are_numpys(values: list[float]) -> None:
    found = statistics.distribution([*values, None])
    assert found is not None and found.n == len(values)
    expected = numpy.quantile(values, [0, 0.5, 0.9, 0.99, 1])
    assert [found.least, found.median, found.p90, found.p99, found.most] == pytest.approx(list(expected))


def test_the_worst_verdict_counts() -> None:
    cases: dict[str, dict[str, Any]] = {
        "unnoticed": {"kernel": ("clocksource: Switched to clocksource hpet",)},
        "complaint": {"kernel": (LIBATA,)},
        "error": {"kernel": (LIBATA,), "user_errors": ("errno 5 at byte 0",)},
        "stall": {"stall": 1000.1, "user_errors": ("errno 5 at byte 0",)},
        "wrong data": {"stall": 2000.0, "wrong": 1},
        "lost": {"outcome": "lost", "wrong": 1},
    }
    assert {word: statistics.verdict(migration(**fields)) for word, fields in cases.items()} == {
        w: w for w in cases
    }
    assert statistics.verdict(migration(stall=1000.0)) == "unnoticed"


@pytest.mark.parametrize(
    "text",
    [
        LIBATA,
        "ata2: soft resetting link",
        "sr 1:0:0:0: [sr0] tag#0 Sense Key : Medium Error [current]",
        "I/O error, dev sr0, sector 6656 op 0x0:(READ) flags 0x800 phys_seg 7 prio class 2",
    ],
)
def test_what_linux_says_of_a_drive_is_a_complaint(text: str) -> None:
    assert statistics.complaints(migration(kernel=(text, "random: crng init done"))) == [text]


def test_summary_counts_what_happened() -> None:
    carry, drop = statistics.summaries(results())
    assert (carry.moved.count, carry.stalls.count, carry.passes_right) == (3, 0, 6)
    assert {name: rate.count for name, rate in carry.phases.items()} == {"idle": 2, "packet-complete": 1}
    assert carry.aimed is None and carry.shares is not None
    assert (drop.moved.count, drop.lost.count, drop.stalls.count, drop.complaints.count) == (1, 1, 2, 1)
    assert drop.aimed is not None and (drop.aimed.count, drop.aimed.of) == (2, 2)


def test_a_migration_that_never_took_place_is_no_proof() -> None:
    made = results()
    made.add(migration(index=3, outcome="stayed", status="failed", stall=None, downtime_host=None))
    carry = statistics.summaries(made)[0]
    assert carry.stayed.count == 1 and carry.moved.of == 4 and carry.stalls.of == 3
