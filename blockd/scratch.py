"""Files without a name, for what is thrown away at the end: nobody can find them, and none is left behind,
however the process ends.

A sandbox lets nobody make files where temporary ones belong, so they are made before it, and opened again
through /proc/self/fd, as open(2) has it for O_TMPFILE.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import IO

from coordinator.contract.errors import BlockError

_ready: list[IO[bytes]] = []


def prepare(count: int) -> list[int]:
    """Make so many ahead; their descriptors. BlockError."""
    _ready.extend(_make() for _ in range(count))
    return [file.fileno() for file in _ready]


@contextlib.contextmanager
def nameless() -> Iterator[str]:
    """A path to an empty file; what has opened it in the end keeps it. BlockError."""
    with _ready.pop() if _ready else _make() as file:
        yield f"/proc/self/fd/{file.fileno()}"


def _make() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        text = f"no temporary file can be made: {error.strerror or error}"
        raise BlockError(text, error.errno or 5) from None
