"""Images in memory where that can be: a flush of a disk that others use, too, takes its time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY = "/dev/shm"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder of the test's own, as pytest's, but in memory."""
    folder = Path(tempfile.mkdtemp(prefix="atoll-", dir=_MEMORY if os.access(_MEMORY, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder)
