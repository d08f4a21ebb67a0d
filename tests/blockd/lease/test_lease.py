"""Taking leases, losing them, and what stands against a second writer."""

from __future__ import annotations

import errno
import json
import os
import stat
from functools import partial
from pathlib import Path

import msgspec
import pytest

from blockd.lease import judge
from blockd.lease.lease import Claim, acquire
from blockd.lease.record import Owner
from blockd.lease.slot import Slot
from blockd.locks import lock_image
from blockd.raw import RawImage
from coordinator.contract.config import Export, Media
from coordinator.contract.durable import Folder, seal, unseal
from coordinator.contract.errors import BlockError, RecordError
from tests.blockd.lease.support import BREAK, TAKE, Actor, Killed, World, litter, make_files, top


def test_a_clean_end_leaves_nothing(world: World, tmp_path: Path) -> None:
    files = make_files(tmp_path, "a", "b")
    one = Actor(world, "one", "web server")
    one.do(lambda: one.open(files))
    assert [record.epoch for record in map(top, files.values())] == [1, 1]
    assert (top(files["a"]).vm, top(files["a"]).host, top(files["a"]).state) == ("web server", "one", "held")
    assert one.writes("a") and one.writes("b")
    assert one.do(one.exports.close_all) == []
    assert litter(tmp_path) == []


@pytest.mark.parametrize("locking", ["shared", "local", "none"])
def test_a_second_vm_is_refused_in_one_line(world: World, tmp_path: Path, locking: str) -> None:
    world.locking = locking
    files = make_files(tmp_path, "a")
    one, two = Actor(world, "one", "web"), Actor(world, "two")
    one.do(lambda: one.open(files))
    with pytest.raises(BlockError) as refused:
        two.do(lambda: two.open(files))
    text = str(refused.value)
    assert "\n" not in text and text.startswith(files["a"])
    if locking != "shared":  # where the lock says so first
        assert "VM 'web' on host one (pid 101, epoch 1)" in text and "atoll img lease --break" in text
    assert world.writers("a") == [one]


def test_all_or_none_in_the_order_of_their_paths(world: World, tmp_path: Path) -> None:
    world.locking = "none"
    files = make_files(tmp_path, "a", "b", "c")
    two = Actor(world, "two")
    two.do(lambda: two.open({"b": files["b"]}))
    one = Actor(world, "one")
    with pytest.raises(BlockError, match="b disk.img: is leased to VM 'vm' on host two"):
        one.do(lambda: one.open({"c": files["c"], "b": files["b"], "a": files["a"]}))
    assert litter(tmp_path) == ["b disk.img.lease-1"] and not one.held
    two.do(two.exports.close_all)
    one.do(lambda: one.open(files))
    assert [world.writers(name) for name in "abc"] == [[one]] * 3


def test_the_lease_of_a_dead_vm_goes_to_the_next_with_the_next_epoch(world: World, tmp_path: Path) -> None:
    files = make_files(tmp_path, "a", "b")
    one = Actor(world, "one")
    one.do(lambda: one.open({"a": files["a"]}))
    one.kill()
    next_one = Actor(world, "one")
    next_one.do(lambda: next_one.open(files))
    assert [top(file).epoch for file in files.values()] == [2, 2]  # one VM, one epoch
    world.reboot("one")
    third = Actor(world, "one")
    third.do(lambda: third.open(files))
    assert top(files["a"]).epoch == 3 and world.writers("a") == [third]


@pytest.mark.parametrize("locking", ["shared", "none"])
def test_the_dead_of_another_host_are_not_known_to_be(
    world: World, tmp_path: Path, locking: str
) -> None:
    world.locking = locking
    files = make_files(tmp_path, "a")
    one = Actor(world, "one")
    one.do(lambda: one.open(files))
    one.kill()
    two = Actor(world, "two")
    with pytest.raises(BlockError, match=r"is leased to VM 'vm' on host one .*lease=break"):
        two.do(lambda: two.open(files))
    two.do(lambda: two.open(files, BREAK))
    assert world.writers("a") == [two] and top(files["a"]).epoch == 2


def test_whoever_lost_the_lease_writes_no_more(world: World, tmp_path: Path) -> None:
    """Two machines say they are the same VM: the lower epoch is fenced off (hardware-cases, 26)."""
    world.locking = "local"
    files = make_files(tmp_path, "a")
    one, two = Actor(world, "one"), Actor(world, "two")
    one.do(lambda: one.open(files))
    image = one.exports.table.named("a").image
    two.do(lambda: two.open(files, BREAK))
    assert world.writers("a") == [two]
    successor = "VM 'vm' on host two .pid 102, epoch 2.'s now"
    for action in (
        lambda: image.write(0, b"x" * 512),
        image.flush,
        lambda: image.trim(0, 512),
        lambda: image.write_zeroes(0, 512, True, False),
        lambda: image.resize(1 << 20),
    ):
        with pytest.raises(PermissionError, match=f"lease is lost .it is {successor}"):
            one.do(action)
    assert one.do(one.exports.describe)[0]["state"] == "lost"
    one.do(one.exports.close_all)  # takes nothing from the other
    assert top(files["a"]).epoch == 2 and world.writers("a") == [two]


