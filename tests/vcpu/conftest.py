"""Fixtures of the vCPU's tests."""

from collections.abc import Callable, Iterator

import pytest

from tests.vcpu.guest import Guest


@pytest.fixture
def make_guest() -> Iterator[Callable[..., Guest]]:
    """Guest(mode, cpl), closed at the end of the test."""
    guests: list[Guest] = []

    def make(mode: str = "real", cpl: int = 0) -> Guest:
        guests.append(Guest(mode, cpl))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()
