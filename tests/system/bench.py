"""`make bench`: native, QEMU (where installed) and Atoll side by side, from one run.

Four sections, of which `--only` selects some: guests (this file), block (bench_block.py), migrate
(bench_migrate.py) and crash (bench_crash.py).
Each machine runs the same static program (tests/guests/bench) with one copy, then with two at once,
pinned and started at a barrier; guests are booted by -kernel with two vCPUs. Then the time from start
to init with the synchronous device round trips, and the rate at which the guest reads its CD.
Wrong results (not slow ones) make the exit status 1.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator import pieces
from coordinator.contract.errors import AtollError, ConfigError
from tests.support import products
from tests.support.launch import CONSOLE, HEARTBEAT_SECONDS, Guest, Launcher, end_on_sigterm
from tests.system import bench_block, bench_crash, bench_migrate, figures

KERNELS = {
    "sha256": "integer", "nbody": "SSE2 double", "sieve": "stores", "qsort": "calls, branches",
    "chase": "cache misses", "memcpy": "block copies", "icall": "indirect calls", "x87": "80-bit float",
    "syscall": "system calls", "fork": "processes", "pagefault": "page faults",
}
SECTIONS = ("guests", "block", "migrate", "crash")
MACHINES = ("native", "qemu", "atoll")
TITLES = {"native": "native", "qemu": "QEMU TCG", "atoll": "Atoll"}
QEMU = "qemu-system-x86_64"
LINE = re.compile(
    r"bench kernel=(?P<kernel>\w+) copies=(?P<copies>\d+) copy=(?P<copy>\d+) cpu=(?P<cpu>\d+) "
    r"reps=(?P<reps>\d+) seconds=(?P<seconds>[\d.]+) check=(?P<check>[0-9a-f]{16}) "
    r"instructions=(?P<count>\d+|-)"
)


@dataclass
class Sample:
    """One copy of one kernel: seconds a repetition and, where known, instructions a repetition."""

    seconds: float
    check: str
    instructions: float | None


@dataclass
class Machine:
    """What one machine achieved."""

    samples: dict[tuple[str, int], list[Sample]] = field(default_factory=dict)  # by kernel and copies
    boot_seconds: float | None = None
    boot_stats: dict[str, Any] = field(default_factory=dict)
    cd_rates: list[float] = field(default_factory=list)  # bytes a second, one a pass
    failures: list[str] = field(default_factory=list)

    def seconds(self, kernel: str, copies: int) -> float | None:
        """Mean time of a repetition over the copies that ran at once."""
        samples = self.samples.get((kernel, copies))
        return sum(sample.seconds for sample in samples) / len(samples) if samples else None

    def mips(self, kernel: str, copies: int) -> float | None:
        """Millions of instructions a second of one copy, where the machine counts them."""
        rates = [
            figures.mips(sample.instructions, sample.seconds)
            for sample in self.samples.get((kernel, copies), [])
        ]
        known = [rate for rate in rates if rate is not None]
        return sum(known) / len(known) if known else None


def parse(line: str) -> tuple[str, int, Sample] | None:
    """A line of the benchmark program: kernel, copies, sample."""
    match = LINE.search(line)
    if match is None:
        return None
    reps = int(match["reps"])
    count = None if match["count"] == "-" else int(match["count"]) / reps
    sample = Sample(float(match["seconds"]) / reps, match["check"], count)
    return match["kernel"], int(match["copies"]), sample


def wrong_results(reference: Machine, machine: Machine) -> list[str]:
    """Kernels whose result differs from the reference machine's."""
    found = []
    for (kernel, copies), samples in machine.samples.items():
        expected = {sample.check for sample in reference.samples.get((kernel, copies), [])}
        got = {sample.check for sample in samples}
        if expected and got != expected:
            results = ", ".join(sorted(got))
            found.append(f"{kernel}, {copies} at once: result {results}, not {', '.join(expected)}")
    return found


def collect(machine: Machine, line: str) -> bool:
    """Takes a line of the benchmark program into the results; whether it was one."""
    if (parsed := parse(line)) is not None:
        kernel, copies, sample = parsed
        machine.samples.setdefault((kernel, copies), []).append(sample)
        return True
    if re.match(r"bench kernel=.* failed|bench: ", line):
        machine.failures.append(line.strip())
    return False


