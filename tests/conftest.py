"""Options and fixtures of all tests."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.system.boots")

from tests.support.launch import Launcher  # noqa: E402  # after what must come before any import of ours


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--launcher "qemu-system-x86_64 -accel tcg"` proves guests against another implementation."""
    parser.addoption("--launcher", help="the command that boots guests (default: atoll run)")


@pytest.fixture(scope="session")
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """The command that boots guests."""
    return Launcher.parse(request.config.getoption("--launcher"))


@pytest.fixture
def stats_file(tmp_path: Path) -> Path:
    """Where a guest's launcher may write its statistics."""
    return tmp_path / "stats.json"
