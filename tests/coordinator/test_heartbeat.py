"""When an island that says nothing hangs, and when it is only slow."""

from __future__ import annotations

import pytest

from coordinator.heartbeat import LOOK_SECONDS, SUSPECT_SECONDS, Pulse, Sight, Verdict

LIMIT = 10.0
LOOK_NS = int(LOOK_SECONDS * 1e9)


def looks(
    pulse: Pulse, seconds: float, state: str = "S", waits: float = 0.0, excused: bool = False
) -> Verdict:
    """Silence for so long, of which it waits for a processor for the part ``waits``."""
    pulse.look(Sight(state, 0, heard=True))
    verdict = Verdict.SERVES
    for number in range(1, round(seconds / LOOK_SECONDS) + 1):
        verdict = pulse.look(Sight(state, int(number * LOOK_NS * waits), heard=False, excused=excused))
    return verdict


@pytest.mark.parametrize("state", ["S", "R", "T"])
def test_silence_is_suspected_then_judged(state: str) -> None:
    assert looks(Pulse(LIMIT), SUSPECT_SECONDS - LOOK_SECONDS, state) is Verdict.SERVES
    assert looks(Pulse(LIMIT), SUSPECT_SECONDS, state) is Verdict.SUSPECT
    assert looks(Pulse(LIMIT), LIMIT - LOOK_SECONDS, state) is Verdict.SUSPECT
    assert looks(Pulse(LIMIT), LIMIT, state) is Verdict.HANGS


def test_zero_is_never() -> None:
    assert looks(Pulse(0), 100 * LIMIT, "T") is Verdict.SUSPECT


def test_an_answer_wipes_the_slate() -> None:
    pulse = Pulse(LIMIT)
    looks(pulse, LIMIT - LOOK_SECONDS)
    assert pulse.look(Sight("S", 0, heard=True)) is Verdict.SERVES
    assert pulse.silent == 0


def test_who_waits_for_a_processor_is_slow() -> None:
    """A tenth of the time is its own, so ten times the limit must pass."""
    assert looks(Pulse(LIMIT), 9 * LIMIT, "R", waits=0.9) is Verdict.SUSPECT
    assert looks(Pulse(LIMIT), 11 * LIMIT, "R", waits=0.9) is Verdict.HANGS
    assert looks(Pulse(LIMIT), 100 * LIMIT, "R", waits=1.0) is Verdict.SERVES


@pytest.mark.parametrize("state", ["D", "t"])
def test_who_waits_for_a_disk_or_is_being_debugged_is_given_all_time(state: str) -> None:
    assert looks(Pulse(LIMIT), 100 * LIMIT, state) is Verdict.SERVES


def test_a_command_that_takes_long_is_an_excuse_unless_it_is_stopped() -> None:
    assert looks(Pulse(LIMIT), 100 * LIMIT, excused=True) is Verdict.SERVES
    assert looks(Pulse(LIMIT), LIMIT, "T", excused=True) is Verdict.HANGS
