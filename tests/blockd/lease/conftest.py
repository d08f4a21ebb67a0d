"""Images in memory where that can be, and hosts that share them."""

from collections.abc import Callable

import pytest

from tests.blockd.lease.support import World
from tests.blockd.qcow2.conftest import tmp_path

__all__ = ["tmp_path"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], World]:
    return lambda locking: World(monkeypatch, locking)
