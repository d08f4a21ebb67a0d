"""The words of ``x-aim``."""

from __future__ import annotations

import pytest

from coordinator.contract.drives import DrivePhase
from coordinator.contract.errors import ConfigError
from coordinator.migrate.aim import Aim
from coordinator.migrate.parameters import Parameters


def test_words() -> None:
    assert Aim.parse("") is None
    assert Aim.parse("ide1-cd0=packet-complete") == Aim("ide1-cd0", DrivePhase.PACKET_COMPLETE, 1)
    assert Aim.parse("my=drive=flush:7") == Aim("my=drive", DrivePhase.FLUSH, 7)


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "=idle",
        "x=",
        "x=lunch",
        "x=idle:",
        "x=idle:0",
        "x=idle:-1",
        "x=idle:x",
        "x=idle:\u0661",
        f"x=idle:{10**6}",
    ],
)
def test_what_is_none_is_refused_with_the_phases_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match="DRIVE=PHASE") as caught:
        Parameters().changed({"x-aim": text})
    assert "packet-complete" in str(caught.value) and "\n" not in str(caught.value)
