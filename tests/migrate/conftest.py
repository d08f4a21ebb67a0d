"""Keys and records of migrations in a folder of the tests' own."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from coordinator.migrate import conversation, decision, target
from tests.migrate.quiet import World

Run = Callable[[Callable[[World], Awaitable[None]]], None]


@pytest.fixture(autouse=True, scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CONFIG", "STATE"):
            patch.setenv(f"XDG_{name}_HOME", str(folder / name.lower()))
        yield folder


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a test among machines without islands, in which nothing waits long; never two may run."""
    shutil.rmtree(decision.folder(), ignore_errors=True)  # of machines killed in other tests
    monkeypatch.setattr(conversation, "REMIND_SECONDS", 0.03)
    monkeypatch.setattr(conversation, "FAREWELL_SECONDS", 0.3)
    monkeypatch.setattr(conversation, "REASON_SECONDS", 0.1)
    monkeypatch.setattr(target, "LOOK_SECONDS", 0.03)
    monkeypatch.setattr(target, "GONE_SECONDS", 0.3)

    def run(test: Callable[[World], Awaitable[None]]) -> None:
        async def go() -> None:
            world = World(tmp_path)
            try:
                await test(world)
            finally:
                await world.close()
            assert not world.clashes

        asyncio.run(go())

    yield run
    shutil.rmtree(decision.folder(), ignore_errors=True)
