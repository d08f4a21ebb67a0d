"""Tables and the statistics file."""

from pathlib import Path

from tests.system import bench, figures

STATS = {
    "vcpus": [{"instructions": 2_000_000_000, "seconds_running": 20.0, "exits": {"sync": 3, "hlt": 40}}],
    "accesses": {"ide": {"sync": 5, "posted": 7}, "uart": {"posted": 100, "shadow": 200}},
    "roundtrips": {"ide": 5},
    "interrupts": {"0xec": 1200, "0xfd": 3},
}


def test_report_shows_rates_and_sums() -> None:
    lines = {line.split("  ")[0]: line.split() for line in figures.report(STATS).splitlines() if line}
    assert lines["vcpu 0"][2:5] == ["2,000,000,000", "20.00", "100.0"]
    assert lines["ide"] == ["ide", "5", "7", "-", "-", "-", "-", "5"]
    assert lines["uart"] == ["uart", "-", "100", "200", "-", "-", "-", "-"]
    assert lines["all"] == ["all", "5", "107", "200", "0", "0", "0", "5"]
    assert "interrupts by vector (1,203 in all): 0xec: 1,200, 0xfd: 3" in figures.report(STATS)


def test_report_without_statistics_shows_dashes(tmp_path: Path) -> None:
    assert figures.read(None) == figures.read(tmp_path / "absent") == {}
    (tmp_path / "broken").write_text("[1")
    assert figures.read(tmp_path / "broken") == {}
    assert "-" in figures.report({})


def test_numbers_are_shown_for_people() -> None:
    shown = [figures.shown(value) for value in (None, 1234567, 1234.56, 12.345, 0.01234, "x")]
    assert shown == ["-", "1,234,567", "1,234.6", "12.35", "0.012", "x"]


LINE = (
    "bench kernel=sha256 copies=2 copy=1 cpu=1 reps=4 seconds=2.000000 "
    "check=0123456789abcdef instructions=1000000000"
)


def test_bench_line_becomes_figures_of_a_repetition() -> None:
    machine = bench.Machine()
    assert bench.collect(machine, LINE)
    assert bench.collect(machine, LINE.replace("seconds=2", "seconds=4").replace("copy=1", "copy=0"))
    assert machine.seconds("sha256", 2) == 0.75
    assert machine.mips("sha256", 2) == (500 + 250) / 2
    assert machine.seconds("sha256", 1) is None and machine.mips("nbody", 1) is None


def test_bench_without_counter_has_no_rate() -> None:
    machine = bench.Machine()
    bench.collect(machine, LINE.replace("=1000000000", "=-"))
    assert machine.mips("sha256", 2) is None


def test_bench_notices_failures_and_other_results() -> None:
    native, guest = bench.Machine(), bench.Machine()
    bench.collect(native, LINE)
    bench.collect(guest, LINE.replace("0123", "1123"))
    assert len(bench.wrong_results(native, guest)) == 1
    assert bench.wrong_results(native, native) == []
    assert not bench.collect(guest, "bench kernel=fork copies=1 copy=0 failed: it died")
    assert guest.failures == ["bench kernel=fork copies=1 copy=0 failed: it died"]


def test_tables_and_json_hold_what_was_measured() -> None:
    native, atoll = bench.Machine(), bench.Machine()
    bench.collect(native, LINE.replace("copies=2 copy=1", "copies=1 copy=0"))
    bench.collect(atoll, LINE.replace("copies=2 copy=1", "copies=1 copy=0").replace("seconds=2", "seconds=9"))
    text = bench.tables({"native": native, "atoll": atoll}, ["sha256"])
    row = next(line for line in text.splitlines() if line.startswith("sha256")).split()
    assert row[:6] == ["sha256", "0.500", "-", "2.25", "4.50", "-"]
    kernels = bench.as_json({"atoll": atoll})["machines"]["atoll"]["kernels"]
    assert kernels[0]["seconds"] == 2.25 and kernels[0]["kernel"] == "sha256"
