"""Runs inputs of a target in a process of its own, with limits on memory and on the time of each input."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

#: of one input; far more than any needs, so that a slow machine does not fail
SECONDS_OF_AN_INPUT = 60
_MEMORY = "/dev/shm"


class Target(Protocol):
    """Something that can be fuzzed."""

    name: str
    #: bytes of address space that its inputs may take beyond what the process has
    memory: int

    def prepare(self, folder: Path) -> None:
        """Once, before the first input."""

    def make(self, rnd: random.Random) -> bytes:
        """An input, which follows from ``rnd`` alone."""

    def judge(self, data: bytes, rnd: random.Random) -> None:
        """Use the input; an exception is a failure. ``rnd`` decides what is done with it."""

    def finish(self) -> None:
        """Once, after the last input."""


@dataclass
class Failure:
    target: str
    seed: int
    number: int
    data: bytes
    text: str

    def save(self, folder: Path) -> Path:
        """Keep the input and what went wrong."""
        file = folder / f"{self.target.replace(' ', '-')}-{self.seed}-{self.number}"
        file.write_bytes(self.data)
        file.with_suffix(".txt").write_text(self.text)
        return file


def random_of(target: str, seed: int, number: int, use: str) -> random.Random:
    return random.Random(f"{target}/{seed}/{number}/{use}")


def run(target: Target, seed: int, first: int, more: Callable[[int], bool]) -> tuple[int, Failure | None]:
    """Inputs from ``first`` on while ``more`` (it is given the number of the next); how many, and the one
    that failed."""
    folder = Path(
        tempfile.mkdtemp(prefix="atoll-fuzz-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None)
    )
    progress = mmap.mmap(-1, 8)
    report = folder / "report"
    (folder / "work").mkdir()
    child = os.fork()
    if not child:
        _child(target, seed, first, more, folder, progress)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        number = int.from_bytes(progress[:], "little")
        if status == 0:
            return number - first, None
        text = report.read_text() if report.exists() else f"the process ended with {status}"
        data = (folder / "input").read_bytes() if (folder / "input").exists() else b""
        return number - first, Failure(target.name, seed, number, data, text)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(
    target: Target, seed: int, first: int, more: Callable[[int], bool], folder: Path, progress: mmap.mmap
) -> None:
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder / "work")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        target.prepare(folder / "work")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + target.memory, resource.RLIM_INFINITY))
        number = first
        while more(number):
            progress[:] = number.to_bytes(8, "little")
            signal.alarm(SECONDS_OF_AN_INPUT)
            data = target.make(random_of(target.name, seed, number, "make"))
            (folder / "input").write_bytes(data)
            target.judge(data, random_of(target.name, seed, number, "judge"))
            signal.alarm(0)
            number += 1
        progress[:] = number.to_bytes(8, "little")
        target.finish()
        os._exit(0)
    except BaseException:
        (folder / "report").write_text(traceback.format_exc())
    finally:
        os._exit(1)


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """For programs of others, which inherit limits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def for_seconds(seconds: float) -> Callable[[int], bool]:
    end = time.monotonic() + seconds
    return lambda number: time.monotonic() < end


def for_inputs(last: int) -> Callable[[int], bool]:
    return lambda number: number < last