def test_a_broken_lease_needs_the_image_unlocked(world: World, tmp_path: Path) -> None:
    """On one host the living keep their lock, and with it the lease: breaking it would help nobody."""
    files = make_files(tmp_path, "a")
    one, other = Actor(world, "one"), Actor(world, "one")
    one.do(lambda: one.open(files))
    with pytest.raises(BlockError, match="is locked"):
        other.do(lambda: other.open(files, BREAK))
    assert world.writers("a") == [one] and top(files["a"]).epoch == 1


def test_tools_respect_a_lease(world: World, tmp_path: Path) -> None:
    world.locking = "none"
    files = make_files(tmp_path, "a")
    one, tool = Actor(world, "one"), Actor(world, "two")
    one.do(lambda: one.open(files))
    with pytest.raises(BlockError, match="is leased to"):
        tool.do(lambda: RawImage(files["a"]))
    tool.do(lambda: RawImage(files["a"], read_only=True)).close()
    one.do(one.exports.close_all)
    tool.do(lambda: RawImage(files["a"])).close()


@pytest.mark.parametrize("what", [b"", b"garbage", b"atoll lease 1 00000000\n{}\n", None])
def test_a_record_that_cannot_be_understood_keeps_everybody_away(
    world: World, tmp_path: Path, what: bytes | None
) -> None:
    files = make_files(tmp_path, "a")
    record = tmp_path / "a disk.img.lease-7"
    if what is None:  # one of a later version
        one = Actor(world, "one")
        one.do(lambda: one.open(files))
        written = (tmp_path / "a disk.img.lease-1").read_bytes()
        one.do(one.exports.close_all)
        what = seal("lease", unseal("lease", written)[:-1] + b',"color":"blue"}')
    record.write_bytes(what)
    two = Actor(world, "two")
    with pytest.raises(BlockError, match="lease-7 is damaged, or of another version"):
        two.do(lambda: two.open(files))
    assert two.do(lambda: two.open(files, BREAK)) and world.writers("a") == [two]
    assert litter(tmp_path) == ["a disk.img.lease-8"]


def test_every_cut_and_every_flipped_byte_of_a_record_is_seen() -> None:
    whole = seal("lease", b'{"epoch":3}')
    assert unseal("lease", whole) == b'{"epoch":3}'
    damaged = [whole[:end] for end in range(len(whole) - 1)]  # without its last newline it is whole
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole) - 1)]
    for data in damaged:
        with pytest.raises(RecordError):
            unseal("lease", data)


def test_names_that_lead_to_one_image(world: World, tmp_path: Path) -> None:
    world.locking = "none"
    files = make_files(tmp_path, "a")
    (tmp_path / "links").mkdir()
    os.symlink(files["a"], tmp_path / "links" / "soft")
    os.link(files["a"], tmp_path / "hard link.img")
    one, two = Actor(world, "one"), Actor(world, "two")
    one.do(lambda: one.open({"x": str(tmp_path / "links" / "soft")}))
    assert os.listdir(tmp_path / "links") == ["soft"] and litter(tmp_path)[0] == "a disk.img.lease-1"
    for name in (files["a"], str(tmp_path / "hard link.img")):
        with pytest.raises(BlockError, match="is leased to VM 'vm' on host one"):
            two.do(partial(two.open, {"x": name}))
    assert world.writers("x") == [one]
    one.do(one.exports.close_all)
    both = {"x": files["a"], "y": str(tmp_path / "hard link.img")}
    with pytest.raises(BlockError, match="are the same image"):
        one.do(lambda: one.open(both))
    os.link(files["a"], tmp_path / "links" / "far.img")
    with pytest.raises(BlockError, match="another name .hard link. in another folder"):
        one.do(lambda: one.open(files))
    world.locking = "shared"
    one.do(lambda: one.open(files))


def test_what_needs_no_lease(world: World, tmp_path: Path) -> None:
    file = make_files(tmp_path, "a")["a"]
    exports = [
        Export("ro", file, read_only=True, lease=TAKE),
        Export("cd", file, media=Media.CDROM, lease=TAKE),
        Export("snap", file, snapshot=True, lease=TAKE),
    ]
    one = Actor(world, "one")
    for export in exports:
        assert not export.leased
        one.do(partial(one.exports.open_all, [export]))
    assert one.do(one.exports.describe) == [] and litter(tmp_path) == []
    assert not Export("net", "nbd://host/x", lease=TAKE).leased and not Export("off", file).leased


