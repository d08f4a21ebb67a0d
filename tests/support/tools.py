"""Programs of others that serve as a second implementation."""

import os
import shutil
import subprocess

import pytest


def require_tool(name: str) -> None:
    """Skip the test where a program is not installed; in continuous integration, which installs it,
    that is a failure (ATOLL_REQUIRE_TOOLS=1)."""
    if shutil.which(name) is None:
        message = f"{name} is not installed"
        if os.environ.get("ATOLL_REQUIRE_TOOLS") == "1":
            pytest.fail(message)
        pytest.skip(message)


def run_tool(*command: str, status: int | None = 0) -> str:
    """Run a program; its output, both streams together. ``status`` None allows any."""
    require_tool(command[0])
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    assert status is None or done.returncode == status, f"{command}: exit {done.returncode}\n{done.stdout}"
    return done.stdout
