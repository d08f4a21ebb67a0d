"""blockd's NBD server beside qemu-nbd: the same image, the same clients, turn and turn about.

python -m tests.blockd.bench [--repeats 5] [--seconds 2] [--format qcow2] [--folder DIR] [case ...]

Clients: nbdcopy for sequential reads, fio's nbd engine (4 KiB, depth 16) for the rest. The ratio is that of
the medians, ours to qemu-nbd's; above 1 is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SIZE = 1 << 30


def run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


class Servers:
    """Both servers, one at a time, over one image."""

    def __init__(self, folder: Path, image_format: str) -> None:
        self.folder, self.format = folder, image_format
        self.socket = str(folder / "socket")

    def ours(self, image: Path) -> list[str]:
        export = f"x={image},format={self.format},allow-backing=*"
        return [sys.executable, "-m", "blockd.main", "--socket", self.socket, "--export", export]

    def theirs(self, image: Path) -> list[str]:
        return ["qemu-nbd", "-t", "-e", "8", "-x", "x", "-k", self.socket, "-f", self.format, str(image)]

    def measure(self, command: list[str], work: Callable[[str], float]) -> float:
        """Start a server, give it the work, and end it."""
        process = subprocess.Popen(command)
        try:
            while not os.path.exists(self.socket):
                if process.poll() is not None:
                    raise SystemExit(f"{command[0]} did not start")
                time.sleep(0.01)
            return work(f"nbd+unix:///x?socket={self.socket}")
        finally:
            process.terminate()
            process.wait()
            if os.path.exists(self.socket):
                os.unlink(self.socket)


def copy(uri: str) -> float:
    """MiB/s of nbdcopy from the export to nowhere."""
    start = time.perf_counter()
    run("nbdcopy", uri, "null:")
    return SIZE / (1 << 20) / (time.perf_counter() - start)


def fio(kind: str, seconds: int) -> Callable[[str], float]:
    """4 KiB requests a second, at depth 16."""

    def work(uri: str) -> float:
        return _fio(uri, kind, "--time_based", f"--runtime={seconds}")

    return work


def fio_new(uri: str) -> float:
    """4 KiB writes a second, at depth 16, each at the start of a random one of 16384 clusters: 4096 of
    them, so that most clusters are new."""
    return _fio(uri, "randwrite", "--blockalign=64k", "--number_ios=4096")


def _fio(uri: str, kind: str, *options: str) -> float:
    told = run(
        "fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={kind}", "--bs=4k", "--iodepth=16",
        f"--size={SIZE}", "--output-format=json", "--randrepeat=0", "--norandommap", *options,
    )  # fmt: skip
    job = json.loads(told[told.index("{") :])["jobs"][0]
    return float(job["read"]["iops"] + job["write"]["iops"])


class Bench:
    def __init__(self, folder: Path, image_format: str, repeats: int, seconds: int) -> None:
        self.folder, self.format, self.repeats = folder, image_format, repeats
        self.servers = Servers(folder, image_format)
        self.full = folder / "full"
        self.base = folder / "base"
        self.cases: dict[str, Callable[[], tuple[float, float]]] = {
            "copy": lambda: self._compare(copy),
            "randread": lambda: self._compare(fio("randread", seconds)),
            "overwrite": lambda: self._compare(fio("randwrite", seconds)),
            "mixed": lambda: self._compare(fio("randrw", seconds)),
            "allocate": lambda: self._compare(fio_new, self._empty),
            "backed": lambda: self._compare(fio_new, self._backed),
        }

    def prepare(self) -> None:
        with open(self.base, "wb") as file:
            block = os.urandom(1 << 20)
            for _ in range(SIZE >> 20):
                file.write(block)
        run("qemu-img", "convert", "-f", "raw", "-O", self.format, str(self.base), str(self.full))
        run("sync")

    def _empty(self) -> Path:
        image = self.folder / "new"
        run("qemu-img", "create", "-f", self.format, str(image), str(SIZE))
        return image

    def _backed(self) -> Path:
        image = self.folder / "new"
        run("qemu-img", "create", "-f", "qcow2", "-b", str(self.base), "-F", "raw", str(image))
        return image

    def _compare(
        self, work: Callable[[str], float], make: Callable[[], Path] | None = None
    ) -> tuple[float, float]:
        """Medians of ours and of theirs."""
        found: tuple[list[float], list[float]] = ([], [])
        for number in range(self.repeats):
            order = (0, 1) if number % 2 else (1, 0)
            for which in order:
                image = self.full if make is None else make()
                server = (self.servers.ours, self.servers.theirs)[which]
                for file in (image, self.base):  # into the page cache
                    subprocess.run(["cat", file], check=True, stdout=subprocess.DEVNULL)
                found[which].append(self.servers.measure(server(image), work))
        return statistics.median(found[0]), statistics.median(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--format", default="qcow2", choices=("qcow2", "raw"))
    parser.add_argument("--folder", help="where the images lie, 3 GiB")
    parser.add_argument("case", nargs="*")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="atoll-bench-", dir=options.folder))
    try:
        bench = Bench(folder, options.format, options.repeats, options.seconds)
        wanted = options.case or [n for n in bench.cases if options.format == "qcow2" or n != "backed"]
        bench.prepare()
        print(f"{'case':<10} {'blockd':>9} {'qemu-nbd':>9}  ratio   (MiB/s, or 4 KiB requests/s)")
        for name in wanted:
            ours, theirs = bench.cases[name]()
            print(f"{name:<10} {ours:9.0f} {theirs:9.0f}  {ours / theirs:5.2f}", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
