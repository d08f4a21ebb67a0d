"""Whole guests that are migrated to and fro: a Linux that reads its CD, by the laboratory's means; a Linux
that writes a qcow2 disk; four processors under interrupts.

No host is too slow for them: each waits for what happens. Where a time counts it is the guest's, and the
middle one of several.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest

from coordinator import pieces
from coordinator.lab.hosts import hosts
from coordinator.lab.pingpong import PingPong
from coordinator.lab.plan import Experiment, Plan, experiment
from coordinator.lab.results import Migration, Results
from coordinator.lab.statistics import STALL_MS, complaints, stalled
from tests.migrate.machines import LINE, Moved, Target
from tests.support import bare, products
from tests.support.tools import run_tool
from tests.system.machine import until
from tests.system.test_leases import lease

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1500)]

#: as in tests/guests/writer
BLOCK, BLOCKS, MOST = 4096, 4096, 32
DISK = "ide0-hd0"
#: tells a hang of a Linux that boots, seconds
BOOT_SECONDS = 300.0
#: migrations of the guest with four processors
MOVES = 10


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys and records of migrations are the tests' own."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "STATE"):
            patch.setenv(f"XDG_{name}_HOME", str(folder / name.lower()))
        yield


# ---- Linux reads its CD --------------------------------------------------------------------------------
Laboratory = Callable[..., list[Migration]]


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """The migrations of an experiment. All begin with a guest that was booted once; each moved it, and after
    each it read the true contents of the CD, whole."""
    folder = tmp_path_factory.mktemp("laboratory")
    with hosts(Plan(experiments=()), folder) as sides:

        def run(**fields: Any) -> list[Migration]:
            made: Experiment = experiment(fields)
            results = Results(Plan(experiments=(made,)))
            state = folder / f"booted-{made.command_timeout}"
            asyncio.run(PingPong(made, sides, folder, state).run(0, results.add))
            assert len(results.migrations) == made.count
            for one in results.migrations:
                assert (one.outcome, one.status, one.error) == ("moved", "completed", ""), one
                assert one.right > 0 and one.wrong == 0, one
                assert one.aimed is (None if made.aim is None else True), one
            return results.migrations

        yield run


def unnoticed(migrations: Sequence[Migration]) -> None:
    """No program and no kernel saw anything; the next read came without a wait that is the migration's."""
    for one in migrations:
        assert complaints(one) == [] and one.user_errors == (), one
    assert statistics.median(one.stall for one in migrations if one.stall is not None) < STALL_MS


def test_carry(laboratory: Laboratory) -> None:
    migrations = laboratory(name="carry", count=10)
    unnoticed(migrations)
    assert {one.stream for one in migrations} == {"full"}


def test_carry_in_the_window(laboratory: Laboratory) -> None:
    migrations = laboratory(name="carry in the window", count=10, aim="packet-complete")
    unnoticed(migrations)
    assert {(one.stream, one.phase) for one in migrations} == {("full", "packet-complete")}


def test_drain(laboratory: Laboratory) -> None:
    """The bound is such that no host is too slow for it."""
    migrations = laboratory(name="drain", count=3, policy="drain", aim="packet-complete", drain=20000)
    unnoticed(migrations)
    assert {one.stream for one in migrations} == {"v0"} and all(one.drained for one in migrations)
    assert not {one.phase for one in migrations} & {"packet-complete", "dma-transfer", "dma-stalled"}


def test_restart(laboratory: Laboratory) -> None:
    migrations = laboratory(name="restart", count=3, policy="restart", aim="packet-complete")
    unnoticed(migrations)
    assert {(one.stream, one.phase) for one in migrations} == {("v0", "packet-complete")}


def test_error(laboratory: Laboratory) -> None:
    """MEDIUM ERROR, NO SEEK COMPLETE once, EIO for the program, which reads again."""
    for one in laboratory(name="error", count=3, policy="error", aim="packet-complete"):
        assert (one.stream, one.phase) == ("v0", "packet-complete")
        said = complaints(one)
        assert sum("Medium Error" in text for text in said) == 1, said
        assert sum("No seek complete" in text for text in said) == 1, said
        assert len(one.user_errors) == 1 and one.user_errors[0].startswith("errno 5 "), one.user_errors


def test_drop(laboratory: Laboratory) -> None:
    """The command is lost, until the guest's kernel gives it up and resets the drive: after 5 s of guest time
    instead of its own choice of 30, so that the test need not wait as long, and none of them while the guest
    stands."""
    clocks = {"command-timeout": 5, "stopped-time": "stands"}
    for one in laboratory(name="drop", count=3, policy="drop", aim="packet-complete", **clocks):
        assert (one.stream, one.phase) == ("v0", "packet-complete")
        said = " ".join(complaints(one))
        assert "frozen" in said and "(timeout)" in said and "soft resetting link" in said, said
        assert stalled(one), one


