"""Attention, sleep and parking. The stress tests end by themselves; a lost wake-up would hang them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial

import pytest

from coordinator.contract._segment import lib
from coordinator.contract.segment import NO_OFFSET, Segment

#: a hang is told after so many seconds
HANG = 30.0


def run_all(*bodies: Callable[[], None]) -> None:
    """Run bodies side by side (C releases the interpreter lock); a failure or a hang of one is ours."""
    failures: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(body,), daemon=True) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert not failures, failures
    assert not any(thread.is_alive() for thread in threads), "somebody was never woken"


def test_bits_collect_and_are_taken_at_once(segment: Segment) -> None:
    segment.attend(2, lib.ATTN_IRQ)
    segment.attend(2, lib.ATTN_MAP)
    assert lib.vcpu_take_attention(segment.header, 2) == lib.ATTN_IRQ | lib.ATTN_MAP
    assert lib.vcpu_take_attention(segment.header, 2) == 0
    assert segment.vcpu(1).attention == 0


def test_sleep_with_attention_pending_returns_at_once(segment: Segment) -> None:
    segment.attend(0, lib.ATTN_IRQ)
    lib.vcpu_sleep(segment.header, 0, NO_OFFSET)
    assert segment.vcpu(0).sleeping == 0
    assert segment.vcpu(0).attention == lib.ATTN_IRQ  # still to be looked at


def test_sleep_ends_at_guest_time(segment: Segment) -> None:
    segment.start_time()
    lib.vcpu_take_attention(segment.header, 0)  # starting time raises ATTN_TIMER
    wake = segment.guest_now() + 2_000_000
    lib.vcpu_sleep(segment.header, 0, wake)
    assert segment.guest_now() >= wake


def test_sleeper_without_running_time_computes_its_deadline_when_time_starts(segment: Segment) -> None:
    def sleeper() -> None:
        lib.vcpu_sleep(segment.header, 0, 1_000_000)

    def starter() -> None:
        while not segment.vcpu(0).sleeping:
            pass
        segment.start_time()

    run_all(sleeper, starter)


def test_no_wake_up_is_lost(segment: Segment) -> None:
    """Each round both sides meet in the window between "look" and "wait"."""
    rounds = 3000
    header, block = segment.header, segment.vcpu(0)
    answered = threading.Semaphore(0)
    seen = 0

    def sleeper() -> None:
        nonlocal seen
        while seen < rounds:
            lib.vcpu_sleep(header, 0, NO_OFFSET)
            if lib.vcpu_take_attention(header, 0) & lib.ATTN_IRQ and block.posted_nmi:
                block.posted_nmi = 0
                seen += 1
                answered.release()

    def sender() -> None:
        for _ in range(rounds):
            block.posted_nmi = 1
            lib.vcpu_attend(header, 0, lib.ATTN_IRQ)
            assert answered.acquire(timeout=HANG)

    run_all(sleeper, sender)
    assert seen == rounds


def test_the_world_stands_while_one_vcpu_holds_it(segment: Segment) -> None:
    """A vCPU says that it runs from unpark to park; a holder finds nobody running."""
    header = segment.header
    rounds, vcpus = 200, 3
    runs = [False] * vcpus
    held = [0] * vcpus

    def park(index: int) -> None:
        runs[index] = False
        lib.vcpu_park(header, index)

    def unpark(index: int) -> None:
        lib.vcpu_unpark(header, index)
        runs[index] = True

    def vcpu(index: int) -> None:
        unpark(index)
        lib.vcpu_map_ack(header, index)
        for _ in range(rounds):
            runs[index] = False  # seg_world_stop() may park
            assert lib.seg_world_stop(header, index) == 1
            assert header.world.owner == index + 1
            assert not any(runs)
            held[index] += 1
            assert not any(runs)
            lib.seg_world_resume(header, index)
            runs[index] = True
            if lib.vcpu_take_attention(header, index) & lib.ATTN_WORLD:
                park(index)
                unpark(index)
        park(index)

    run_all(*(lambda i=i: vcpu(i) for i in range(vcpus)))
    assert held == [rounds] * vcpus
    assert header.world.owner == 0


def test_resume_by_somebody_else_does_nothing(segment: Segment) -> None:
    assert lib.seg_world_stop(segment.header, 1) == 1
    lib.seg_world_resume(segment.header, 2)
    assert segment.header.world.owner == 2  # vCPU 1
    lib.seg_world_resume(segment.header, 1)
    assert segment.header.world.owner == 0


def test_call_counts_messages_and_raises_attention(segment: Segment) -> None:
    segment.call(3)
    segment.call(3)
    assert segment.vcpu(3).commands == 2
    assert segment.vcpu(3).attention == lib.ATTN_CONTROL


LOCKS = """
import os, signal, sys
from coordinator.contract._segment import lib
from coordinator.contract.segment import Segment
segment = Segment.attach(int(sys.argv[1]))
holder, name = (segment.fabric, "lock") if sys.argv[2] == "fabric" else (segment.header, "map_lock")
setattr(holder, name, os.getpid() << 1)  # as seg_lock() leaves it (seg.h)
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("lock", ["fabric", "map"])
def test_locks_of_the_dead_are_broken(segment: Segment, lock: str) -> None:
    """Whoever waits for one goes on; one that another holds stays."""
    child = subprocess.run(
        [sys.executable, "-c", LOCKS, str(segment.fd), lock],
        pass_fds=(segment.fd,), capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    pid = int(child.stdout)
    use: Callable[[], None] = (
        partial(segment.pin_set, 4, 0, True) if lock == "fabric" else segment.republish_map
    )
    waiter = threading.Thread(target=use)
    waiter.start()

    def word() -> int:
        return int(segment.fabric.lock if lock == "fabric" else segment.header.map_lock)

    segment.break_locks(pid + 1)
    assert word() >> 1 == pid
    while not word() & 1:  # it sleeps
        pass
    segment.break_locks(pid)
    waiter.join(HANG)
    assert not waiter.is_alive() and word() == 0


def test_nobody_waits_for_a_vcpu_that_has_died(segment: Segment) -> None:
    """It had the world stopped, and was not parked: neither a new map nor another LOCK waits for it."""
    segment.vcpu(1).parked = 0
    segment.vcpu(1).commands = 7
    segment.header.world.owner = 2
    segment.lost(1)
    assert segment.header.world.owner == 0 and segment.vcpu(1).commands == 0
    segment.republish_map()
    assert lib.seg_world_stop(segment.header, 0) == 1
    segment.lost(1)
    assert segment.header.world.owner == 1  # vCPU 0 has it, and lives
