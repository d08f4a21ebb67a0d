"""The migration section of `make bench` moves a small guest, and its plot is an SVG file."""

import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.system import bench_migrate, plot
from tests.system.bench_migrate import MIB, Plan

SMALL = Plan(ram=160, used=80, repeats=1, curve=(64, 1 << 30), curve_repeats=1)


@pytest.mark.boot
@pytest.mark.timeout(600)
def test_small(tmp_path: Path) -> None:
    SMALL.plot = tmp_path / "plots" / "migration.svg"
    results = bench_migrate.run(SMALL, print)
    assert not results.failures
    told = bench_migrate.report(results)
    assert {"atoll", "running", "zstd"} <= results.rows.keys()
    assert ("qemu" in results.rows) is (shutil.which("qemu-system-x86_64") is not None)
    for row in (*results.rows.values(), *results.curve):
        assert row.own > 0 and row.floor > 0 and row.bytes > 30 * MIB
    assert "Atoll: migrate, zstd" in told and "64 MiB in use" in told
    assert f"skipped: {1 << 30} MiB in use" in told
    ElementTree.parse(SMALL.plot)


def test_floor_is_measured() -> None:
    assert 0 < bench_migrate.floor(3 * MIB + 1) < 60


def test_plot() -> None:
    """Larger is to the right and longer is higher."""
    points = [(64.0, 0.05, 0.02), (300.0, 0.2, 0.1), (4096.0, 3.0, 1.5)]
    tree = ElementTree.fromstring(plot.downtime(points))
    lines = [line.attrib["points"].split() for line in tree.iter("{http://www.w3.org/2000/svg}polyline")]
    places = [[tuple(map(float, place.split(","))) for place in line] for line in lines]
    assert len(places) == 2
    for line in places:
        assert line == sorted(line) and [y for _, y in line] == sorted((y for _, y in line), reverse=True)
        assert all(plot.LEFT <= x <= plot.WIDTH and plot.TOP <= y <= plot.HEIGHT for x, y in line)
