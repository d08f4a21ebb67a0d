"""The crash section of `make bench` runs a guest each way."""

import pytest

from tests.system import bench_crash
from tests.system.bench_crash import Plan, Results, Way


@pytest.mark.boot
@pytest.mark.timeout(900)
def test_small() -> None:
    results = bench_crash.run(Plan(repeats=1, passes=1, cd=4), print)
    assert not results.failures
    for way in results.ways.values():
        assert len(way.boots) == len(way.reads) == len(way.cpu) == 1 and way.cpu[0] > 0
    assert len(bench_crash.ratios(results)) == 3 and "CD pass" in bench_crash.report(results)


def test_ratios_are_of_the_best() -> None:
    results = Results(ways={"on": Way([3.0, 2.2], [5.0], []), "off": Way([2.0, 9.0], [4.0, 5.0], [1.0])})
    assert bench_crash.ratios(results) == {
        "start to init, s": pytest.approx(1.1), "CD pass, guest s": pytest.approx(1.25)
    }  # fmt: skip
