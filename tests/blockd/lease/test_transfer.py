"""Handing leases over: order, repetition, loss, death and failure of either side at every file operation."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coordinator.contract import decision
from coordinator.contract.decision import Decision
from coordinator.contract.errors import BlockError, RecordError
from tests.blockd.lease.support import AWAIT, BREAK, Actor, Killed, World, litter, make_files, top


class Pair:
    """A source that runs, and a destination that waits, on two hosts."""

    def __init__(self, world: World, folder: Path, names: str = "ab") -> None:
        world.end()
        self.world, self.folder = world, folder
        self.files = make_files(folder, *names)
        self.source, self.target = Actor(world, "one", "web"), Actor(world, "two", "web")
        self.source.do(lambda: self.source.open(self.files))
        self.target.do(lambda: self.target.open(self.files, AWAIT))

    def prepare(self, transfer: str = "T") -> Any:
        return self.source.do(lambda: self.source.source.prepare(transfer))

    def release(self, transfer: str = "T", epoch: int = 1) -> Any:
        return self.source.do(lambda: self.source.source.release(transfer, epoch))

    def abort(self, transfer: str = "T") -> None:
        self.source.do(lambda: self.source.source.abort(transfer))

    def check(self, transfer: str = "T") -> Any:
        return self.target.do(lambda: self.target.destination.check(transfer))

    def grant(self, transfer: str = "T", epoch: int = 1) -> Any:
        return self.target.do(lambda: self.target.destination.grant(transfer, epoch))

    def writers(self) -> list[Actor]:
        """The same for all images, or there are halves."""
        found = [self.world.writers(name) for name in self.files]
        assert all(writers == found[0] for writers in found), found
        assert len(found[0]) <= 1, "two writers"
        return found[0]


@pytest.fixture
def pair(world: World, tmp_path: Path) -> Pair:
    return Pair(world, tmp_path)


def test_a_transfer(pair: Pair) -> None:
    assert pair.writers() == [pair.source]
    told = pair.prepare()
    assert (told["transfer"], told["epoch"]) == ("T", 1)
    assert [(row["id"], row["state"]) for row in told["images"]] == [
        ("a", "transferring"),
        ("b", "transferring"),
    ]
    assert pair.writers() == [] and pair.source.exports.table.names() == []
    seen = pair.check()
    assert [row["token"] for row in seen] == [row["token"] for row in told["images"]]
    released = pair.release()
    assert os.path.exists(released["decision"]) and pair.writers() == []
    rows = pair.grant()
    assert [(row["id"], row["state"], row["epoch"]) for row in rows] == [("a", "held", 2), ("b", "held", 2)]
    assert pair.writers() == [pair.target]
    assert litter(pair.folder) == ["a disk.img.lease-3", "b disk.img.lease-3"]
    pair.source.do(pair.source.exports.close_all)
    assert pair.writers() == [pair.target]
    pair.target.do(pair.target.exports.close_all)
    assert litter(pair.folder) == []


def test_and_back(pair: Pair) -> None:
    pair.prepare(), pair.release(), pair.grant()
    back = Actor(pair.world, "one", "web")
    back.do(lambda: back.open(pair.files, AWAIT))
    pair.target.do(lambda: pair.target.source.prepare("T2"))
    pair.target.do(lambda: pair.target.source.release("T2", 2))
    back.do(lambda: back.destination.grant("T2", 2))
    assert pair.writers() == [back] and top(pair.files["a"]).epoch == 3


def test_what_is_asked_twice_is_answered_as_the_first_time(pair: Pair) -> None:
    assert pair.prepare() == pair.prepare()
    assert pair.release() == pair.release()
    assert pair.grant() == pair.grant()
    assert pair.writers() == [pair.target]


def test_order_is_kept(pair: Pair) -> None:
    with pytest.raises(BlockError, match="no transfer T is prepared"):
        pair.release()
    with pytest.raises(BlockError, match="is not part of transfer T"):
        pair.check()
    pair.prepare()
    with pytest.raises(BlockError, match="has not released"):
        pair.grant()
    with pytest.raises(BlockError, match="transfer T is under way"):
        pair.prepare("U")
    with pytest.raises(BlockError, match="epoch 7 is stale .it is 1"):
        pair.release(epoch=7)
    pair.release()
    with pytest.raises(BlockError, match="epoch 2 is stale .it is 1"):
        pair.grant(epoch=2)
    with pytest.raises(BlockError, match="is not part of transfer U"):
        pair.grant("U")
    with pytest.raises(BlockError, match="is released; its images are the destination's"):
        pair.abort()
    pair.grant()
    for step in (partial(pair.grant, epoch=2), partial(pair.release, epoch=2)):
        with pytest.raises(BlockError, match="stale"):
            step()
    with pytest.raises(BlockError, match="has ended"):
        pair.prepare()
    with pytest.raises(BlockError, match="an identifier is up to"):
        pair.prepare("../x")
    assert pair.writers() == [pair.target]


def test_abort_gives_everything_back(pair: Pair) -> None:
    pair.prepare()
    pair.abort()
    pair.abort()
    assert pair.writers() == [pair.source]
    with pytest.raises(BlockError, match="has ended"):
        pair.prepare()  # doubled, and late
    with pytest.raises(BlockError, match="is not part of transfer T"):
        pair.grant()
    pair.prepare("U"), pair.release("U"), pair.grant("U")
    assert pair.writers() == [pair.target]


def test_abort_that_overtakes_prepare(pair: Pair) -> None:
    pair.abort()
    with pytest.raises(BlockError, match="has ended"):
        pair.prepare()
    assert pair.writers() == [pair.source]


def test_both_sides_must_mean_the_same_images(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    less = Actor(world, "two")
    less.do(lambda: less.open({"a": pair.files["a"]}, AWAIT))
    with pytest.raises(BlockError, match="handed over together .a, b."):
        pair.source.do(lambda: pair.source.source.prepare("T", ["a"]))
    pair.source.do(lambda: pair.source.source.prepare("T", ["b", "a"]))
    pair.release()
    with pytest.raises(BlockError, match="2 images are handed over, and 1 are waited for"):
        less.do(lambda: less.destination.grant("T", 1))
    assert pair.writers() == []
    pair.grant()


def test_what_has_no_lease_cannot_be_handed_over(pair: Pair) -> None:
    with pytest.raises(BlockError, match="is waiting for its lease"):
        pair.target.do(lambda: pair.target.source.prepare("T"))
    with pytest.raises(BlockError, match="no image is waiting"):
        pair.source.do(lambda: pair.source.destination.grant("T", 1))
    bare = Actor(pair.world, "one")
    with pytest.raises(BlockError, match="no image is leased"):
        bare.do(lambda: bare.source.prepare("T"))


def test_released_and_not_taken(pair: Pair) -> None:
    """Nobody but the destination, unless the user says so; then the destination no more."""
    pair.prepare(), pair.release()
    pair.source.kill()
    other = Actor(pair.world, "one")
    with pytest.raises(BlockError, match="handed over from VM 'web' on host one .* not taken yet; if"):
        other.do(lambda: other.open(pair.files))
    other.do(lambda: other.open(pair.files, BREAK))
    with pytest.raises(BlockError, match="is not part of transfer T"):
        other.do(lambda: other.exports.close_all()), pair.grant()


def test_a_source_that_died_before_the_decision_can_start_again(pair: Pair) -> None:
    pair.prepare()
    pair.source.kill()
    again = Actor(pair.world, "one")
    again.do(lambda: again.open(pair.files))
    with pytest.raises(BlockError):
        pair.grant()
    assert pair.writers() == [again]


def test_a_transfer_needs_a_name_of_its_own(world: World, tmp_path: Path) -> None:
    pair = Pair(world, tmp_path)
    old = tmp_path / "a disk.img.transfer-T"
    old.write_bytes(b"")
    with pytest.raises(BlockError, match="there has been a transfer of this name"):
        pair.prepare()
    assert pair.writers() == [pair.source]
    long = tmp_path / f"{'x' * 230}.img"
    long.write_bytes(bytes(4096))
    one = Actor(world, "one")
    one.do(lambda: one.open({"c": str(long)}))
    with pytest.raises(BlockError, match="File name too long"):
        one.do(lambda: one.source.prepare("a-transfer-with-a-longer-name"))
    assert world.writers("c") == [one]


def test_a_name_that_leads_elsewhere_meanwhile(world: World, tmp_path: Path) -> None:
    """What comes back is the image that was leased, or nothing."""
    files = make_files(tmp_path, "a", "other")
    link = tmp_path / "link.img"
    link.symlink_to(files["a"])
    one = Actor(world, "one")
    one.do(lambda: one.open({"a": str(link)}))
    one.do(lambda: one.source.prepare("T"))
    link.unlink()
    link.symlink_to(files["other"])
    with pytest.raises(BlockError, match="link.img: is not the file any more that was leased"):
        one.do(lambda: one.source.abort("T"))
    assert world.writers("a") == []
    link.unlink()
    link.symlink_to(files["a"])
    one.do(lambda: one.source.abort("T"))
    assert world.writers("a") == [one]


def test_images_that_were_awaited_can_be_taken_without_a_transfer(pair: Pair) -> None:
    """As when a machine comes from a file."""
    with pytest.raises(BlockError, match="is locked"):
        pair.target.do(lambda: pair.target.open(pair.files))
    assert pair.writers() == [pair.source]
    pair.source.do(pair.source.exports.close_all)
    pair.target.do(lambda: pair.target.open(pair.files))
    assert pair.writers() == [pair.target]
    pair.target.do(pair.target.exports.close_all)
    assert litter(pair.folder) == []


def test_images_in_several_folders_reached_by_other_paths(world: World, tmp_path: Path) -> None:
    """The second host has the storage somewhere else."""
    for name in ("x", "y"):
        (tmp_path / "store" / name).mkdir(parents=True)
    here = make_files(tmp_path / "store" / "x", "a") | make_files(tmp_path / "store" / "y", "b")
    os.symlink(tmp_path / "store", tmp_path / "mount")
    there = {name: file.replace("/store/", "/mount/") for name, file in here.items()}
    source, target = Actor(world, "one"), Actor(world, "two")
    source.do(lambda: source.open(here))
    target.do(lambda: target.open(there, AWAIT))
    source.do(lambda: source.source.prepare("T"))
    target.do(lambda: target.destination.check("T"))
    source.do(lambda: source.source.release("T", 1))
    target.do(lambda: target.destination.grant("T", 1))
    assert world.writers("a") == world.writers("b") == [target]


def test_a_claim_of_one_who_died_over_it_hinders_nobody(world: World, tmp_path: Path) -> None:
    """Killed between making its record and removing that of the living."""
    world.locking = "local"
    for moment in range(1000):
        place = tmp_path / str(moment)
        place.mkdir()
        pair = Pair(world, place)
        thief = Actor(world, "one")
        world.locking = "none"
        with pytest.raises(Killed):
            thief.do(partial(thief.open, pair.files, BREAK), kill_before=moment)
        world.locking = "local"
        if len(list(place.glob("a*.lease-*"))) == 2:
            break
    assert pair.writers() == [pair.source]
    pair.prepare(), pair.release(), pair.grant()
    assert pair.writers() == [pair.target]
    assert litter(place) == ["a disk.img.lease-4", "b disk.img.lease-3"]


# ---- death ------------------------------------------------------------------------------------------------
Step = Callable[[Pair], Any]


def _moments(
    world: World, folder: Path, before: list[Step], actor: Callable[[Pair], Actor], step: Step
) -> Any:
    """(pair, killed) of fresh pairs: the actor is killed before the nth file operation of ``step``."""
    for moment in range(1000):
        place = folder / str(moment)
        place.mkdir()
        pair = Pair(world, place)
        for earlier in before:
            earlier(pair)
        try:
            actor(pair).do(partial(step, pair), kill_before=moment)
        except Killed:
            yield pair, True
        else:
            yield pair, False
            assert moment >= 5
            return


def _release(pair: Pair) -> None:
    pair.source.source.release("T", 1)


def _grant(pair: Pair) -> None:
    pair.target.destination.grant("T", 1)


def _prepare_and_abort(pair: Pair) -> None:
    pair.source.source.prepare("U")
    pair.source.source.abort("U")


def test_a_source_killed_in_release_has_released_or_not(world: World, tmp_path: Path) -> None:
    outcomes = set()
    for pair, killed in _moments(world, tmp_path, [Pair.prepare], lambda pair: pair.source, _release):
        assert pair.writers() == []
        if killed:
            again = Actor(world, "one")
            try:
                again.do(partial(again.open, pair.files))
            except BlockError as error:
                assert "handed over" in str(error)
                outcomes.add("released")
            else:
                outcomes.add("kept")
                with pytest.raises(BlockError):
                    pair.grant()
                assert pair.writers() == [again]
                continue
        pair.grant()
        assert pair.writers() == [pair.target]
    assert outcomes == {"released", "kept"}


def test_a_source_killed_in_prepare_or_abort_starts_again(world: World, tmp_path: Path) -> None:
    for pair, killed in _moments(world, tmp_path, [], lambda pair: pair.source, _prepare_and_abort):
        if killed:
            again = Actor(world, "one")
            again.do(partial(again.open, pair.files))
            assert pair.writers() == [again]
            again.do(again.exports.close_all)
            assert litter(pair.folder) == []
        else:
            assert pair.writers() == [pair.source]


def test_a_destination_killed_in_grant(world: World, tmp_path: Path) -> None:
    for pair, killed in _moments(
        world, tmp_path, [Pair.prepare, Pair.release], lambda pair: pair.target, _grant
    ):
        if not killed:
            assert pair.writers() == [pair.target]
            continue
        assert pair.writers() == []
        with pytest.raises(BlockError, match="is released"):
            pair.abort()
        late = Actor(world, "two")  # of another process, that has not the guest's memory
        late.do(partial(late.open, pair.files, AWAIT))
        try:
            late.do(partial(late.destination.grant, "T", 1))
        except BlockError:
            late.do(late.exports.close_all)
            late = Actor(world, "two")
            late.do(partial(late.open, pair.files, BREAK))
        assert pair.writers() == [late]


# ---- failure ----------------------------------------------------------------------------------------------
def _fails(actor: Actor, step: str, number: int, after: int = 0) -> Callable[[], bool]:
    """Let the file operation ``step`` fail once, after so many others of its kind; has it?"""
    left = after
    failed = False

    def before(name: str) -> None:
        nonlocal left, failed
        if name != step or failed:
            return
        if left:
            left -= 1
            return
        failed = True
        raise OSError(number, os.strerror(number))

    actor.before = before
    return lambda: failed


STEPS = ["names", "read", "draft", "publish", "remove", "sync"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_step_that_fails_can_be_asked_for_again(
    world: World, tmp_path: Path, step: str, number: int
) -> None:
    for after in range(200):
        place = tmp_path / str(after)
        place.mkdir()
        pair = Pair(world, place)
        failed = _fails(pair.source, step, number, after)
        failed_there = _fails(pair.target, step, number, after)
        for action in (pair.prepare, pair.release, pair.grant):
            try:
                action()
            except BlockError:
                assert pair.writers() in ([], [pair.source], [pair.target])
                action()
        assert pair.writers() == [pair.target]
        if not failed() and not failed_there():
            break
    assert after >= 1


@pytest.mark.parametrize("step", STEPS)
def test_after_a_failed_step_everything_can_be_taken_back(world: World, tmp_path: Path, step: str) -> None:
    """Unless the decision was made: then abort says so, and the destination goes on."""
    for after in range(200):
        place = tmp_path / str(after)
        place.mkdir()
        pair = Pair(world, place)
        failed = _fails(pair.source, step, errno.EIO, after)
        try:
            pair.prepare()
            pair.release()
        except BlockError:
            pass
        try:
            pair.abort()
        except BlockError as error:
            if "is released" not in str(error):  # it failed itself
                pair.abort()
        if pair.writers() != [pair.source]:
            pair.grant()
            assert pair.writers() == [pair.target]
        else:
            with pytest.raises(BlockError):
                pair.grant()
            assert pair.writers() == [pair.source]
        if not failed():
            break
    assert after >= 1


def test_a_lease_broken_meanwhile_stops_the_transfer(world: World, tmp_path: Path) -> None:
    world.locking = "local"
    pair = Pair(world, tmp_path)
    pair.prepare()
    thief = Actor(world, "two")
    thief.do(lambda: thief.open({"a": pair.files["a"]}, BREAK))
    with pytest.raises(BlockError, match="the lease is lost"):
        pair.release()
    with pytest.raises(BlockError, match="is leased to|is not part of|is locked"):
        pair.grant()
    with pytest.raises(BlockError, match="a disk.img: the lease is lost"):
        pair.abort()
    assert world.writers("a") == [thief] and world.writers("b") == [pair.source]


# ---- the record of a VM without disks ---------------------------------------------------------------------
def test_the_first_decision_holds(tmp_path: Path) -> None:
    path = decision.path_of(str(tmp_path), "T-1")
    assert decision.decided(path) is None
    released, aborted = Decision("T-1", "released", 4), Decision("T-1", "aborted", 4)
    assert decision.decide(path, released) == released
    assert decision.decide(path, aborted) == released == decision.decided(path)
    decision.forget(path)
    decision.forget(path)
    assert decision.decide(path, aborted) == aborted and os.listdir(tmp_path) == ["transfer-T-1"]
    with pytest.raises(RecordError):
        decision.path_of(str(tmp_path), "a/b")
    Path(path).write_bytes(Path(path).read_bytes()[:-9])
    with pytest.raises(RecordError, match="damaged"):
        decision.decided(path)
