"""Any sequence of starts, ends, kills, reboots and of messages lost, doubled or late: never two writers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blockd.lease.slot import Slot
from coordinator.contract.errors import BlockError
from tests.blockd.lease.support import AWAIT, BREAK, TAKE, Actor, Killed, hosts, litter, make_files

#: before which file operation the process is killed
KILL = st.one_of(st.none(), st.none(), st.none(), st.integers(0, 60))
WHICH = st.integers(0, 5)
TRANSFERS = st.sampled_from(["T1", "T2"])
EPOCHS = st.one_of(st.none(), st.none(), st.integers(1, 4))


def some_live(machine: Hosts) -> bool:
    return any(actor.alive for actor in machine.world.actors)


def one_writes(machine: Hosts) -> bool:
    return bool(machine.world.writers("a"))


class Hosts(RuleBasedStateMachine):
    """VMs on two hosts around the same two images."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        #: transfer -> the epoch that its prepare answered last
        self.epochs: dict[str, int] = {}

    @initialize(locking=st.sampled_from(["shared", "local", "none"]))
    def begin(self, locking: str) -> None:
        self.world, self.folder = self.stack.enter_context(hosts(locking))
        self.files = make_files(self.folder, "a", "b")

    def attempt(self, actor: Actor, what: Callable[[], Any], kill: int | None) -> Any:
        """None when it was refused, or killed."""
        try:
            return actor.do(what, kill_before=kill)
        except (BlockError, Killed):
            return None

    def alive(self, which: int) -> Actor:
        actors = [actor for actor in self.world.actors if actor.alive]
        return actors[which % len(actors)]

    # ---- machines --------------------------------------------------------------------------------
    @rule(host=st.sampled_from(["one", "two"]), policy=st.sampled_from([TAKE, TAKE, BREAK]), kill=KILL)
    def start(self, host: str, policy: Any, kill: int | None) -> None:
        actor = Actor(self.world, host)
        self.attempt(actor, lambda: actor.open(self.files, policy), kill)

    @rule(host=st.sampled_from(["one", "two"]))
    def start_incoming(self, host: str) -> None:
        actor = Actor(self.world, host)
        self.attempt(actor, lambda: actor.open(self.files, AWAIT), None)

    @precondition(some_live)
    @rule(which=WHICH)
    def kill(self, which: int) -> None:
        actor = self.alive(which)
        actor.kill()

    @precondition(some_live)
    @rule(which=WHICH, kill=KILL)
    def quit(self, which: int, kill: int | None) -> None:
        actor = self.alive(which)
        self.attempt(actor, actor.exports.close_all, kill)
        if actor.alive:
            actor.kill()

    @rule(host=st.sampled_from(["one", "two"]))
    def reboot(self, host: str) -> None:
        self.world.reboot(host)

    # ---- messages, in any order and number ---------------------------------------------------------
    @precondition(some_live)
    @rule(which=WHICH, transfer=TRANSFERS, kill=KILL)
    def prepare(self, which: int, transfer: str, kill: int | None) -> None:
        actor = self.alive(which)
        answer = self.attempt(actor, lambda: actor.source.prepare(transfer), kill)
        if answer is not None:
            self.epochs[transfer] = answer["epoch"]

    @precondition(some_live)
    @rule(which=WHICH, transfer=TRANSFERS, epoch=EPOCHS, kill=KILL)
    def release(self, which: int, transfer: str, epoch: int | None, kill: int | None) -> None:
        actor = self.alive(which)
        named = epoch or self.epochs.get(transfer, 1)
        self.attempt(actor, lambda: actor.source.release(transfer, named), kill)

    @precondition(some_live)
    @rule(which=WHICH, transfer=TRANSFERS, kill=KILL)
    def abort(self, which: int, transfer: str, kill: int | None) -> None:
        actor = self.alive(which)
        self.attempt(actor, lambda: actor.source.abort(transfer), kill)

    @precondition(some_live)
    @rule(which=WHICH, transfer=TRANSFERS, epoch=EPOCHS, kill=KILL)
    def grant(self, which: int, transfer: str, epoch: int | None, kill: int | None) -> None:
        actor = self.alive(which)
        named = epoch or self.epochs.get(transfer, 1)
        self.attempt(actor, lambda: actor.destination.grant(transfer, named), kill)

    @precondition(one_writes)
    @rule(host=st.sampled_from(["one", "two"]), transfer=TRANSFERS, kill=KILL)
    def migrate(self, host: str, transfer: str, kill: int | None) -> None:
        """The way it should go, which single messages seldom find; killed somewhere on it."""
        (source,) = self.world.writers("a")
        target = Actor(self.world, host)
        self.attempt(target, lambda: target.open(self.files, AWAIT), None)
        answer = self.attempt(source, lambda: source.source.prepare(transfer), None)
        if answer is not None:
            self.epochs[transfer] = answer["epoch"]
            self.attempt(source, partial(source.source.release, transfer, answer["epoch"]), kill)
            self.attempt(target, partial(target.destination.grant, transfer, answer["epoch"]), kill)

    # ---- what must hold ----------------------------------------------------------------------------
    @invariant()
    def never_two_writers(self) -> None:
        for name, file in self.files.items():
            writers = self.world.writers(name)
            assert len(writers) <= 1, "two writers"
            for writer in writers:
                lease = writer.exports.leases[name]
                # a claim that was not made good may lie above it
                assert lease is not None and lease.record in [found.record for found in Slot(file).look()]

    def teardown(self) -> None:
        """Whatever has happened, the user can have the images back, and nothing is left beside them."""
        with self.stack:
            self.world.end()
            last = Actor(self.world, "one")
            last.do(lambda: last.open(self.files, BREAK))
            assert last.writes("a") and last.writes("b")
            assert last.do(last.exports.close_all) == []
            assert not [name for name in litter(self.folder) if ".lease-" in name]


TestHosts = Hosts.TestCase
TestHosts.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