class FullFolder(Folder):
    """A disk without room, from the nth record on."""

    room = 0
    number = errno.ENOSPC

    def draft(self, data: bytes) -> object:  # type: ignore[override]
        if type(self).room <= 0:
            raise OSError(self.number, os.strerror(self.number))
        type(self).room -= 1
        return super().draft(data)


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_leaves_things_as_they_were(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_files(tmp_path, "a", "b")
    monkeypatch.setattr(FullFolder, "room", room)
    claims = [Claim(name, file) for name, file in files.items()]
    with pytest.raises(BlockError, match="cannot keep a lease in .*: No space left on device; lease=off"):
        acquire(claims, Owner("", "vm"), FullFolder)
    assert litter(tmp_path) == [] and not judge.held


def test_a_full_disk_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_files(tmp_path, "a")
    monkeypatch.setattr(FullFolder, "room", 1)
    lease = acquire([Claim("a", files["a"])], Owner("", "vm"), FullFolder)["a"]
    assert lease is not None
    with pytest.raises(OSError, match="No space"):
        lease.change(state="transferring")
    lease.check()
    assert top(files["a"]) == lease.record and lease.record.state == "held"
    lease.give_back()
    assert litter(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With image locks the VM runs without a lease; without locks it does not."""
    files = make_files(tmp_path, "a")
    monkeypatch.setattr(FullFolder, "room", 0)
    monkeypatch.setattr(FullFolder, "number", errno.EROFS)
    claims = [Claim("a", files["a"])]
    assert acquire(claims, Owner("", "vm"), FullFolder) == {"a": None}
    monkeypatch.setattr("blockd.locks._lock", lambda fd, file, writable: False)
    with pytest.raises(BlockError, match="Read-only file system; lease=off"):
        acquire(claims, Owner("", "vm"), FullFolder)


def test_a_file_system_without_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No O_TMPFILE, and then no hard links either: a temporary name, renamed without replacing."""
    real_open, real_link = os.open, os.link

    def no_tmpfile(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_open(path, flags, *rest)

    def no_link(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    folder = Folder(str(tmp_path))
    monkeypatch.setattr(os, "open", no_tmpfile)
    for link in (real_link, no_link):
        monkeypatch.setattr(os, "link", link)
        assert folder.create("name", b"one")
        assert not folder.create("name", b"two")
        assert folder.create("name", b"one")  # a network file system that asks twice
        assert os.listdir(tmp_path) == ["name"] and folder.read("name") == b"one"
        folder.remove("name")
    assert folder.read("name") is None


def test_records_are_plain_files_others_may_read(world: World, tmp_path: Path) -> None:
    files = make_files(tmp_path, "a")
    one = Actor(world, "one")
    one.do(lambda: one.open(files))
    (record,) = tmp_path.glob("*.lease-*")
    assert stat.S_IMODE(record.stat().st_mode) & 0o444 and record.stat().st_nlink == 1
    told = json.loads(unseal("lease", record.read_bytes()))
    assert (told["serial"], told["epoch"], told["state"], told["host"]) == (1, 1, "held", "one")


def test_a_container_that_is_gone_is_known_by_its_locks(world: World, tmp_path: Path) -> None:
    """Another PID namespace of the same boot: its PIDs say nothing here, its image locks do."""
    files = make_files(tmp_path, "a")
    one, other = Actor(world, "one"), Actor(world, "one")
    identity = msgspec.structs.replace(one.identity(), namespace=77)
    one.identity = lambda: identity  # type: ignore[method-assign]
    one.do(lambda: one.open(files))
    one.kill()
    world.locking = "none"
    with pytest.raises(BlockError, match="is leased"):
        other.do(lambda: other.open(files))
    world.locking = "shared"
    other.do(lambda: other.open(files))
    assert world.writers("a") == [other]


def test_killed_at_every_file_operation(world: World, tmp_path: Path) -> None:
    """Whatever the dead leaves, the next one takes, and nothing is left in the end."""
    files = make_files(tmp_path, "a", "b")
    for moment in range(1000):
        one = Actor(world, "one")
        try:
            one.do(partial(one.open, files), kill_before=moment)
        except Killed:
            assert world.writers("a") == []
        else:
            one.kill()
            break
        two = Actor(world, "one")
        two.do(partial(two.open, files))
        assert world.writers("a") == world.writers("b") == [two]
        two.do(two.exports.close_all)
        assert litter(tmp_path) == []
    assert moment > 10


def test_locks_are_respected_by_the_lease(world: World, tmp_path: Path) -> None:
    files = make_files(tmp_path, "a")
    fd = os.open(files["a"], os.O_RDWR)
    one = Actor(world, "one")
    one.do(lambda: lock_image(fd, files["a"], writable=True))  # as qemu-img does
    with pytest.raises(BlockError, match="is locked"):
        one.do(lambda: one.open(files))
    os.close(fd)
    assert litter(tmp_path) == [] and Slot(files["a"]).look() == ()
