"""Images in memory where that can be, and hosts that share them."""

from collections.abc import Iterator

import pytest

from tests.blockd.lease.support import World
from tests.blockd.qcow2.conftest import tmp_path

__all__ = ["tmp_path"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(monkeypatch)
    yield world
    world.end()