def run_native(program: Path, words: list[list[str]]) -> Machine:
    """The program on this machine itself."""
    machine = Machine()
    for arguments in words:
        with subprocess.Popen([str(program), *arguments], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if collect(machine, line):
                    say(f"native: {line.strip()}")
    return machine


def run_guest(name: str, launcher: Launcher, words: list[list[str]], passes: int) -> Machine:
    """The program in a guest, then a boot for its time, then one that reads the CD."""
    machine = Machine()

    def boot(label: str, demo: str, extra: list[str], take: Callable[[float, str], None]) -> dict[str, Any]:
        say(f"{TITLES[name]}: {label}")
        shown, last = [0.0], [""]

        def seen(at: float, line: str) -> None:
            take(at, line)
            last[0] = line.strip() or last[0]
            if at - shown[0] >= HEARTBEAT_SECONDS and not line.startswith("bench "):
                shown[0] = at
                say(f"{TITLES[name]}:   {at:.0f} s: {last[0][:100]}")

        with tempfile.TemporaryDirectory(prefix="atoll-bench-") as scratch:
            stats = Path(scratch) / "stats.json"
            options = [
                "-machine", "pc", "-smp", "2", "-m", "512", "-no-reboot", *CONSOLE,
                "-kernel", str(pieces.kernel()), "-initrd", str(products.initramfs()),
                "-append", f"console=ttyS0 {demo}", *extra, *launcher.options(stats),
            ]
            with Guest(launcher, options, Path(scratch) / "console.log") as guest:
                guest.expect("reboot: Power down", silence=600, limit=3600, seen=seen)
                guest.wait()
            return figures.read(stats)

    def take_boot(at: float, line: str) -> None:
        if machine.boot_seconds is None and line.startswith("atoll: init "):
            machine.boot_seconds = at

    def take_bench(at: float, line: str) -> None:
        if collect(machine, line):
            say(f"{TITLES[name]}: {line.strip()}")

    def take_cd(at: float, line: str) -> None:
        if match := re.match(r"atoll: cdread (\d+) ([\d.]+) ([\d.]+)", line):
            elapsed = float(match[3]) - float(match[2])
            machine.cd_rates.append(int(match[1]) / max(elapsed, 0.01))

    try:
        machine.boot_stats = boot("boot to init", "atoll.demo=poweroff", [], take_boot)
        if passes:
            image = ["-cdrom", str(products.demo_iso())]
            boot("CD read", f"atoll.demo=cdread atoll.passes={passes}", image, take_cd)
        runs = "+".join(",".join(arguments) for arguments in words)
        boot("benchmark", f"atoll.demo=bench atoll.bench={runs}", [], take_bench)
    except AtollError as error:
        machine.failures.append(str(error))
    return machine


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b where both are known."""
    return a / b if a is not None and b else None


def tables(machines: dict[str, Machine], kernels: list[str]) -> str:
    """The report."""
    native, qemu, atoll = (machines.get(name, Machine()) for name in MACHINES)
    one = figures.table(
        ("kernel", "native s", "QEMU TCG s", "Atoll s", "Atoll/native", "Atoll/QEMU", "Atoll MIPS", "what"),
        [
            (
                kernel, native.seconds(kernel, 1), qemu.seconds(kernel, 1), atoll.seconds(kernel, 1),
                ratio(atoll.seconds(kernel, 1), native.seconds(kernel, 1)),
                ratio(atoll.seconds(kernel, 1), qemu.seconds(kernel, 1)),
                atoll.mips(kernel, 1), KERNELS[kernel],
            )
            for kernel in kernels
        ],
    )
    rows = []
    for kernel in kernels:
        scaling = {m: ratio(m_.seconds(kernel, 2), m_.seconds(kernel, 1)) for m, m_ in
                   zip(MACHINES, (native, qemu, atoll), strict=True)}
        rows.append((
            kernel, native.seconds(kernel, 2), qemu.seconds(kernel, 2), atoll.seconds(kernel, 2),
            *scaling.values(), ratio(scaling["atoll"], scaling["native"]), atoll.mips(kernel, 2),
        ))
    two = figures.table(
        ("kernel", "native s", "QEMU TCG s", "Atoll s", "native 2:1", "QEMU 2:1", "Atoll 2:1",
         "Atoll/native", "Atoll MIPS"),
        rows,
    )
    machine_rows = []
    for name in MACHINES[1:]:
        machine = machines.get(name)
        if machine is not None:
            best = max(machine.cd_rates, default=None)
            accesses = machine.boot_stats.get("accesses", {})
            machine_rows.append((
                TITLES[name], machine.boot_seconds,
                sum(sum(classes.values()) for classes in accesses.values()) if accesses else None,
                figures.total_roundtrips(machine.boot_stats), best / 1e6 if best else None,
            ))
    whole = figures.table(
        ("guest", "start to init s", "device accesses", "round trips", "CD read MB/s"), machine_rows
    )
    return (
        f"Seconds a repetition, one copy\n\n{one}\n\n"
        f"Seconds a repetition, two copies at once, and against one\n\n{two}\n\n"
        f"Debian's kernel by -kernel, 2 vCPUs (accesses and round trips until power-off)\n\n{whole}"
    )


def as_json(machines: dict[str, Machine]) -> dict[str, Any]:
    """The same figures for programs; seconds, bytes a second, counts."""
    return {
        "machine": {"cpu": _cpu_model(), "cpus": os.cpu_count(), "kernel": platform.release()},
        "machines": {
            name: {
                "kernels": [
                    {
                        "kernel": kernel, "copies": copies,
                        "seconds": machine.seconds(kernel, copies), "mips": machine.mips(kernel, copies),
                        "each": [vars(sample) for sample in samples],
                    }
                    for (kernel, copies), samples in machine.samples.items()
                ],
                "boot_seconds": machine.boot_seconds, "boot_stats": machine.boot_stats,
                "cd_bytes_per_second": machine.cd_rates, "failures": machine.failures,
            }
            for name, machine in machines.items()
        },
    }


def _cpu_model() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def say(line: str) -> None:
    """Progress, at once."""
    print(f"[bench] {line}", flush=True)


def run_guests(options: argparse.Namespace, kernels: list[str], names: list[str]) -> dict[str, Machine]:
    """The section of guests, by machine."""
    words = [["-t", f"{options.seconds:g}", "-c", copies, *kernels] for copies in options.copies.split(",")]
    machines: dict[str, Machine] = {}
    if "native" in names:
        machines["native"] = run_native(products.program("bench"), words)
    if "qemu" in names and shutil.which(QEMU):
        tcg = Launcher((QEMU, "-accel", "tcg,thread=multi"))
        machines["qemu"] = run_guest("qemu", tcg, words, options.passes)
    elif "qemu" in names:
        say(f"{QEMU} is not installed; its columns stay empty")
    if "atoll" in names:
        machines["atoll"] = run_guest("atoll", Launcher.parse(options.launcher), words, options.passes)
    if "native" in machines:
        for machine in machines.values():
            machine.failures += wrong_results(machines["native"], machine)
    return machines


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make bench ARGS=...", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections of %(default)s")
    parser.add_argument("--machines", default=",".join(MACHINES), help="of %(default)s")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="of %(default)s")
    parser.add_argument("--copies", default="1,2", help="how many at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="a kernel and copy, at least (default: 2)")
    parser.add_argument("--passes", type=int, default=3, help="over the CD, 0 for none (default: 3)")
    parser.add_argument("--launcher", help="Atoll's command (default: atoll run)")
    parser.add_argument("--json", type=Path, default=Path("build/bench.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    end_on_sigterm()
    begun = time.monotonic()
    kernels, names, sections = (text.split(",") for text in (options.kernels, options.machines, options.only))
    machines: dict[str, Machine] = {}
    block: bench_block.Results | None = None
    moved: bench_migrate.Results | None = None
    crash: bench_crash.Results | None = None
    try:
        for given, known in ((kernels, KERNELS), (names, MACHINES), (sections, SECTIONS)):
            for word in given:
                if word not in known:
                    raise ConfigError(f"no kernel, machine or section {word}")
        if "guests" in sections:
            machines = run_guests(options, kernels, names)
        if "block" in sections:
            block = bench_block.run(bench_block.Plan(), say)
        if "migrate" in sections:
            moved = bench_migrate.run(bench_migrate.Plan(), say, options.launcher)
        if "crash" in sections:
            crash = bench_crash.run(bench_crash.Plan(), say, options.launcher)
    except AtollError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_status
    found = as_json(machines)
    failures = [f"{TITLES[name]}: {text}" for name, each in machines.items() for text in each.failures]
    texts = [tables(machines, kernels)] if machines else []
    if block is not None:
        found["block"] = bench_block.as_json(block)
        failures += block.failures
        texts.append(bench_block.report(block))
    if moved is not None:
        found["migrate"] = bench_migrate.as_json(moved)
        failures += moved.failures
        texts.append(bench_migrate.report(moved))
    if crash is not None:
        found["crash"] = bench_crash.as_json(crash)
        failures += crash.failures
        texts.append(bench_crash.report(crash))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    seconds = time.monotonic() - begun
    print(f"\n{_cpu_model()}, {os.cpu_count()} CPUs; {seconds:.0f} s; JSON: {options.json}\n")
    print("\n\n".join(texts))
    for text in failures:
        print(f"[bench] FAILED: {text}")
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)