# ---- Linux writes a qcow2 disk -------------------------------------------------------------------------
def told(text: str, word: str) -> list[int]:
    """The numbers behind a word. Fails where the guest has found a fault, or its kernel."""
    assert not re.search("^(bad|failed|kernel) |Kernel panic", text, re.MULTILINE), text
    return [int(number) for number in re.findall(rf"^{word} (\d+)$", text.replace("\r", ""), re.MULTILINE)]


def writes(machine: Moved, more: int) -> None:
    """Waits until the guest has told of so many more tens of rounds here."""
    seen = len(told(machine.text, "wrote"))
    until(lambda: len(told(machine.text, "wrote")) >= seen + more, "a guest that writes", BOOT_SECONDS)


def mixed(z: int) -> int:
    """As in tests/guests/writer."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def written(base: bytes, rounds: int) -> bytes:
    """The disk after so many rounds of tests/guests/writer."""
    disk = numpy.frombuffer(base, dtype="<u8").reshape(-1, BLOCK // 8).copy()
    place = numpy.arange(BLOCKS, dtype="<u8")[:, None] << 12 | numpy.arange(BLOCK // 8, dtype="<u8")
    for n in range(1, rounds + 1):
        r = mixed(n * 0x9E3779B97F4A7C15 % 2**64)
        count = 1 + (r >> 32) % MOST
        at = slice(first := (r & 0xFFFFFFFF) % (BLOCKS - count), first + count)
        disk[at] = n << 32 | place[at]
    return disk.tobytes()


def test_qcow2_disk_goes_along(tmp_path: Path) -> None:
    """Six times between two coordinators, three of them in the middle of a command; the lease passes each
    time. A block that came late, twice, to the wrong place or never is found by the guest, or at the end."""
    base, image, model = tmp_path / "base.raw", tmp_path / "disk.qcow2", tmp_path / "model.raw"
    content = random.Random(1).randbytes(BLOCK * BLOCKS)
    base.write_bytes(content)
    below = ("-b", "base.raw", "-F", "raw")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", *below, str(image))
    options = [
        "-kernel", str(pieces.kernel()), "-initrd", str(products.writer()), "-m", "96", "-serial", "stdio",
        "-append", "console=ttyS0 loglevel=0 panic=-1", "-drive", f"file={image},format=qcow2,if=ide,index=0",
    ]  # fmt: skip
    texts: list[str] = []
    with contextlib.ExitStack() as machines:
        here: Moved = machines.enter_context(Moved(*options))
        for aim in ("", "dma-transfer:2", "", "flush:1", "dma-awaited:3", ""):
            there = machines.enter_context(Target(*options))
            writes(here, 2)
            here.cmd("migrate-set-parameters", x_aim=f"{DISK}={aim}" if aim else "")
            status = here.migrates(there)
            assert status["status"] == "completed", status
            if aim:
                (drive,) = (drive for drive in status["x-drives"] if drive["id"] == DISK)
                assert status["x-aimed"] and drive["phase"] == aim.partition(":")[0], status
            texts.append(here.quit())
            here = there
        writes(here, 2)
        held = lease(image)
        assert (held["state"], held["vm"]) == ("held", here.machine.name)
        here.machine.type(b"q")
        assert here.machine.wait() == 0
        texts.append(here.text)
    said = "".join(texts)  # a line may begin on one console and end on the next
    (rounds,) = told(said, "end")
    assert told(said, "wrote") == list(range(10, rounds + 1, 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == [base.name, image.name]
    assert "No errors were found" in run_tool("qemu-img", "check", str(image))
    model.write_bytes(written(content, rounds))
    same = run_tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(image), str(model))
    assert same.strip() == "Images are identical."
    assert base.read_bytes() == content


# ---- four processors -----------------------------------------------------------------------------------
def test_no_interrupt_is_lost_or_doubled(tmp_path: Path) -> None:
    """tests/guests/machine/moved counts IPIs and timers of four processors, while it is moved ten times."""
    kernel = ["-kernel", str(bare.image("moved")), "-smp", "4", "-m", "64"]
    options = [*kernel, "-serial", "stdio", *bare.DEBUG_EXIT]
    draw = random.Random(1)
    texts: list[str] = []
    with contextlib.ExitStack() as machines:
        here: Moved = machines.enter_context(Moved(*options))
        for _ in range(MOVES):
            there = machines.enter_context(Target(*options))
            here.counts(draw.randint(1, 3))
            status = here.migrates(there)
            assert status["status"] == "completed", status
            texts.append(here.quit())
            here = there
        here.counts(2)
        here.machine.type(b"q")
        end = here.machine.wait()
        texts.append(here.text)
    said = "".join(texts)
    assert "FAIL" not in said and end == bare.PASSED, said[-2000:]
    rounds = [int(number, 16) for number in LINE.findall(said)]
    assert rounds == list(range(256, rounds[-1] + 1, 256))
    assert re.findall("ok (.*)", said) == ["all_come_back", *("ipis", "timers", "calls", "clock") * 4]
