"""`make demo`: boots Debian's kernel from an emulated CD-ROM and checks all that happened.

Builds a bootable ISO with a random payload, boots it through SeaBIOS and ISOLINUX with two vCPUs,
lets the guest read the whole drive by bus-master DMA and print its SHA-256, and power off by ACPI.
Exit status 0 only if every one of the claims in `judge.verdict` held.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from coordinator import pieces
from coordinator.contract.errors import AtollError
from tests.support import products
from tests.support.launch import CONSOLE, HEARTBEAT_SECONDS, Guest, GuestError, Launcher, end_on_sigterm
from tests.system import figures, judge

# A stage ends with the first line that matches.
STAGES = (
    ("firmware", r"ISOLINUX \d"),
    ("boot loader", r"Linux version"),
    ("kernel", r"^atoll: init "),
    ("drivers", r"^atoll: cdrom "),
    ("CD read and SHA-256", r"^atoll: sha256 "),
    ("power-off", r"reboot: Power down"),
)
CPUS = 2
MEMORY_MIB = 512


class Progress:
    """One line when a stage ends, and one now and then while it goes on."""

    def __init__(self, say: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
        self._say = say
        self._stage = ""
        self._shown = 0.0
        self._last = "(nothing printed yet)"
        self.times: list[tuple[str, float]] = []

    def begin(self, stage: str) -> None:
        """A stage begins."""
        self._stage = stage

    def end(self, seconds: float, note: str = "") -> None:
        """The stage has ended, after so many seconds."""
        self.times.append((self._stage, seconds))
        self._say(f"[demo] {self._stage}: {seconds:.1f} s{f' ({note})' if note else ''}")
        self._stage = ""

    def line(self, at: float, line: str) -> None:
        """The guest printed a line, `at` seconds after its start."""
        self._last = line.strip() or self._last
        if self._stage and at - self._shown >= HEARTBEAT_SECONDS:
            self._shown = at
            self._say(f"[demo]   {at:4.0f} s, {self._stage}: {self._last[:90]}")


def boot(launcher: Launcher, image: Path, folder: Path, progress: Progress) -> tuple[judge.Facts, int | None]:
    """Boots the image and follows it to its end; the console goes to `folder`/console.log."""
    options = [
        "-machine", "pc", "-smp", str(CPUS), "-m", str(MEMORY_MIB), "-cdrom", str(image), "-boot", "d",
        "-no-reboot", *CONSOLE, *launcher.options(folder / "stats.json"),
    ]
    print(f"[demo] {' '.join([*launcher.command, *options])}", flush=True)
    status = None
    with Guest(launcher, options, folder / "console.log") as guest:
        last = time.monotonic()
        try:
            for stage, pattern in STAGES:
                progress.begin(stage)
                match = guest.expect(pattern, silence=300, seen=progress.line)
                now = time.monotonic()
                progress.end(now - last, match.string.strip()[:70])
                last = now
            progress.begin("exit")
            status = guest.wait(silence=60)
            progress.end(time.monotonic() - last, f"exit status {status}")
        except GuestError as error:
            print(f"[demo] {error}", flush=True)
            status = guest.exit_status()
        return judge.facts(guest.text(), launcher.excused), status


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make demo ARGS=...", description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", help="the command to boot with (default: atoll run)")
    parser.add_argument("--keep", type=Path, help="keep console.log and stats.json in this folder")
    options = parser.parse_args(arguments)
    end_on_sigterm()
    launcher = Launcher.parse(options.launcher)
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="atoll-demo-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        try:
            progress.begin("ISO")
            image = products.demo_iso()
            size, digest = image.stat().st_size, products.sha256_of(image)
            progress.end(time.monotonic() - begun, f"{size / 2**20:.1f} MiB, SHA-256 {digest[:16]}...")
            guest, status = boot(launcher, image, folder, progress)
        except AtollError as error:
            print(f"demo: {error}", file=sys.stderr)
            return error.exit_status
        stats = figures.read(folder / "stats.json")
    release = pieces.modules_dir().name
    reasons = judge.verdict(
        guest, sha256=digest, cd_bytes=size, cpus=CPUS, release=release, exit_status=status
    )
    print()
    print(figures.table(("stage", "seconds"), [*progress.times, ("in all", time.monotonic() - begun)]))
    print(f"\n{figures.report(stats)}\n")
    for reason in reasons:
        print(f"[demo] FAILED: {reason}")
    if reasons:
        return 1
    read = guest.marks.get("read", "0 to 0").split()
    seconds = float(read[2]) - float(read[0])
    clock, drive = guest.marks.get("clock"), guest.marks["dma"]
    print(f"[demo] guest: {release}, {CPUS} CPUs, clock {clock}, drive {drive};"
          f" {size:,} bytes read and hashed in {seconds:.1f} s of guest time")
    print(f"[demo] SHA-256 in the guest and on the host: {digest}")
    print("[demo] passed: hash, CPUs, kernel log, ACPI power-off")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)
