"""Guests that write anything anywhere: nothing raises, nothing leaves the medium (hardware-cases 12)."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from devhost.ide.ata import TRANSFERS, AtaDrive
from devhost.ide.atapi import AtapiDrive
from devhost.ide.atapi_commands import COMMANDS
from tests.devhost.ide.rig import Backend, Memory, Rig, pattern

RANGES = st.sampled_from(["command", "command", "command", "control", "busmaster"])
WIDTHS = st.sampled_from([1, 2, 4])
OFFSETS = st.integers(0, 9)
VALUES = st.one_of(
    st.sampled_from([0xA0, 0xB0, 0xE0, 0xEC, 0xA1, 0xEF, 0xC6, 0x08, 0x90, 0x01, 0x09, *TRANSFERS]),
    st.integers(0, 0xFFFF_FFFF),
)
ACCESS = st.tuples(st.just("write"), RANGES, OFFSETS, WIDTHS, VALUES)
READ = st.tuples(st.just("read"), RANGES, OFFSETS, WIDTHS, st.integers(1, 600))
STRING = st.tuples(st.just("string"), st.just("command"), st.just(0), WIDTHS, st.binary(max_size=80))
PACKET = st.tuples(
    st.just("packet"),
    st.booleans(),
    st.integers(0, 0xFFFF),
    st.sampled_from(sorted(COMMANDS)),
    st.binary(min_size=11, max_size=11),
)
COMMAND = st.tuples(
    st.just("command"),
    st.sampled_from([*TRANSFERS, 0xE7, 0xEC, 0xA1]),
    st.integers(0, 255),
    st.integers(0, 140),
    st.booleans(),
)
START = st.tuples(
    st.just("start"), st.booleans(), st.binary(min_size=64, max_size=64), st.just(0), st.just(0)
)
HOST = st.tuples(
    st.sampled_from(
        ["settle", "fail", "reload", "tray", "force", "close", "swap", "reset", "pause", "resume"]
    ),
    st.just(0),
    st.just(0),
    st.just(0),
    st.just(0),
)


def fresh() -> Rig:
    first, second = Backend(pattern(128 * 512)), Backend(pattern(60 * 2048))
    return Rig(lambda: (AtaDrive(first), AtapiDrive(second)), memory=Memory(1 << 18))


def act(rig: Rig, step: tuple) -> None:
    kind, first, second, third, fourth = step
    cd = rig.channel.drives[1]
    assert isinstance(cd, AtapiDrive)
    if kind == "write":
        rig.channel.write(second, third, fourth & (1 << 8 * third) - 1, first)
    elif kind == "read":
        assert 0 <= rig.channel.read(second, third, first) < 1 << 8 * third
        assert len(rig.channel.read_string(second, third, fourth, first)) == third * fourth
    elif kind == "string":
        rig.channel.write_string(second, third, fourth[: len(fourth) // third * third], first)
    elif kind == "packet":
        rig.packet(third, *fourth, dma=first, limit=second, device=1)
    elif kind == "command":
        rig.taskfile(count=second, lba=third, device=int(fourth))
        rig.command(first)
    elif kind == "start":
        rig.memory.write(0x1000, second)
        rig.channel.write(4, 4, 0x1000, "busmaster")
        rig.start(to_memory=first)
    elif kind == "settle":
        rig.settle()
    elif kind == "fail":
        rig.settle(5)
    elif kind == "reload":
        backend = cd.backend
        rig.reload()
        assert rig.channel.drives[1] is not cd and backend is not None
    elif kind == "tray":
        cd.open_tray()
    elif kind == "force":
        cd.open_tray(force=True)
    elif kind == "close":
        cd.close_tray()
    elif kind == "swap":
        cd.insert(cd.backend)
    elif kind == "reset":
        rig.channel.reset()
    elif kind == "pause":
        rig.channel.pause()
    else:
        rig.channel.resume()
    for offset, name in ((0, "control"), (0, "busmaster"), (2, "busmaster")):
        value = rig.channel.peek(offset, name)
        assert value is None or 0 <= value <= 0xFF


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(ACCESS, READ, STRING, PACKET, PACKET, COMMAND, COMMAND, START, HOST, HOST), max_size=60
    )
)
def test_any_sequence_of_accesses(steps: list[tuple]) -> None:
    """The backend asserts that requests stay on the medium and are not doubled in flight."""
    rig = fresh()
    for step in steps:
        act(rig, step)
    rig.channel.resume()
    rig.settle()
    rig.channel.reset()
    rig.settle()
    rig.channel.write(6, 1, 0xA0, "command")
    rig.command(0xEC)
    assert rig.status & 0x08 and len(rig.words(256)) == 512
