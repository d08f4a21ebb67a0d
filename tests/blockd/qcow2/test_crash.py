"""SIGKILL: the image is clean or has leaks only, and everything that was acknowledged is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.blockd.qcow2.crashing import Life

#: set to more for a longer run
KILLS = int(os.environ.get("ATOLL_CRASHES", "300"))
CRASHES_OF_A_LIFE = 10


@pytest.mark.parametrize("seed", range(-(-KILLS // CRASHES_OF_A_LIFE)))
def test_killed_writers_lose_nothing(tmp_path: Path, seed: int) -> None:
    """Crash upon crash of one image; what a worker does and when it dies follows from ``seed``, unless it
    dies after a number of replies."""
    life = Life(tmp_path, seed)
    for number in range(CRASHES_OF_A_LIFE):
        life.crash(number)
