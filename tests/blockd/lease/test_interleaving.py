"""Two processes change one lease at once, their file operations in every order that chance brings: at most
one holds it afterwards, and whoever thinks so does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.contract.errors import BlockError
from tests.blockd.lease.support import AWAIT, BREAK, Actor, Killed, World, hosts, litter, make_files, top

SECONDS = 60


class Turn:
    """A thread of one actor that stops before each of its file operations."""

    def __init__(self, actor: Actor, what: Callable[[], Any]) -> None:
        self.actor = actor
        self.failed: BaseException | None = None
        self.done = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        actor.before = self._stop
        self._thread = threading.Thread(target=self._run, args=(what,), daemon=True)
        self._thread.start()
        self.step()

    def _stop(self, step: str) -> None:
        self._stopped.release()
        self._go.acquire()

    def _run(self, what: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            self.actor.do(what)
        except (BlockError, OSError, Killed) as error:
            self.failed = error
        finally:
            self.done = True
            self._stopped.release()

    def step(self) -> None:
        """Up to the next file operation, or the end."""
        self._go.release()
        assert self._stopped.acquire(timeout=SECONDS), "a thread hangs"

    def end(self) -> None:
        while not self.done:
            self.step()
        self._thread.join()
        self.actor.before = lambda step: None


#: who goes on, and for how many file operations
ORDERS = st.lists(st.tuples(st.booleans(), st.integers(1, 4) | st.integers(1, 100)), max_size=30)
KILLS = st.none() | st.integers(0, 10)
Order = list[tuple[bool, int]]


def race(turns: list[Turn], order: list[tuple[bool, int]]) -> None:
    go_on(turns, order)
    for turn in turns:
        turn.end()


def go_on(turns: list[Turn], order: Order) -> None:
    for second, steps in order:
        for _ in range(steps):
            if not turns[second].done:
                turns[second].step()


def check(world: World, files: dict[str, str]) -> None:
    for name, file in files.items():
        writers = world.writers(name)
        assert len(writers) <= 1, "two writers"
        for writer in writers:
            lease = writer.exports.leases[name]
            assert lease is not None and top(file) == lease.record


FAST = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("dead_before", [False, True])
@given(order=ORDERS)
@FAST
def test_two_take_it(dead_before: bool, order: Order) -> None:
    with hosts("none") as (world, folder):
        files = make_files(folder, "a", "b")
        if dead_before:
            dead = Actor(world, "one")
            dead.do(lambda: dead.open(files))
            dead.kill()
        actors = [Actor(world, "one"), Actor(world, "one")]
        race([Turn(actor, partial(actor.open, files)) for actor in actors], order)
        check(world, files)
        assert world.writers("a") == world.writers("b")
        for actor in actors:
            assert actor.do(actor.exports.close_all) == []
        assert litter(folder) == []


@pytest.mark.parametrize("dead_before", [False, True])
@given(order=ORDERS)
@FAST
def test_one_acts_on_what_it_saw_long_ago(dead_before: bool, order: Order) -> None:
    """The other takes the lease and changes it several times meanwhile, so that old serials are free."""
    with hosts("none") as (world, folder):
        files = make_files(folder, "a")
        if dead_before:
            dead = Actor(world, "one")
            dead.do(lambda: dead.open(files))
            dead.kill()
        one, two = Actor(world, "one"), Actor(world, "one")

        def change() -> None:
            one.open(files)
            one.source.prepare("T")
            one.source.abort("T")

        turns = [Turn(one, change), Turn(two, lambda: two.open(files))]
        race(turns, order)
        check(world, files)


@given(order=ORDERS, what=st.sampled_from(["close", "prepare", "abort", "release", "open"]))
@FAST
def test_one_breaks_what_another_is_changing(order: Order, what: str) -> None:
    with hosts("none") as (world, folder):
        files = make_files(folder, "a", "b")
        one, two = Actor(world, "one"), Actor(world, "two")
        if what != "open":
            one.do(lambda: one.open(files))
        if what in ("abort", "release"):
            one.do(lambda: one.source.prepare("T"))
        actions: dict[str, Callable[[], Any]] = {
            "open": lambda: one.open(files),
            "close": one.exports.close_all,
            "prepare": lambda: one.source.prepare("T"),
            "abort": lambda: one.source.abort("T"),
            "release": lambda: one.source.release("T", 1),
        }
        turns = [Turn(one, actions[what]), Turn(two, lambda: two.open(files, BREAK))]
        race(turns, order)
        check(world, files)
        if what == "open":
            return  # the one that was first may have been broken, or the other have lost the race
        assert turns[1].failed is None or "being changed" in str(turns[1].failed)
        if turns[1].failed is None:
            assert world.writers("a") == world.writers("b") == [two]


@given(order=ORDERS, killed=KILLS, both=st.booleans())
@FAST
def test_two_destinations(order: Order, killed: int | None, both: bool) -> None:
    """All images go to one of them; where it is killed on the way, none goes to the other by halves."""
    with hosts("none") as (world, folder):
        files = make_files(folder, "a", "b")
        source, one, two = Actor(world, "one"), Actor(world, "two"), Actor(world, "two")
        source.do(lambda: source.open(files))
        for each in (one, two):
            each.do(partial(each.open, files, AWAIT))
        source.do(lambda: source.source.prepare("T"))
        if both:
            source.do(lambda: source.source.release("T", 1))
            turns = [Turn(one, lambda: one.destination.grant("T", 1))]
        else:
            turns = [Turn(source, lambda: source.source.release("T", 1))]
        turns.append(Turn(two, lambda: two.destination.grant("T", 1)))
        if killed is not None:
            go_on(turns, order[:killed])
            turns[0].actor.alive = turns[0].done
            order = order[killed:]
        race(turns, order)
        check(world, files)
        assert world.writers("a") == world.writers("b")
        assert source not in world.writers("a")
