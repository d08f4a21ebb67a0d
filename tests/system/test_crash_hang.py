"""Islands that are stopped: given the time that the user has set, then replaced; or they go on as if nothing
had been.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.system.machine import CONSOLE, until, with_qmp


def restarted(qmp: Any) -> list[dict[str, Any]]:
    events = [event["data"] for event in qmp.get_events() if event["event"] == "ISLAND_RESTARTED"]
    return events


@pytest.mark.parametrize("role", ["devhost0", "blockd"])
def test_who_is_stopped_is_replaced_after_the_time_that_is_set(role: str) -> None:
    with with_qmp(*CONSOLE, "-island-timeout", "1") as machine, machine.qmp() as qmp:
        machine.says("ready")
        pid = machine.roles()[role]
        os.kill(pid, signal.SIGSTOP)
        (event,) = until(lambda: restarted(qmp), "the replacement")
        assert event["role"] == role
        assert event["cause"] == f"{role} (pid {pid}) did not answer for 1 s and was killed"
        machine.type(b"a")
        machine.says("got 61")
        machine.type(b"O")
        assert machine.wait() == 0
        machine.gone()


@pytest.mark.parametrize("role", ["devhost0", "blockd"])
def test_who_is_stopped_and_goes_on_has_never_been_away(role: str, tmp_path: Path) -> None:
    """Zero: however long. Guest time stands still meanwhile, which is said."""
    log = tmp_path / "log"
    with with_qmp(*CONSOLE, "-island-timeout", "0", "-D", str(log)) as machine, machine.qmp() as qmp:
        machine.says("ready")
        pid = machine.roles()[role]
        os.kill(pid, signal.SIGSTOP)
        word = f"{role} does not answer (state T); guest time stands still"
        until(lambda: word in log.read_text(), "the suspicion")
        os.kill(pid, signal.SIGCONT)
        until(lambda: f"{role} serves again" in log.read_text(), "its end")
        machine.type(b"a")
        machine.says("got 61")
        assert machine.roles()[role] == pid and not restarted(qmp)
        machine.type(b"O")
        assert machine.wait() == 0
        machine.gone()
